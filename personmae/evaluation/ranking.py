"""Ranks of gallery images for each query; `measures` has what follows: average precision, first match, inverse negative penalty.

The common protocol of single-query person ReID (Zheng et al., "Scalable person re-identification: a benchmark", ICCV
2015, as torchreid, fast-reid and TransReID compute it): rank the gallery by distance, leave out images of the same
person from the same camera, take precision at each match.

Ties: of gallery images at the same distance the one with the smaller gallery index comes first. `distances` defines what is the same distance:
results do not depend on tiles, threads or the place in the gallery.

Nothing is sorted but the few images of a query's own person: the rank of a match is a count of the images nearer than it.
`personmae_kernels.match_places` takes the count from tiles of a float32 matrix product, and computes in float64 only the pairs that the product
leaves open. Memory is the features and a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from personmae.data.records import PersonImage
from personmae.evaluation.distances import Features, FloatArray, Held, Metric, Space, as_tensor, exact_products, open_space
from personmae.evaluation.memory import require_memory
from personmae_kernels.match_places import Bounds, Matches, bounds_of_products, counts_of_steps, new_steps, place_distances_, place_products_

LeaveOut = Literal["same-camera", "nothing"]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

# Queries and gallery images of one product.
TILE, TILE_ON_CUDA = (8192, 2048), (4096, 16384)
TILE_OF_NEAREST = (1024, 4096)
# Distances of a given matrix that are looked at in one go.
CHUNK_PAIRS = 4_000_000
# What is held of an image of a query's own person, in bytes, at the fullest moment.
BYTES_A_MATCH = 160


@dataclass(frozen=True)
class Labels:
    """people, cameras: int64 [N]. Equal numbers are the same person; no number is special, and -1 (junk) is refused."""

    people: IntArray
    cameras: IntArray

    def __post_init__(self) -> None:
        if self.people.ndim != 1 or self.people.shape != self.cameras.shape:
            raise ValueError(
                f"people {self.people.shape} and cameras {self.cameras.shape} must be one number for each image"
            )
        if (self.people < 0).any():
            row = int(np.flatnonzero(self.people < 0)[0])
            raise ValueError(
                f"image {row} is of person {self.people[row]}: junk images are dropped when a set is read, not ranked"
            )

    def __len__(self) -> int:
        return len(self.people)


def labels_of(images: Sequence[PersonImage]) -> Labels:
    """People and cameras of the images."""
    return Labels(
        np.array([image.person for image in images], np.int64), np.array([image.camera for image in images], np.int64)
    )


@dataclass(frozen=True)
class MatchRanks:
    """Where the matches of each query stand in its ranking: all that CMC, mAP and mINP need, under any rule for ties.

    A match is a gallery image of the query's person that is not left out. Those of query q are the rows
    offsets[q]:offsets[q + 1] of what has length M, in the order of the ranking: by distance, then by gallery index.
    Counts are of gallery images that are not left out.
    """

    offsets: IntArray  # [Q + 1]
    match: IntArray  # [M] gallery index
    distance: FloatArray  # [M]
    closer: IntArray  # [M] images at a smaller distance than the match
    tied_before: IntArray  # [M] images at exactly its distance, of smaller gallery index
    tied_after: IntArray  # [M] the same, of larger gallery index
    num_kept: IntArray  # [Q] gallery images that are not left out

    @property
    def rank(self) -> IntArray:
        """[M] the rank of each match, from 1, ties by gallery index."""
        return self.closer + self.tied_before + 1

    @property
    def num_matches(self) -> IntArray:
        """[Q] the matches of each query."""
        return np.diff(self.offsets)

    @classmethod
    def concatenate(cls, parts: Sequence[MatchRanks]) -> MatchRanks:
        """The ranks of chunks of queries, in order, as one. Raises ValueError for no parts."""
        if not parts:
            raise ValueError("no parts: at least one chunk of queries is wanted")
        per_row = ("match", "distance", "closer", "tied_before", "tied_after", "num_kept")
        joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in per_row}
        return cls(offsets=_offsets(np.concatenate([part.num_matches for part in parts])), **joined)


def match_ranks(
    query_features: Features,
    gallery_features: Features,
    query: Labels,
    gallery: Labels,
    metric: Metric = "cosine",
    *,
    leave_out: LeaveOut = "same-camera",
    tile: tuple[int, int] | None = None,
) -> MatchRanks:
    """The ranks of all matches from features [Q, D] and [G, D], numpy or torch, on the device they are on.

    leave_out: gallery images of the query's person from the query's camera, or none. tile: (queries, gallery images) of one matrix product; bounds
    memory, and changes no result.

    Raises ValueError for features that do not fit the labels or each other or are not finite (see `open_space`); UserError where the matches would
    not fit into memory.
    """
    # First, for it may refuse, and takes less time than a look at all features.
    candidates = _own_people(query, gallery, leave_out)
    space = _checked_space(query_features, gallery_features, query, gallery, metric)
    rows, columns = (torch.from_numpy(numbers).to(space.device) for numbers in (candidates.query, candidates.image))
    return _count(candidates, space.pair_distances(rows, columns), len(gallery), lambda matches: _place_features(space, matches, tile))


def match_ranks_of_distances(
    distance: npt.ArrayLike | Tensor, query: Labels, gallery: Labels, *, leave_out: LeaveOut = "same-camera"
) -> MatchRanks:
    """The ranks of all matches from a matrix of distances [Q, G] of any real dtype, numpy or torch.

    Raises ValueError if the shapes do not fit or a distance is NaN (naming the query); UserError where the matches would not fit into memory.
    """
    matrix = as_tensor("distances", distance)
    if tuple(matrix.shape) != (len(query), len(gallery)):
        raise ValueError(f"distances have shape {tuple(matrix.shape)}; labels say ({len(query)}, {len(gallery)})")
    for rows in _slices(len(query), _rows_at_once(len(gallery))):
        bad = matrix[rows].isnan().any(dim=1).nonzero()
        if len(bad):
            raise ValueError(f"distances of query {rows.start + int(bad[0])} are not numbers")
    candidates = _own_people(query, gallery, leave_out)
    own = matrix[torch.from_numpy(candidates.query).to(matrix.device), torch.from_numpy(candidates.image).to(matrix.device)]
    return _count(candidates, own.double(), len(gallery), lambda matches: _place_matrix(matrix, matches))


def nearest_gallery(
    query_features: Features,
    gallery_features: Features,
    query: Labels,
    gallery: Labels,
    num_nearest: int = 10,
    metric: Metric = "cosine",
    *,
    leave_out: LeaveOut = "same-camera",
    tile: tuple[int, int] | None = None,
) -> IntArray:
    """Gallery indices [Q, num_nearest] of each query's nearest by the protocol; -1 where the gallery is used up.

    Arguments and errors: see `match_ranks`. Raises ValueError if num_nearest is less than 1.
    """
    if num_nearest < 1:
        raise ValueError(f"num_nearest is {num_nearest}; at least 1 is wanted")
    space = _checked_space(query_features, gallery_features, query, gallery, metric)
    require_memory(64 * len(query) * min(num_nearest, len(gallery)), f"the {num_nearest:,} nearest of {len(query):,} queries")
    nearest = np.full((len(query), num_nearest), -1, np.int64)
    rows_at_once, columns_at_once = tile or TILE_OF_NEAREST
    for rows in _slices(len(query), rows_at_once):
        part = Labels(query.people[rows], query.cameras[rows])
        chunk = replace(space, query=space.query.rows(rows))
        found = _nearest(chunk, part, gallery, num_nearest, columns_at_once, leave_out)
        nearest[rows, : found.shape[1]] = found
    return nearest


@dataclass(frozen=True)
class _Candidates:
    """The gallery images of each query's own person, by query, then by gallery index."""

    num_queries: int
    query: IntArray  # [A]
    image: IntArray  # [A]
    left_out: BoolArray  # [A]


def _own_people(query: Labels, gallery: Labels, leave_out: LeaveOut) -> _Candidates:
    if leave_out not in ("same-camera", "nothing"):
        raise ValueError(f"leave_out is {leave_out!r}; allowed: same-camera, nothing")
    by_person = np.argsort(gallery.people, kind="stable")
    people = gallery.people[by_person]
    first, end = np.searchsorted(people, query.people, "left"), np.searchsorted(people, query.people, "right")
    num = end - first
    total = int(num.sum())
    require_memory(BYTES_A_MATCH * total, f"{total:,} pairs of a query with a gallery image of its person ({len(query):,} queries)")
    row = np.repeat(np.arange(len(query)), num)
    image = by_person[np.arange(total) - np.repeat(_offsets(num)[:-1] - first, num)]
    same_camera = gallery.cameras[image] == query.cameras[row]
    return _Candidates(len(query), row, image, same_camera if leave_out == "same-camera" else np.zeros(total, np.bool_))


def _count(candidates: _Candidates, distance: Tensor, num_gallery: int, place: Callable[[Matches], Tensor]) -> MatchRanks:
    """The ranks, where `place` gives the steps of the whole gallery for the matches it is handed. distance: float64 [A], of the candidates."""
    values = distance.cpu().numpy()
    order = np.lexsort((candidates.image, values, candidates.query))
    query, image, values, left_out = candidates.query[order], candidates.image[order], values[order], candidates.left_out[order]
    kept = ~left_out
    offsets = _offsets(np.bincount(query[kept], minlength=candidates.num_queries))
    matches = Matches(*(torch.from_numpy(array).to(distance.device) for array in (offsets, image[kept], values[kept])))
    counts = [count.cpu().numpy() for count in counts_of_steps(place(matches), matches.offsets)]
    # Left out before each candidate in the order, before the first and before the end of its group of ties: the first two of a query count from zero.
    before = np.concatenate([[0], np.cumsum(left_out)])
    new_query = np.concatenate([[True], query[1:] != query[:-1]]) if len(query) else np.zeros(0, np.bool_)
    new_group = new_query.copy()
    new_group[1:] |= values[1:] != values[:-1]
    group = np.cumsum(new_group) - 1
    starts = np.flatnonzero(new_group)
    ends = np.concatenate([starts[1:], [len(query)]]).astype(np.int64)
    query_start = np.searchsorted(query, query)
    at = np.flatnonzero(kept)
    first, end = starts[group[at]], ends[group[at]]
    return MatchRanks(
        offsets=offsets,
        match=image[kept],
        distance=values[kept],
        closer=counts[0] - (before[first] - before[query_start[at]]),
        tied_before=counts[1] - (before[at] - before[first]),
        tied_after=counts[2] - (before[end] - before[at]),
        num_kept=num_gallery - np.bincount(query[left_out], minlength=candidates.num_queries),
    )


def _place_features(space: Space, matches: Matches, tile: tuple[int, int] | None) -> Tensor:
    """The steps of all gallery images, from tiles of products."""
    rows_at_once, columns_at_once = tile or (TILE_ON_CUDA if space.device.type == "cuda" else TILE)
    steps = [new_steps(matches)[:, :0]]
    for rows, part in _chunks_of_matches(matches, rows_at_once):
        own = new_steps(part)
        steps.append(own)
        if not len(part.match):
            continue
        query = space.query.rows(rows)
        held = space.hold(query)
        slack, query_of = space.slack(held), torch.repeat_interleave(held.square, part.offsets.diff())
        limits = space.limits(part.distance, query_of)
        for columns, gallery_held, products in _products(space, held.values, columns_at_once):
            bounds = Bounds(limits, slack, space.gallery_bounds(gallery_held))
            gallery = space.gallery.rows(columns)
            place_products_(own, part, products, bounds, query, gallery, cosine=space.cosine, first=columns.start)
    return torch.cat(steps, dim=1)


def _place_matrix(matrix: Tensor, matches: Matches) -> Tensor:
    """The steps of all gallery images, from a matrix [Q, G]."""
    dtype = torch.float32 if matrix.is_floating_point() and matrix.dtype != torch.float64 else torch.float64
    steps = [new_steps(matches)[:, :0]]
    for rows, part in _chunks_of_matches(matches, _rows_at_once(matrix.shape[1])):
        own = new_steps(part)
        place_distances_(own, part, matrix[rows].to(dtype))
        steps.append(own)
    return torch.cat(steps, dim=1)


def _nearest(space: Space, query: Labels, gallery: Labels, num_nearest: int, columns_at_once: int, leave_out: LeaveOut) -> IntArray:
    """Gallery indices [Q, at most num_nearest]: of each tile the images that may be among the nearest, sorted in with those of earlier tiles."""
    num_queries, num_columns = len(query), min(num_nearest, len(gallery))
    held = space.hold(space.query)
    slack = space.slack(held)
    best, image = np.full((num_queries, num_columns), np.inf), np.full((num_queries, num_columns), -1, np.int64)
    people, cameras = (torch.from_numpy(numbers).to(space.device)[:, None] for numbers in (query.people, query.cameras))
    for columns, gallery_held, products in _products(space, held.values, columns_at_once):
        own_people, own_cameras = (torch.from_numpy(numbers[columns]).to(space.device) for numbers in (gallery.people, gallery.cameras))
        counts = (people != own_people) | (cameras != own_cameras) if leave_out == "same-camera" else torch.ones_like(products, dtype=torch.bool)
        lower, upper = bounds_of_products(products, slack, space.gallery_bounds(gallery_held))
        limit = space.limits(torch.from_numpy(best[:, -1]).to(space.device), held.square)[1]
        if not np.isfinite(best[:, -1]).all() and products.shape[1] >= num_columns:
            surely = upper.masked_fill_(~counts, np.inf).topk(num_columns, dim=1, largest=False).values[:, -1]
            limit = torch.minimum(limit, space.surely_farther(surely, held.square))
        row, column = (counts & (lower <= limit[:, None])).nonzero(as_tuple=True)
        column += columns.start
        found = space.pair_distances(row, column)
        best, image = _merged(best, image, row.cpu().numpy(), column.cpu().numpy(), found.cpu().numpy())
    return image


def _merged(best: FloatArray, image: IntArray, row: IntArray, column: IntArray, found: FloatArray) -> tuple[FloatArray, IntArray]:
    """The nearest [Q, K] so far and more pairs [P]: the nearest of all."""
    num_queries, num_columns = best.shape
    rows = np.concatenate([np.repeat(np.arange(num_queries), num_columns), row])
    # Places that are not filled yet come last.
    images = np.concatenate([np.where(image < 0, np.iinfo(np.int64).max, image).ravel(), column])
    values = np.concatenate([best.ravel(), found])
    order = np.lexsort((images, values, rows))
    rows, images, values = rows[order], images[order], values[order]
    take = np.searchsorted(rows, np.arange(num_queries))[:, None] + np.arange(num_columns)
    return values[take], np.where(images[take] == np.iinfo(np.int64).max, -1, images[take])


def _products(space: Space, query: Tensor, columns_at_once: int) -> Iterator[tuple[slice, Held, Tensor]]:
    """Tiles over the gallery: its columns, as held, and the products float32 [Q, G'] with the query as held, which last until the next tile."""
    room = torch.empty(len(query) * min(columns_at_once, len(space.gallery.features)), dtype=torch.float32, device=space.device)
    for columns in _slices(len(space.gallery.features), columns_at_once):
        gallery = space.hold(space.gallery.rows(columns))
        products = room[: len(query) * len(gallery.values)].view(len(query), len(gallery.values))
        with exact_products():
            torch.mm(query, gallery.values.T, out=products)
        yield columns, gallery, products


def _chunks_of_matches(matches: Matches, rows_at_once: int) -> Iterator[tuple[slice, Matches]]:
    offsets = matches.offsets.tolist()
    for rows in _slices(len(offsets) - 1, rows_at_once):
        first, end = offsets[rows.start], offsets[rows.stop]
        yield rows, Matches(matches.offsets[rows.start : rows.stop + 1] - first, matches.match[first:end], matches.distance[first:end])


def _slices(num: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, num)) for start in range(0, num, step))


def _rows_at_once(num_gallery: int) -> int:
    return max(1, CHUNK_PAIRS // max(1, num_gallery))


def _offsets(num: IntArray) -> IntArray:  # [Q] -> [Q + 1]
    return np.concatenate([[0], np.cumsum(num)]).astype(np.int64)


def _checked_space(query_features: Features, gallery_features: Features, query: Labels, gallery: Labels, metric: Metric) -> Space:
    space = open_space(query_features, gallery_features, metric)
    for part, vectors, labels in (("query", space.query, query), ("gallery", space.gallery, gallery)):
        if len(vectors.features) != len(labels):
            raise ValueError(f"{len(vectors.features)} {part} features, but labels of {len(labels)} images")
    return space
