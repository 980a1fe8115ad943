"""Pictures of a run: reconstructions, ranked lists, curves, and the one HTML page that holds them all."""
