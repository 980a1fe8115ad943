"""Features made better before they are ranked: average query expansion, and the features of mirror images taken in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from personmae.evaluation.conventions import Flip

Features = npt.NDArray[np.floating]

# Similarities held at once: 128 MiB.
_PAIRS_AT_ONCE = 32_000_000


@dataclass(frozen=True, kw_only=True)
class QueryExpansion:
    """Average query expansion (Chum et al., "Total recall", ICCV 2007) with weights, as fast-reid has it; its defaults.

    k: nearest neighbours taken in, the image itself counted. alpha: their weight is similarity^alpha. num_times: passes.
    """

    k: int = 5
    alpha: float = 3.0
    num_times: int = 1

    def __post_init__(self) -> None:
        if self.k < 1 or self.num_times < 1 or self.alpha < 0:
            raise ValueError(f"query expansion wants k and num_times >= 1 and alpha >= 0, not {self.k}, {self.num_times} and {self.alpha}")

    def __str__(self) -> str:
        passes = f", {self.num_times} passes" if self.num_times > 1 else ""
        return f"query expansion (k {self.k}, alpha {self.alpha:g}{passes})"


def expand(query: Features, gallery: Features, expansion: QueryExpansion) -> tuple[Features, Features]:
    """Each feature [Q, D], [G, D] replaced by a weighted mean of its k nearest among all queries and gallery images; dtypes stay.

    Neighbours and weights are by cosine similarity, in float32; the mean is of the features as they are, which are not normalised before nor after. A
    similarity below zero keeps its sign under a whole alpha, as in numpy, and counts as zero under another, where fast-reid gets NaN. If there are
    fewer than k images, all are taken.
    """
    features = np.concatenate([query, gallery])
    for _ in range(expansion.num_times):
        expanded = np.empty_like(features)
        for rows, similarity, neighbour in _neighbours(features, min(expansion.k, len(features))):
            weight = (similarity if float(expansion.alpha).is_integer() else np.maximum(similarity, 0)) ** expansion.alpha
            expanded[rows] = np.einsum("nk,nkd->nd", weight, features[neighbour]) / neighbour.shape[1]
        features = expanded
    return features[: len(query)], features[len(query) :]


def combine_flipped(features: Features, flipped: Features, flip: Flip = "mean") -> Features:
    """One feature [N, D] from those of images and of their mirror images; neither is changed.

    "mean": the mean of both. "sum of unit length": their sum at unit length, as layumi's code base has it. They rank alike by cosine distance.
    Raises ValueError if the shapes differ.
    """
    if features.shape != flipped.shape:
        raise ValueError(f"features have shape {features.shape}, those of the mirror images {flipped.shape}")
    if flip == "mean":
        return (features + flipped) / 2
    return unit_length(features + flipped)


def unit_length(features: Features) -> Features:
    """Rows [N, D] at length 1; rows of zeros stay zero."""
    norm = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.where(norm == 0, 1, norm)


def _neighbours(features: Features, k: int) -> Iterator[tuple[slice, npt.NDArray[np.float32], npt.NDArray[np.int64]]]:
    """(rows, cosine similarities [rows, k], indices [rows, k]) of the k most similar, without all pairs at once."""
    unit = torch.from_numpy(unit_length(features).astype(np.float32))
    at_once = max(1, _PAIRS_AT_ONCE // len(features))
    for start in range(0, len(features), at_once):
        rows = slice(start, min(start + at_once, len(features)))
        similarity, index = torch.topk(unit[rows] @ unit.T, k, dim=1)
        yield rows, similarity.numpy(), index.numpy()
