"""Features made better before they are ranked: average query expansion, and the features of mirror images taken in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from personmae.evaluation.conventions import Flip
from personmae.evaluation.neighbours import nearest_neighbours


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


def expand(query: Tensor, gallery: Tensor, expansion: QueryExpansion) -> tuple[Tensor, Tensor]:
    """Each feature [Q, D], [G, D] replaced by a weighted mean of its k nearest among all queries and gallery images; dtype and device stay.

    Neighbours (ties by index) and weights are by cosine similarity, in float32; the mean is of the features as they are, which are not normalised
    before nor after. A similarity below zero keeps its sign under a whole alpha, as in numpy, and counts as zero under another, where fast-reid gets
    NaN. If there are fewer than k images, all are taken.
    """
    features = torch.cat([query, gallery])
    for _ in range(expansion.num_times):
        found = nearest_neighbours(features, expansion.k)
        similarity = 1 - torch.from_numpy(found.distances).to(features)
        weight = (similarity if float(expansion.alpha).is_integer() else similarity.clamp(min=0)) ** expansion.alpha
        expanded = torch.zeros_like(features)
        # One neighbour after the other: [N, k, D] would be k times the features.
        for column in range(weight.shape[1]):
            expanded += weight[:, column, None] * features[torch.from_numpy(found.indices[:, column]).to(features.device)]
        features = expanded / weight.shape[1]
    return features[: len(query)], features[len(query) :]


def combine_flipped(features: Tensor, flipped: Tensor, flip: Flip = "mean") -> Tensor:
    """One feature [N, D] from those of images and of their mirror images; neither is changed.

    "mean": the mean of both. "unit-sum": their sum at unit length, as layumi's code base has it. They rank alike by cosine distance. Raises
    ValueError if the shapes differ.
    """
    if features.shape != flipped.shape:
        raise ValueError(f"features have shape {tuple(features.shape)}, those of the mirror images {tuple(flipped.shape)}")
    return (features + flipped) / 2 if flip == "mean" else unit_length(features + flipped)


def unit_length(features: Tensor) -> Tensor:
    """Rows [N, D] at length 1; rows of zeros stay zero."""
    norm = features.norm(dim=1, keepdim=True)
    return features / torch.where(norm == 0, 1, norm)
