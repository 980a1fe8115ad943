"""One image on its way into a pack: its verdict, what is to become of it, and the figures that statistics and duplicates need."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt

from personmae.configs import UserError
from personmae.data.images import UnreadableImage
from personmae.data.packs.duplicates import MAX_NEAR_BITS, content_hash, difference_hash
from personmae.data.packs.transcoding import Change, Planned, Transcoding, plan_change
from personmae.data.verdicts import Limits, check_image

DuplicateKind = Literal["keep", "exact", "near"]

# What is kept of an examined image. change: a `Change`, or -1 if it is rejected. checksum: CRC-32 of the source's content. height, width: as packed.
# sums, squares: of the levels (0 to 255) of R, G, B and of their squares, over its pixels.
EXAMINED = np.dtype(
    [
        ("change", np.int8),
        ("height", np.int32),
        ("width", np.int32),
        ("checksum", np.uint32),
        ("contents", np.uint64, 2),
        ("near", np.uint64),
        ("sums", np.float64, 3),
        ("squares", np.float64, 3),
    ]
)
REJECTED = -1


@dataclass(frozen=True)
class PackSettings:
    """What the bytes of a pack depend on, besides the source.

    seed: of the order of the images in the shards. images_per_shard: of the source, so that a shard with rejected ones holds fewer. duplicates:
    "keep", leave out those with the same content ("exact"), or those whose dHash differs in at most near_bits bits as well ("near").
    """

    seed: int = 0
    images_per_shard: int = 10_000
    transcoding: Transcoding = Transcoding()
    limits: Limits = Limits()
    duplicates: DuplicateKind = "keep"
    near_bits: int = 3

    def __post_init__(self) -> None:
        for name, value, least, most in (
            ("images_per_shard", self.images_per_shard, 1, 10**6),
            ("near_bits", self.near_bits, 0, MAX_NEAR_BITS),
            ("quality", self.transcoding.quality, 1, 100),
            ("max_side_px", self.transcoding.max_side_px, 0, 65_500),
            ("min_side_px", self.limits.min_side_px, 1, 65_500),
        ):
            if not least <= value <= most:
                raise UserError(f"{name} is {value}; it must lie between {least} and {most}")
        if 0 < self.transcoding.max_side_px < self.limits.min_side_px:
            raise UserError(f"max_side_px is {self.transcoding.max_side_px}, less than min_side_px ({self.limits.min_side_px})")

    def describe(self) -> dict[str, Any]:
        """As plain values, for the manifest."""
        coding = self.transcoding
        return {
            "seed": self.seed,
            "images_per_shard": self.images_per_shard,
            "max_side_px": coding.max_side_px,
            "re_encode": coding.re_encode,
            "quality": coding.quality,
            "subsampling": coding.subsampling,
            "min_side_px": self.limits.min_side_px,
            "max_pixels": self.limits.max_pixels,
            "duplicates": self.duplicates,
            "near_bits": self.near_bits if self.duplicates == "near" else None,
        }


@dataclass(frozen=True)
class Examined:
    """figures: one element of EXAMINED. planned: what the image becomes."""

    figures: npt.NDArray[Any]
    planned: Planned


def examine(data: bytes, path: Path, settings: PackSettings) -> Examined:
    """The verdict over a content, by the rules of the index. Raises UnreadableImage with the same reason as there."""
    checked = check_image(data, path, settings.limits)
    planned = plan_change(data, checked.header, checked.pixels, path, settings.transcoding, settings.limits)
    height, width = planned.pixels.shape[:2]
    mean, deviation = (value.ravel() for value in cv2.meanStdDev(planned.pixels))
    figures = np.zeros((), dtype=EXAMINED)
    figures["change"], figures["height"], figures["width"] = planned.change, height, width
    figures["checksum"] = zlib.crc32(data)
    figures["sums"], figures["squares"] = mean * (height * width), (deviation**2 + mean**2) * (height * width)
    if settings.duplicates != "keep":
        figures["contents"] = content_hash(data)
    if settings.duplicates == "near":
        figures["near"] = difference_hash(planned.pixels)
    return Examined(figures, planned)


def plan_again(data: bytes, figures: npt.NDArray[Any], path: Path, settings: PackSettings) -> Planned:
    """What an image that was examined before becomes: decoded again only where it is encoded. Raises UnreadableImage if it has changed."""
    if zlib.crc32(data) != figures["checksum"]:
        raise UnreadableImage(path, "changed while it was being packed")
    change = Change(int(figures["change"]))
    if change in (Change.KEPT, Change.TRIMMED):
        return Planned(change, np.empty((0, 0, 3), dtype=np.uint8))
    return examine(data, path, settings).planned
