"""Attention maps over images: where they lie, on which scale, and what the picture says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_vit import random_encoder

from personmae.data.images import read_image, resize
from personmae.data.records import PersonImage
from personmae.models.attention_rollout import attention_maps
from personmae.models.vit import VitConfig
from personmae.visuals.attention_maps import attention_picture, colour_levels, maps_of_files, overlay
from personmae.visuals.ranked_lists import GAP_PX, LINE_PX, QUERY_FRAME, RIGHT, WRONG


@pytest.fixture
def images(tmp_path: Path) -> list[PersonImage]:
    found = []
    for number, person in enumerate((1, 1, 2, 0, 1)):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 22, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        found.append(PersonImage(tmp_path / f"{number}.png", person, number))
    return found


def test_maps_of_files_are_those_of_the_encoder(images: list[PersonImage]) -> None:
    encoder = random_encoder(VitConfig(image_size=(32, 16), patch_px=8, width=16, depth=2, num_heads=2))
    paths = [image.path for image in images]
    found = maps_of_files(encoder, paths, batch_size=2)
    assert found.shape == (5, 4, 2)
    pixels = torch.from_numpy(np.stack([resize(read_image(path), (32, 16)) for path in paths]))
    np.testing.assert_allclose(found, attention_maps(encoder, pixels).numpy(), rtol=1e-5, atol=1e-7)
    assert maps_of_files(encoder, []).shape == (0, 4, 2)
    assert not np.allclose(found, maps_of_files(encoder, paths, "last", "mean"))


def test_the_colour_lies_over_the_patch() -> None:
    grey = np.full((64, 32, 3), 128, np.uint8)
    shares = np.zeros((8, 4), np.float32)
    shares[6, 1] = 1
    seen = overlay(grey, shares, full=32).astype(int)
    low, high = colour_levels()[0].astype(int), colour_levels()[-1].astype(int)
    for (y, x), colour in (((6 * 8 + 4, 8 + 4), high), ((4, 4), low), ((60, 30), low)):
        expected = 128 * (1 - colour[3] / 255) + colour[:3] * colour[3] / 255
        assert np.abs(seen[y, x] - expected).max() <= 24 if colour is high else np.abs(seen[y, x] - expected).max() <= 1
    assert np.abs(seen - seen[0, 0]).sum(axis=2).reshape(8, 8, 4, 8).mean(axis=(1, 3)).argmax() == 6 * 4 + 1
    # An even share is shown alike everywhere; what lies beyond the full colour is cut off.
    even = overlay(grey, np.full((8, 4), 1 / 32, np.float32), full=2)
    assert (even == even[0, 0]).all()
    assert (overlay(grey, np.full((8, 4), 1 / 32, np.float32), full=0.5) == overlay(grey, np.full((8, 4), 1 / 32, np.float32), full=1)).all()


def test_the_picture_shows_images_frames_and_maps(images: list[PersonImage]) -> None:
    maps = np.random.default_rng(0).dirichlet(np.ones(8), 5).reshape(5, 4, 2).astype(np.float32)
    picture = attention_picture(images[0], [images[1], images[2], None, images[3]], maps, title="query 7", size=(64, 32))
    sheet = np.asarray(picture)
    top = 2 * GAP_PX + 2 * LINE_PX
    for place, colour in enumerate((QUERY_FRAME, RIGHT, WRONG, None, WRONG)):
        x = GAP_PX + place * (32 + GAP_PX) + (2 * GAP_PX if place else 0)
        for y in (top, top + 64 + GAP_PX):
            edge, middle = sheet[y + 62, x + 1], sheet[y + 20 : y + 60, x + 4 : x + 28]
            if colour is None:
                assert (middle == 255).all()
                continue
            assert edge.tolist() == list(colour)
            plain = resize(read_image([images[0], images[1], images[2], None, images[3]][place].path), (64, 32))[20:60, 4:28]  # type: ignore[union-attr]
            assert np.array_equal(middle, plain) == (y == top)
    with pytest.raises(ValueError, match=r"\[3, rows, columns\] is wanted"):
        attention_picture(images[0], images[1:3], maps)
