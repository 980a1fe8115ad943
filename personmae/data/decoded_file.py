"""All images of an index decoded once, as raw pixels in one memory-mapped file that all processes of a machine share.

Where decoding is what a loader waits for and the disk is large: 3 bytes a pixel, about ten times what JPEGs take. The system keeps in memory what
fits and reads the rest from the disk. A file is named by the index's digest, which changes with any image, so it is never of other images.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from personmae.configs import UserError
from personmae.data.image_index import ImageIndex
from personmae.data.images import UInt8Array, UnreadableImage
from personmae.whole_files import explained_write, whole_file

# What is decoded by one thread at a time, in the order of the file.
_IMAGES_PER_TASK = 64
_CURE = "make room or give write permission there, choose another --data.loader.decoded-dir, or leave it out"


@dataclass(frozen=True)
class DecodedFile:
    """path: of the file; a pickled one is mapped again. pixels: uint8 [sum of H W 3], mapped from it. starts: int64 [N], where an image begins there;
    -1: it could not be decoded."""

    index: ImageIndex
    path: Path
    pixels: UInt8Array = field(repr=False)
    starts: npt.NDArray[np.int64] = field(repr=False)

    def image(self, sample: int) -> UInt8Array:
        """The pixels of a sample, uint8 RGB [H, W, 3], not to be written to. Raises UnreadableImage as `ImageIndex.image` does."""
        start = int(self.starts[sample])
        if start < 0:
            return self.index.image(sample)
        shape = int(self.index.heights[sample]), int(self.index.widths[sample]), 3
        return self.pixels[start : start + shape[0] * shape[1] * 3].reshape(shape)

    def __reduce__(self) -> tuple[Any, ...]:
        return _map_file, (self.index, self.path)


def open_decoded(
    index: ImageIndex, folder: Path, num_threads: int, announce: Callable[[str], object] = print, *, progress: bool = True
) -> DecodedFile:
    """The decoded images of an index, from `folder`; where they are not there yet they are written, by one process while others wait.

    num_threads: that decode. announce: receives a line. Images that cannot be decoded are left out, and tried again when they are asked for. Raises
    UserError if the disk has no room or refuses.
    """
    folder = folder.expanduser().absolute()
    lengths = image_lengths(index)
    total = int(lengths.sum())
    path = folder / f"{index.digest()}.u8"
    with explained_write(folder, _CURE):
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / f"{path.stem}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        # Ends with the descriptor, or with the process.
        fcntl.flock(lock, fcntl.LOCK_EX)
        is_new = not _is_whole(path, total, len(index))
        if is_new:
            free = shutil.disk_usage(folder).free
            if free < total:
                raise UserError(f"{folder} has {free / 2**30:.2f} GiB free, and the decoded images take {total / 2**30:.2f} GiB: {_CURE}")
            _write(index, path, lengths, num_threads, progress)
    finally:
        os.close(lock)
    announce(f"decoded images: {total / 2**30:.2f} GiB in {path}, {'decoded now' if is_new else 'as they were decoded before'}")
    return _map_file(index, path)


def image_lengths(index: ImageIndex) -> npt.NDArray[np.int64]:
    """Bytes of each decoded image, int64 [N]."""
    return 3 * index.heights.astype(np.int64) * index.widths


def _map_file(index: ImageIndex, path: Path) -> DecodedFile:
    lengths = image_lengths(index)
    total = int(lengths.sum())
    # Copy on write: nothing that is written to the pixels reaches the file, and PyTorch takes them as they are.
    content = np.memmap(path, dtype=np.uint8, mode="c")
    readable = np.asarray(content[total:]).astype(bool)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    return DecodedFile(index, path, content[:total], np.where(readable, starts, -1))


def _is_whole(path: Path, total: int, num_images: int) -> bool:
    """Whether the file is there: the pixels, and behind them a byte for each image, 1 where it was decoded."""
    return path.is_file() and path.stat().st_size == total + num_images


def _write(index: ImageIndex, path: Path, lengths: npt.NDArray[np.int64], num_threads: int, progress: bool) -> None:
    def decode(first: int) -> list[UInt8Array | None]:
        return [_decoded(index, sample) for sample in range(first, min(first + _IMAGES_PER_TASK, len(index)))]

    readable = np.zeros(len(index), dtype=np.uint8)
    with (
        whole_file(path, _CURE) as file,
        ThreadPoolExecutor(num_threads, thread_name_prefix="decode") as pool,
        tqdm(total=len(index), desc="decoding", unit="image", disable=not progress) as bar,
    ):
        firsts = range(0, len(index), _IMAGES_PER_TASK)
        # A few tasks for each thread at a time: all at once would hold all pixels in memory.
        at_once = 4 * num_threads
        for begin in range(0, len(firsts), at_once):
            for first, images in zip(firsts[begin : begin + at_once], pool.map(decode, firsts[begin : begin + at_once]), strict=True):
                for sample, image in enumerate(images, first):
                    if image is None:
                        file.seek(int(lengths[sample]), os.SEEK_CUR)
                    else:
                        file.write(image.data)
                        readable[sample] = 1
                bar.update(len(images))
        file.write(readable.data)


def _decoded(index: ImageIndex, sample: int) -> UInt8Array | None:
    try:
        return index.image(sample)
    except UnreadableImage:
        return None
