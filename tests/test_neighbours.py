"""Neighbours against a full float64 distance matrix: both backends, both forms, any tile, with ties, copies and zero vectors."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from dense_jaccard import dense_distances
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from personmae.configs import UserError
from personmae.evaluation import memory, neighbours
from personmae.evaluation.distances import exact_products
from personmae.evaluation.memory import require_memory
from personmae.evaluation.neighbours import as_points, choose_backend, nearest_neighbours, search
from personmae_kernels import compiled, launching

HAS_FAISS = find_spec("faiss") is not None
BACKENDS = ["torch", pytest.param("faiss", marks=pytest.mark.skipif(not HAS_FAISS, reason="faiss is not installed"))]
FORMS = ["reference", pytest.param("compiled", marks=pytest.mark.skipif(not compiled.available(), reason=compiled.why_missing()))]
METRICS = ["cosine", "sqeuclidean"]


@pytest.fixture(params=FORMS)
def form(request):
    launching.use_operators(request.param)
    yield request.param
    launching.use_operators(None)


def examples() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    centres = np.repeat(generator.normal(size=(10, 20)), 15, axis=0)
    return {
        "random": generator.normal(size=(150, 20)),
        "clustered": centres + 0.3 * generator.normal(size=centres.shape),
        "ties": generator.integers(-1, 2, (150, 3)).astype(float),
        "copies": centres,
        "nearly copies": centres + 1e-7 * generator.normal(size=centres.shape),
        "far from zero": 100 + generator.normal(size=(150, 20)),
        "all equal": np.ones((60, 4)),
        "zeros": np.zeros((60, 4)),
        "two": generator.normal(size=(2, 5)),
        "one": np.ones((1, 3)),
    }


def nearest_of(distance: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(distance, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(distance, order, axis=1)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", examples())
def test_equal_to_the_full_matrix(name, backend, metric, form, monkeypatch):
    features = examples()[name].astype(np.float32)
    distance = dense_distances(features, metric)
    for side in (7, 64, 2048):
        monkeypatch.setitem(neighbours.TILE_SIDE, "cpu", side)
        for k in (1, 20, 1000):
            found = nearest_neighbours(features, k, metric=metric, backend=backend)
            indices, distances = nearest_of(distance, k)
            np.testing.assert_array_equal(found.indices, indices)
            np.testing.assert_array_equal(found.distances, distances)
            assert found.choice.backend == backend


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_among_other_features(backend, metric, form):
    features = examples()["ties"].astype(np.float32)
    query, gallery = features[:40], features[30:]
    indices, distances = nearest_of(dense_distances(np.concatenate([query, gallery]), metric)[:40, 40:], 12)
    found = nearest_neighbours(query, 12, among=gallery, metric=metric, backend=backend)
    np.testing.assert_array_equal(found.indices, indices)
    np.testing.assert_array_equal(found.distances, distances)


@settings(max_examples=80, deadline=None)
@given(
    features=hnp.arrays(np.float32, st.tuples(st.integers(1, 40), st.integers(1, 4)), elements=st.integers(-1, 1).map(float)),
    k=st.integers(1, 20),
    metric=st.sampled_from(METRICS),
)
def test_small_integers(features, k, metric):
    indices, distances = nearest_of(dense_distances(features, metric), k)
    found = nearest_neighbours(features, k, metric=metric, backend="torch")
    np.testing.assert_array_equal(found.indices, indices)
    np.testing.assert_array_equal(found.distances, distances)


@pytest.mark.parametrize("metric", METRICS)
def test_farthest(metric, form, monkeypatch):
    monkeypatch.setitem(neighbours.TILE_SIDE, "cpu", 32)
    features = examples()["random"].astype(np.float32)
    points = as_points("features", features, metric)
    expected = dense_distances(features, metric).max(axis=1)
    np.testing.assert_allclose(search(points, 3, farthest=True).farthest.numpy(), expected, rtol=1e-5)
    assert len(search(points, 3).farthest) == 0


@pytest.mark.skipif(not HAS_FAISS, reason="faiss is not installed")
def test_farthest_beside_faiss():
    points = as_points("features", examples()["random"], "cosine")
    found = search(points, 3, backend="faiss", farthest=True)
    torch.testing.assert_close(found.farthest, search(points, 3, backend="torch", farthest=True).farthest)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float(dtype):
    features = torch.from_numpy(examples()["clustered"]).to(dtype)
    expected = nearest_neighbours(features.float(), 5)
    np.testing.assert_array_equal(nearest_neighbours(features, 5).indices, expected.indices)


def test_lengths_do_not_matter_to_cosine():
    features = examples()["random"]
    scales = 10.0 ** np.linspace(-30, 30, len(features))[:, None]
    np.testing.assert_array_equal(nearest_neighbours(features * scales, 9).indices, nearest_neighbours(features, 9).indices)


def test_progress_ends_at_the_number_of_images():
    told: list[tuple[int, int]] = []
    nearest_neighbours(examples()["random"], 3, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (150, 150)


def test_choices_say_why(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_backend("torch", cpu) == ("torch", "asked for")
    assert choose_backend("auto", cuda).backend == "torch"
    with pytest.raises(UserError, match="CUDA"):
        choose_backend("faiss", cuda)
    with pytest.raises(ValueError, match="'annoy'; allowed"):
        choose_backend("annoy", cpu)  # type: ignore[arg-type]
    monkeypatch.setattr(neighbours, "faiss_problem", lambda: None)
    assert choose_backend("auto", cpu, itself=False).backend == "faiss"
    assert "farthest" in choose_backend("auto", cpu, farthest=True).reason
    monkeypatch.setattr(neighbours, "runs_compiled", lambda tensor: False)
    assert choose_backend("auto", cpu).backend == "faiss"
    monkeypatch.setattr(neighbours, "runs_compiled", lambda tensor: True)
    assert choose_backend("auto", cpu).backend == "torch"


def test_missing_faiss_is_said_with_the_cure(monkeypatch):
    monkeypatch.setattr(neighbours, "faiss_problem", neighbours.faiss_problem.__wrapped__)
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(neighbours.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install"):
        choose_backend("faiss", torch.device("cpu"))
    assert "pip install" in choose_backend("auto", torch.device("cpu")).reason


def test_products_are_exact_whatever_is_allowed():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), exact_products():
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_what_is_wrong_is_named():
    features = examples()["random"].astype(np.float32)
    for value in (np.nan, np.inf):
        broken = features.copy()
        broken[17, 3] = value
        with pytest.raises(ValueError, match="features: row 17 is not finite"):
            nearest_neighbours(broken, 3)
    with pytest.raises(ValueError, match="row 2 is too large"):
        nearest_neighbours(np.array([[1.0], [2.0], [1e20]]), 3, metric="sqeuclidean")
    with pytest.raises(ValueError, match="k is 0"):
        nearest_neighbours(features, 0)
    with pytest.raises(ValueError, match="20 dimensions, those they are searched among 4"):
        nearest_neighbours(features, 3, among=np.ones((3, 4)))
    with pytest.raises(ValueError, match=r"shape \(0, 4\)"):
        nearest_neighbours(np.ones((0, 4)), 3)
    with pytest.raises(ValueError, match="metric is 'manhattan'"):
        nearest_neighbours(features, 3, metric="manhattan")  # type: ignore[arg-type]


def test_what_does_not_fit_is_refused_with_the_estimate(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1 << 20)
    claimed = np.broadcast_to(np.float32(1), (10_000_000, 768))
    with pytest.raises(UserError, match=r"10,000,000 features of 768 dimensions needs about 28\.6 GiB, and 0\.0 GiB are free"):
        nearest_neighbours(claimed, 3)


def test_memorys(tmp_path, monkeypatch):
    for name, text in {"memory.max": "1000\n", "memory.current": "700\n", "memory.stat": "anon 1\ninactive_file 200\n"}.items():
        (tmp_path / name).write_text(text)
    assert memory._group_bytes(tmp_path) == 500
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._group_bytes(tmp_path) is None
    assert memory._group_bytes(tmp_path / "none") is None
    assert memory._machine_bytes(tmp_path / "none") is None
    monkeypatch.setattr(memory, "available_bytes", lambda device: None)
    require_memory(1e30, "everything")


@pytest.mark.gpu
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", examples())
def test_equal_on_cuda(name, metric):
    features = torch.from_numpy(examples()[name].astype(np.float32))
    expected, found = nearest_neighbours(features, 20, metric=metric), nearest_neighbours(features.cuda(), 20, metric=metric)
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_array_equal(found.distances, expected.distances)
