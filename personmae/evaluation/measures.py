"""Measures of each query from the ranks of its matches, under any convention: average precision, inverse negative penalty, first match."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from personmae.evaluation.conventions import AveragePrecision, Ties
from personmae.evaluation.ranking import FloatArray, IntArray, MatchRanks


@dataclass(frozen=True)
class QueryMeasures:
    """Measures of single queries, each [Q]; a query without a match has NaN, NaN, -1 and 0.

    inverse_negative_penalty: number of matches / rank of the last one (Ye et al., "Deep learning for person re-identification", TPAMI 2021).
    """

    average_precision: FloatArray
    inverse_negative_penalty: FloatArray
    first_match: IntArray  # rank of the first match, from 0
    num_matches: IntArray

    def __len__(self) -> int:
        return len(self.num_matches)

    @property
    def matched(self) -> npt.NDArray[np.bool_]:
        """[Q] whether the query has a match."""
        return self.num_matches > 0


def measure_queries(ranks: MatchRanks, average_precision: AveragePrecision = "precision at hits", ties: Ties = "by index") -> QueryMeasures:
    """The measures of all queries; `Convention` explains the choices. "ties pooled" is of average precision alone: elsewhere `ties` holds."""
    num_queries = len(ranks.num_kept)
    num_matches = ranks.num_matches
    query = np.repeat(np.arange(num_queries), num_matches)
    # Of each match: how many matches of its query are not further away, itself included; from 1.
    number = np.arange(len(query)) - ranks.offsets[query] + 1
    rank = ranks.rank if ties == "by index" else _reversed_rank(ranks, query)
    if average_precision == "ties pooled":
        precision = _last_of_group(ranks, query, number) / (ranks.closer + ranks.tied_before + ranks.tied_after + 1)
    else:
        precision = number / rank
        if average_precision == "trapezoid":
            earlier = np.where(rank > 1, (number - 1) / np.maximum(rank - 1, 1), 1.0)
            precision = (earlier + precision) / 2
    matched = num_matches > 0
    first, last = ranks.offsets[:-1][matched], ranks.offsets[1:][matched] - 1
    first_match = np.full(num_queries, -1, np.int64)
    first_match[matched] = rank[first] - 1
    penalty = np.full(num_queries, np.nan)
    penalty[matched] = num_matches[matched] / rank[last]
    summed = np.bincount(query, weights=precision, minlength=num_queries)
    return QueryMeasures(
        average_precision=np.where(matched, summed / np.maximum(num_matches, 1), np.nan),
        inverse_negative_penalty=penalty,
        first_match=first_match,
        num_matches=num_matches,
    )


def _reversed_rank(ranks: MatchRanks, query: IntArray) -> IntArray:
    """[M] the ranks of each query's matches in ascending order, if of equal distances the larger index comes first."""
    # Query and rank in one number, so that one sort orders all.
    base = int(ranks.num_kept.max(initial=0)) + 1
    return np.sort(base * query + ranks.closer + ranks.tied_after + 1) - base * query


def _last_of_group(ranks: MatchRanks, query: IntArray, number: IntArray) -> IntArray:
    """[M] the number of the last match at the same distance. Matches of a query are at the same distance if as many images are closer."""
    starts = np.flatnonzero((np.diff(query, prepend=-1) != 0) | (np.diff(ranks.closer, prepend=-1) != 0))
    sizes = np.diff(starts, append=len(query))
    return np.repeat(number[starts + sizes - 1], sizes)
