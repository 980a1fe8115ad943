"""The networks: encoder, decoders, masks and the geometry of the two regions."""
