"""Pseudo labels: clusters of features without labels, as Cluster Contrast finds them, how good they are, and what another eps would give."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from personmae.configs import UserError
from personmae.evaluation.clustering import Clusters, agreement, cluster, cluster_each
from personmae.evaluation.reciprocal import jaccard_distances

# Beyond the chosen eps the table goes on this far.
TABLE_STEPS = (-0.2, -0.1, -0.05, 0.0, 0.05, 0.1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PseudoLabelConfig:
    """Jaccard distances of k-reciprocal neighbours, and DBSCAN on them. Defaults: those of Cluster Contrast on Market-1501."""

    eps: float = 0.6  # largest Jaccard distance of neighbours; 0.7 on MSMT17 with a ViT
    min_samples: int = 4  # images within eps that make a core, itself among them
    k1: int = 30  # nearest neighbours that may be reciprocal
    k2: int = 6  # nearest neighbours whose vectors are averaged
    definition: Literal["classic", "fast-reid"] = "fast-reid"

    def __post_init__(self) -> None:
        if not 0 < self.eps < 1:
            raise UserError(f"pseudo.eps is {self.eps}; it is a Jaccard distance, between 0 and 1")
        for name in ("min_samples", "k1", "k2"):
            if getattr(self, name) < 1:
                raise UserError(f"pseudo.{name} is {getattr(self, name)}; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class LabelQuality:
    """How clusters agree with true people, over the images in a cluster. nmi, ari: normalised mutual information, adjusted Rand index. purity: share
    of images whose cluster has mostly their person. clustered: share of all images that are in one."""

    nmi: float
    ari: float
    purity: float
    clustered: float


def find_clusters(features: npt.ArrayLike, config: PseudoLabelConfig) -> Clusters:
    """The clusters of features, float [N, D], by cosine. Raises UserError for fewer than 2 images, or pairs that outgrow the memory."""
    return find_each(features, [config.eps], config)[0]


def find_each(features: npt.ArrayLike, eps: Sequence[float], config: PseudoLabelConfig) -> list[Clusters]:
    """`find_clusters` at several eps, from the distances of one search."""
    values = np.asarray(features)
    if len(values) < 2:
        raise UserError(f"{len(values)} images cannot be clustered; at least 2 are wanted")
    k1, k2 = min(config.k1, len(values) - 1), min(config.k2, len(values) - 1)
    distances = jaccard_distances(values, cut=max(eps), k1=k1, k2=k2, definition=config.definition)
    return cluster_each(distances, list(eps), min_samples=config.min_samples) if len(eps) > 1 else [
        cluster(distances, eps=eps[0], min_samples=config.min_samples)
    ]


def eps_around(eps: float) -> list[float]:
    """The values of `eps_table` about a chosen one, rising, all between 0 and 1."""
    return [value for step in TABLE_STEPS if 0.01 <= (value := round(eps + step, 4)) <= 0.99]


def eps_table(found: Sequence[Clusters]) -> str:
    """What each eps gives, a line each: clusters, mean images in one, the largest, outliers."""
    lines = ["    eps  clusters  images in one  largest  outliers"]
    for one in found:
        sizes = np.bincount(one.labels[one.labels >= 0])
        mean = f"{sizes.mean():.1f}" if len(sizes) else "-"
        largest = f"{sizes.max():,}" if len(sizes) else "-"
        lines.append(f"{one.eps:7.3g}  {one.num_clusters:8,}  {mean:>13}  {largest:>7}  {one.num_outliers / len(one.labels):8.1%}")
    return "\n".join(lines)


def label_quality(labels: npt.NDArray[np.int64], people: npt.NDArray[np.int64]) -> LabelQuality:
    """How pseudo labels, int64 [N] with -1 for outliers, agree with true people, int64 [N]. Of nothing but outliers all but `clustered` are NaN."""
    inside = labels >= 0
    if not inside.any():
        return LabelQuality(float("nan"), float("nan"), float("nan"), 0.0)
    own, true = labels[inside], people[inside]
    _, numbers = np.unique(true, return_inverse=True)
    pairs, counts = np.unique(own * (numbers.max() + 1) + numbers, return_counts=True)
    most = np.zeros(own.max() + 1, dtype=np.int64)
    np.maximum.at(most, pairs // (numbers.max() + 1), counts)
    nmi, ari = agreement(own, true)
    return LabelQuality(nmi, ari, float(most.sum() / len(own)), float(inside.mean()))


def advice(found: Clusters, num_wanted: int) -> str | None:
    """What to do where clusters cannot be trained on: fewer than num_wanted, those of a batch; None where they can."""
    if found.num_clusters >= num_wanted:
        return None
    if found.num_clusters == 0:
        return f"eps {found.eps:g} leaves all {len(found.labels):,} images outliers: raise --pseudo.eps, or lower --pseudo.min-samples"
    if found.num_clusters == 1 and found.num_outliers < len(found.labels) / 2:
        return f"eps {found.eps:g} makes one cluster of {len(found.labels) - found.num_outliers:,} images: lower --pseudo.eps"
    return (
        f"eps {found.eps:g} finds {found.num_clusters:,} clusters, fewer than the {num_wanted} of a batch "
        f"({found.num_outliers / len(found.labels):.0%} of the images are outliers): "
        + ("raise --pseudo.eps" if found.num_outliers > len(found.labels) / 2 else "lower --pseudo.eps")
        + ", or set a smaller --num-people"
    )
