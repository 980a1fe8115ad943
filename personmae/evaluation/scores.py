"""Scores of a set: means over its queries, by a convention, with confidence intervals, what was left out, and each query's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from personmae.configs import UserError, to_plain
from personmae.evaluation.confidence import Bootstrap, Confidence, bootstrap_intervals
from personmae.evaluation.conventions import Convention
from personmae.evaluation.measures import QueryMeasures, measure_queries
from personmae.evaluation.ranking import FloatArray, Labels, MatchRanks, Metric
from personmae.evaluation.verification import Roc, rates

MAX_RANK = 50
REPORTED_RANKS = (1, 5, 10, 20)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of one feature on one set; all ratios in [0, 1].

    mAP: mean average precision; mINP: mean inverse negative penalty (Ye et al., "Deep learning for person re-identification", TPAMI 2021);
    cmc [max_rank]: share of queries with a match at rank 1, 2, ...; constant once the gallery ends. Means are over the `num_scored` queries: those
    with a match, or all, of which the others count as zero, by the convention. In `measures`, which holds each query's own, the others are NaN.
    """

    mAP: float  # noqa: N815 (the field's own name)
    mINP: float  # noqa: N815
    cmc: FloatArray
    measures: QueryMeasures
    query: Labels
    names: Sequence[str] | None  # of the queries: paths
    convention: Convention
    metric: Metric
    num_gallery: int
    num_left_out: int  # pairs of query and gallery image: the same person from the same camera
    num_tied: int  # matches at exactly the distance of another gallery image: only there do orders differ
    notes: tuple[str, ...] = ()  # what was done to features and gallery beforehand, a sentence each
    confidence: Confidence | None = None
    roc: Roc | None = None

    @property
    def average_precision(self) -> FloatArray:
        """[num_queries]; NaN for queries without a match."""
        return self.measures.average_precision

    @property
    def num_queries(self) -> int:
        return len(self.query)

    @property
    def num_valid(self) -> int:
        """Queries with a match."""
        return int(self.measures.matched.sum())

    @property
    def num_scored(self) -> int:
        """Queries that the means are over."""
        return self.num_valid if self.convention.unmatched == "left out" else self.num_queries

    def rank(self, k: int) -> float:
        """Rank-k: share of queries with a match among the k nearest. Raises ValueError for a k beyond the curve."""
        if not 1 <= k <= len(self.cmc):
            raise ValueError(f"rank-{k} is not known; ranks 1 to {len(self.cmc)} are")
        return float(self.cmc[k - 1])

    def interval(self, name: str) -> tuple[float, float] | None:
        """The confidence interval of "mAP", "mINP", "rank1", "rank5", ..., if any was asked for."""
        return self.confidence.intervals[name] if self.confidence else None

    def row(self, model: str = "", feature: str = "") -> dict[str, Any]:
        """The numbers as JSON-ready values, a row of evaluation.json."""
        named = {name: value for name, value in (("model", model), ("feature", feature)) if value}
        ranks = {f"rank{k}": self.rank(k) for k in REPORTED_RANKS if k <= len(self.cmc)}
        counts = {"num_queries": self.num_queries, "num_valid": self.num_valid, "num_gallery": self.num_gallery}
        found = {**named, "mAP": self.mAP, "mINP": self.mINP, **ranks, **counts, "convention": self.convention.name, "metric": self.metric}
        found["processing"] = "; ".join(self.notes)
        if self.confidence:
            found["intervals"] = {name: list(ends) for name, ends in self.confidence.intervals.items()}
        if self.roc:
            # A set may have pairs of one kind only; JSON has no NaN.
            found |= {name: None if np.isnan(rate) else rate for name, rate in rates(self.roc, self.convention.roc_positive).items()}
        return found

    def plain(self) -> dict[str, Any]:
        """All there is but the queries' own, JSON-ready: the row, the curve, the convention in full and what was left out."""
        left_out = {
            "queries_without_a_match": self.num_queries - self.num_valid,
            "they_are": self.convention.unmatched,
            "pairs_of_same_person_and_camera": self.num_left_out,
        }
        found = {**self.row(), "cmc": self.cmc.tolist(), "num_scored": self.num_scored, "num_tied": self.num_tied, "left_out": left_out}
        if self.confidence:
            found["bootstrap"] = {**to_plain(self.confidence.bootstrap), "num_people": self.confidence.num_people}
        if self.roc:
            found["pairs"] = {"same": self.roc.num_same, "different": self.roc.num_different, "resolution": self.roc.resolution}
        return {**found, "convention": to_plain(self.convention), "notes": list(self.notes)}

    def __str__(self) -> str:
        mean = f"mAP {self.mAP:.2%}"
        if ends := self.interval("mAP"):
            mean += f" [{ends[0]:.2%}, {ends[1]:.2%}]"
        ranks = ", ".join(f"rank-{k} {self.rank(k):.2%}" for k in REPORTED_RANKS if k <= len(self.cmc))
        if self.roc:
            known = rates(self.roc, self.convention.roc_positive).items()
            ranks += "".join(f", {name} {'-' if np.isnan(rate) else f'{rate:.2%}'}" for name, rate in known)
        unmatched = "left out" if self.convention.unmatched == "left out" else "counted as zero"
        counts = f"{self.num_valid} queries, {self.num_queries - self.num_valid} without a match {unmatched}, gallery {self.num_gallery}"
        others = "".join(f"; {word}" for word in [f"as {self.convention.name}, {self.metric}", *self.notes])
        return f"{mean}, mINP {self.mINP:.2%}, {ranks} ({counts}{others})"


def score_ranks(
    ranks: MatchRanks,
    query: Labels,
    gallery: Labels,
    *,
    convention: Convention,
    metric: Metric,
    max_rank: int = MAX_RANK,
    bootstrap: Bootstrap | None = None,
    shot_curves: FloatArray | None = None,
    roc: Roc | None = None,
    names: Sequence[str] | None = None,
    notes: Sequence[str] = (),
) -> Scores:
    """Scores from the ranks of all matches. shot_curves [Q, max_rank]: instead of the curve of the whole gallery.

    Raises UserError if no query has a match, ValueError for max_rank below 1, or ranks or names of another number of queries.
    """
    if max_rank < 1:
        raise ValueError(f"max_rank is {max_rank}; at least 1 is wanted")
    for what, number in (("ranks", len(ranks.num_kept)), ("names", len(query) if names is None else len(names))):
        if number != len(query):
            raise ValueError(f"{what} of {number} queries, but labels of {len(query)}")
    measures = measure_queries(ranks, convention.average_precision, convention.ties)
    if not measures.matched.any():
        raise UserError(_why_unmatched(ranks, query, gallery))
    curves = shot_curves if shot_curves is not None else _hits(measures, max_rank)
    scored = measures.matched if convention.unmatched == "left out" else np.ones(len(query), bool)
    values = {
        "mAP": np.nan_to_num(measures.average_precision)[scored],
        "mINP": np.nan_to_num(measures.inverse_negative_penalty)[scored],
        **{f"rank{k}": curves[scored, k - 1].astype(np.float64) for k in REPORTED_RANKS if k <= max_rank},
    }
    return Scores(
        mAP=float(values["mAP"].mean()),
        mINP=float(values["mINP"].mean()),
        cmc=curves[scored].mean(axis=0),
        measures=measures,
        query=query,
        names=names,
        convention=convention,
        metric=metric,
        num_gallery=len(gallery),
        num_left_out=len(query) * len(gallery) - int(ranks.num_kept.sum()),
        num_tied=int((ranks.tied_before + ranks.tied_after > 0).sum()),
        notes=tuple(notes),
        confidence=bootstrap_intervals(values, query.people[scored], bootstrap) if bootstrap else None,
        roc=roc,
    )


def _hits(measures: QueryMeasures, max_rank: int) -> npt.NDArray[np.bool_]:
    """[Q, max_rank] whether the query has a match at rank 1, 2, ... or before."""
    return (measures.first_match[:, None] <= np.arange(max_rank)) & measures.matched[:, None]


def _why_unmatched(ranks: MatchRanks, query: Labels, gallery: Labels) -> str:
    message = f"none of the {len(query)} queries has an image of the same person from another camera in the gallery: nothing to score"
    own_camera_only = int((ranks.num_kept < len(gallery)).sum())
    if own_camera_only:
        return f"{message}. {own_camera_only} have one from their own camera, which is left out; if the set has no cameras, give none"
    return f"{message}. No query's person is in the gallery at all; are the people of both numbered alike?"
