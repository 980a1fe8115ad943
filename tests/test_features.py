"""Features from files: order, batches, threads, what reaches the describer, and bad files."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from personmae.configs import UserError
from personmae.data.records import PersonImage
from personmae.evaluation.features import choose_precision, extract_features, normalised
from personmae.evaluation.progress import Progress


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


def upper_left(batch: Tensor) -> dict[str, Tensor]:
    """Spoils what it was given, as some code bases normalise in place."""
    feature = batch[:, :2, :2].float().flatten(1)
    batch.zero_()
    return {"corner": feature}


def test_flip_test_sees_the_whole_mirror_image(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 6, 4, 3), np.uint8)
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image).save(path)
    one, other = (part[:, :2, :2].reshape(3, -1).astype(np.float64) for part in (pixels, pixels[:, :, ::-1]))
    mean = extract_features(upper_left, paths, size=(6, 4), flip_test="mean")["corner"]
    np.testing.assert_array_equal(mean, (one + other) / 2)
    unit = extract_features(upper_left, paths, size=(6, 4), flip_test="unit-sum")["corner"]
    np.testing.assert_allclose(unit, (one + other) / np.linalg.norm(one + other, axis=1, keepdims=True), rtol=1e-6)
    np.testing.assert_array_equal(extract_features(upper_left, paths, size=(6, 4))["corner"], one)
    with pytest.raises(ValueError, match="flip_test is 'both'"):
        extract_features(upper_left, paths, size=(6, 4), flip_test="both")  # type: ignore[arg-type]
    zero = extract_features(lambda batch: {"zero": batch.float().mean(dim=(1, 2)) * 0}, paths, size=(6, 4), flip_test="unit-sum")
    assert not zero["zero"].any()


def test_precision_is_that_of_the_products(images: list[PersonImage]) -> None:
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    seen = []

    def describe(batch: Tensor) -> dict[str, Tensor]:
        product = batch.float().mean(dim=(1, 2)) @ weight
        seen.append(product.dtype)
        return {"product": product}

    for precision in ("auto", "fp32", "bf16"):
        found = extract_features(describe, images, size=(8, 4), precision=precision)  # type: ignore[arg-type]
        assert found["product"].dtype == np.float32
    assert seen == [torch.float32, torch.float32, torch.bfloat16]
    with pytest.raises(ValueError, match="precision is 'fp16'"):
        extract_features(describe, images, size=(8, 4), precision="fp16")  # type: ignore[arg-type]


@pytest.mark.gpu
def test_bf16_is_taken_by_itself_on_a_gpu(images: list[PersonImage]) -> None:
    assert choose_precision("auto", torch.device("cuda")) == torch.bfloat16
    found = extract_features(mean_colour, images, size=(8, 4), batch_size=3, device="cuda")
    np.testing.assert_array_equal(found["colour"], extract_features(mean_colour, images, size=(8, 4))["colour"])


def test_progress_is_a_line_every_ten_seconds() -> None:
    now, stream = 100.0, io.StringIO()
    with Progress(100, "features", stream=stream, clock=lambda: now) as bar:
        for _ in range(10):
            now += 4.0
            bar.advance(10)
    lines = stream.getvalue().splitlines()
    assert lines == [f"features: {done} of 100, 2.5 img/s, {rest} s to go" for done, rest in ((30, 28), (60, 16), (90, 4))]
    with Progress(100, "features", stream=stream, shown=False, clock=lambda: now) as bar:
        now += 60
        bar.advance(50)
    assert stream.getvalue().splitlines() == lines


def test_progress_is_a_bar_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with Progress(8, "features", stream=stream) as bar:
        bar.advance(8)
    assert "features:" in stream.getvalue()
