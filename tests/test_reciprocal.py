"""Sparse Jaccard distances, re-ranking and clusters against the dense definition, on random, clustered and adversarial features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dense_jaccard import dense_distances, dense_jaccard, dense_reranked, dense_vectors
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.sparse import csr_array
from sklearn.cluster import DBSCAN

from personmae.configs import UserError
from personmae.evaluation import memory, neighbours, reciprocal
from personmae.evaluation.clustering import cluster, cluster_each
from personmae.evaluation.reciprocal import Reciprocal, jaccard_distances, jaccard_of, least_sum
from personmae.evaluation.reranking import reranked_distances
from personmae_kernels import compiled, launching
from personmae_kernels.jaccard import ONE

FORMS = ["reference", pytest.param("compiled", marks=pytest.mark.skipif(not compiled.available(), reason=compiled.why_missing()))]
CUT = 0.7
# (definition, metric, resquare)
VARIANTS = [
    ("classic", "cosine", False),
    ("classic", "sqeuclidean", False),
    ("classic", "sqeuclidean", True),
    ("fast-reid", "cosine", False),
    ("fast-reid", "sqeuclidean", False),
]
NEIGHBOURS = [(30, 6), (20, 6), (7, 3), (5, 1), (1, 1)]


@pytest.fixture(params=FORMS)
def form(request):
    launching.use_operators(request.param)
    yield request.param
    launching.use_operators(None)


def examples() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    centres = np.repeat(generator.normal(size=(9, 16)), 12, axis=0)
    found = {
        "random": generator.normal(size=(90, 20)),
        "clustered": centres + 0.5 * generator.normal(size=centres.shape),
        "ties": generator.integers(-1, 2, (90, 3)).astype(float),
        "copies": np.repeat(generator.normal(size=(4, 20)), 24, axis=0),
        "nearly copies": centres + 1e-7 * generator.normal(size=centres.shape),
        "some zeros": np.where(np.arange(108)[:, None] % 9 == 0, 0, centres),
        "all equal": np.ones((70, 4)),
        "all zero": np.zeros((40, 4)),
        "two": generator.normal(size=(2, 5)),
        "one": np.ones((1, 3)),
    }
    return {name: features.astype(np.float32) for name, features in found.items()}


def dense_of(graph: csr_array) -> np.ndarray:
    dense = np.full(graph.shape, np.inf)
    dense[np.repeat(np.arange(graph.shape[0]), np.diff(graph.indptr)), graph.indices] = graph.data
    return dense


def check_pairs(graph: csr_array, expected: np.ndarray, cut: float = CUT) -> None:
    """Every pair at most the cut is there with its distance, and no other; but for rounding just at the cut."""
    found = dense_of(graph)
    stored = np.isfinite(found)
    assert (stored | (expected > cut - 1e-6)).all()
    assert (expected[stored] <= cut + 1e-6).all()
    np.testing.assert_allclose(found[stored], expected[stored], atol=2e-6)


@pytest.mark.parametrize(("definition", "metric", "resquare"), VARIANTS)
@pytest.mark.parametrize("name", examples())
def test_pairs_and_labels_equal_the_dense_definition(name, definition, metric, resquare, form, monkeypatch):
    monkeypatch.setattr(reciprocal, "ROWS_AT_ONCE", 50)
    monkeypatch.setitem(neighbours.TILE_SIDE, "cpu", 32)
    features = examples()[name]
    distance = dense_distances(features, metric)
    for k1, k2 in NEIGHBOURS:
        expected = dense_jaccard(dense_vectors(distance, k1, k2, definition, metric=metric, resquare=resquare))
        graph = jaccard_distances(features, cut=CUT, k1=k1, k2=k2, definition=definition, metric=metric, resquare=resquare)
        check_pairs(graph, expected)
        assert np.array_equal(dense_of(graph), dense_of(graph).T)
        for clusters in cluster_each(graph, [0.3, 0.55, CUT]):
            labels = DBSCAN(eps=clusters.eps, min_samples=4, metric="precomputed").fit(expected.astype(np.float32)).labels_
            np.testing.assert_array_equal(clusters.labels, labels)
            assert (clusters.num_clusters, clusters.num_outliers) == (labels.max() + 1, (labels == -1).sum())


@pytest.mark.parametrize(("definition", "metric", "resquare"), VARIANTS)
@pytest.mark.parametrize("name", [name for name, features in examples().items() if len(features) > 1])
def test_reranked_equal_the_dense_definition(name, definition, metric, resquare, form):
    features = examples()[name]
    query, gallery = features[: len(features) // 3 + 1], features[len(features) // 3 + 1 :]
    for k1, k2 in NEIGHBOURS[1:4]:
        expected = dense_reranked(query, gallery, k1, k2, 0.3, definition, metric, resquare)
        for rows_at_once in (None, 7):
            tiles = list(
                reranked_distances(
                    query, gallery, k1=k1, k2=k2, definition=definition, metric=metric, resquare=resquare, rows_at_once=rows_at_once, backend="torch"
                )
            )
            assert [part.start for part, _ in tiles[1:]] == [part.stop for part, _ in tiles[:-1]]
            assert (tiles[0][0].start, tiles[-1][0].stop) == (0, len(query))
            found = np.concatenate([tile for _, tile in tiles])
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=5e-6)


def test_weight_one_is_the_original_distance_and_weight_zero_the_jaccard_distance():
    features = examples()["clustered"]
    for weight in (0.0, 1.0):
        expected = dense_reranked(features[:40], features[40:], 20, 6, weight, "fast-reid", "cosine")
        ((_, found),) = reranked_distances(features[:40], features[40:], weight=weight, definition="fast-reid")
        np.testing.assert_allclose(found, expected, atol=3e-6)


@pytest.mark.parametrize("definition", ["classic", "fast-reid"])
def test_gallery_of_one(definition):
    for query in (np.ones((1, 4)), np.eye(4)):
        ((_, tile),) = reranked_distances(query, np.ones((1, 4)), definition=definition)
        expected = dense_reranked(query, np.ones((1, 4)), 20, 6, 0.3, definition, "cosine")
        np.testing.assert_allclose(tile, expected, atol=3e-6)


@settings(max_examples=120, deadline=None)
@given(
    features=hnp.arrays(np.float32, st.tuples(st.integers(1, 30), st.integers(1, 3)), elements=st.integers(-2, 2).map(float)),
    k1=st.integers(1, 12),
    k2=st.integers(1, 12),
    variant=st.sampled_from(VARIANTS),
    eps=st.sampled_from([0.2, 0.5, 0.69]),
    min_samples=st.integers(1, 5),
)
def test_small_integers(features, k1, k2, variant, eps, min_samples):
    definition, metric, resquare = variant
    k2 = min(k1, k2)
    expected = dense_jaccard(dense_vectors(dense_distances(features, metric), k1, k2, definition, metric=metric, resquare=resquare))
    graph = jaccard_distances(features, cut=CUT, k1=k1, k2=k2, definition=definition, metric=metric, resquare=resquare)
    check_pairs(graph, expected)
    # A distance that is eps but for rounding may fall on either side.
    if (np.abs(expected - eps) > 1e-6).all():
        labels = DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed").fit(expected).labels_
        np.testing.assert_array_equal(cluster(graph, eps=eps, min_samples=min_samples).labels, labels)


def test_tiles_and_forms_and_backends_agree_to_the_bit(monkeypatch):
    features = np.concatenate([examples()["clustered"], examples()["clustered"][::3], np.random.default_rng(1).normal(size=(200, 16))])
    found = []
    forms = ["reference", "compiled"] if compiled.available() else ["reference"]
    try:
        for form in forms:
            launching.use_operators(form)  # type: ignore[arg-type]
            for side, rows in ((16, 7), (100, 100), (4096, 4096)):
                monkeypatch.setitem(neighbours.TILE_SIDE, "cpu", side)
                monkeypatch.setattr(reciprocal, "ROWS_AT_ONCE", rows)
                for backend in ("torch", "faiss") if neighbours.faiss_problem() is None else ("torch",):
                    found.append(jaccard_distances(features, cut=CUT, backend=backend))
    finally:
        launching.use_operators(None)
    for graph in found[1:]:
        for name in ("indptr", "indices", "data"):
            np.testing.assert_array_equal(getattr(graph, name), getattr(found[0], name))


def test_published_numbers_of_neighbours():
    classic, fast_reid = ([Reciprocal(name, k1, 1) for k1 in (20, 30, 5, 7, 1)] for name in ("classic", "fast-reid"))  # type: ignore[arg-type]
    assert [(part.num_neighbours, part.num_half) for part in classic] == [(21, 11), (31, 16), (6, 3), (8, 5), (2, 1)]
    assert [(part.num_neighbours, part.num_half) for part in fast_reid] == [(20, 11), (30, 16), (5, 3), (7, 5), (1, 1)]


@pytest.mark.parametrize("cut", [0.0, 0.1, 0.5, 0.6, 0.7, 0.999])
def test_least_sum_is_the_first_within_the_cut(cut):
    least = least_sum(cut)
    assert jaccard_of(torch.tensor(least)).item() <= np.float32(cut)
    assert jaccard_of(torch.tensor(least - 1)).item() > np.float32(cut)
    assert jaccard_of(torch.tensor([0, ONE, ONE + 50])).tolist() == [1, 0, 0]


def test_a_point_that_is_not_near_itself():
    """Its distance to itself is beyond the cut and so not stored; scikit-learn would take that for 0."""
    graph = csr_array((np.float32([0.0, 0.1, 0.1, 0.0]), ([0, 0, 1, 1], [0, 1, 0, 1])), shape=(3, 3))
    assert cluster(graph, eps=0.5, min_samples=1).labels.tolist() == [0, 0, -1]
    assert graph.nnz == 4


def test_what_is_wrong_is_named():
    features = examples()["random"]
    with pytest.raises(ValueError, match="k1 is 5 and k2 is 6"):
        jaccard_distances(features, cut=0.5, k1=5, k2=6)
    with pytest.raises(ValueError, match="cut is 1"):
        jaccard_distances(features, cut=1)
    with pytest.raises(ValueError, match="definition is 'zhong'"):
        jaccard_distances(features, cut=0.5, definition="zhong")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="resquare belongs to"):
        jaccard_distances(features, cut=0.5, resquare=True)
    broken = features.copy()
    broken[5] = np.nan
    with pytest.raises(ValueError, match="gallery features: row 5 is not finite"):
        reranked_distances(features, broken)
    with pytest.raises(ValueError, match="20 dimensions, gallery features 3"):
        reranked_distances(features, np.ones((4, 3)))
    with pytest.raises(ValueError, match="gallery features have shape"):
        reranked_distances(features, np.ones((0, 20)))
    with pytest.raises(ValueError, match=r"weight is 1\.5"):
        reranked_distances(features, features, weight=1.5)
    with pytest.raises(ValueError, match="rows_at_once is 0"):
        reranked_distances(features, features, rows_at_once=0)
    graph = jaccard_distances(features, cut=0.5)
    with pytest.raises(ValueError, match="eps is 0"):
        cluster(graph, eps=0)
    with pytest.raises(ValueError, match="min_samples is 0"):
        cluster(graph, eps=0.5, min_samples=0)
    with pytest.raises(ValueError, match="shape"):
        cluster(graph[:3], eps=0.5)


def test_pairs_that_outgrow_the_memory_are_refused(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1 << 40)
    monkeypatch.setattr(reciprocal, "available_bytes", lambda device: 20_000)
    with pytest.raises(UserError, match=r"about 4,900 pairs of images are within a Jaccard distance of 0\.5, 70 for each image"):
        jaccard_distances(np.ones((70, 4)), cut=0.5)


@pytest.mark.gpu
@pytest.mark.parametrize(("definition", "metric", "resquare"), VARIANTS)
@pytest.mark.parametrize("name", examples())
def test_equal_on_cuda(name, definition, metric, resquare):
    features = torch.from_numpy(examples()[name])
    expected, found = (
        jaccard_distances(part, cut=CUT, definition=definition, metric=metric, resquare=resquare) for part in (features, features.cuda())
    )
    np.testing.assert_array_equal(found.indices, expected.indices)
    # exp rounds differently there, by a unit of 2^-30 at most.
    np.testing.assert_allclose(found.data, expected.data, atol=1e-6)
