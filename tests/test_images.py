"""Strict reading against Pillow, sampling against ramps and Pillow's own resampler, colour against plain arithmetic."""

import io
import math
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from personmae.data import images
from personmae.data.images import ERASED_COLOUR, UnreadableImage, decode, is_antialiased, read_header, read_image, recolour, resize, sample_box
from tests.bad_images import HEIGHT, WIDTH, broken_samples, picture, readable_samples

READABLE = readable_samples()
BROKEN = broken_samples()
SIZES = [(256, 128), (64, 32), (100, 90)]


@pytest.mark.parametrize("sample", READABLE, ids=lambda sample: sample.name)
def test_readable_files_are_read_as_pillow_reads_them(sample, tmp_path):
    path = tmp_path / "image"
    path.write_bytes(sample.content)
    pixels = read_image(path)
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    image = Image.open(io.BytesIO(sample.content))
    if "16" in sample.name:
        expected = np.asarray(image).astype(np.int64)
        expected = np.repeat((expected >> 8)[..., None], 3, axis=2) if expected.ndim == 2 else expected
    else:
        expected = np.asarray(image.convert("RGBA" if image.mode == "P" else "RGB"))[:, :, :3]
    # Two builds of libjpeg-turbo differ in the less usual subsamplings; Pillow decodes RGB JPEGs and the rest to the bit.
    limit = 8 if sample.name in ("440.jpg", "411.jpg") else 0
    assert np.abs(pixels.astype(np.int64) - expected).max() <= limit
    header = read_header(sample.content, path)
    assert (header.height, header.width) == (HEIGHT, WIDTH)


@pytest.mark.parametrize("name", ["ordinary.jpg", "cmyk.jpg", "grey16.png", "rgb16.png", "lossless.webp", "alpha.png", "rgb.bmp"])
def test_conversions_keep_the_picture(name):
    (sample,) = [sample for sample in READABLE if sample.name == name]
    expected = picture().astype(np.float64)
    if name == "grey16.png":
        expected = (expected @ [0.299, 0.587, 0.114])[:, :, None]
    assert np.abs(decode(sample.content, None) - expected).mean() < 6


# Dimensions are the index's business, not the decoder's.
@pytest.mark.parametrize("sample", [sample for sample in BROKEN if not sample.reason.startswith("too ")], ids=lambda sample: sample.name)
def test_broken_files_are_refused(sample, tmp_path):
    path = tmp_path / sample.name
    path.write_bytes(sample.content)
    with pytest.raises(UnreadableImage) as caught:
        read_image(path)
    assert caught.value.path == path
    assert str(path) in str(caught.value)
    # A header too short to be read is found out by either step.
    assert caught.value.reason.startswith(sample.reason) or sample.reason == "broken header"
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    for name, reason in (("pipe.jpg", "regular file"), ("folder.jpg", "directory"), ("missing.jpg", "No such file")):
        with pytest.raises(UnreadableImage, match=reason):
            read_image(tmp_path / name)


def test_no_descriptor_is_left_open(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "long.jpg").write_bytes(bytes(20))
    before = os.listdir("/proc/self/fd")
    for name in ("pipe.jpg", "folder.jpg", "missing.jpg", "long.jpg"):
        with pytest.raises(UnreadableImage):
            images.read_bytes(tmp_path / name, max_bytes=10)
    assert images.read_bytes(tmp_path / "long.jpg") == bytes(20)
    assert os.listdir("/proc/self/fd") == before


def test_a_file_longer_than_allowed_is_not_read(tmp_path):
    path = tmp_path / "long.jpg"
    with open(path, "wb") as file:
        file.truncate(2**40)
    with pytest.raises(UnreadableImage, match="too large"):
        images.read_bytes(path, max_bytes=10_000)


def ramp(height: int = 250, width: int = 250) -> np.ndarray:
    """Red is the column, green is the row."""
    image = np.zeros((height, width, 3), np.uint8)
    image[:, :, 0], image[:, :, 1] = np.arange(width), np.arange(height)[:, None]
    return image


def sampled_positions(first: int, last: int, num: int, end: int, flip: bool = False) -> np.ndarray:
    """Where output pixels look in the image, by the definition."""
    positions = first + (np.arange(num) + 0.5) * (last - first) / num - 0.5
    return (positions[::-1] if flip else positions).clip(0, end - 1)


@st.composite
def boxes(draw, height: int = 250, width: int = 250) -> tuple[int, int, int, int]:
    y0, x0 = draw(st.integers(0, height - 4)), draw(st.integers(0, width - 4))
    return y0, x0, draw(st.integers(y0 + 4, height)), draw(st.integers(x0 + 4, width))


@settings(max_examples=150, deadline=None)
@given(box=boxes(), flip=st.booleans(), size=st.sampled_from(SIZES))
def test_samples_lie_where_the_box_says(box, flip, size):
    out = sample_box(ramp(), box, flip, size).astype(np.float64)
    y0, x0, y1, x1 = box
    columns = out[:, :, 0] - sampled_positions(x0, x1, size[1], 250, flip)
    rows = out[:, :, 1] - sampled_positions(y0, y1, size[0], 250)[:, None]
    # OpenCV's fixed-point sums round twice, to 3/4 of a level at most.
    assert max(np.abs(columns).max(), np.abs(rows).max()) <= 0.75


def test_the_grid_has_no_offset():
    """OpenCV rounds down by a tenth of a level in the mean. A ramp that falls tells that from an offset of the positions, which turns its sign."""
    generator = np.random.default_rng(0)
    offsets = []
    for _ in range(100):
        top, left = generator.integers(0, 100, 2)
        bottom, right = top + generator.integers(40, 150), left + generator.integers(40, 150)
        flip = bool(generator.integers(2))
        box = (int(top), int(left), int(bottom), int(right))
        rising, falling = (sample_box(image, box, flip, (256, 128)).astype(np.float64) for image in (ramp(), 255 - ramp()))
        looked_at = (rising + 255 - falling) / 2
        offsets.append((looked_at[:, :, 0] - sampled_positions(left, right, 128, 250, flip)).mean())
        offsets.append((looked_at[:, :, 1] - sampled_positions(top, bottom, 256, 250)[:, None]).mean())
    assert np.abs(offsets).max() < 0.1
    assert abs(np.mean(offsets)) < 0.005


@pytest.mark.parametrize(
    ("box", "size", "most"), [((40, 20, 240, 140), (256, 128), 2), ((3, 5, 60, 40), (256, 128), 2), ((0, 0, 300, 150), (256, 128), 24)]
)
def test_sampling_agrees_with_pillow(box, size, most):
    """Where boxes grow, to rounding. Where they shrink, Pillow always antialiases and by another filter, so contours differ a little."""
    image = picture(3, 300, 150)
    y0, x0, y1, x1 = box
    expected = np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR, box=(x0, y0, x1, y1))).astype(np.int64)
    difference = np.abs(sample_box(image, box, False, size) - expected)
    assert difference.max() <= most
    assert difference.mean() < 0.8
    mirrored = np.abs(sample_box(image, box, True, size)[:, ::-1] - expected)
    assert mirrored.max() <= most


def test_shrinking_averages():
    fine = np.zeros((256, 128, 3), np.uint8)
    fine[::2, ::2] = fine[1::2, 1::2] = 255
    for size in ((64, 32), (100, 50), (64, 128), (256, 32), (64, 200)):
        out = sample_box(fine, (0, 0, 256, 128), False, size)
        assert np.abs(out.astype(np.int64) - 127.5).max() < 70, size
    assert is_antialiased(161, 64, (128, 64))
    assert is_antialiased(64, 161, (64, 128))
    assert not is_antialiased(160, 80, (128, 64))


def test_a_box_of_the_same_size_is_a_copy():
    image = picture(1, 120, 80)
    assert np.array_equal(sample_box(image, (10, 20, 74, 52), False, (64, 32)), image[10:74, 20:52])
    assert np.array_equal(sample_box(image, (10, 20, 74, 52), True, (64, 32)), image[10:74, 20:52][:, ::-1])
    assert np.array_equal(resize(image, (120, 80)), image)
    out = np.zeros((64, 32, 3), np.uint8)
    assert sample_box(image, (0, 0, 120, 80), False, (64, 32), out) is out
    assert np.array_equal(out, resize(image, (64, 32)))


def test_colour_is_an_affine_map_of_levels():
    image = picture(2, 64, 32)
    matrix = np.array([[1.2, 0.1, -0.1, -30], [0.1, 0.9, 0, 20], [-0.2, 0.1, 1.1, 5]], np.float32)
    expected = (image.reshape(-1, 3) @ matrix[:, :3].T.astype(np.float64) + matrix[:, 3]).reshape(image.shape).clip(0, 255)
    recolour(image, matrix)
    assert np.abs(image - expected).max() <= 1


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.7])
def test_blur_is_a_gaussian(sigma):
    image = picture(2, 64, 33)
    radius = math.ceil(3 * sigma)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    weights /= weights.sum()
    padded = np.pad(image.astype(np.float64), ((radius, radius), (radius, radius), (0, 0)), mode="reflect")
    rows = sum(weight * padded[k : k + 64] for k, weight in enumerate(weights))
    expected = sum(weight * rows[:, k : k + 33] for k, weight in enumerate(weights))
    recolour(image, blur_sigma=sigma)
    assert np.abs(image - expected).max() <= 1.5


def test_erasing_fills_its_box_only():
    image = picture(2, 64, 32)
    before = image.copy()
    recolour(image, erase_box=np.array([5, 6, 20, 30], np.int32))
    assert (image[5:20, 6:30] == ERASED_COLOUR).all()
    image[5:20, 6:30] = before[5:20, 6:30]
    assert np.array_equal(image, before)
    recolour(image, erase_box=np.zeros(4, np.int32))
    assert np.array_equal(image, before)
