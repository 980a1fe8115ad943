"""Bootstrap intervals: the vectorised form against a slow loop over the same draws, what they cover, and their speed."""

from __future__ import annotations

import time

import numpy as np
import pytest

from personmae.evaluation.confidence import Bootstrap, bootstrap_intervals


def test_intervals_equal_a_slow_loop():
    generator = np.random.default_rng(0)
    people = generator.choice([3, 7, 8, 20, 10**12], 40)
    values = {"a": generator.uniform(size=40), "b": generator.integers(0, 2, 40).astype(float)}
    found = bootstrap_intervals(values, people, Bootstrap(num_resamples=50, level=0.8, seed=4))
    names = np.unique(people)
    draws = np.random.default_rng(4)
    means = {"a": [], "b": []}
    for row in draws.integers(0, len(names), (50, len(names))):
        chosen = np.concatenate([np.flatnonzero(people == names[number]) for number in row])
        for name, value in values.items():
            means[name].append(value[chosen].mean())
    for name in values:
        np.testing.assert_allclose(found.intervals[name], np.quantile(means[name], [0.1, 0.9]), atol=1e-12)
    assert (found.num_people, found.bootstrap.level) == (5, 0.8)


def test_intervals_cover_the_true_mean_and_those_over_queries_do_not():
    """40 people with 8 queries each that are alike: about 95 % of intervals over people cover; over queries far fewer."""
    people = np.repeat(np.arange(40), 8)
    covered, covered_by_query = 0, 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        value = np.repeat(generator.normal(0.5, 0.2, 40), 8) + generator.normal(0, 0.05, 320)
        for by, group in (("people", people), ("query", np.arange(320))):
            low, high = bootstrap_intervals({"x": value}, group, Bootstrap(num_resamples=200)).intervals["x"]
            covered += by == "people" and low <= 0.5 <= high
            covered_by_query += by == "query" and low <= 0.5 <= high
    assert 0.9 * 200 <= covered <= 0.99 * 200
    assert covered_by_query < 0.7 * 200


def test_the_same_seed_gives_the_same_interval_and_one_person_no_width():
    generator = np.random.default_rng(1)
    people, value = generator.integers(0, 30, 90), {"x": generator.uniform(size=90)}
    first, second, other = (bootstrap_intervals(value, people, Bootstrap(seed=seed)).intervals["x"] for seed in (1, 1, 2))
    assert first == second != other
    assert first[0] < value["x"].mean() < first[1]
    alone = bootstrap_intervals(value, people * 0, Bootstrap())
    assert alone.intervals["x"][0] == pytest.approx(alone.intervals["x"][1]) == pytest.approx(value["x"].mean())


def test_chunks_of_draws_change_nothing(monkeypatch):
    generator = np.random.default_rng(2)
    people, value = generator.integers(0, 30, 90), {"x": generator.uniform(size=90)}
    whole = bootstrap_intervals(value, people, Bootstrap())
    monkeypatch.setattr("personmae.evaluation.confidence._DRAWS_AT_ONCE", 100)
    assert bootstrap_intervals(value, people, Bootstrap()).intervals["x"] == pytest.approx(whole.intervals["x"], abs=1e-12)


def test_a_thousand_resamples_are_quick_at_the_size_of_msmt17():
    generator = np.random.default_rng(3)
    people = generator.integers(0, 3060, 11_659)
    value = {name: generator.uniform(size=11_659) for name in "abcdef"}
    start = time.perf_counter()
    bootstrap_intervals(value, people, Bootstrap())
    # Measured at 0.1 s; a loop over resamples takes many seconds.
    assert time.perf_counter() - start < 3


def test_bad_input():
    with pytest.raises(ValueError, match="at least 2 resamples"):
        Bootstrap(num_resamples=1)
    with pytest.raises(ValueError, match="level between 0 and 1, not 1000 and 95"):
        Bootstrap(level=95)
    with pytest.raises(ValueError, match="no query"):
        bootstrap_intervals({"x": np.zeros(0)}, np.zeros(0, np.int64), Bootstrap())
