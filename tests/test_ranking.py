"""Ranking against a re-derivation in plain Python, on small random sets: ties, missing matches, tiny galleries."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import average_precision_score

from personmae.evaluation.ranking import Labels, Metric, distances, nearest_gallery, score_distances, score_features


def plain_ranking(distance: list[float], person: int, camera: int, gallery: list[tuple[int, int]]) -> list[int]:
    candidates = [g for g in range(len(gallery)) if gallery[g] != (person, camera)]
    return sorted(candidates, key=lambda g: (distance[g], g))


def plain_scores(
    distance: list[float], person: int, camera: int, gallery: list[tuple[int, int]]
) -> tuple[float, float, int]:
    """(average precision, inverse negative penalty, first match) straight from the definitions."""
    ranking = plain_ranking(distance, person, camera, gallery)
    ranks = [rank for rank, g in enumerate(ranking, start=1) if gallery[g][0] == person]
    if not ranks:
        return math.nan, math.nan, -1
    precisions = [sum(other <= rank for other in ranks) / rank for rank in ranks]
    return sum(precisions) / len(precisions), len(ranks) / ranks[-1], ranks[0] - 1


def labels(pairs: list[tuple[int, int]]) -> Labels:
    return Labels(
        np.array([person for person, _ in pairs], np.int64), np.array([camera for _, camera in pairs], np.int64)
    )


people_and_cameras = st.tuples(st.integers(0, 3), st.integers(1, 3))


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]], list[tuple[int, int]]]:
    # Few small integers as coordinates: many features are equal, and many different ones are equally far.
    query = draw(st.lists(people_and_cameras, min_size=1, max_size=5))
    gallery = draw(st.lists(people_and_cameras, min_size=1, max_size=9))
    coordinates = st.integers(-1, 1).map(float)
    query_features = draw(hnp.arrays(np.float32, (len(query), 2), elements=coordinates))
    gallery_features = draw(hnp.arrays(np.float32, (len(gallery), 2), elements=coordinates))
    return query_features, gallery_features, query, gallery


@settings(max_examples=300, deadline=None)
@given(case=cases(), chunk_pairs=st.integers(1, 40))
def test_scores_equal_the_definitions(case: tuple, chunk_pairs: int) -> None:
    query_features, gallery_features, query, gallery = case
    found = score_features(query_features, gallery_features, labels(query), labels(gallery), "euclidean", chunk_pairs)
    nearest = nearest_gallery(
        query_features, gallery_features, labels(query), labels(gallery), 4, "euclidean", chunk_pairs
    )
    for q, (person, camera) in enumerate(query):
        distance = [math.dist(query_features[q].tolist(), row.tolist()) for row in gallery_features]
        precision, penalty, first = plain_scores(distance, person, camera, gallery)
        assert found.average_precision[q] == pytest.approx(precision, abs=1e-12, nan_ok=True)
        assert found.inverse_negative_penalty[q] == pytest.approx(penalty, abs=1e-12, nan_ok=True)
        assert found.first_match[q] == first
        ranking = plain_ranking(distance, person, camera, gallery)
        assert nearest[q].tolist() == (ranking + [-1] * 4)[:4]


@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_cosine_scores_equal_the_definitions(case: tuple) -> None:
    query_features, gallery_features, query, gallery = case

    def cosine_distance(a: list[float], b: list[float]) -> float:
        norm = math.hypot(*a) * math.hypot(*b)
        # Rounded: the definition's ties must not depend on the last bit.
        return round(1 - (sum(x * y for x, y in zip(a, b, strict=True)) / norm if norm else 0.0), 9)

    found = score_features(query_features, gallery_features, labels(query), labels(gallery), "cosine")
    for q, (person, camera) in enumerate(query):
        distance = [cosine_distance(query_features[q].tolist(), row.tolist()) for row in gallery_features]
        exact = distances(query_features[q : q + 1], gallery_features)[0]
        np.testing.assert_allclose(exact, distance, atol=1e-8)
        precision, penalty, first = plain_scores(exact.round(9).tolist(), person, camera, gallery)
        # Vectors of different length and the same direction may differ in the last bit; only then may the ranks differ.
        if len(set(exact.tolist())) == len(set(exact.round(9).tolist())):
            assert found.average_precision[q] == pytest.approx(precision, abs=1e-12, nan_ok=True)
            assert found.inverse_negative_penalty[q] == pytest.approx(penalty, abs=1e-12, nan_ok=True)
            assert found.first_match[q] == first


def test_average_precision_equals_sklearn_without_ties() -> None:
    generator = np.random.default_rng(0)
    distance = generator.permutation(31 * 57).reshape(31, 57).astype(float)
    query = Labels(generator.integers(0, 8, 31), np.ones(31, np.int64))
    gallery = Labels(generator.integers(0, 8, 57), np.full(57, 2, np.int64))
    found = score_distances(distance, query, gallery)
    expected = [average_precision_score(gallery.people == query.people[q], -distance[q]) for q in range(31)]
    np.testing.assert_allclose(found.average_precision, expected, atol=1e-12)


def test_worked_example() -> None:
    # Nearest first: own camera (left out), wrong, right, distractor, right. Ranks of the matches: 2 and 4.
    gallery = labels([(1, 1), (2, 2), (1, 2), (0, 1), (1, 3)])
    found = score_distances(np.array([[0.0, 0.1, 0.2, 0.3, 0.4]]), labels([(1, 1)]), gallery)
    assert found.average_precision[0] == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert found.inverse_negative_penalty[0] == pytest.approx(2 / 4)
    assert found.first_match[0] == 1


def test_of_equal_distances_the_smaller_index_is_first() -> None:
    wrong_first = score_distances(np.zeros((1, 2)), labels([(1, 1)]), labels([(2, 2), (1, 2)]))
    right_first = score_distances(np.zeros((1, 2)), labels([(1, 1)]), labels([(1, 2), (2, 2)]))
    assert (wrong_first.first_match[0], right_first.first_match[0]) == (1, 0)


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


def test_bad_input_is_named() -> None:
    one, query, gallery = np.ones((1, 2)), labels([(1, 1)]), labels([(1, 2), (2, 2), (3, 2)])
    bad = np.ones((3, 2))
    bad[1, 0] = np.nan
    with pytest.raises(ValueError, match="gallery features: row 1 is not finite"):
        score_features(one, bad, query, gallery)
    with pytest.raises(ValueError, match="query features: row 0 is not finite"):
        score_features(one * np.inf, np.ones((3, 2)), query, gallery)
    with pytest.raises(ValueError, match="2 gallery features, but labels of 3"):
        score_features(one, np.ones((2, 2)), query, gallery)
    with pytest.raises(ValueError, match="2 dimensions, gallery features 5"):
        score_features(one, np.ones((3, 5)), query, gallery)
    with pytest.raises(ValueError, match=r"shape \(0, 2\)"):
        distances(np.ones((0, 2)), one)
    with pytest.raises(ValueError, match="metric is 'manhattan'"):
        distances(one, one, "manhattan")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="distances of query 0"):
        score_distances(np.full((1, 3), np.nan), query, gallery)
    with pytest.raises(ValueError, match=r"shape \(1, 2\)"):
        score_distances(np.zeros((1, 2)), query, gallery)
    with pytest.raises(ValueError, match="image 1 is of person -1"):
        labels([(1, 1), (-1, 1)])
    with pytest.raises(ValueError, match="one number for each image"):
        Labels(np.zeros(2, np.int64), np.zeros(3, np.int64))
