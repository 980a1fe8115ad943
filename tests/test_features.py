"""Features from files: order, batches, threads, what reaches the describer, and bad files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from personmae.configs import UserError
from personmae.data.records import PersonImage
from personmae.evaluation.features import extract_features, normalised


@pytest.fixture
def images(tmp_path: Path) -> list[PersonImage]:
    found = []
    for number in range(11):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (5 + number, 12), (number * 20, 7, 255 - number)).save(path)
        found.append(PersonImage(path, number, 1))
    return found


def mean_colour(batch: Tensor) -> dict[str, Tensor]:
    return {"colour": batch.double().mean(dim=(1, 2))}


@pytest.mark.parametrize(("batch_size", "num_threads"), [(1, 1), (3, 2), (4, 5), (64, 2)])
def test_features_are_in_the_order_of_the_images(images: list[PersonImage], batch_size: int, num_threads: int) -> None:
    found = extract_features(mean_colour, images, size=(8, 4), batch_size=batch_size, num_threads=num_threads)
    assert found["colour"].dtype == np.float32
    np.testing.assert_allclose(found["colour"], [(number * 20, 7, 255 - number) for number in range(11)], atol=0.5)
    paths = extract_features(mean_colour, [image.path for image in images], size=(8, 4), batch_size=batch_size)
    np.testing.assert_array_equal(paths["colour"], found["colour"])


def test_the_describer_gets_uint8_batches_of_the_size_without_gradient(images: list[PersonImage]) -> None:
    seen = []

    def describe(batch: Tensor) -> dict[str, Tensor]:
        seen.append((batch.dtype, tuple(batch.shape), torch.is_grad_enabled()))
        return mean_colour(batch)

    extract_features(describe, images, size=(8, 4), batch_size=4)
    assert seen == [(torch.uint8, (size, 8, 4, 3), False) for size in (4, 4, 3)]


def test_bad_features_are_refused(images: list[PersonImage]) -> None:
    def broken(batch: Tensor) -> dict[str, Tensor]:
        feature = batch.float().mean(dim=(1, 2))
        return {"colour": torch.where(feature[:, :1] == 100, torch.nan, feature)}

    with pytest.raises(ValueError, match=r"5\.png is not finite"):
        extract_features(broken, images, size=(8, 4), batch_size=4)
    with pytest.raises(ValueError, match=r"shape \(4, 8, 4, 3\)"):
        extract_features(lambda batch: {"pixels": batch}, images, size=(8, 4), batch_size=4)
    with pytest.raises(ValueError, match="after"):
        extract_features(
            lambda batch: {str(len(batch)): batch.float().mean(dim=(1, 2))}, images, size=(8, 4), batch_size=4
        )
    with pytest.raises(ValueError, match="at least 1"):
        extract_features(mean_colour, images, size=(8, 4), batch_size=0)


def test_no_image_and_an_unreadable_image_are_the_users_to_mend(images: list[PersonImage]) -> None:
    with pytest.raises(UserError, match="no image"):
        extract_features(mean_colour, [], size=(8, 4))
    images[6].path.write_bytes(images[6].path.read_bytes()[:40])
    with pytest.raises(UserError, match=r"6\.png"):
        extract_features(mean_colour, images, size=(8, 4), batch_size=4)


def test_normalised_feeds_a_module_its_own_units(images: list[PersonImage]) -> None:
    mean, std = (0.5, 0.25, 0.0), (0.5, 0.1, 2.0)
    module = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    found = extract_features(normalised(module, mean, std), images, size=(8, 4))["feature"]
    colours = np.array([(number * 20, 7, 255 - number) for number in range(11)])
    np.testing.assert_allclose(found, (colours / 255 - mean) / std, atol=0.02)
    with pytest.raises(ValueError, match=r"call \.eval\(\)"):
        extract_features(normalised(module.train(), mean, std), images, size=(8, 4))
