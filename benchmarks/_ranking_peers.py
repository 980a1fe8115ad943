"""Ranking as public ReID code does it: the whole matrix of distances, all of it sorted, then a loop over the queries. Written anew.

TransReID (and with it TransReID-SSL, SOLIDER, CLIP-ReID) looks up who stands at every place of every ranking at once; fast-reid's compiled evaluator
sorts at once too, and looks up query by query.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from personmae.evaluation.ranking import Labels

# Of each pair: its distance (float32), its place (int64), and at the fullest moment who stands there (int64) and whether that is a match (bool).
BYTES_A_PAIR = {"argsort, matches at once (TransReID)": 21, "argsort, matches query by query (fast-reid)": 12}


def matrix_of_distances(query: npt.NDArray[np.float32], gallery: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Squared distances of the unit vectors [Q, G], as |q|^2 + |g|^2 - 2 q.g."""
    a, b = (torch.nn.functional.normalize(torch.from_numpy(part), dim=1) for part in (query, gallery))
    squares = a.square().sum(1, keepdim=True) + b.square().sum(1)
    return squares.addmm_(a, b.T, alpha=-2).numpy()


def average_precisions(distance: npt.NDArray, query: Labels, gallery: Labels, *, at_once: bool) -> npt.NDArray[np.float64]:  # type: ignore[type-arg]
    """Average precision of each query [Q], NaN without a match, from all rankings. distance: [Q, G] of any float dtype."""
    order = np.argsort(distance, axis=1)
    matches = gallery.people[order] == query.people[:, None] if at_once else None
    precision = np.full(len(query), np.nan)
    for q in range(len(query)):
        people = gallery.people[order[q]]
        keep = ~((people == query.people[q]) & (gallery.cameras[order[q]] == query.cameras[q]))
        found = (people == query.people[q] if matches is None else matches[q])[keep].astype(np.int32)
        if found.any():
            share = found.cumsum() / np.arange(1, len(found) + 1)
            precision[q] = (share * found).sum() / found.sum()
    return precision
