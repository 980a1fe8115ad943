"""Ranking against a re-derivation in plain Python, on small random sets: ties, missing matches, tiny galleries."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import average_precision_score

from personmae.configs import UserError
from personmae.evaluation import memory
from personmae.evaluation.distances import distances
from personmae.evaluation.measures import measure_queries
from personmae.evaluation.ranking import (
    Labels,
    LeaveOut,
    MatchRanks,
    Metric,
    match_ranks,
    match_ranks_of_distances,
    nearest_gallery,
)
from personmae_kernels import compiled, launching, match_places_reference


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
@given(case=cases())
def test_scores_equal_the_definitions(case: tuple) -> None:
    query_features, gallery_features, query, gallery = case
    found = measure_queries(match_ranks(query_features, gallery_features, labels(query), labels(gallery), "euclidean"))
    nearest = nearest_gallery(query_features, gallery_features, labels(query), labels(gallery), 4, "euclidean")
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

    found = measure_queries(match_ranks(query_features, gallery_features, labels(query), labels(gallery), "cosine"))
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


FIELDS = ("offsets", "match", "distance", "closer", "tied_before", "tied_after", "num_kept")
TILES = [(1, 1), (7, 7), None]
FORMS = [
    "reference",
    pytest.param("compiled", marks=pytest.mark.skipif(not compiled.available(), reason=compiled.why_missing())),
]


def sorted_ranks(distance: np.ndarray, query: Labels, gallery: Labels, leave_out: LeaveOut = "same-camera") -> MatchRanks:
    """The definition, on the full matrix by a stable sort of each row."""
    columns: dict[str, list] = {name: [] for name in FIELDS}
    columns["offsets"].append(0)
    for q in range(len(query)):
        same = gallery.people == query.people[q]
        left_out = same & (gallery.cameras == query.cameras[q]) if leave_out == "same-camera" else np.zeros_like(same)
        images = np.flatnonzero(~left_out)
        images = images[np.argsort(distance[q, images], kind="stable")]
        row = distance[q, images]
        for place in np.flatnonzero(same[images]):
            columns["match"].append(images[place])
            columns["distance"].append(row[place])
            columns["closer"].append(np.sum(row < row[place]))
            columns["tied_before"].append(np.sum(row[:place] == row[place]))
            columns["tied_after"].append(np.sum(row[place + 1 :] == row[place]))
        columns["offsets"].append(len(columns["match"]))
        columns["num_kept"].append(len(images))
    arrays: dict[str, Any] = {name: np.array(values, np.float64 if name == "distance" else np.int64) for name, values in columns.items()}
    return MatchRanks(**arrays)


def assert_equal_ranks(found: MatchRanks, wanted: MatchRanks) -> None:
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name), err_msg=name)
        assert getattr(found, name).dtype == getattr(wanted, name).dtype, name


def sorted_nearest(distance: np.ndarray, query: Labels, gallery: Labels, num: int) -> np.ndarray:
    pairs = list(zip(gallery.people.tolist(), gallery.cameras.tolist(), strict=True))
    rankings = [
        plain_ranking(distance[q].tolist(), int(query.people[q]), int(query.cameras[q]), pairs) for q in range(len(query))
    ]
    return np.array([(ranking + [-1] * num)[:num] for ranking in rankings])


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=60, deadline=None)
@given(case=cases(), metric=st.sampled_from(["cosine", "euclidean"]), leave_out=st.sampled_from(["same-camera", "nothing"]))
def test_ranks_equal_a_stable_sort_whatever_the_tile(form: str, case: tuple, metric: Metric, leave_out: LeaveOut) -> None:
    query_features, gallery_features, *pairs = case
    query, gallery = map(labels, pairs)
    exact = distances(query_features, gallery_features, metric)
    wanted = sorted_ranks(exact, query, gallery, leave_out)
    launching.use_operators(form)  # type: ignore[arg-type]
    try:
        for tile in TILES:
            found = match_ranks(query_features, gallery_features, query, gallery, metric, leave_out=leave_out, tile=tile)
            assert_equal_ranks(found, wanted)
        for matrix in (exact, np.asfortranarray(exact), torch.from_numpy(exact)):
            assert_equal_ranks(match_ranks_of_distances(matrix, query, gallery, leave_out=leave_out), wanted)
    finally:
        launching.use_operators(None)


def clustered(kind: str, num_queries: int = 40, num_gallery: int = 700, width: int = 37) -> tuple[np.ndarray, np.ndarray, Labels, Labels]:
    generator = np.random.default_rng(5)
    query, gallery = (
        Labels(generator.integers(0, 12, num) * 10**17, generator.integers(-3, 3, num)) for num in (num_queries, num_gallery)
    )
    centres = generator.normal(size=(12, width))
    features = [
        centres[part.people // 10**17] + 2 * generator.normal(size=(len(part), width)) for part in (query, gallery)
    ]
    if kind == "far mean":
        features = [part + 1e5 for part in features]
    elif kind == "whole numbers":
        features = [part.round() for part in features]
    elif kind == "duplicates":
        features = [part[generator.integers(0, len(part) // 4, len(part))] for part in features]
        features[0][:20] = features[1][:20]
    elif kind == "collapsed":
        features = [np.full_like(part, 0.1) for part in features]
    elif kind == "nearly collapsed":
        features = [1 + 1e-4 * part for part in features]
    elif kind == "zeros":
        for part in features:
            part[::3] = 0
    elif kind == "one far away":
        features[1][13] *= 1e30
    return features[0].astype(np.float32), features[1].astype(np.float32), query, gallery


KINDS = ["clusters", "far mean", "whole numbers", "duplicates", "collapsed", "nearly collapsed", "zeros", "one far away"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_and_nearest_of_larger_sets(kind: str, metric: Metric, form: str) -> None:
    query_features, gallery_features, query, gallery = clustered(kind)
    exact = distances(query_features, gallery_features, metric)
    wanted = sorted_ranks(exact, query, gallery)
    launching.use_operators(form)  # type: ignore[arg-type]
    try:
        for tile in ((7, 100), None):
            assert_equal_ranks(match_ranks(query_features, gallery_features, query, gallery, metric, tile=tile), wanted)
            for num in (1, 10, 800):
                nearest = nearest_gallery(query_features, gallery_features, query, gallery, num, metric, tile=tile)
                np.testing.assert_array_equal(nearest, sorted_nearest(exact, query, gallery, num))
    finally:
        launching.use_operators(None)


def test_ranks_do_not_depend_on_where_an_image_stands() -> None:
    query_features, gallery_features, query, gallery = clustered("duplicates")
    ranks = match_ranks(query_features, gallery_features, query, gallery)
    order = np.random.default_rng(6).permutation(len(gallery))
    moved = match_ranks(query_features, gallery_features[order], query, Labels(gallery.people[order], gallery.cameras[order]))
    np.testing.assert_array_equal(moved.distance, ranks.distance)
    np.testing.assert_array_equal(moved.closer, ranks.closer)
    np.testing.assert_array_equal(moved.tied_before + moved.tied_after, ranks.tied_before + ranks.tied_after)


def test_few_pairs_are_computed_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the speed is gone, and no result would show it."""
    num_pairs = [0]
    compute = match_places_reference.pair_distances

    def count(*arguments: object) -> torch.Tensor:
        num_pairs[0] += len(arguments[4])  # type: ignore[arg-type]
        return compute(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(match_places_reference, "pair_distances", count)
    launching.use_operators("reference")
    try:
        for kind in ("clusters", "far mean", "nearly collapsed"):
            features = clustered(kind, num_gallery=3000, width=64)
            num_pairs[0] = 0
            match_ranks(*features, "euclidean")
            assert num_pairs[0] < 0.25 * 40 * 3000, kind
            num_pairs[0] = 0
            nearest_gallery(*features, 10, "euclidean")
            assert num_pairs[0] < 0.05 * 40 * 3000, kind
    finally:
        launching.use_operators(None)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32, np.uint8])
def test_a_matrix_of_any_dtype(dtype: type) -> None:
    _, _, query, gallery = clustered("clusters")
    distance: np.ndarray = np.random.default_rng(7).integers(0, 90, (len(query), len(gallery))).astype(dtype)
    wanted = sorted_ranks(distance.astype(np.float64), query, gallery)
    assert_equal_ranks(match_ranks_of_distances(distance, query, gallery), wanted)
    assert_equal_ranks(match_ranks_of_distances(distance[:, ::-1][:, ::-1], query, gallery), wanted)
    if dtype is np.float16:
        assert_equal_ranks(match_ranks_of_distances(torch.from_numpy(distance).bfloat16(), query, gallery), wanted)


def test_infinite_distances_tie() -> None:
    distance = np.array([[np.inf, 1, np.inf, -np.inf, np.inf]])
    query, gallery = labels([(1, 1)]), labels([(2, 2), (3, 2), (1, 2), (1, 3), (4, 1)])
    assert_equal_ranks(match_ranks_of_distances(distance, query, gallery), sorted_ranks(distance, query, gallery))


def test_chunks_of_queries_are_joined() -> None:
    query_features, gallery_features, query, gallery = clustered("whole numbers")
    parts = [
        match_ranks(query_features[rows], gallery_features, Labels(query.people[rows], query.cameras[rows]), gallery)
        for rows in (slice(0, 1), slice(1, 19), slice(19, 40))
    ]
    assert_equal_ranks(MatchRanks.concatenate(parts), match_ranks(query_features, gallery_features, query, gallery))


def test_small_and_odd_sets() -> None:
    one, largest = np.ones((1, 2), np.float32), 2**63 - 1
    query = Labels(np.array([largest]), np.array([-(2**63)]))
    alone = match_ranks(one, one, query, Labels(np.array([largest]), np.array([largest])))
    assert (alone.rank.tolist(), alone.num_kept.tolist()) == ([1], [1])
    # The only image is left out: no match, and nothing is near.
    for gallery in (query, Labels(np.array([largest - 1]), np.array([0]))):
        none = match_ranks(one, one, query, gallery)
        assert none.num_matches.tolist() == [0]
        assert math.isnan(measure_queries(none).average_precision[0])
    assert match_ranks(one, one, query, query).num_kept.tolist() == [0]
    assert match_ranks(one, one, query, query, leave_out="nothing").rank.tolist() == [1]
    assert nearest_gallery(one, one, query, query, 3).tolist() == [[-1, -1, -1]]
    assert nearest_gallery(one, one, query, query, 3, leave_out="nothing").tolist() == [[0, -1, -1]]
    empty = match_ranks_of_distances(np.zeros((2, 0)), labels([(1, 1), (2, 1)]), labels([]))
    assert empty.num_matches.tolist() == [0, 0]
    assert len(match_ranks_of_distances(np.zeros((0, 3)), labels([]), labels([(1, 1)] * 3)).num_kept) == 0


def test_more_pairs_than_fit_are_refused_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2**34)
    rows = np.broadcast_to(np.float32(1), (10_000_000, 1))
    everybody = Labels(np.broadcast_to(np.int64(1), 10_000_000), np.broadcast_to(np.int64(1), 10_000_000))
    with pytest.raises(UserError, match=r"100,000,000,000,000 pairs .* needs about [\d,.]+ GiB, and 16\.0 GiB"):
        match_ranks(rows, rows, everybody, everybody)


def test_average_precision_equals_sklearn_without_ties() -> None:
    generator = np.random.default_rng(0)
    distance = generator.permutation(31 * 57).reshape(31, 57).astype(float)
    query = Labels(generator.integers(0, 8, 31), np.ones(31, np.int64))
    gallery = Labels(generator.integers(0, 8, 57), np.full(57, 2, np.int64))
    found = measure_queries(match_ranks_of_distances(distance, query, gallery))
    expected = [average_precision_score(gallery.people == query.people[q], -distance[q]) for q in range(31)]
    np.testing.assert_allclose(found.average_precision, expected, atol=1e-12)


def test_worked_example() -> None:
    # Nearest first: own camera (left out), wrong, right, distractor, right. Ranks of the matches: 2 and 4.
    gallery = labels([(1, 1), (2, 2), (1, 2), (0, 1), (1, 3)])
    found = measure_queries(match_ranks_of_distances(np.array([[0.0, 0.1, 0.2, 0.3, 0.4]]), labels([(1, 1)]), gallery))
    assert found.average_precision[0] == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert found.inverse_negative_penalty[0] == pytest.approx(2 / 4)
    assert found.first_match[0] == 1


def test_of_equal_distances_the_smaller_index_is_first() -> None:
    wrong_first = measure_queries(match_ranks_of_distances(np.zeros((1, 2)), labels([(1, 1)]), labels([(2, 2), (1, 2)])))
    right_first = measure_queries(match_ranks_of_distances(np.zeros((1, 2)), labels([(1, 1)]), labels([(1, 2), (2, 2)])))
    assert (wrong_first.first_match[0], right_first.first_match[0]) == (1, 0)


def test_bad_input_is_named() -> None:
    one, query, gallery = np.ones((1, 2)), labels([(1, 1)]), labels([(1, 2), (2, 2), (3, 2)])
    bad = np.ones((3, 2))
    bad[1, 0] = np.nan
    with pytest.raises(ValueError, match="gallery features: row 1 is not finite"):
        measure_queries(match_ranks(one, bad, query, gallery))
    with pytest.raises(ValueError, match="query features: row 0 is not finite"):
        measure_queries(match_ranks(one * np.inf, np.ones((3, 2)), query, gallery))
    with pytest.raises(ValueError, match="2 gallery features, but labels of 3"):
        measure_queries(match_ranks(one, np.ones((2, 2)), query, gallery))
    with pytest.raises(ValueError, match="2 dimensions, gallery features 5"):
        measure_queries(match_ranks(one, np.ones((3, 5)), query, gallery))
    with pytest.raises(ValueError, match=r"gallery features have shape \(0, 2\)"):
        match_ranks(one, np.ones((0, 2)), query, labels([]))
    with pytest.raises(ValueError, match="metric is 'manhattan'"):
        match_ranks(one, np.ones((3, 2)), query, gallery, "manhattan")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="leave_out is 'junk'"):
        match_ranks(one, np.ones((3, 2)), query, gallery, leave_out="junk")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_nearest is 0"):
        nearest_gallery(one, np.ones((3, 2)), query, gallery, 0)
    with pytest.raises(ValueError, match="no parts"):
        MatchRanks.concatenate([])
    with pytest.raises(ValueError, match="distances of query 0"):
        measure_queries(match_ranks_of_distances(np.full((1, 3), np.nan), query, gallery))
    late = np.zeros((9, 3), np.float16)
    late[7, 2] = np.nan
    with pytest.raises(ValueError, match="distances of query 7"):
        match_ranks_of_distances(late, labels([(1, 1)] * 9), gallery)
    with pytest.raises(ValueError, match=r"shape \(1, 2\)"):
        measure_queries(match_ranks_of_distances(np.zeros((1, 2)), query, gallery))
    with pytest.raises(ValueError, match="image 1 is of person -1"):
        labels([(1, 1), (-1, 1)])
    with pytest.raises(ValueError, match="one number for each image"):
        Labels(np.zeros(2, np.int64), np.zeros(3, np.int64))
