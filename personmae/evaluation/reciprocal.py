"""k-reciprocal vectors and the Jaccard distance, sparse: equal to the dense definition for every pair up to a cut, in memory linear in the images.

Zhong et al., "Re-ranking person re-identification with k-reciprocal encoding", CVPR 2017. Each image has a sparse vector V over the images: weights
on its expanded k-reciprocal set, which sum to 1, averaged over its k2 nearest, itself among them; the Jaccard distance of two images is 1 - S / (2 -
S), S the sum of the smaller of their weights. Two definitions are in use, and give different numbers:

    classic    the authors' code, as torchreid, TransReID and TransReID-SSL have it: neighbours are the k1 + 1 nearest, an image itself among them;
               a weight is exp(-d), d the squared Euclidean distance divided by the largest of the image's row. `resquare`: d is squared once more
               before that, as in torchreid, which takes the square of what is a square already.
    fast-reid  fast-reid, OpenUnReID, SpCL, Cluster Contrast: neighbours are the k1 nearest, an image itself among them; a weight is exp(-d), d the
               squared Euclidean distance, 2 - 2 cos of unit vectors.

In both, half sets are of the first round(k1 / 2) + 1 neighbours (a half rounds to the even number), and a half set is taken over where more than two
thirds of it are in the set already. Where the codes leave it to chance, ties go to the smaller index. Weights are held in units of 2^-30
(`personmae_kernels.jaccard`): the distance differs from the real-valued definition by about 1e-7, as float32 does, and does not depend on tiles or
device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import csr_array
from torch import Tensor

from personmae.configs import UserError
from personmae.evaluation.memory import GIB, available_bytes
from personmae.evaluation.neighbours import Backend, Features, Found, NeighbourMetric, Points, Progress, as_points, search
from personmae_kernels.jaccard import ONE, Rows, by_column, mean_rows, min_sum_pairs, reciprocal_sets

Definition = Literal["classic", "fast-reid"]
ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Reciprocal:
    """k1, k2: neighbours for the sets, and for the mean of the vectors; at least 1, k2 at most k1. A set of fewer images has fewer neighbours.

    Raises ValueError for other values, and for resquare with the definition fast-reid, which has no such form.
    """

    definition: Definition
    k1: int
    k2: int
    resquare: bool = False

    def __post_init__(self) -> None:
        if self.definition not in ("classic", "fast-reid"):
            raise ValueError(f"definition is {self.definition!r}; allowed: classic, fast-reid")
        if not 1 <= self.k2 <= self.k1:
            raise ValueError(f"k1 is {self.k1} and k2 is {self.k2}; 1 <= k2 <= k1 is wanted")
        if self.resquare and self.definition != "classic":
            raise ValueError(f"resquare belongs to the definition classic, not to {self.definition}")

    @property
    def num_neighbours(self) -> int:
        """Neighbours of an image, itself among them."""
        return self.k1 + 1 if self.definition == "classic" else self.k1

    @property
    def num_half(self) -> int:
        """Neighbours for the half sets, itself among them."""
        return min(round(self.k1 / 2) + 1, self.num_neighbours)

    def search(self, points: Points, backend: Backend, progress: Progress | None) -> Found:
        """The neighbours this definition needs, with the largest distances where it needs them."""
        return search(points, self.num_neighbours, backend=backend, farthest=self.definition == "classic", progress=progress)


def reciprocal_vectors(points: Points, found: Found, reciprocal: Reciprocal) -> Rows:
    """The vectors V of all images, in units of 2^-30, on the device of the points."""
    ranks = found.indices
    offsets, columns = reciprocal_sets(ranks, min(reciprocal.num_half, ranks.shape[1]))
    sets = Rows(offsets, columns, columns)
    row = sets.row
    distance = points.distances(row.int(), columns, points).double()
    if reciprocal.definition == "classic":
        distance = relative(distance, found.farthest[row], points.error(points)[row], reciprocal.resquare)
    elif points.metric == "cosine":
        distance = 2 * distance
    # The smallest distance off, so that far images do not all weigh nothing; the quotient is the same.
    weight = torch.exp(_of_rows(distance, offsets, "min")[row] - distance)
    units = (weight / _of_rows(weight, offsets, "sum")[row] * ONE).round().int()
    return mean_rows(Rows(offsets, columns, units), ranks[:, : reciprocal.k2].contiguous())


def relative(distance: Tensor, farthest: Tensor, error: Tensor, resquare: bool) -> Tensor:
    """Distances divided by the largest of their row, and squared; 0 where that is no more than rounding: then all images are the same."""
    quotient = distance / torch.where(farthest <= error, torch.inf, farthest)
    return quotient.square() if resquare else quotient


def _of_rows(values: Tensor, offsets: Tensor, reduce: str) -> Tensor:
    return torch.segment_reduce(values, reduce, offsets=offsets, axis=0, initial=0.0 if reduce == "sum" else torch.inf)


def jaccard_of(sums: Tensor) -> Tensor:
    """Jaccard distances float32 from sums of minima int32. Not below 0, which rounding alone would bring about."""
    share = sums.double() / ONE
    return (1 - share / (2 - share)).clamp(min=0).float()


def least_sum(cut: float) -> int:
    """The smallest sum of minima whose Jaccard distance, in float32, is at most cut."""
    low, high = 1, ONE
    while low < high:
        middle = (low + high) // 2
        if float(jaccard_of(torch.tensor(middle))) <= np.float32(cut):
            high = middle
        else:
            low = middle + 1
    return low


def jaccard_distances(
    features: Features,
    *,
    cut: float,
    k1: int = 30,
    k2: int = 6,
    definition: Definition = "fast-reid",
    metric: NeighbourMetric = "cosine",
    resquare: bool = False,
    backend: Backend = "auto",
    progress: Progress | None = None,
) -> csr_array:
    """The Jaccard distances of features [N, D] to one another, as far as they are at most `cut`: float32 [N, N], columns rising in each row.

    Pairs that are not stored are farther than cut; a stored 0 is a distance of 0. The matrix is symmetric. Defaults as Cluster Contrast has them.
    cut: in [0, 1), for DBSCAN the largest eps. progress: of the neighbour search. Raises as `nearest_neighbours`, ValueError for other parameters,
    UserError when the pairs outgrow the memory.
    """
    reciprocal = Reciprocal(definition, k1, k2, resquare)
    if not 0 <= cut < 1:
        raise ValueError(f"cut is {cut}; it must lie in [0, 1): all pairs are within 1")
    points = as_points("features", features, metric)
    vectors = reciprocal_vectors(points, reciprocal.search(points, backend, progress), reciprocal)
    N, device = len(points.rows), points.rows.device
    del points
    return pairs_within(vectors, N, cut, device)


def pairs_within(vectors: Rows, num_images: int, cut: float, device: torch.device) -> csr_array:
    """`jaccard_distances` from the vectors."""
    turned, least = by_column(vectors, num_images), least_sum(cut)
    lengths, columns, distances = [], [], []
    num_pairs = 0
    for first in range(0, num_images, ROWS_AT_ONCE):
        last = min(num_images, first + ROWS_AT_ONCE)
        part = min_sum_pairs(vectors, turned, num_images, first, last, least)
        lengths.append(part.offsets.diff().cpu().numpy())
        columns.append(part.columns.cpu().numpy())
        distances.append(jaccard_of(part.units).cpu().numpy())
        num_pairs += len(part.columns)
        _check_growth(num_pairs, last, num_images, cut)
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    if offsets[-1] < 2**31:
        offsets = offsets.astype(np.int32)
    else:
        columns = [part.astype(np.int64) for part in columns]
    del turned
    return csr_array((_joined(distances), _joined(columns), offsets), shape=(num_images, num_images))


def _joined(parts: list[npt.NDArray[np.generic]]) -> npt.NDArray[np.generic]:
    joined = np.concatenate(parts)
    parts.clear()
    return joined


def _check_growth(num_pairs: int, num_done: int, num_images: int, cut: float) -> None:
    """Raises UserError if the pairs found so far say that all of them will not fit: 8 bytes each, once in parts and once joined."""
    free = available_bytes(torch.device("cpu"))
    expected = num_pairs / num_done * num_images
    if free is not None and 16 * expected - 8 * num_pairs > free:
        raise UserError(
            f"about {expected:,.0f} pairs of images are within a Jaccard distance of {cut}, {math.ceil(expected / num_images):,} for each image: "
            f"they need {16 * expected / GIB:,.1f} GiB, and {free / GIB:,.1f} GiB are free. Features that are nearly all the same do that; else a "
            "smaller cut helps"
        )
