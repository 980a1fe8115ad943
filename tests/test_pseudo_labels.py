"""Pseudo labels: the clusters of the dense definition, their quality by plain counting, and what is advised where there are none."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import DBSCAN
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from personmae.configs import UserError
from personmae.evaluation.clustering import Clusters
from personmae.evaluation.pseudo_labels import (
    PseudoLabelConfig,
    advice,
    eps_around,
    eps_table,
    find_clusters,
    find_each,
    label_quality,
)
from personmae.evaluation.reciprocal import jaccard_distances


def blobs(num_people: int = 12, each: int = 10, width: int = 24, spread: float = 0.25, seed: int = 0):
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((num_people, width))
    people = np.repeat(np.arange(num_people), each)
    return (centres[people] + spread * rng.standard_normal((len(people), width))).astype(np.float32), people


def test_clusters_are_those_of_the_dense_matrix():
    features, people = blobs(spread=0.5)
    config = PseudoLabelConfig(eps=0.55, min_samples=3, k1=9, k2=3)
    # All pairs within 1 but for those at 1, which no eps below reaches.
    dense = jaccard_distances(features, cut=0.999, k1=9, k2=3).toarray()
    stored = jaccard_distances(features, cut=0.999, k1=9, k2=3).astype(bool).toarray() | np.eye(len(features), dtype=bool)
    dense[~stored] = 1.0
    np.fill_diagonal(dense, 0)
    expected = DBSCAN(eps=0.55, min_samples=3, metric="precomputed").fit(dense).labels_
    found = find_clusters(features, config)
    assert np.array_equal(found.labels, expected)
    assert label_quality(found.labels, people).purity > 0.9
    each = find_each(features, [0.3, 0.55, 0.7], config)
    assert np.array_equal(each[1].labels, expected)
    assert each[0].num_outliers >= each[1].num_outliers >= each[2].num_outliers


def test_few_images_have_fewer_neighbours_than_asked():
    features, _ = blobs(2, 5)
    assert find_clusters(features, PseudoLabelConfig()).num_clusters >= 1
    with pytest.raises(UserError, match="1 images cannot be clustered"):
        find_clusters(features[:1], PseudoLabelConfig())


labellings = st.integers(2, 40).flatmap(
    lambda size: st.tuples(st.lists(st.integers(-1, 5), min_size=size, max_size=size), st.lists(st.integers(0, 6), min_size=size, max_size=size))
)


@settings(max_examples=150, deadline=None)
@given(drawn=labellings, shift=st.integers(1, 5))
def test_quality_by_plain_counting(drawn, shift):
    raw, people = np.array(drawn[0]), np.array(drawn[1])
    # Clusters have numbers without gaps.
    names = {name: number for number, name in enumerate(sorted({int(name) for name in raw if name >= 0}))}
    labels = np.array([names[int(name)] if name >= 0 else -1 for name in raw])
    found = label_quality(labels, people)
    inside = labels >= 0
    assert found.clustered == pytest.approx(inside.mean())
    if not inside.any():
        assert np.isnan(found.nmi)
        assert np.isnan(found.purity)
        return
    right = sum(Counter(people[labels == cluster].tolist()).most_common(1)[0][1] for cluster in names.values())
    assert found.purity == pytest.approx(right / inside.sum())
    assert found.nmi == pytest.approx(normalized_mutual_info_score(people[inside], labels[inside]))
    assert found.ari == pytest.approx(adjusted_rand_score(people[inside], labels[inside]))
    # Names of clusters and people mean nothing.
    turned = np.where(inside, (labels + shift) % len(names), -1)
    other = label_quality(turned, people * 1000 + 7)
    assert (other.nmi, other.ari, other.purity) == pytest.approx((found.nmi, found.ari, found.purity))


def test_the_table_of_eps():
    assert eps_around(0.6) == [0.4, 0.5, 0.55, 0.6, 0.65, 0.7]
    assert eps_around(0.05) == [0.05, 0.1, 0.15]
    assert eps_around(0.95) == [0.75, 0.85, 0.9, 0.95]
    table = eps_table([Clusters(np.array([0, 0, 1, 1, 1, -1]), 0.5, 4), Clusters(np.full(6, -1), 0.1, 4)]).splitlines()
    assert table[1].split() == ["0.5", "2", "2.5", "3", "16.7%"]
    assert table[2].split() == ["0.1", "0", "-", "-", "100.0%"]


def test_advice():
    assert advice(Clusters(np.arange(8), 0.5, 4), 8) is None
    assert "all 6 images outliers: raise --pseudo.eps" in advice(Clusters(np.full(6, -1), 0.1, 4), 2)
    assert "one cluster of 6 images: lower" in advice(Clusters(np.zeros(6, int), 0.9, 4), 2)
    assert "fewer than the 8 of a batch (75% of the images are outliers): raise" in advice(Clusters(np.array([0, 1] + [-1] * 6), 0.3, 4), 8)
    assert "lower --pseudo.eps" in advice(Clusters(np.array([0, 1] * 4), 0.9, 4), 8)


@pytest.mark.parametrize("wrong", [{"eps": 0.0}, {"eps": 1.0}, {"min_samples": 0}, {"k1": 0}])
def test_mistakes(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        PseudoLabelConfig(**wrong)
