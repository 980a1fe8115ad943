"""Ranks of gallery images for each query, and what follows: average precision, first match, inverse negative penalty.

The common protocol of single-query person ReID (Zheng et al., "Scalable person re-identification: a benchmark", ICCV
2015, as torchreid, fast-reid and TransReID compute it): rank the gallery by distance, leave out images of the same
person from the same camera, take precision at each match.

Ties: of gallery images at the same distance the one with the smaller gallery index comes first. Distances are sums of
squared differences in float64, taken in the same order for each pair, so that equal features are at exactly equal
distances wherever they stand in the gallery.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from personmae.data.records import PersonImage

Metric = Literal["cosine", "euclidean"]
FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

# Bounds the memory of a chunk of queries: about ten arrays of 8 bytes a pair.
CHUNK_PAIRS = 4_000_000


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


@dataclass(frozen=True)
class QueryScores:
    """Scores of single queries, each [Q]; a query without a match in the gallery has NaN, NaN and first match -1."""

    average_precision: FloatArray
    inverse_negative_penalty: FloatArray
    first_match: IntArray  # rank of the first match, from 0


def labels_of(images: Sequence[PersonImage]) -> Labels:
    """People and cameras of the images."""
    return Labels(
        np.array([image.person for image in images], np.int64), np.array([image.camera for image in images], np.int64)
    )


def distances(query: npt.ArrayLike, gallery: npt.ArrayLike, metric: Metric = "cosine") -> FloatArray:
    """All distances [Q, G], float64.

    query [Q, D], gallery [G, D]. cosine: 1 - cos, in [0, 2], taken as half the squared distance of the unit vectors; a
    zero vector has no direction, and distance 1 from everything. euclidean: not squared.

    Raises ValueError for other shapes, for no features, and for values that are not finite (naming the row).
    """
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f"metric is {metric!r}; allowed: cosine, euclidean")
    query_array, gallery_array = _checked("query", query), _checked("gallery", gallery)
    if query_array.shape[1] != gallery_array.shape[1]:
        raise ValueError(
            f"query features have {query_array.shape[1]} dimensions, gallery features {gallery_array.shape[1]}"
        )
    if metric == "euclidean":
        return _pairwise(query_array, gallery_array)
    query_norm = np.linalg.norm(query_array, axis=1, keepdims=True)
    gallery_norm = np.linalg.norm(gallery_array, axis=1, keepdims=True)
    unit_query = query_array / np.where(query_norm == 0, 1, query_norm)
    unit_gallery = gallery_array / np.where(gallery_norm == 0, 1, gallery_norm)
    cosine = _pairwise(unit_query, unit_gallery) ** 2 / 2
    return np.where((query_norm == 0) | (gallery_norm == 0).T, 1.0, cosine)


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


def match_ranks_of_distances(distance: FloatArray, query: Labels, gallery: Labels) -> MatchRanks:
    """The ranks of all matches from the distances [Q, G], by a stable sort. Raises ValueError if the shapes do not fit or a distance is NaN."""
    order, match, kept = _ranked(distance, query, gallery)
    rows, columns = np.nonzero(match & kept)
    sorted_distance = np.take_along_axis(distance, order, axis=1)
    before = np.concatenate([np.zeros((len(query), 1), np.int64), np.cumsum(kept, axis=1)], axis=1)
    found = sorted_distance[rows, columns]
    first = np.array([np.searchsorted(sorted_distance[row], value, "left") for row, value in zip(rows, found, strict=True)], np.int64)
    end = np.array([np.searchsorted(sorted_distance[row], value, "right") for row, value in zip(rows, found, strict=True)], np.int64)
    return MatchRanks(
        offsets=np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(query)))]).astype(np.int64),
        match=order[rows, columns],
        distance=found,
        closer=before[rows, first],
        tied_before=before[rows, columns] - before[rows, first],
        tied_after=before[rows, end] - before[rows, columns] - 1,
        num_kept=kept.sum(axis=1),
    )


def score_distances(distance: FloatArray, query: Labels, gallery: Labels) -> QueryScores:
    """Scores of each query from its distances [Q, G] to the gallery. Raises ValueError if the shapes do not fit."""
    order, match, kept = _ranked(distance, query, gallery)
    # Rank of each kept gallery image, from 1, as if the images left out were not there.
    rank = np.cumsum(kept, axis=1)
    match &= kept
    num_matches = match.sum(axis=1)
    scored = num_matches > 0
    precision = np.where(match, np.cumsum(match, axis=1) / np.maximum(rank, 1), 0)
    last_rank = np.where(match, rank, 0).max(axis=1)
    first_rank = np.where(match, rank, order.shape[1] + 1).min(axis=1)
    return QueryScores(
        average_precision=np.where(scored, precision.sum(axis=1) / np.maximum(num_matches, 1), np.nan),
        inverse_negative_penalty=np.where(scored, num_matches / np.maximum(last_rank, 1), np.nan),
        first_match=np.where(scored, first_rank - 1, -1),
    )


def score_features(
    query_features: npt.ArrayLike,
    gallery_features: npt.ArrayLike,
    query: Labels,
    gallery: Labels,
    metric: Metric = "cosine",
    chunk_pairs: int = CHUNK_PAIRS,
) -> QueryScores:
    """Scores of each query from features [Q, D] and [G, D].

    chunk_pairs: distances held at once, which bounds memory; at least one query is taken at a time.
    """
    chunks = [
        score_distances(distance, part, gallery)
        for distance, part in _chunks(query_features, gallery_features, query, gallery, metric, chunk_pairs)
    ]
    return QueryScores(
        np.concatenate([chunk.average_precision for chunk in chunks]),
        np.concatenate([chunk.inverse_negative_penalty for chunk in chunks]),
        np.concatenate([chunk.first_match for chunk in chunks]),
    )


def nearest_gallery(
    query_features: npt.ArrayLike,
    gallery_features: npt.ArrayLike,
    query: Labels,
    gallery: Labels,
    num_nearest: int = 10,
    metric: Metric = "cosine",
    chunk_pairs: int = CHUNK_PAIRS,
) -> IntArray:
    """Gallery indices [Q, num_nearest] of each query's nearest by the protocol; -1 where the gallery is used up."""
    nearest = np.full((len(query), num_nearest), -1, np.int64)
    start = 0
    for distance, part in _chunks(query_features, gallery_features, query, gallery, metric, chunk_pairs):
        order, _, kept = _ranked(distance, part, gallery)
        for row in range(len(part)):
            found = order[row][kept[row]][:num_nearest]
            nearest[start + row, : len(found)] = found
        start += len(part)
    return nearest


def _ranked(
    distance: FloatArray, query: Labels, gallery: Labels
) -> tuple[IntArray, npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Gallery order [Q, G] of each query; in that order: is it the same person, and does it count (is not left out)?"""
    if distance.shape != (len(query), len(gallery)):
        raise ValueError(f"distances have shape {distance.shape}; labels say ({len(query)}, {len(gallery)})")
    if np.isnan(distance).any():
        raise ValueError(f"distances of query {int(np.flatnonzero(np.isnan(distance).any(axis=1))[0])} are not numbers")
    order = np.argsort(distance, axis=1, kind="stable")
    match = gallery.people[order] == query.people[:, None]
    same_camera = gallery.cameras[order] == query.cameras[:, None]
    return order, match, ~(match & same_camera)


def _chunks(
    query_features: npt.ArrayLike,
    gallery_features: npt.ArrayLike,
    query: Labels,
    gallery: Labels,
    metric: Metric,
    chunk_pairs: int,
) -> Iterator[tuple[FloatArray, Labels]]:
    query_array, gallery_array = _checked("query", query_features), _checked("gallery", gallery_features)
    for part, array, labels in (("query", query_array, query), ("gallery", gallery_array, gallery)):
        if len(array) != len(labels):
            raise ValueError(f"{len(array)} {part} features, but labels of {len(labels)} images")
    num_rows = max(1, chunk_pairs // len(gallery))
    for start in range(0, len(query), num_rows):
        rows = slice(start, start + num_rows)
        yield distances(query_array[rows], gallery_array, metric), Labels(query.people[rows], query.cameras[rows])


def _checked(part: str, features: npt.ArrayLike) -> FloatArray:
    array = np.asarray(features, np.float64)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{part} features have shape {array.shape}; [N, D] with at least one image is wanted")
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if len(bad):
        raise ValueError(f"{part} features: row {bad[0]} is not finite ({len(bad)} such rows of {len(array)})")
    return array


def _pairwise(query: FloatArray, gallery: FloatArray) -> FloatArray:
    # Not by matrix product: its tiles add in an order that depends on the place in the matrix, which breaks ties at
    # random.
    return torch.cdist(
        torch.from_numpy(query), torch.from_numpy(gallery), compute_mode="donot_use_mm_for_euclid_dist"
    ).numpy()
