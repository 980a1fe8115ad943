"""The colour baseline against counting by hand."""

import numpy as np
import pytest
import torch

from personmae.evaluation.colour_histogram import describe_colours, stripe_histograms


def random_images(num: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(("height", "width"), [(13, 7), (6, 1), (48, 24), (31, 16)])
def test_scalar_product_is_the_mean_bhattacharyya_coefficient(height: int, width: int) -> None:
    images = random_images(3, height, width) // 90 * 90
    features = stripe_histograms(images)

    def shares(image: np.ndarray, stripe: int) -> dict[tuple[int, ...], float]:
        rows = image[height * stripe // 6 : height * (stripe + 1) // 6].reshape(-1, 3)
        counts: dict[tuple[int, ...], float] = {}
        for pixel in rows.tolist():
            key = tuple(value // 32 for value in pixel)
            counts[key] = counts.get(key, 0.0) + 1.0 / len(rows)
        return counts

    for i in range(3):
        for j in range(3):
            expected = 0.0
            for stripe in range(6):
                one, other = shares(images[i], stripe), shares(images[j], stripe)
                expected += sum((one[key] * other[key]) ** 0.5 for key in one if key in other) / 6
            assert features[i] @ features[j] == pytest.approx(expected, abs=1e-5)
        assert features[i] @ features[i] == pytest.approx(1.0, abs=1e-5)


def test_an_image_does_not_depend_on_its_batch() -> None:
    images = random_images(4, 24, 12)
    assert np.array_equal(stripe_histograms(images)[2:3], stripe_histograms(images[2:3]))
    assert stripe_histograms(images[:0]).shape == (0, 3072)


def test_a_colour_counts_where_it_is() -> None:
    trousers, shirt = np.zeros((2, 1, 60, 10, 3), dtype=np.uint8)
    trousers[:, 30:] = (20, 30, 200)
    shirt[:, :30] = (20, 30, 200)
    mirrored = trousers[:, :, ::-1].copy()
    features = [stripe_histograms(image)[0] for image in (trousers, shirt, mirrored)]
    assert features[0] @ features[1] == pytest.approx(0.0, abs=1e-6)
    assert features[0] @ features[2] == pytest.approx(1.0, abs=1e-6)


def test_the_evaluator_gets_a_tensor() -> None:
    images = random_images(2, 16, 8)
    described = describe_colours(torch.from_numpy(images))
    assert list(described) == ["colour histogram"]
    assert described["colour histogram"].dtype == torch.float32
    np.testing.assert_array_equal(described["colour histogram"].numpy(), stripe_histograms(images))


def test_bad_input_is_named() -> None:
    with pytest.raises(TypeError, match="float32"):
        stripe_histograms(np.zeros((1, 12, 6, 3), dtype=np.float32))  # type: ignore[arg-type]
    for shape in [(12, 6, 3), (1, 12, 6, 4), (1, 5, 6, 3), (1, 12, 0, 3)]:
        with pytest.raises(ValueError, match=r"\[B, H, W, 3\]"):
            stripe_histograms(np.zeros(shape, dtype=np.uint8))
