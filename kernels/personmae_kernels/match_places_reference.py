"""match_places in plain PyTorch: the specification, and what runs on CUDA. Works through pieces of bounded size; results do not depend on them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

LANES = 32
INFINITY = float("inf")


def pair_distances(
    query: Tensor, query_scale: Tensor, gallery: Tensor, gallery_scale: Tensor, rows: Tensor, columns: Tensor, cosine: bool
) -> Tensor:  # [Q, D], [Q], [G, D], [G], [P], [P] -> float64 [P]
    """See match_places."""
    result = torch.empty(len(rows), dtype=torch.float64, device=query.device)
    for part in pieces(len(rows), query.shape[1], query.device):
        row, column = rows[part], columns[part]
        a, b = query_scale[row], gallery_scale[column]
        difference = query[row].double() * a[:, None] - gallery[column].double() * b[:, None]
        sums = lane_sums(difference.square_())
        result[part] = torch.where((a == 0) | (b == 0), 1.0, 0.5 * sums) if cosine else rounded_root(sums)
    return result


def lane_sums(terms: Tensor) -> Tensor:  # float64 [P, D] -> [P]
    """The sums of the rows, in the order of the definition."""
    terms = torch.nn.functional.pad(terms, (0, -terms.shape[1] % LANES)).unflatten(1, (-1, LANES))
    lanes = terms[:, 0].clone()
    for number in range(1, terms.shape[1]):
        lanes += terms[:, number]
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


def rounded_root(values: Tensor) -> Tensor:
    """Square roots in float64, rounded correctly. torch.sqrt is on CUDA; on a CPU it may go to a library that is now and then off by the last bit."""
    return values.sqrt() if values.is_cuda else torch.from_numpy(np.sqrt(values.numpy()))


def place_distances_(steps: Tensor, offsets: Tensor, match: Tensor, distance: Tensor, distances: Tensor, first: int) -> None:
    """See match_places."""
    for part in pieces(len(distances), distances.shape[1], distances.device):
        tile = distances[part].double().contiguous()
        matches = Padded(offsets, match, distance, part)
        place = torch.searchsorted(matches.distance, tile)
        tied = (place < matches.num[:, None]) & (matches.distance.gather(1, place) == tile)
        matches.count(steps, place, ~tied)
        row, column = tied.nonzero(as_tuple=True)
        matches.place(steps, row, column + first, tile[row, column])


def place_products_(
    steps: Tensor,
    offsets: Tensor,
    match: Tensor,
    distance: Tensor,
    match_bounds: Tensor,
    products: Tensor,
    slack: Tensor,
    gallery_bounds: Tensor,
    query: Tensor,
    query_scale: Tensor,
    gallery: Tensor,
    gallery_scale: Tensor,
    cosine: bool,
    first: int,
) -> None:
    """See match_places."""
    for part in pieces(len(products), products.shape[1], products.device):
        lower, upper = bounds_of_products(products[part], slack[part], gallery_bounds)
        matches = Padded(offsets, match, distance, part)
        nearer, farther = matches.pad(match_bounds[0], INFINITY), matches.pad(match_bounds[1], INFINITY)
        place = torch.searchsorted(farther, lower)
        known = (place == matches.num[:, None]) | (upper < nearer.gather(1, place))
        matches.count(steps, place, known)
        row, column = known.logical_not_().nonzero(as_tuple=True)
        exact = pair_distances(query[part], query_scale[part], gallery, gallery_scale, row, column, cosine)
        matches.place(steps, row, column + first, exact)


def bounds_of_products(products: Tensor, slack: Tensor, gallery_bounds: Tensor) -> tuple[Tensor, Tensor]:  # [Q, G], [Q], [3, G] -> 2 [Q, G]
    """(lower, upper) float64 of what products leave open. Where one is not a number nothing is known, and it is infinite."""
    low, high, norm = gallery_bounds
    twice, doubt = 2 * products.double(), slack[:, None] * norm
    lower, upper = (low - doubt) - twice, (high + doubt) - twice
    return lower.nan_to_num_(-INFINITY, INFINITY, -INFINITY), upper.nan_to_num_(INFINITY, INFINITY, -INFINITY)


class Padded:
    """The matches of some queries, each in a row of K + 1 columns, the last of them and those to spare at infinity."""

    def __init__(self, offsets: Tensor, match: Tensor, distance: Tensor, queries: slice) -> None:
        starts = offsets[:-1][queries]
        self.num = offsets[1:][queries] - starts  # [Q]
        columns = torch.arange(int(self.num.max()) + 1, device=match.device)
        self._within = columns < self.num[:, None]
        self._source = torch.where(self._within, starts[:, None] + columns, 0)
        # Where the steps of a query begin.
        self._base = starts + torch.arange(len(offsets) - 1, device=match.device)[queries]
        self.distance = self.pad(distance, INFINITY)
        self._index = self.pad(match, torch.iinfo(torch.int64).max)

    def pad(self, values: Tensor, fill: float) -> Tensor:  # [M] -> [Q, K + 1]
        """What the matches have, in rows."""
        return torch.where(self._within, values[self._source], fill) if len(values) else values.new_full(self._within.shape, fill)

    def count(self, steps: Tensor, place: Tensor, known: Tensor) -> None:
        """Images nearer than the matches from `place` [Q, G] on, where that is known."""
        steps[0] += torch.bincount((place + self._base[:, None])[known], minlength=steps.shape[1])

    def place(self, steps: Tensor, row: Tensor, image: Tensor, distance: Tensor) -> None:
        """Images [P] at exact distances from the queries of rows [P]."""
        for part in pieces(len(row), self.distance.shape[1], row.device):
            self._place(steps, row[part], image[part], distance[part])

    def _place(self, steps: Tensor, row: Tensor, image: Tensor, distance: Tensor) -> None:
        matches, index = self.distance[row], self._index[row]
        start = (matches < distance[:, None]).sum(1)
        end = torch.minimum((matches <= distance[:, None]).sum(1), self.num[row])
        own = start + ((matches == distance[:, None]) & (index < image[:, None])).sum(1)
        is_own = (own < end) & (index.gather(1, own[:, None])[:, 0] == image)
        tied = start < end
        base = self._base[row]

        def num_at(place: Tensor) -> Tensor:
            return torch.bincount(place, minlength=steps.shape[1])

        steps[0] += num_at(base + end)
        base, start, own, end, after_own = base[tied], start[tied], own[tied], end[tied], (own + is_own)[tied]
        steps[1] += num_at(base + after_own) - num_at(base + end)
        steps[2] += num_at(base + start) - num_at(base + own)


def pieces(num_rows: int, width: int, device: torch.device) -> Iterator[slice]:
    """Slices of rows of so many elements, each of a size that its float64 copies fit beside all else."""
    num_elements = 2**26 if device.type == "cuda" else 2**20
    step = max(1, num_elements // max(1, width))
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))
