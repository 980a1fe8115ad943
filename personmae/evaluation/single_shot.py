"""Single-gallery-shot CMC: the curve when the gallery holds one image of each person, over all ways to choose it (classic CUHK03).

Exact by default. A match stands behind as many people as have their image in front of it; person p has with probability f_p = (images of p in front)
/ (images of p), independently, so the rank is 1 + a sum of unequal coins, whose distribution is multiplied out person by person. torchreid and
fast-reid estimate the same from 10 random draws a query; `sampled_shot_curves` does what they do.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from personmae.evaluation.conventions import Ties
from personmae.evaluation.ranking import FloatArray, IntArray, Labels

# Numbers in one table of matches by people, 32 MiB.
_TABLE_SIZE = 4_000_000


def single_shot_curves(distance: npt.NDArray[np.floating], query: Labels, gallery: Labels, max_rank: int, ties: Ties = "by index") -> FloatArray:
    """For each query and k = 1 ... max_rank the probability that its match is among the first k people: [Q, max_rank]; zeros without a match.

    distance [Q, G]. Each image of a person that is not left out is chosen with the same probability.
    """
    curves = np.zeros((len(query), max_rank))
    _, person = np.unique(gallery.people, return_inverse=True)
    num_people = int(person.max()) + 1
    waiting: list[tuple[int, FloatArray]] = []
    size = 0

    def finish() -> None:
        if waiting:
            found = _within(np.concatenate([share for _, share in waiting]), max_rank)
            start = 0
            for row, share in waiting:
                curves[row] = found[start : start + len(share)].mean(axis=0)
                start += len(share)
            waiting.clear()

    for row in range(len(query)):
        order, match = _kept_order(distance[row], int(query.people[row]), int(query.cameras[row]), gallery, ties)
        if not match.any():
            continue
        ranked = person[order]
        places = np.flatnonzero(match)
        # [matches, people]: images of each person in front of each match.
        segment = np.searchsorted(places, np.arange(len(ranked)), "right")
        before = segment < len(places)
        between = np.bincount(segment[before] * num_people + ranked[before], minlength=len(places) * num_people)
        in_front = np.cumsum(between.reshape(len(places), num_people), axis=0)
        share = in_front / np.maximum(np.bincount(ranked, minlength=num_people), 1)
        share[:, ranked[places[0]]] = 0
        waiting.append((row, share))
        size += share.size
        if size > _TABLE_SIZE:
            finish()
            size = 0
    finish()
    return curves


def sampled_shot_curves(
    distance: npt.NDArray[np.floating],
    query: Labels,
    gallery: Labels,
    max_rank: int,
    *,
    num_repeats: int,
    generator: np.random.RandomState,
    ties: Ties = "by index",
) -> FloatArray:
    """The same from random choices: [Q, max_rank], the share of `num_repeats` draws in which the match is among the first k people.

    Draws are those of torchreid and fast-reid after numpy.random.seed(s), for a generator RandomState(s): for each query with a match and each draw,
    an image of each person, in the order in which people first appear in the ranking.
    """
    curves = np.zeros((len(query), max_rank))
    for row in range(len(query)):
        order, match = _kept_order(distance[row], int(query.people[row]), int(query.cameras[row]), gallery, ties)
        if not match.any():
            continue
        _, first, person, size = np.unique(gallery.people[order], return_index=True, return_inverse=True, return_counts=True)
        by_appearance = np.argsort(first)
        places = np.argsort(person, kind="stable")  # places in the ranking, person by person
        start = (np.cumsum(size) - size)[by_appearance]
        for _ in range(num_repeats):
            chosen = np.sort(places[start + generator.randint(0, size[by_appearance])])
            rank = int(np.flatnonzero(match[chosen])[0])
            curves[row, rank:] += 1
    return curves / num_repeats


def _kept_order(
    distance: npt.NDArray[np.floating], person: int, camera: int, gallery: Labels, ties: Ties
) -> tuple[IntArray, npt.NDArray[np.bool_]]:
    """Gallery indices in the order of the ranking, without what is left out, and whether each is a match."""
    stable = np.argsort(distance if ties == "by index" else distance[::-1], kind="stable")
    order = stable if ties == "by index" else len(distance) - 1 - stable
    match = gallery.people[order] == person
    kept = ~(match & (gallery.cameras[order] == camera))
    return order[kept], match[kept]


def _within(share: FloatArray, max_rank: int) -> FloatArray:
    """P(rank <= k) of each match: share [M, P] of each person's images in front of it -> [M, max_rank]."""
    exactly = np.zeros((len(share), max_rank))  # [M, k]: probability that k people are in front
    exactly[:, 0] = 1
    for person in np.flatnonzero(share.any(axis=0)):
        front = share[:, person, None]
        moved = exactly * front
        exactly -= moved
        exactly[:, 1:] += moved[:, :-1]
    return np.minimum(np.cumsum(exactly, axis=1), 1)
