"""Packs: millions of images in tar shards with an index, written by `personmae pack`."""
