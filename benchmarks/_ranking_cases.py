"""What benchmarks/ranking_speed.py times: drawn features of the sizes of known sets, and the ways to rank them."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks._ranking_peers import BYTES_A_PAIR, average_precisions, matrix_of_distances
from personmae.evaluation.distances import distances
from personmae.evaluation.measures import measure_queries
from personmae.evaluation.ranking import Labels, match_ranks
from personmae_kernels import compiled, launching

DIMENSIONS = 768
ROWS = 4096


class Size(NamedTuple):
    """A set's counts. Distractors are gallery images of person 0, whom no query shows."""

    name: str
    num_queries: int
    num_gallery: int
    num_people: int
    num_cameras: int
    num_distractors: int = 0


SIZES = {"market": Size("market", 3368, 15_913, 750, 6, 2798), "msmt17": Size("msmt17", 11_659, 82_161, 3060, 15)}


class Drawn(NamedTuple):
    """Features and labels of one size."""

    query_features: npt.NDArray[np.float32]
    gallery_features: npt.NDArray[np.float32]
    query: Labels
    gallery: Labels


class Case(NamedTuple):
    """One way to do the work of a size, run in a process of its own.

    run: from the size and the spread of its features to what was found; "seconds" (of the work alone) must be in it, all else goes into the result.
    bytes_needed: of the size; a case that needs more than there is is skipped. missing: why it cannot run here, or nothing.
    """

    name: str
    run: Callable[[Size, float], dict[str, Any]]
    bytes_needed: Callable[[Size], int]
    missing: Callable[[], str] = str


def size_of(words: str) -> Size:
    """market, msmt17, or a number of gallery images in the proportions of MSMT17. Raises ValueError for anything else."""
    if words in SIZES:
        return SIZES[words]
    if not words.isdigit() or int(words) < 1:
        raise ValueError(f"{words!r} is no size; allowed: {', '.join(SIZES)}, or a number of gallery images")
    num = int(words)
    return Size(words, max(1, num // 7), num, max(1, num // 27), 15)


def draw(size: Size, spread: float) -> Drawn:
    """Each image is its person's centre, drawn from a normal distribution of standard deviation 1, and noise of `spread`."""
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((size.num_people + 1, DIMENSIONS), np.float32)

    def images(num: int, num_distractors: int = 0) -> tuple[npt.NDArray[np.float32], Labels]:
        people = generator.integers(1, size.num_people + 1, num)
        people[:num_distractors] = 0
        generator.shuffle(people)
        features = np.empty((num, DIMENSIONS), np.float32)
        for start in range(0, num, ROWS):
            part = people[start : start + ROWS]
            noise = generator.standard_normal((len(part), DIMENSIONS), np.float32)
            # Distractors have no centre in common.
            own = np.where(part[:, None] > 0, centres[part], generator.standard_normal(noise.shape, np.float32))
            features[start : start + ROWS] = own + np.float32(spread) * noise
        return features, Labels(people, generator.integers(0, size.num_cameras, num))

    query_features, query = images(size.num_queries)
    gallery_features, gallery = images(size.num_gallery, size.num_distractors)
    return Drawn(query_features, gallery_features, query, gallery)


def cases() -> list[Case]:
    """Ours, its plain form, and the evaluators that sort."""
    ours = [
        Case("ours, compiled", partial(run_ours, form="compiled"), partial(bytes_of, per_pair=0), compiled.why_missing),
        Case("ours, reference", partial(run_ours, form="reference"), partial(bytes_of, per_pair=0)),
    ]
    return ours + [
        Case(name, partial(run_peer, at_once="at once" in name), partial(bytes_of, per_pair=per_pair)) for name, per_pair in BYTES_A_PAIR.items()
    ]


def bytes_of(size: Size, per_pair: int) -> int:
    """The features twice, PyTorch and tiles, and the pairs."""
    return 8 * DIMENSIONS * (size.num_queries + size.num_gallery) + 2**29 + per_pair * size.num_queries * size.num_gallery


def run_ours(size: Size, spread: float, form: launching.Form) -> dict[str, Any]:
    """Distances, ranks and scores by match_ranks."""
    launching.use_operators(form)
    match_ranks(*draw(size_of("50"), spread))
    drawn = draw(size, spread)
    started = time.perf_counter()
    precision = measure_queries(match_ranks(*drawn)).average_precision
    return {"seconds": time.perf_counter() - started, "mAP": float(np.nanmean(precision))}


def run_peer(size: Size, spread: float, at_once: bool) -> dict[str, Any]:
    """Distances, ranks and scores by sorting."""
    drawn = draw(size, spread)
    started = time.perf_counter()
    matrix = matrix_of_distances(drawn.query_features, drawn.gallery_features)
    precision = average_precisions(matrix, drawn.query, drawn.gallery, at_once=at_once)
    return {"seconds": time.perf_counter() - started, "mAP": float(np.nanmean(precision))}


def check(size: Size, spread: float, num_queries: int = 100) -> None:
    """Raises AssertionError unless ours and the sorting evaluator, both on the same float64 distances of some queries, agree to rounding."""
    drawn = draw(size, spread)
    query = Labels(drawn.query.people[:num_queries], drawn.query.cameras[:num_queries])
    features = drawn.query_features[:num_queries]
    ours = measure_queries(match_ranks(features, drawn.gallery_features, query, drawn.gallery)).average_precision
    matrix = distances(features, drawn.gallery_features)
    for at_once in (True, False):
        peer = average_precisions(matrix, query, drawn.gallery, at_once=at_once)
        np.testing.assert_allclose(ours, peer, rtol=1e-12, err_msg="ours and the evaluator that sorts differ")
