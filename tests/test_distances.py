"""Distances: the definition against numpy, ties, every dtype, and that the bounds on float32 products hold for hostile features."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from personmae.configs import UserError
from personmae.evaluation import memory
from personmae.evaluation.distances import Metric, distances, exact_products, open_space
from personmae.evaluation.memory import require_memory
from personmae_kernels.match_places import bounds_of_products


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_equal_features_tie_exactly_wherever_they_stand(metric: Metric) -> None:
    generator = np.random.default_rng(1)
    query, kinds = generator.normal(size=(7, 129)), generator.normal(size=(5, 129))
    kind = generator.integers(0, 5, 203)
    found = distances(query, kinds[kind], metric)
    for k in range(5):
        assert (found[:, kind == k] == found[:, kind == k][:, :1]).all()


def test_distances_equal_numpy() -> None:
    generator = np.random.default_rng(2)
    query, gallery = generator.normal(size=(3, 11)), generator.normal(size=(6, 11))
    np.testing.assert_allclose(
        distances(query, gallery, "euclidean"), np.linalg.norm(query[:, None] - gallery, axis=2), rtol=1e-12
    )
    cosine = (query @ gallery.T) / np.linalg.norm(query, axis=1)[:, None] / np.linalg.norm(gallery, axis=1)
    np.testing.assert_allclose(distances(query, gallery), 1 - cosine, atol=1e-12)


def test_a_zero_vector_has_distance_one_from_everything() -> None:
    assert distances([[0.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [-2.0, 0.0]]).tolist() == [[1.0, 1.0], [1.0, 2.0]]


def test_a_small_difference_far_from_the_origin_is_seen() -> None:
    query, gallery = np.full((1, 64), 1e6), np.full((2, 64), 1e6)
    gallery[0, 5] += 2**-20
    assert distances(query, gallery, "euclidean").tolist() == [[2.0**-20, 0.0]]


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.int64, torch.bool])
def test_every_dtype_is_converted_exactly(dtype: torch.dtype, metric: Metric) -> None:
    generator = torch.Generator().manual_seed(0)
    query, gallery = (torch.randint(-9, 9, (num, 33), generator=generator).to(dtype) for num in (4, 9))
    wanted = distances(query.double().numpy(), gallery.double().numpy(), metric)
    np.testing.assert_array_equal(distances(query, gallery, metric), wanted)
    np.testing.assert_array_equal(distances(query, gallery.double(), metric), wanted)
    if dtype != torch.bfloat16:
        np.testing.assert_array_equal(distances(query.numpy(), gallery.tolist(), metric), wanted)


def test_any_layout_is_taken_and_nothing_is_written() -> None:
    generator = np.random.default_rng(3)
    query, gallery = generator.normal(size=(5, 12)).astype(np.float32), generator.normal(size=(8, 12)).astype(np.float32)
    wanted = distances(query, gallery)
    frozen = gallery.copy()
    frozen.flags.writeable = False
    np.testing.assert_array_equal(distances(query[::-1][::-1], np.asfortranarray(gallery)), wanted)
    np.testing.assert_array_equal(distances(query[::-1], frozen), wanted[::-1])
    np.testing.assert_array_equal(distances(query.astype(">f4"), gallery), wanted)
    np.testing.assert_array_equal(distances(torch.from_numpy(query).requires_grad_(), torch.from_numpy(gallery).t().contiguous().t()), wanted)
    np.testing.assert_array_equal(frozen, gallery)


def hostile(kind: str, num: int, generator: np.random.Generator) -> np.ndarray:
    features = generator.normal(size=(num, 96))
    if kind == "far mean":
        features = features * 1e-3 + 7
    elif kind == "one direction":
        features[:, 0] += 30
    elif kind == "scales apart":
        features *= 10.0 ** generator.integers(-30, 30, (num, 1))
    elif kind == "huge":
        features *= 1e140
    elif kind == "tiny":
        features *= 1e-158
    elif kind == "duplicates":
        features = features[generator.integers(0, 3, num)]
    elif kind == "zeros":
        features[::3] = 0
    elif kind == "opposite":
        features = np.sign(features[:, :1]) * np.ones((num, 96)) + 1e-9 * features
    return features


KINDS = ["normal", "far mean", "one direction", "scales apart", "huge", "tiny", "duplicates", "zeros", "opposite"]


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_the_bounds_hold(kind: str, dtype: type, metric: Metric) -> None:
    """Of every pair of distances: what the products call surely nearer or farther is, strictly."""
    if dtype is np.float32 and kind in ("huge", "tiny"):
        pytest.skip("beyond float32")
    generator = np.random.default_rng(4)
    query: np.ndarray = hostile(kind, 6, generator).astype(dtype)
    gallery: np.ndarray = hostile(kind, 60, generator).astype(dtype)
    exact = distances(query, gallery, metric)
    space = open_space(query, gallery, metric)
    held, gallery_held = space.hold(space.query), space.hold(space.gallery)
    with exact_products():
        products = held.values @ gallery_held.values.T
    assert products.isfinite().all()
    lower, upper = bounds_of_products(products, space.slack(held), space.gallery_bounds(gallery_held))
    # Each image as a threshold for all others of its query.
    nearer, farther = space.limits(torch.from_numpy(exact.ravel()), held.square.repeat_interleave(60)).view(2, 6, 60)
    surely_nearer, surely_farther = (upper[:, None] < nearer[:, :, None]).numpy(), (lower[:, None] > farther[:, :, None]).numpy()
    assert (exact[:, None] < exact[:, :, None])[surely_nearer].all()
    assert (exact[:, None] > exact[:, :, None])[surely_farther].all()
    beyond = space.surely_farther(upper[:, :1].expand(-1, 60).reshape(-1), held.square.repeat_interleave(60)).view(6, 60)
    assert (exact > exact[:, :1])[(lower > beyond).numpy()].all()
    if kind in ("normal", "far mean", "one direction", "huge"):
        # And little is left open.
        assert (surely_nearer | surely_farther).mean() > 0.95


def test_products_are_in_float32_whatever_is_allowed() -> None:
    backends: Any = torch.backends
    modes = (backends.cuda.matmul, backends.mkldnn.matmul)
    before = [mode.fp32_precision for mode in modes]
    try:
        for mode in modes:
            mode.fp32_precision = "tf32"
        with exact_products():
            assert [mode.fp32_precision for mode in modes] == ["ieee", "ieee"]
        assert [mode.fp32_precision for mode in modes] == ["tf32", "tf32"]
        with pytest.raises(KeyError), exact_products():
            raise KeyError
        assert [mode.fp32_precision for mode in modes] == ["tf32", "tf32"]
    finally:
        for mode, precision in zip(modes, before, strict=True):
            mode.fp32_precision = precision


def test_bad_input_is_named() -> None:
    one = np.ones((1, 2))
    with pytest.raises(ValueError, match=r"shape \(0, 2\)"):
        distances(np.ones((0, 2)), one)
    with pytest.raises(ValueError, match=r"gallery features have shape \(3,\)"):
        distances(one, np.ones(3))
    with pytest.raises(ValueError, match="metric is 'manhattan'"):
        distances(one, one, "manhattan")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="query features are of type complex128"):
        distances(one * 1j, one)
    with pytest.raises(ValueError, match=r"of type torch\.complex64"):
        distances(torch.ones(1, 2, dtype=torch.complex64), one)
    with pytest.raises(ValueError, match="gallery features are of type <U1"):
        distances(one, np.array([["a", "b"]]))
    with pytest.raises(ValueError, match="query features: row 1 is longer than 1e"):
        distances(np.array([[1.0, 1], [1e200, 0]]), one)
    with pytest.raises(ValueError, match=r"gallery features: row 2 is not finite \(2 such rows of 4\)"):
        distances(one, np.array([[1, 1], [1e200, 0], [0, np.nan], [-np.inf, 0]]))
    with pytest.raises(ValueError, match="2 dimensions, gallery features 5"):
        distances(one, np.ones((3, 5)))


def test_what_does_not_fit_is_refused_with_both_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 2**20 < (memory.available_bytes(torch.device("cpu")) or 0) < 2**50
    require_memory(1, "nothing")
    monkeypatch.setattr(memory, "available_bytes", lambda device: 3 * 2**30)
    with pytest.raises(UserError, match=r"a matrix needs about 8\.0 GiB, and 3\.0 GiB are free"):
        require_memory(8 * 2**30, "a matrix")
    # A claim of 10 million rows that takes no memory of its own.
    claim = np.broadcast_to(np.float16(1), (10_000_000, 768))
    with pytest.raises(UserError, match=r"the gallery features \(10000000, 768\) as float32 needs about 28\.6 GiB"):
        distances(np.ones((1, 768), np.float32), claim)
    with pytest.raises(UserError, match=r"30,000 x 30,000 distances needs about 6\.7 GiB"):
        distances(np.ones((30_000, 1), np.float32), np.ones((30_000, 1), np.float32))
