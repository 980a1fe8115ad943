"""Images that are there more than once: exactly, by a hash of the content; nearly, by a 64-bit difference hash of the luminance.

The difference hash (dHash) shrinks the luminance to 8 rows of 9 and notes for each pair of neighbours in a row which is lighter. Two images are near
duplicates when their hashes differ in at most `max_bits` of the 64. Of all images that are near or equal to one another, the first by name is kept.

Memory is linear in the number of images. Near pairs are found without comparing all: the 64 bits are cut into max_bits + 4 bands, and two hashes that
differ in at most max_bits bits agree in at least four of them, so for each choice of four bands the hashes are sorted by those and compared within
runs of equal ones only.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from personmae.data.images import UInt8Array

UInt64Array = npt.NDArray[np.uint64]
Int64Array = npt.NDArray[np.int64]

HASH_BITS = 64
MAX_NEAR_BITS = 6
_BANDS_THAT_AGREE = 4


@dataclass(frozen=True)
class Duplicates:
    """rows: int64 [D], ascending, of images to leave out. originals: int64 [D], the row that each was found equal or near to; it may itself be left
    out, for a third. bits: int64 [D], by how many bits the hashes differ; -1 = the same content."""

    rows: Int64Array
    originals: Int64Array
    bits: Int64Array

    def __len__(self) -> int:
        return len(self.rows)


def content_hash(data: bytes) -> tuple[int, int]:
    """128 bits of a content, as two 64-bit words."""
    digest = hashlib.blake2b(data, digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def difference_hash(image: UInt8Array) -> int:  # [H, W, 3] RGB -> 64 bits
    """The dHash of an image: bit 8 * row + column (from the most significant) is set where the right one of two neighbours is lighter."""
    luminance = cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (9, 8), interpolation=cv2.INTER_AREA)
    return int.from_bytes(np.packbits(luminance[:, 1:] > luminance[:, :-1]).tobytes(), "big")


def find_exact(contents: UInt64Array, usable: npt.NDArray[np.bool_]) -> Duplicates:  # [N, 2], [N]
    """Images whose content an earlier one has. contents: `content_hash` of each. usable: bool [N], the rest is not looked at."""
    rows = np.flatnonzero(usable)
    order = rows[np.lexsort((rows, contents[rows, 1], contents[rows, 0]))]
    same = np.zeros(len(order), dtype=bool)
    same[1:] = (contents[order[1:]] == contents[order[:-1]]).all(axis=1)
    firsts = order[np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))] if len(order) else order
    return _sorted(order[same], firsts[same], np.full(int(same.sum()), -1))


def find_near(hashes: UInt64Array, usable: npt.NDArray[np.bool_], max_bits: int) -> Duplicates:  # [N], [N]
    """Images whose dHash differs from that of an earlier one, kept so far, in at most `max_bits` (0 to 6) bits.

    Afterwards no two images that are left are that near. Of a chain of images, each near to the next alone, some are left.
    """
    if not 0 <= max_bits <= MAX_NEAR_BITS:
        raise ValueError(f"max_bits is {max_bits}; it must lie between 0 and {MAX_NEAR_BITS}")
    alive = np.asarray(usable).copy()
    found: list[tuple[Int64Array, Int64Array]] = []
    for mask in [np.uint64(2**64 - 1), *(band_masks(max_bits) if max_bits else [])]:
        rows = np.flatnonzero(alive)
        keys = hashes[rows] & mask
        order = np.argsort(keys, kind="stable")
        rows, keys = rows[order], keys[order]
        left, original = _near_in_runs(hashes, rows, keys, max_bits)
        alive[left] = False
        found.append((left, original))
    rows = np.concatenate([left for left, _ in found])
    originals = np.concatenate([original for _, original in found])
    return _sorted(rows, originals, np.bitwise_count(hashes[rows] ^ hashes[originals]).astype(np.int64))


def band_masks(max_bits: int) -> list[np.uint64]:
    """Masks of four bands out of max_bits + 4: hashes that differ in at most max_bits bits are equal under one of them."""
    num_bands = max_bits + _BANDS_THAT_AGREE
    edges = [HASH_BITS * band // num_bands for band in range(num_bands + 1)]
    bands = [(1 << high) - (1 << low) for low, high in itertools.pairwise(edges)]
    return [np.uint64(sum(chosen)) for chosen in itertools.combinations(bands, _BANDS_THAT_AGREE)]


def _near_in_runs(hashes: UInt64Array, rows: Int64Array, keys: UInt64Array, max_bits: int) -> tuple[Int64Array, Int64Array]:
    """(rows to leave out, their originals): within each run of equal keys, rows ascending, the first leaves out those near to it, then the next that
    is left does, and so on. All runs at once."""
    left: list[Int64Array] = []
    originals: list[Int64Array] = []
    while len(rows) > 1:
        begins = np.ones(len(rows), dtype=bool)
        begins[1:] = keys[1:] != keys[:-1]
        leaders = rows[np.maximum.accumulate(np.where(begins, np.arange(len(rows)), 0))]
        near = ~begins & (np.bitwise_count(hashes[rows] ^ hashes[leaders]) <= max_bits)
        left.append(rows[near])
        originals.append(leaders[near])
        others = ~begins & ~near
        rows, keys = rows[others], keys[others]
    empty = np.empty(0, dtype=np.int64)
    return np.concatenate([empty, *left]), np.concatenate([empty, *originals])


def _sorted(rows: Int64Array, originals: Int64Array, bits: Int64Array) -> Duplicates:
    order = np.argsort(rows)
    return Duplicates(rows[order].astype(np.int64), originals[order].astype(np.int64), bits[order].astype(np.int64))
