"""The protocol: scores of a set from features. Every accuracy number of the project comes from here.

Single query, whole gallery, mean over the queries that have a match. `ranking` defines ranks and ties, `whitening` the
whitened variants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from personmae.configs import UserError
from personmae.data.records import PersonImage
from personmae.data.reid import ReidSet
from personmae.evaluation.features import Describe, FeatureArray, extract_features
from personmae.evaluation.ranking import FloatArray, Labels, Metric, labels_of, score_features
from personmae.evaluation.whitening import fit_whitening

MAX_RANK = 50
REPORTED_RANKS = (1, 5, 10)


@dataclass(frozen=True)
class Scores:
    """Scores of one feature on one set; all ratios in [0, 1].

    mAP: mean average precision; mINP: mean inverse negative penalty (Ye et al., "Deep learning for person
    re-identification", TPAMI 2021); cmc [max_rank]: share of queries with a match at rank 1, 2, ...; constant once the
    gallery ends. Means are over the `num_valid` queries that have a match from another camera; the other queries are
    NaN in `average_precision` [num_queries].
    """

    mAP: float  # noqa: N815 (the field's own name)
    mINP: float  # noqa: N815
    cmc: FloatArray
    average_precision: FloatArray
    num_queries: int
    num_valid: int
    num_gallery: int

    def rank(self, k: int) -> float:
        """Rank-k: share of queries with a match among the k nearest. Raises ValueError for a k beyond the curve."""
        if not 1 <= k <= len(self.cmc):
            raise ValueError(f"rank-{k} is not known; ranks 1 to {len(self.cmc)} are")
        return float(self.cmc[k - 1])

    def row(self, model: str, feature: str) -> dict[str, str | float | int]:
        """A row of evaluation.json."""
        ranks = {f"rank{k}": self.rank(k) for k in REPORTED_RANKS if k <= len(self.cmc)}
        counts = {"num_queries": self.num_queries, "num_valid": self.num_valid, "num_gallery": self.num_gallery}
        return {"model": model, "feature": feature, "mAP": self.mAP, "mINP": self.mINP, **ranks, **counts}

    def __str__(self) -> str:
        ranks = ", ".join(f"rank-{k} {self.rank(k):.2%}" for k in REPORTED_RANKS if k <= len(self.cmc))
        skipped = self.num_queries - self.num_valid
        counts = f"{self.num_valid} queries, {skipped} without a match left out, gallery {self.num_gallery}"
        return f"mAP {self.mAP:.2%}, mINP {self.mINP:.2%}, {ranks} ({counts})"


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found: scores by feature and variant, and the features themselves by name, for ranked lists."""

    scores: dict[str, Scores]
    query_features: dict[str, FeatureArray]
    gallery_features: dict[str, FeatureArray]
    unlabelled_features: dict[str, FeatureArray] | None


def score(
    query_features: npt.ArrayLike,
    gallery_features: npt.ArrayLike,
    query: Labels,
    gallery: Labels,
    *,
    metric: Metric = "cosine",
    max_rank: int = MAX_RANK,
) -> Scores:
    """Scores of features [Q, D] and [G, D], float.

    Raises UserError if no query has a match from another camera, ValueError for features that do not fit the labels or
    are not finite.
    """
    if max_rank < 1:
        raise ValueError(f"max_rank is {max_rank}; at least 1 is wanted")
    queries = score_features(query_features, gallery_features, query, gallery, metric)
    valid = queries.first_match >= 0
    num_valid = int(valid.sum())
    if num_valid == 0:
        raise UserError(
            f"none of the {len(query)} queries has an image of the same person from another camera in the gallery: "
            "nothing to score"
        )
    hits = np.bincount(queries.first_match[valid], minlength=max_rank)[:max_rank]
    return Scores(
        mAP=float(queries.average_precision[valid].mean()),
        mINP=float(queries.inverse_negative_penalty[valid].mean()),
        cmc=np.cumsum(hits) / num_valid,
        average_precision=queries.average_precision,
        num_queries=len(query),
        num_valid=num_valid,
        num_gallery=len(gallery),
    )


def whitened(
    query: Mapping[str, FeatureArray], gallery: Mapping[str, FeatureArray], unlabelled: Mapping[str, FeatureArray]
) -> tuple[dict[str, FloatArray], dict[str, FloatArray]]:
    """Query and gallery features by name, whitened with what was fitted on the unlabelled features of that name."""
    fitted = {name: fit_whitening(unlabelled[name]) for name in query}
    white_query = {name: fitted[name].apply(query[name]) for name in query}
    white_gallery = {name: fitted[name].apply(gallery[name]) for name in query}
    return white_query, white_gallery


def evaluate_features(
    query_features: Mapping[str, FeatureArray],
    gallery_features: Mapping[str, FeatureArray],
    query: Labels,
    gallery: Labels,
    *,
    unlabelled_features: Mapping[str, FeatureArray] | None = None,
    metrics: Sequence[Metric] = ("cosine",),
) -> dict[str, Scores]:
    """Scores of each feature and variant: "mean"; "mean, whitened" if there are unlabelled features; "mean, euclidean".

    Each mapping: name -> float [N, D]. Raises ValueError if the mappings do not name the same features.
    """
    for part, features in (("gallery", gallery_features), ("unlabelled", unlabelled_features)):
        if features is not None and features.keys() != query_features.keys():
            raise ValueError(f"query features are {sorted(query_features)}, {part} features {sorted(features)}")
    variants: dict[str, tuple[Mapping[str, npt.ArrayLike], Mapping[str, npt.ArrayLike]]] = {}
    variants[""] = query_features, gallery_features
    if unlabelled_features is not None:
        variants[", whitened"] = whitened(query_features, gallery_features, unlabelled_features)
    scores = {}
    for name in query_features:
        for variant, (queries, galleries) in variants.items():
            for metric in metrics:
                suffix = "" if metric == "cosine" else f", {metric}"
                found = score(queries[name], galleries[name], query, gallery, metric=metric)
                scores[name + variant + suffix] = found
    return scores


def evaluate(
    describe: Describe,
    reid_set: ReidSet,
    *,
    size: tuple[int, int],
    unlabelled: Sequence[PersonImage] | Sequence[Path] = (),
    metrics: Sequence[Metric] = ("cosine",),
    batch_size: int = 64,
    num_threads: int = 2,
    device: torch.device | str = "cpu",
) -> Evaluation:
    """Features and scores of a describer on a set; see `extract_features` and `evaluate_features`.

    unlabelled: images that whitening is fitted on; without them there are no whitened scores.
    """

    def extract(images: Sequence[PersonImage] | Sequence[Path]) -> dict[str, FeatureArray]:
        return extract_features(
            describe, images, size=size, batch_size=batch_size, num_threads=num_threads, device=device
        )

    query, gallery = extract(reid_set.query), extract(reid_set.gallery)
    fitted_on = extract(unlabelled) if unlabelled else None
    scores = evaluate_features(
        query,
        gallery,
        labels_of(reid_set.query),
        labels_of(reid_set.gallery),
        unlabelled_features=fitted_on,
        metrics=metrics,
    )
    return Evaluation(scores, query, gallery, fitted_on)
