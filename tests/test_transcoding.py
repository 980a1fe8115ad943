"""What an image becomes in a pack: the same bytes where they will do, else an ordinary JPEG that shows the same."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from personmae.data.images import UnreadableImage, decode, read_header, read_orientation, turn_upright
from personmae.data.packs.transcoding import Change, Transcoding, jpeg_end, packed_bytes, plan_change
from personmae.data.verdicts import Limits, check_image
from tests.bad_images import encoded, picture, readable_samples

KEPT = {"ordinary.jpg", "444.jpg", "422.jpg", "progressive.jpeg", "grey.jpg", "UPPER CASE, ünïcode.JPG"}
NAME = Path("image")


def pack(data: bytes, settings: Transcoding = Transcoding()) -> tuple[Change, bytes]:  # noqa: B008
    checked = check_image(data, NAME, Limits())
    planned = plan_change(data, checked.header, checked.pixels, NAME, settings, Limits())
    return planned.change, packed_bytes(data, planned, settings)


@pytest.mark.parametrize("sample", readable_samples(), ids=lambda sample: sample.name)
def test_the_corpus(sample):
    change, content = pack(sample.content)
    expected = Change.KEPT if sample.name in KEPT else Change.TRIMMED if sample.name == "bytes_after_the_end.jpg" else Change.ENCODED
    assert change == expected
    header = read_header(content, NAME)
    assert (header.kind, header.plain) == ("jpeg", True)
    assert jpeg_end(content) == len(content)
    before, after = decode(sample.content, NAME), decode(content, NAME)
    if change == Change.KEPT:
        assert content == sample.content
    elif change == Change.TRIMMED:
        assert np.array_equal(before, after)
    else:
        upright = turn_upright(before, read_orientation(sample.content))
        assert (header.height, header.width) == upright.shape[:2]
        noise = 12 if sample.name == "one_bit.png" else 4
        assert np.abs(after.astype(int) - upright).mean() < noise
        # Encoded once, it stays as it is.
        assert pack(content) == (Change.KEPT, content)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_is_turned_upright(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(3, 60, 30), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    assert read_orientation(data) == orientation
    shown = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert np.abs(turn_upright(decode(data, NAME), orientation).astype(int) - shown).max() <= 4
    change, content = pack(data)
    assert change == (Change.KEPT if orientation == 1 and kind == "JPEG" else Change.ENCODED)
    assert decode(content, NAME).shape == shown.shape


def test_an_orientation_that_makes_no_sense_is_none():
    exif = Image.Exif()
    for value in (0, 9, 77):
        exif[0x0112] = value
        assert read_orientation(encoded(picture(), "JPEG", exif=exif)) == 1
    data = encoded(picture(), "JPEG", exif=exif)
    assert read_orientation(data.replace(b"Exif\0\0", b"Exif\0\0\xff\xff", 1)) == 1
    assert read_orientation(b"no image") == 1


def test_shrinking():
    tall = encoded(picture(0, 400, 200), "JPEG", quality=90)
    change, content = pack(tall, Transcoding(max_side_px=256))
    assert (change, decode(content, NAME).shape) == (Change.SHRUNK, (256, 128, 3))
    assert pack(tall, Transcoding(max_side_px=400)) == (Change.KEPT, tall)
    with pytest.raises(UnreadableImage, match=r"too narrow to be shrunk: 20 x 800 pixels \(w x h\) to 5 x 200, at least 16"):
        pack(encoded(picture(0, 800, 20), "JPEG"), Transcoding(max_side_px=200))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(pack(encoded(picture(0, 200, 400), "JPEG", exif=exif), Transcoding(max_side_px=200))[1], NAME).shape == (200, 100, 3)


def test_re_encoding_takes_the_quality_asked_for():
    data = encoded(picture(0, 200, 100), "JPEG", quality=95, subsampling=0)
    ways = [Transcoding(re_encode=True, quality=50), Transcoding(re_encode=True, quality=90, subsampling="420"), Transcoding(re_encode=True)]
    sizes = [len(pack(data, way)[1]) for way in ways]
    assert sizes == sorted(sizes)
    assert Image.open(io.BytesIO(pack(data, Transcoding(re_encode=True))[1])).getexif() == {}


@given(st.binary(max_size=300))
def test_any_bytes_have_an_end(data):
    assert 0 <= jpeg_end(data) <= len(data)
    jpeg = b"\xff\xd8" + data
    assert 2 <= jpeg_end(jpeg) <= len(jpeg)


def test_an_image_behind_the_end_is_no_part_of_it():
    first, second = (encoded(picture(seed), "JPEG", progressive=bool(seed)) for seed in (1, 0))
    assert jpeg_end(first + second) == len(first)
    assert pack(first + second) == (Change.TRIMMED, first)
    assert jpeg_end(first[:-2]) == len(first) - 2
