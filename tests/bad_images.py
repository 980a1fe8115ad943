"""A corpus of image files as they are met in the wild: odd ones that must be read, and broken ones that must be left out."""

import io
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from PIL import Image

HEIGHT, WIDTH = 96, 40


@dataclass(frozen=True)
class Sample:
    """A file of the corpus: its name, its content, and, if it must be left out, words of the reason given."""

    name: str
    content: bytes
    reason: str = ""


def picture(seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Smooth shapes with a little noise, uint8 [height, width, 3]: what a photograph is to a codec."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (max(height // 8, 2), max(width // 8, 2), 3), dtype=np.uint8)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return (smooth + generator.normal(0, 3, smooth.shape)).clip(0, 255).astype(np.uint8)


def encoded(image: Image.Image | np.ndarray, kind: str, **options: object) -> bytes:
    """The image in a format of Pillow's."""
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG of one's own making. rows: all rows with their filter bytes."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(rows, 9)) + png_chunk(b"IEND", b"")


def sized_jpeg(jpeg: bytes, height: int, width: int) -> bytes:
    """The JPEG with other dimensions in its header."""
    start = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:start] + struct.pack(">HH", height, width) + jpeg[start + 4 :]


def rotten_jpeg(jpeg: bytes) -> bytes:
    """The JPEG with some bytes of its scan overwritten such that Pillow still reads it, without a word."""
    generator = np.random.default_rng(0)
    for _ in range(200):
        start = int(generator.integers(len(jpeg) // 2, len(jpeg) - 64))
        rotten = jpeg[:start] + generator.integers(0, 255, 24, dtype=np.uint8).tobytes() + jpeg[start + 24 :]
        try:
            simplejpeg.decode_jpeg(rotten, strict=True)
        except ValueError:
            Image.open(io.BytesIO(rotten)).load()
            return rotten
    raise AssertionError("no such damage found")


def readable_samples() -> list[Sample]:
    """Odd files that must be read. All show `picture()`, up to their format's losses, at 96 x 40 pixels."""
    rgb = picture()
    image = Image.fromarray(rgb)
    jpeg = encoded(image, "JPEG", quality=92)
    alpha = Image.fromarray(np.dstack([rgb, np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 256]).astype(np.uint8))
    grey16 = (np.asarray(image.convert("L")).astype(np.uint16) << 8) + 77
    orientation = Image.Exif()
    orientation[0x0112] = 6
    transparent_palette = image.quantize(64)
    transparent_palette.info["transparency"] = bytes(range(64))
    return [
        Sample("ordinary.jpg", jpeg),
        Sample("444.jpg", encoded(image, "JPEG", quality=95, subsampling=0)),
        Sample("422.jpg", encoded(image, "JPEG", quality=95, subsampling=1)),
        Sample("440.jpg", simplejpeg.encode_jpeg(rgb, 92, colorsubsampling="440")),
        Sample("411.jpg", simplejpeg.encode_jpeg(rgb, 92, colorsubsampling="411")),
        Sample("progressive.jpeg", encoded(image, "JPEG", quality=92, progressive=True)),
        Sample("grey.jpg", encoded(image.convert("L"), "JPEG", quality=92)),
        Sample("cmyk.jpg", encoded(image.convert("CMYK"), "JPEG", quality=92)),
        Sample("rgb_not_ycc.jpg", encoded(image, "JPEG", quality=92, keep_rgb=True)),
        Sample("turned_by_exif.jpg", encoded(image, "JPEG", quality=92, exif=orientation)),
        Sample("turned_by_exif.webp", encoded(image, "WEBP", lossless=True, exif=orientation)),
        Sample("bytes_after_the_end.jpg", jpeg + b"some camera's own data" * 20),
        Sample("UPPER CASE, ünïcode.JPG", jpeg),
        Sample("really_a_png.jpg", encoded(image, "PNG")),
        Sample("rgb.png", encoded(image, "PNG")),
        Sample("alpha.png", encoded(alpha, "PNG")),
        Sample("grey_alpha.png", encoded(image.convert("LA"), "PNG")),
        Sample("palette.png", encoded(image.quantize(64), "PNG")),
        Sample("palette_transparent.png", encoded(transparent_palette, "PNG")),
        Sample("one_bit.png", encoded(image.convert("1"), "PNG")),
        Sample("grey16.png", encoded(grey16, "PNG")),
        Sample("rgb16.png", cv2.imencode(".png", (rgb[:, :, ::-1].astype(np.uint16) << 8) + 77)[1].tobytes()),
        Sample("lossy.webp", encoded(image, "WEBP", quality=80)),
        Sample("lossless.webp", encoded(image, "WEBP", lossless=True)),
        Sample("alpha.webp", encoded(alpha, "WEBP", lossless=True, exact=True)),
        Sample("rgb.bmp", encoded(image, "BMP")),
        Sample("palette.bmp", encoded(image.quantize(64), "BMP")),
        Sample("rgb.tif", encoded(image, "TIFF")),
        Sample("lzw.TIFF", encoded(image, "TIFF", compression="tiff_lzw")),
        Sample("really_a_tiff.jpg", encoded(image, "TIFF", compression="tiff_deflate")),
        Sample("grey16.tif", encoded(Image.fromarray(grey16), "TIFF")),
    ]


def broken_samples() -> list[Sample]:
    """Files that must be left out, each with its reason."""
    image = Image.fromarray(picture())
    jpeg = encoded(image, "JPEG", quality=92)
    progressive = encoded(image, "JPEG", quality=92, progressive=True)
    png, webp, bmp = encoded(image, "PNG"), encoded(image, "WEBP", quality=90), encoded(image, "BMP")
    # Pillow writes the pixels of a plain TIFF last, the directory of a compressed one.
    tiff, lzw = encoded(image, "TIFF"), encoded(image, "TIFF", compression="tiff_lzw")
    rotten_png, wrong_checksum = bytearray(png), bytearray(png)
    rotten_png[png.index(b"IDAT") + 300] ^= 1
    # The last bytes of a PNG are its IEND chunk, of twelve; those before it the checksum of the pixels.
    wrong_checksum[-14] ^= 1
    cut, format_, header, size = "truncated or damaged", "not a JPEG, PNG, WebP, BMP or TIFF", "broken header", "too large"
    return [
        Sample("empty.jpg", b"", "empty file"),
        Sample("two_bytes.jpg", b"\xff\xd8", format_),
        Sample("text.jpg", b"this is no image\n" * 9, format_),
        Sample("page.jpg", b"<!DOCTYPE html><html><body>404</body></html>", format_),
        Sample("gif.jpg", encoded(image, "GIF"), format_),
        Sample("bytes_before.jpg", b"junk" + jpeg, format_),
        Sample("header_only.jpg", jpeg[:60], header),
        Sample("no_height.jpg", sized_jpeg(jpeg, 0, WIDTH), header),
        *(Sample(f"cut_at_{part}.jpg", jpeg[: len(jpeg) * part // 100], cut) for part in (40, 60, 95)),
        Sample("without_end.jpg", jpeg[:-2], cut),
        Sample("cut_and_ended.jpg", jpeg[: len(jpeg) * 60 // 100] + b"\xff\xd9", cut),
        Sample("zeros_at_the_end.jpg", jpeg[:-200] + bytes(200), cut),
        Sample("cut_progressive.jpg", progressive[: len(progressive) * 80 // 100], cut),
        Sample("rotten.jpg", rotten_jpeg(jpeg), cut),
        Sample("says_it_is_10000_square.jpg", sized_jpeg(jpeg, 10_000, 10_000), size),
        Sample("says_it_is_65500_square.jpg", sized_jpeg(jpeg, 65_500, 65_500), size),
        Sample("says_it_is_larger.jpg", sized_jpeg(jpeg, 2 * HEIGHT, WIDTH), cut),
        Sample("cut.png", png[: len(png) // 2], cut),
        Sample("rotten.png", bytes(rotten_png), cut),
        Sample("wrong_checksum.png", bytes(wrong_checksum), cut),
        Sample("bomb.png", png_of(12_000, 12_000, 1, 0, bytes(1501) * 12_000), size),
        Sample("says_it_is_50000_square.png", png_of(50_000, 50_000, 8, 2, b""), size),
        Sample("cut.webp", webp[: len(webp) // 2], header),
        Sample("cut.bmp", bmp[: len(bmp) // 2], cut),
        Sample("cut.tif", tiff[: len(tiff) // 2], cut),
        Sample("header_only.tif", tiff[:8], header),
        Sample("cut_lzw.tif", lzw[: len(lzw) - 40], header),
        Sample("tiny.png", encoded(picture(0, 1, 1), "PNG"), "too small"),
        Sample("narrow.jpg", encoded(picture(0, 200, 8), "JPEG"), "too small"),
    ]


def write_corpus(folder: Path, samples: list[Sample]) -> Path:
    """Writes the samples into a folder, which is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    for sample in samples:
        (folder / sample.name).write_bytes(sample.content)
    return folder


def write_people(folder: Path, num_images: int, seed: int = 0) -> Path:
    """JPEGs of 60 to 150 by 30 to 80 pixels in three sub-folders, returned."""
    generator = np.random.default_rng(seed)
    for number in range(num_images):
        height, width = int(generator.integers(60, 151)), int(generator.integers(30, 81))
        path = folder / "abc"[number % 3] / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(seed + number, height, width), "JPEG", quality=90, subsampling=0 if number % 4 == 0 else 2))
    return folder


def spoil(paths: list[Path]) -> dict[Path, str]:
    """Breaks up to six files in six ways; returns a word of the reason expected for each."""
    expected: dict[Path, str] = {}
    ways = ["cut", "deleted", "empty", "other size", "folder", "same length"]
    for path, way in zip(paths, ways, strict=False):
        content = path.read_bytes()
        if way == "cut":
            path.write_bytes(content[: len(content) // 2])
            expected[path] = "changed since it was indexed"
        elif way == "deleted":
            path.unlink()
            expected[path] = "No such file"
        elif way == "empty":
            path.write_bytes(b"")
            expected[path] = "empty file"
        elif way == "other size":
            path.write_bytes(encoded(picture(99, 64, 64), "JPEG"))
            expected[path] = "changed since it was indexed"
        elif way == "folder":
            path.unlink()
            path.mkdir()
            expected[path] = "directory"
        else:
            middle = len(content) // 2
            path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
            expected[path] = "changed since it was indexed"
        os.utime(path.parent)
    return expected
