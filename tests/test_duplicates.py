"""Duplicates against comparing every pair; the hash against what it is for."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from personmae.data.packs.duplicates import band_masks, content_hash, difference_hash, find_exact, find_near
from tests.bad_images import picture


def differing_bits(left: int, right: int) -> int:
    return bin(int(left) ^ int(right)).count("1")


def some_hashes(generator: np.random.Generator, num_images: int) -> np.ndarray:
    """A few centres, with some bits of each turned."""
    centres = generator.integers(0, 2**64, max(1, num_images // 6), dtype=np.uint64)
    hashes = centres[generator.integers(0, len(centres), num_images)]
    for row in range(num_images):
        for bit in generator.choice(64, int(generator.integers(0, 6)), replace=False):
            hashes[row] ^= np.uint64(1 << int(bit))
    return hashes


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), num_images=st.integers(0, 60), max_bits=st.integers(0, 6))
def test_no_two_that_are_left_are_near(seed, num_images, max_bits):
    generator = np.random.default_rng(seed)
    hashes = some_hashes(generator, num_images)
    usable = generator.random(num_images) < 0.9
    found = find_near(hashes, usable, max_bits)
    assert sorted(set(found.rows.tolist())) == found.rows.tolist()
    for row, original, bits in zip(found.rows.tolist(), found.originals.tolist(), found.bits.tolist(), strict=True):
        assert usable[row]
        assert usable[original]
        assert original < row
        assert differing_bits(hashes[row], hashes[original]) == bits <= max_bits
    left = sorted(set(np.flatnonzero(usable).tolist()) - set(found.rows.tolist()))
    assert [(a, b) for a in left for b in left if a < b and differing_bits(hashes[a], hashes[b]) <= max_bits] == []


@pytest.mark.parametrize("max_bits", range(1, 7))
def test_hashes_that_near_agree_under_a_mask(max_bits):
    generator = np.random.default_rng(max_bits)
    masks = band_masks(max_bits)
    assert np.bitwise_or.reduce(np.array(masks)) == np.uint64(2**64 - 1)
    for _ in range(300):
        difference = np.uint64(sum(1 << int(bit) for bit in generator.choice(64, max_bits, replace=False)))
        assert any(difference & mask == 0 for mask in masks)


def test_many_images_take_memory_and_time_in_proportion():
    hashes = np.random.default_rng(0).integers(0, 2**64, 200_000, dtype=np.uint64)
    hashes[100_000:] = hashes[:100_000] ^ np.uint64(0b101)
    found = find_near(hashes, np.ones(200_000, dtype=bool), 3)
    assert len(found) == 100_000
    assert np.array_equal(found.originals, found.rows - 100_000)


def test_a_number_of_bits_out_of_range():
    with pytest.raises(ValueError, match="max_bits is 7"):
        find_near(np.zeros(2, np.uint64), np.ones(2, bool), 7)


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=40))
def test_exact_ones_are_found_with_the_first(images):
    contents = np.array([content_hash(bytes([number])) for number, _ in images], dtype=np.uint64).reshape(-1, 2)
    usable = np.array([fine for _, fine in images], dtype=bool)
    found = find_exact(contents, usable)
    firsts: dict[int, int] = {}
    expected = []
    for row, (number, fine) in enumerate(images):
        if fine and firsts.setdefault(number, row) != row:
            expected.append((row, firsts[number], -1))
    assert list(zip(found.rows.tolist(), found.originals.tolist(), found.bits.tolist(), strict=True)) == expected


def test_the_hash_stays_when_an_image_is_encoded_again_or_shrunk_and_differs_between_images():
    pictures = [picture(seed, 160, 64) for seed in range(40)]
    hashes = [difference_hash(image) for image in pictures]
    for image, value in zip(pictures, hashes, strict=True):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=60)
        assert differing_bits(value, difference_hash(np.array(Image.open(file)))) <= 3
        assert differing_bits(value, difference_hash(np.array(Image.fromarray(image).resize((48, 120), Image.Resampling.BILINEAR)))) <= 6
        brighter = (image * 0.7 + 50).astype(np.uint8)
        assert differing_bits(value, difference_hash(brighter)) <= 3
    assert min(differing_bits(a, b) for i, a in enumerate(hashes) for b in hashes[:i]) > 6


def test_the_bits_of_the_hash_are_where_they_are_said_to_be():
    image = np.full((8, 9, 3), 100, np.uint8)
    image[2, 4] = 200
    # Row 2: the fourth pair rises, the fifth falls.
    assert difference_hash(image) == 1 << (63 - (8 * 2 + 3))
