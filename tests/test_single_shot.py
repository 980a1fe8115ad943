"""Single-gallery-shot CMC: the exact expectation against all choices tried one by one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from personmae.evaluation import single_shot
from personmae.evaluation.ranking import Labels
from personmae.evaluation.single_shot import sampled_shot_curves, single_shot_curves

MAX_RANK = 4


def labels(pairs) -> Labels:
    return Labels(np.array([person for person, _ in pairs], np.int64), np.array([camera for _, camera in pairs], np.int64))


def all_choices(distance, own, gallery, ties):
    """The mean curve over every way to choose one image of each person."""
    kept = [g for g in range(len(gallery)) if gallery[g] != own]
    by_person = {}
    for g in kept:
        by_person.setdefault(gallery[g][0], []).append(g)
    if own[0] not in by_person:
        return [0.0] * MAX_RANK
    sign = 1 if ties == "by index" else -1
    curves = []
    for choice in itertools.product(*by_person.values()):
        ranking = sorted(choice, key=lambda g: (distance[g], sign * g))
        rank = [gallery[g][0] for g in ranking].index(own[0])
        curves.append([float(rank <= k) for k in range(MAX_RANK)])
    return np.mean(curves, axis=0)


image = st.tuples(st.integers(0, 4), st.integers(1, 2))


@settings(max_examples=150, deadline=None)
@given(
    query=st.lists(image, min_size=1, max_size=3),
    gallery=st.lists(image, min_size=1, max_size=9),
    ties=st.sampled_from(["by index", "reversed"]),
    table_size=st.sampled_from([1, 20, 10**6]),
    data=st.data(),
)
def test_the_expectation_is_the_mean_over_all_choices(query, gallery, ties, table_size, data):
    row = st.lists(st.integers(0, 4), min_size=len(gallery), max_size=len(gallery))
    distance = np.array([data.draw(row) for _ in query], np.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(single_shot, "_TABLE_SIZE", table_size)
        found = single_shot_curves(distance, labels(query), labels(gallery), MAX_RANK, ties)
    for q, own in enumerate(query):
        np.testing.assert_allclose(found[q], all_choices(distance[q], own, gallery, ties), atol=1e-12)


def test_one_image_a_person_needs_no_draws():
    generator = np.random.default_rng(0)
    query, gallery = labels([(p, 1) for p in range(20)]), labels([(p, 2) for p in range(25)])
    distance = generator.uniform(size=(20, 25))
    exact = single_shot_curves(distance, query, gallery, 10)
    drawn = sampled_shot_curves(distance, query, gallery, 10, num_repeats=3, generator=np.random.RandomState(0))
    rank = (distance < distance[np.arange(20), np.arange(20)][:, None]).sum(axis=1)
    np.testing.assert_allclose(exact, rank[:, None] <= np.arange(10), atol=1e-12)
    np.testing.assert_allclose(exact, drawn, atol=1e-12)


def test_tiles_of_queries_change_neither_form():
    generator = np.random.default_rng(1)
    pairs = [(int(p), int(c)) for p, c in zip(generator.integers(0, 6, 40), generator.integers(1, 4, 40), strict=True)]
    query, gallery, distance = labels(pairs[:12]), labels(pairs[12:]), generator.uniform(size=(12, 28))
    draws = np.random.RandomState(5)
    whole = sampled_shot_curves(distance, query, gallery, 6, num_repeats=4, generator=np.random.RandomState(5))
    parts, exact = [], []
    for rows in (slice(0, 5), slice(5, 12)):
        part = Labels(query.people[rows], query.cameras[rows])
        parts.append(sampled_shot_curves(distance[rows], part, gallery, 6, num_repeats=4, generator=draws))
        exact.append(single_shot_curves(distance[rows], part, gallery, 6))
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_allclose(np.concatenate(exact), single_shot_curves(distance, query, gallery, 6), atol=1e-15)
