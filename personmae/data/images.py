"""Image files to uint8 RGB arrays, strictly; and boxes of an image sampled to a given size.

Formats are told by content, never by name: JPEG, PNG, WebP, BMP and TIFF (its first page). Dimensions are read from the header before any
pixel is decoded, so that a decompression bomb costs nothing. JPEGs are decoded by libjpeg-turbo in strict mode (any
warning is an error: Pillow accepts bit rot), the rest by Pillow with its `LOAD_TRUNCATED_IMAGES` left alone. 16-bit,
palette, CMYK and grey images are converted; alpha is dropped, not blended.

Stored pixels are what counts, everywhere in the project: the EXIF orientation is ignored by the index, by both loaders
and by `read_image`.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import BmpImagePlugin, Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

from personmae_kernels.area_resize import area_resize

UInt8Array = npt.NDArray[np.uint8]

# Shrinking by more than this (the larger of both axes) is antialiased; below it plain linear sampling loses nothing
# that shows.
ANTIALIAS_FROM = 1.25
# What fills an erased box: ImageNet's mean colour, RGB.
ERASED_COLOUR = (124, 116, 104)
_EXIF_ORIENTATION = 0x0112

# What Pillow's decoders raise on broken files, apart from their own OSErrors.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class UnreadableImage(ValueError):
    """An image file that cannot be used. `path` (a text for one behind an address) and `reason` say which and why;
    `by_system` if it could not be read at all (it may be back later); `tried` if it was waited for long enough."""

    def __init__(self, path: Path | str, reason: str, by_system: bool = False, tried: bool = False) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason
        self.by_system = by_system
        self.tried = tried


@dataclass(frozen=True)
class ImageHeader:
    """What the first bytes of an image file say. kind: "jpeg", "png", "webp", "bmp" or "tiff".

    plain: a JPEG in three colours or grey, with the usual subsampling: any decoder built on libjpeg-turbo gives the
    same pixels.
    """

    kind: str
    height: int
    width: int
    plain: bool


def read_bytes(path: Path, max_bytes: int | None = None) -> bytes:
    """The content of a regular file.

    Raises UnreadableImage if the system cannot read it (`by_system`), if it is empty, not a regular file, or longer
    than `max_bytes`.
    """
    try:
        # Without O_NONBLOCK, a named pipe called photo.jpg would block for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            # Before `open`, which refuses a directory and then leaves its descriptor to us.
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise UnreadableImage(path, f"{'a directory, ' if stat.S_ISDIR(status.st_mode) else ''}not a regular file")
            if max_bytes is not None and status.st_size > max_bytes:
                raise UnreadableImage(path, f"too large: {status.st_size} bytes, at most {max_bytes}")
            with open(descriptor, "rb", buffering=0, closefd=False) as file:
                data = file.readall()
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UnreadableImage(path, f"cannot be read: {error.strerror or error}", by_system=True) from error
    if not data:
        raise UnreadableImage(path, "empty file")
    return data


def read_header(data: bytes, path: Path | str) -> ImageHeader:
    """Format and dimensions, without decoding a pixel. Raises UnreadableImage for anything but a JPEG, PNG, WebP, BMP or
    TIFF header."""
    try:
        if data[:3] == b"\xff\xd8\xff":
            height, width, colours, subsampling = simplejpeg.decode_jpeg_header(data)
            plain = colours in ("YCbCr", "Gray") and subsampling in ("444", "422", "420", "Gray")
            return ImageHeader("jpeg", height, width, plain)
        kind = _kind(data)
        if kind is not None:
            with _open_with_pillow(data, kind) as image:
                return ImageHeader(kind, image.height, image.width, False)
    except _DECODE_ERRORS as error:
        raise UnreadableImage(path, f"broken header: {_one_line(error)}") from error
    raise UnreadableImage(path, f"not a JPEG, PNG, WebP, BMP or TIFF image (it begins with {data[:12]!r})")


def read_orientation(data: bytes) -> int:
    """The EXIF orientation of an image file's content, 1 to 8; 1 = as stored, also where there is none or it makes no sense."""
    try:
        if data[:3] == b"\xff\xd8\xff":
            # Pillow's reader of JPEG headers takes 100 us, and crops hardly ever have this segment.
            if data.find(b"Exif\0\0", 0, 1 << 16) < 0:
                return 1
            with JpegImagePlugin.JpegImageFile(io.BytesIO(data)) as image:
                value = image.getexif().get(_EXIF_ORIENTATION, 1)
        else:
            kind = _kind(data)
            if kind is None:
                return 1
            with _open_with_pillow(data, kind) as image:
                value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except _DECODE_ERRORS:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def turn_upright(image: UInt8Array, orientation: int) -> UInt8Array:  # [H, W, 3] -> [H, W, 3] or [W, H, 3]
    """The image as its EXIF orientation wants it shown, C-contiguous."""
    if orientation >= 5:
        image = image.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


def decode(data: bytes, path: Path | str) -> UInt8Array:  # -> [H, W, 3] RGB
    """The pixels of an image file's content, uint8 RGB [H, W, 3], C-contiguous, as stored (EXIF orientation ignored).

    Raises UnreadableImage if the content is truncated, damaged, or in another format. Does not limit dimensions: see
    `read_header`.
    """
    try:
        if data[:3] == b"\xff\xd8\xff":
            return _decode_jpeg(data)
        kind = _kind(data)
        if kind is not None:
            return _decode_with_pillow(data, kind)
    except _DECODE_ERRORS as error:
        raise UnreadableImage(path, f"truncated or damaged: {_one_line(error)}") from error
    raise UnreadableImage(path, f"not a JPEG, PNG, WebP, BMP or TIFF image (it begins with {data[:12]!r})")


def read_image(path: Path) -> UInt8Array:  # -> [H, W, 3] RGB
    """The pixels of an image file, uint8 RGB [H, W, 3]. Raises UnreadableImage with the path and the reason."""
    return decode(read_bytes(path), path)


def resize(image: UInt8Array, size: tuple[int, int]) -> UInt8Array:  # [H, W, 3], (height, width) -> [height, width, 3]
    """The whole image at another size: linear, antialiased when shrinking by more than 1.25. uint8 in and out."""
    return sample_box(image, (0, 0, image.shape[0], image.shape[1]), False, size)


def is_antialiased(box_height: int, box_width: int, size: tuple[int, int]) -> bool:
    """Whether a box of this many pixels is antialiased on its way to `size` = (height, width): one rule for both
    loaders."""
    return max(box_height / size[0], box_width / size[1]) > ANTIALIAS_FROM


def sample_box(
    image: UInt8Array,
    box: tuple[int, int, int, int],
    flip: bool,
    size: tuple[int, int],
    out: UInt8Array | None = None,
) -> UInt8Array:  # [H, W, 3] -> [height, width, 3]
    """A box of an image at a given size, mirrored if asked: what torchvision calls a resized crop, but exact.

    Output pixel (i, j) shows the image at y = y0 + (i + .5) * (y1 - y0) / height - .5 and x likewise (pixel centres are
    integers), with linear interpolation that looks beyond the box where the box is not the image's edge, as PIL's
    `resize(box=)` and DALI's ROI do; cropping first would repeat the box's edge. A box shrunk by more than 1.25 along
    either axis is averaged over each output pixel's footprint instead.

    image: uint8 [H, W, 3]. box: (y0, x0, y1, x1) pixels of the image, inside it. flip: mirror left to right, after
    cropping. size: (height, width). out: where to write, uint8 [height, width, 3], C-contiguous. Returns `out` or a new
    array.
    """
    if out is None:
        out = np.empty((*size, 3), dtype=np.uint8)
    y0, x0, y1, x1 = (int(edge) for edge in box)
    height, width = size
    if not is_antialiased(y1 - y0, x1 - x0, size):
        _sample_linear(image, (y0, x0, y1, x1), out)
    elif y1 - y0 >= height and x1 - x0 >= width:
        _average(image, (y0, x0, y1, x1), out)
    elif y1 - y0 > height:
        # OpenCV's INTER_AREA misplaces samples along an axis that grows, so each axis gets its own step. One column
        # more on either side is kept for the second.
        left, right = max(x0 - 1, 0), min(x1 + 1, image.shape[1])
        rows = _average(image, (y0, left, y1, right), np.empty((height, right - left, 3), dtype=np.uint8))
        _sample_linear(rows, (0, x0 - left, height, x1 - left), out)
    else:
        top, bottom = max(y0 - 1, 0), min(y1 + 1, image.shape[0])
        columns = _average(image, (top, x0, bottom, x1), np.empty((bottom - top, width, 3), dtype=np.uint8))
        _sample_linear(columns, (y0 - top, 0, y1 - top, width), out)
    if flip:
        cv2.flip(out, 1, dst=out)
    return out


def recolour(
    image: UInt8Array,
    colour: npt.NDArray[np.float32] | None = None,
    blur_sigma: float = 0.0,
    shift: npt.NDArray[np.int32] | None = None,
    erase_box: npt.NDArray[np.int32] | None = None,
) -> None:
    """Colour, blur, shift and erasing on one region, in place and in this order.

    image: uint8 [H, W, 3]. colour: float32 [3, 4], output level = matrix @ (R, G, B, 1), rounded and clipped to 0..255.
    blur_sigma: of a Gaussian of width 2 * ceil(3 sigma) + 1, in pixels, mirrored at the edges; 0 = none.
    shift: int32 (down, right) in pixels, in size less than the region; what comes in from outside is black.
    erase_box: int32 (y0, x0, y1, x1) in pixels, filled with ERASED_COLOUR; empty = none.
    """
    if colour is not None:
        cv2.transform(image, colour, dst=image)
    if blur_sigma > 0:
        window = int(blur_windows(blur_sigma))
        cv2.GaussianBlur(image, (window, window), blur_sigma, dst=image, sigmaY=blur_sigma, borderType=cv2.BORDER_REFLECT_101)
    if shift is not None:
        _shift(image, int(shift[0]), int(shift[1]))
    if erase_box is not None:
        y0, x0, y1, x1 = (int(edge) for edge in erase_box)
        image[y0:y1, x0:x1] = ERASED_COLOUR


def blur_windows(sigmas: npt.ArrayLike) -> npt.NDArray[np.int32]:
    """Widths in pixels of Gaussians of these sigmas, int32 of the same shape; 1 where sigma is 0."""
    return (2 * np.ceil(3 * np.asarray(sigmas, dtype=np.float32)) + 1).astype(np.int32)


def _shift(image: UInt8Array, down: int, right: int) -> None:
    height, width = image.shape[:2]
    from_rows, to_rows = slice(max(-down, 0), height - max(down, 0)), slice(max(down, 0), height - max(-down, 0))
    from_columns, to_columns = slice(max(-right, 0), width - max(right, 0)), slice(max(right, 0), width - max(-right, 0))
    kept = image[from_rows, from_columns].copy()
    image[:] = 0
    image[to_rows, to_columns] = kept


def _average(image: UInt8Array, box: tuple[int, int, int, int], out: UInt8Array) -> UInt8Array:
    """A box averaged over the footprint of each pixel of `out`, which it returns: in C++ or by OpenCV, with the same bits."""
    if not area_resize(image, box, out):
        y0, x0, y1, x1 = box
        cv2.resize(image[y0:y1, x0:x1], (out.shape[1], out.shape[0]), dst=out, interpolation=cv2.INTER_AREA)
    return out


def _sample_linear(image: UInt8Array, box: tuple[int, int, int, int], out: UInt8Array) -> None:
    """Linear sampling of a box into `out`, without antialiasing."""
    y0, x0, y1, x1 = box
    height, width = out.shape[:2]
    cv2.resize(image[y0:y1, x0:x1], (width, height), dst=out, interpolation=cv2.INTER_LINEAR)
    # cv2.resize is twice as fast as cv2.warpAffine but sees the box alone. Where the box grows, its outermost output
    # pixels lie nearer to the pixels outside: those few rows and columns are sampled again from the whole image.
    row_step, column_step = (y1 - y0) / height, (x1 - x0) / width
    rows, columns = _edge_pixels(row_step), _edge_pixels(column_step)
    for first, last, inside in ((0, rows, y0 > 0), (height - rows, height, y1 < image.shape[0])):
        if rows and inside:
            out[first:last] = _warp(image, y0 + first * row_step, x0, row_step, column_step, (last - first, width))
    for first, last, inside in ((0, columns, x0 > 0), (width - columns, width, x1 < image.shape[1])):
        if columns and inside:
            out[:, first:last] = _warp(image, y0, x0 + first * column_step, row_step, column_step, (height, last - first))


def _edge_pixels(step: float) -> int:
    """How many output pixels at each end lie less than half an image pixel inside the box: (j + .5) * step < .5."""
    return 0 if step >= 1 else int(np.ceil(0.5 / step - 0.5))


def _warp(image: UInt8Array, top: float, left: float, row_step: float, column_step: float, size: tuple[int, int]) -> UInt8Array:
    """Linear sampling on a regular grid whose first cell begins at (top, left), in a coordinate frame where pixel edges
    are integers."""
    inverse = np.array([[column_step, 0.0, left + 0.5 * column_step - 0.5], [0.0, row_step, top + 0.5 * row_step - 0.5]], dtype=np.float64)
    strip = cv2.warpAffine(image, inverse, (size[1], size[0]), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(strip, dtype=np.uint8)


def _kind(data: bytes) -> str | None:
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[:2] == b"BM":
        return "bmp"
    if data[:4] in (b"II*\0", b"MM\0*"):
        return "tiff"
    return None


def _open_with_pillow(data: bytes, kind: str) -> Image.Image:
    """A Pillow image of known format, its header read. Not Image.open: that warns of large images from any thread;
    limits are our caller's."""
    file = io.BytesIO(data)
    if kind == "png":
        return PngImagePlugin.PngImageFile(file)
    if kind == "webp":
        return WebPImagePlugin.WebPImageFile(file)
    if kind == "tiff":
        return TiffImagePlugin.TiffImageFile(file)
    return BmpImagePlugin.BmpImageFile(file)


def _decode_jpeg(data: bytes) -> UInt8Array:
    colours = simplejpeg.decode_jpeg_header(data)[2]
    if colours in ("CMYK", "YCCK"):
        # Stored inverted, as Adobe writes them and Pillow assumes.
        inks = 255 - simplejpeg.decode_jpeg(data, "CMYK", strict=True)
        return np.array(Image.fromarray(inks, "CMYK").convert("RGB"))
    return np.asarray(simplejpeg.decode_jpeg(data, "RGB", strict=True), dtype=np.uint8)


def _decode_with_pillow(data: bytes, kind: str) -> UInt8Array:
    if kind == "png":
        # Pillow checks the checksums of a PNG's chunks only here, and the object is spent afterwards.
        _open_with_pillow(data, kind).verify()
    with _open_with_pillow(data, kind) as image:
        image.load()
        if image.mode.startswith("I"):
            # 16 bits a pixel: Pillow's own conversion clips at 255 instead of scaling.
            levels = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
            return np.repeat(levels[:, :, None], 3, axis=2)
        # By way of RGBA, a palette with transparency keeps its colours and Pillow does not warn.
        converted = image.convert("RGBA").convert("RGB") if image.mode == "P" else image.convert("RGB")
        return np.array(converted)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text or type(error).__name__
