"""Verification: are two images of the same person? ROC curve and true-positive rate at a false-positive rate, over all pairs of query and gallery.

Pairs that are left out of the ranking are left out here. The pairs are not held: their distances are counted in bins, a power of two wide, as tiles
of distances come by. So the curve is exactly that of the distances rounded down to a multiple of `Roc.resolution`, which is 2^-20 (about 1e-6) where
the largest distance lies between 1 and 2, and in proportion elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from personmae.evaluation.ranking import FloatArray, IntArray, Labels

REPORTED_RATES = (1e-4, 1e-3, 1e-2, 1e-1)
_NUM_BINS = 1 << 22
_FINEST = 2.0**-20


@dataclass(frozen=True)
class Roc:
    """Counts of pairs at ascending distances: distance [T], and same, different [T]: pairs of the same and of different people at it (rounded down).

    resolution: what distances are rounded down to multiples of.
    """

    distance: FloatArray
    same: IntArray
    different: IntArray
    resolution: float

    @property
    def num_same(self) -> int:
        return int(self.same.sum())

    @property
    def num_different(self) -> int:
        return int(self.different.sum())

    def true_positive_rate(self, false_positive_rate: float) -> float:
        """The largest share of same-person pairs accepted by a threshold that accepts at most this share of different-person pairs.

        A threshold accepts the pairs at or below it. NaN if there are no pairs of one of the two kinds.
        """
        if not self.num_same or not self.num_different:
            return float("nan")
        allowed = np.cumsum(self.different) / self.num_different <= false_positive_rate
        return float(self.same[allowed].sum() / self.num_same)

    def fast_reid_rate(self, false_positive_rate: float) -> float:
        """What fast-reid prints as TPR@FPR: the share of different-person pairs rejected by the threshold that rejects this share of same-person
        pairs.

        There scores are distances and "positive" is "different person"; of the corners of the curve (points on a straight line with their neighbours
        are dropped, as scikit-learn's roc_curve does by default) the one of nearest false-positive rate is taken, the first of several.
        """
        if not self.num_same or not self.num_different:
            return float("nan")
        points = np.cumsum(np.stack([self.same, self.different])[:, ::-1], axis=1)
        if points.shape[1] > 2:
            corner = (np.diff(points, 2, axis=1) != 0).any(axis=0)
            points = points[:, np.concatenate([[True], corner, [True]])]
        same, different = np.concatenate([[[0], [0]], points], axis=1)
        return float(different[np.abs(same / self.num_same - false_positive_rate).argmin()] / self.num_different)


class PairCounts:
    """Counts the pairs of query and gallery by distance, tile by tile; 64 MiB whatever their number."""

    def __init__(self) -> None:
        self.width = 0.0  # of the first distances' own size
        self._same = np.zeros(_NUM_BINS, np.int64)
        self._different = np.zeros(_NUM_BINS, np.int64)

    def add(self, distance: npt.NDArray[Any], query: Labels, gallery: Labels) -> None:
        """Count the pairs of a tile: distances [Q, G], with the labels of its queries and of the whole gallery. Raises ValueError if one is not
        finite."""
        if distance.shape != (len(query), len(gallery)):
            raise ValueError(f"distances have shape {distance.shape}; labels say ({len(query)}, {len(gallery)})")
        if distance.dtype not in (np.float32, np.float64):
            distance = distance.astype(np.float64)
        largest = float(max(distance.max(initial=0), -distance.min(initial=0)))
        if not np.isfinite(largest):
            raise ValueError("a distance is not finite")
        if not self.width:
            # The finest that holds these; larger ones that come later widen it.
            self.width = 2.0 ** (math.frexp(largest)[1] - _NUM_BINS.bit_length() + 2) if largest else _FINEST
        factor = 1
        while largest >= self.width * factor * (_NUM_BINS // 2):
            factor *= 2
        if factor > 1:
            self._widen(factor)
        rows, columns = np.nonzero(query.people[:, None] == gallery.people)
        other_camera = query.cameras[rows] != gallery.cameras[columns]
        same = self._bins(distance[rows, columns])
        _count(self._different, self._bins(distance).ravel())
        np.subtract.at(self._different, same, 1)
        np.add.at(self._same, same[other_camera], 1)

    def roc(self) -> Roc:
        """The counts so far."""
        used = np.flatnonzero((self._same > 0) | (self._different > 0))
        return Roc((used - _NUM_BINS // 2).astype(np.float64) * self.width, self._same[used], self._different[used], self.width)

    def _bins(self, distance: npt.NDArray[np.floating]) -> npt.NDArray[np.int32]:
        # The width is a power of two, so the quotient is exact.
        return np.floor(distance / distance.dtype.type(self.width)).astype(np.int32) + _NUM_BINS // 2

    def _widen(self, factor: int) -> None:
        """Bins of `factor` times the width, around zero as before: each takes that many of the old ones."""
        half = _NUM_BINS // 2
        for counts in (self._same, self._different):
            used = np.flatnonzero(counts)
            merged, number = counts[used], (used - half) // min(factor, _NUM_BINS) + half
            counts[used] = 0
            np.add.at(counts, number, merged)
        self.width *= factor


def _count(counts: IntArray, bins: npt.NDArray[np.int32]) -> None:
    """Add 1 for each of the bins; only the stretch that they lie in is touched."""
    if len(bins):
        lowest = int(bins.min())
        found = np.bincount(bins - lowest)
        counts[lowest : lowest + len(found)] += found


def rates(roc: Roc, positive: str = "same person", at: Sequence[float] = REPORTED_RATES) -> dict[str, float]:
    """{"TPR@FPR=1e-04": rate, ...} by the convention's `roc_positive`."""
    found = roc.true_positive_rate if positive == "same person" else roc.fast_reid_rate
    return {f"TPR@FPR={rate:.0e}": found(rate) for rate in at}
