"""Occlusion augmentation: how often, how large and where; and that what is covered is covered by another person, or by noise."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from personmae.configs import UserError
from personmae.training.occlusions import OcclusionConfig, cover, draw_occlusions, noise, others

SIZE = (256, 128)


def test_shares_and_places():
    config = OcclusionConfig(prob=0.6, scale=(0.1, 0.3), border_prob=0.5)
    boxes = draw_occlusions(config, SIZE, seed=1, epoch=2, samples=np.arange(20_000))
    assert boxes.dtype == np.int32
    y0, x0, y1, x1 = boxes.T
    assert ((y0 >= 0) & (y0 <= y1) & (y1 <= 256) & (x0 >= 0) & (x0 <= x1) & (x1 <= 128)).all()
    area = (y1 - y0) * (x1 - x0) / (256 * 128)
    covered = area > 0
    assert covered.mean() == pytest.approx(0.6, abs=0.02)
    # Rounded edges, and boxes that would be longer than the image, may fall short.
    assert area[covered].max() < 0.31
    assert np.mean(area[covered] > 0.09) > 0.95
    assert area[covered].mean() == pytest.approx(0.2, abs=0.02)
    at_border = (y1 == 256) | (x0 == 0) | (x1 == 128)
    assert 0.5 < at_border[covered].mean() < 0.65
    shape = np.log((y1 - y0)[covered] / (x1 - x0)[covered])
    assert np.mean(np.abs(shape) < np.log(1 / 0.3) + 0.1) > 0.95
    assert abs(np.mean(shape)) < 0.15
    inside = draw_occlusions(OcclusionConfig(prob=1, scale=(0.1, 0.2), aspect=(1.8, 2.2), border_prob=0), SIZE, 1, 2, np.arange(5000))
    assert np.mean(inside[:, 2] == 256) < 0.02


def test_draws_follow_seed_epoch_and_sample_alone():
    config = OcclusionConfig(prob=1)
    whole = draw_occlusions(config, SIZE, 3, 1, np.arange(10))
    assert np.array_equal(draw_occlusions(config, SIZE, 3, 1, [7, 2]), whole[[7, 2]])
    assert not np.array_equal(draw_occlusions(config, SIZE, 4, 1, np.arange(10)), whole)
    assert not np.array_equal(draw_occlusions(config, SIZE, 3, 2, np.arange(10)), whole)
    assert not draw_occlusions(OcclusionConfig(), SIZE, 3, 1, np.arange(10)).any()


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), height=st.integers(1, 17), width=st.integers(1, 17))
def test_covering_is_copying_the_box(seed, height, width):
    generator = np.random.default_rng(seed)
    images, filling = generator.integers(0, 256, (2, 5, height, width, 3), dtype=np.uint8)
    ends = np.sort(generator.integers(0, [[[height, width]]], (5, 2, 2), endpoint=True), axis=1)
    boxes = ends.reshape(5, 4).astype(np.int32)
    expected = images.copy()
    for row, (y0, x0, y1, x1) in enumerate(boxes):
        expected[row, y0:y1, x0:x1] = filling[row, y0:y1, x0:x1]
    given_to = torch.from_numpy(images)
    found = cover(given_to, torch.from_numpy(boxes), torch.from_numpy(filling))
    assert np.array_equal(found.numpy(), expected)
    assert np.array_equal(given_to.numpy(), images), "the images themselves stay"


def test_others_are_of_other_people():
    labels = torch.arange(6).repeat_interleave(4)
    images = labels.to(torch.uint8)[:, None, None, None].expand(-1, 2, 2, 3)
    assert (others(images, 4)[:, 0, 0, 0] != labels).all()


def test_noise():
    images = torch.zeros(8, 64, 32, 3, dtype=torch.uint8)
    mean, std = (0.5, 0.4, 0.6), (0.1, 0.05, 0.1)
    drawn = noise(images, mean, std, seed=5)
    assert drawn.shape == images.shape
    assert drawn.dtype == torch.uint8
    levels = drawn.double().flatten(0, 2) / 255
    assert torch.allclose(levels.mean(0), torch.tensor(mean, dtype=torch.float64), atol=0.01)
    assert torch.allclose(levels.std(0), torch.tensor(std, dtype=torch.float64), atol=0.01)
    assert torch.equal(noise(images, mean, std, seed=5), drawn)
    assert not torch.equal(noise(images, mean, std, seed=6), drawn)


@pytest.mark.parametrize("wrong", [{"prob": 1.5}, {"border_prob": -1}, {"scale": (0.5, 0.1)}, {"scale": (0.1, 1.2)}, {"aspect": (0, 1)}])
def test_mistakes(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        OcclusionConfig(**wrong)
