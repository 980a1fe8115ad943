"""Decoded images in memory that processes share: whoever decodes one first, decodes it for all."""

from __future__ import annotations

import mmap
import os
from typing import Any

import numpy as np

from personmae.data.decoded_file import image_lengths
from personmae.data.image_index import ImageIndex
from personmae.data.images import UInt8Array


class SharedPixels:
    """The images of an index, each decoded when it is first asked for.

    Memory is taken as images come in, 3 bytes a pixel, and is given back with the last process that has it. Pickled, it is the same memory in a
    process that has inherited `descriptor`.
    """

    index: ImageIndex
    descriptor: int = -1

    def __init__(self, index: ImageIndex) -> None:
        lengths = image_lengths(index)
        descriptor = os.memfd_create("personmae pixels")
        os.ftruncate(descriptor, int(lengths.sum()) + len(index))
        self._open(index, descriptor)

    def __del__(self) -> None:
        self.close()

    def image(self, sample: int) -> UInt8Array:
        """The pixels of a sample, uint8 RGB [H, W, 3], not to be written to. Raises UnreadableImage as `ImageIndex.image` does."""
        start, end = int(self._starts[sample]), int(self._starts[sample + 1])
        pixels = self._pixels[start:end].reshape(int(self.index.heights[sample]), int(self.index.widths[sample]), 3)
        if not self._there[sample]:
            pixels[:] = self.index.image(sample)
            # After the pixels: two processes may both write them, and write the same.
            self._there[sample] = 1
        return pixels

    def close(self) -> None:
        """Lets go of the descriptor; the images stay as long as this object is used."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _open(self, index: ImageIndex, descriptor: int) -> None:
        self.index, self.descriptor = index, descriptor
        self._starts = np.concatenate([[0], np.cumsum(image_lengths(index))])
        total = int(self._starts[-1])
        content = np.frombuffer(mmap.mmap(descriptor, total + len(index)), dtype=np.uint8)
        self._pixels, self._there = content[:total], content[total:]

    def __getstate__(self) -> dict[str, Any]:
        return {"index": self.index, "descriptor": self.descriptor}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._open(**state)
