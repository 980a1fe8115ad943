"""Confidence intervals of mean scores: the percentile bootstrap over identities.

The queries of one person are alike, so people are drawn, not queries: drawing queries as if each were a find of its own gives intervals that are too
narrow (the cluster bootstrap; Davison & Hinkley, "Bootstrap methods and their application", 1997, sections 2.4 and 3.8). The gallery stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from personmae.evaluation.ranking import FloatArray, IntArray

# People drawn at once: 16 MiB of numbers.
_DRAWS_AT_ONCE = 2_000_000


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """num_resamples: sets of people drawn with replacement, as many as there are. level: share of them that the interval spans, the same cut off
    above and below."""

    num_resamples: int = 1000
    level: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_resamples < 2 or not 0 < self.level < 1:
            raise ValueError(f"a bootstrap wants at least 2 resamples and a level between 0 and 1, not {self.num_resamples} and {self.level}")


@dataclass(frozen=True)
class Confidence:
    """intervals: name of a score -> (low, high). num_people: identities drawn from; of few, say under 20, the intervals are too narrow."""

    intervals: dict[str, tuple[float, float]]
    num_people: int
    bootstrap: Bootstrap


def bootstrap_intervals(values: Mapping[str, FloatArray], people: IntArray, bootstrap: Bootstrap) -> Confidence:
    """Intervals of the means of `values`, each [Q], over the queries; people [Q]: whose query it is.

    A resample's score is the mean over all queries of the people drawn, a person drawn twice counting twice. Raises ValueError if there is no query.
    """
    if len(people) == 0:
        raise ValueError("there is no query to draw people from")
    _, person = np.unique(people, return_inverse=True)
    num_people = int(person.max()) + 1
    sums = np.stack([np.bincount(person, weights=value, minlength=num_people) for value in [np.ones(len(people)), *values.values()]], axis=1)
    generator = np.random.default_rng(bootstrap.seed)
    totals = np.empty((bootstrap.num_resamples, sums.shape[1]))
    at_once = max(1, _DRAWS_AT_ONCE // num_people)
    for start in range(0, bootstrap.num_resamples, at_once):
        num_rows = min(at_once, bootstrap.num_resamples - start)
        drawn = generator.integers(0, num_people, (num_rows, num_people))
        drawn += np.arange(num_rows)[:, None] * num_people
        times = np.bincount(drawn.ravel(), minlength=num_rows * num_people).reshape(num_rows, num_people)
        totals[start : start + num_rows] = times @ sums
    means = totals[:, 1:] / totals[:, :1]
    tail = (1 - bootstrap.level) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    return Confidence({name: (float(low[k]), float(high[k])) for k, name in enumerate(values)}, num_people, bootstrap)
