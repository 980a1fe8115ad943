"""Whether an image file's content can be trained on, and if not, why: one verdict for the index and for packing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from personmae.data.images import ImageHeader, UInt8Array, UnreadableImage, decode, read_header

MIN_SIDE_PX = 16
MAX_PIXELS = 50_000_000
MAX_SIDE_PX = 16_384


class Limits(NamedTuple):
    """What an image's dimensions may be, checked before any pixel is decoded."""

    min_side_px: int = MIN_SIDE_PX
    max_pixels: int = MAX_PIXELS
    max_side_px: int = MAX_SIDE_PX

    @property
    def max_bytes(self) -> int:
        """No readable image within the limits is longer than an uncompressed 16-bit RGBA one."""
        return 8 * self.max_pixels + (1 << 20)


@dataclass(frozen=True)
class CheckedImage:
    """A content that can be used: its header, and its pixels as stored, uint8 [H, W, 3]."""

    header: ImageHeader
    pixels: UInt8Array


def check_image(data: bytes, path: Path, limits: Limits) -> CheckedImage:
    """The header and pixels of an image file's content, decoded strictly. Raises UnreadableImage naming the path if it is damaged, or its dimensions
    lie outside the limits."""
    header = read_header(data, path)
    height, width = header.height, header.width
    if min(height, width) < limits.min_side_px:
        raise UnreadableImage(path, f"too small: {width} x {height} pixels (w x h), at least {limits.min_side_px} a side")
    if max(height, width) > limits.max_side_px or height * width > limits.max_pixels:
        allowed = f"at most {limits.max_side_px} a side and {limits.max_pixels} in all"
        raise UnreadableImage(path, f"too large: {width} x {height} pixels (w x h), {allowed}")
    pixels = decode(data, path)
    if pixels.shape != (height, width, 3):
        raise UnreadableImage(path, f"its header says {width} x {height} pixels (w x h), its content {pixels.shape[1]} x {pixels.shape[0]}")
    return CheckedImage(header, pixels)
