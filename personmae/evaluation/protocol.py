"""The protocol: scores of a set from features. Every accuracy number of the project comes from here.

Single query, whole gallery, mean over the queries that have a match, unless another convention is asked for (`conventions`). `ranking` defines ranks
and ties, `whitening` the whitened variants.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from personmae.data.records import PersonImage
from personmae.data.reid import ReidSet
from personmae.evaluation.confidence import Bootstrap
from personmae.evaluation.conventions import CONVENTIONS, Convention, Reranking, convention_of
from personmae.evaluation.distances import FloatArray, Metric, open_space, product_distances
from personmae.evaluation.expansion import QueryExpansion, combine_flipped, expand
from personmae.evaluation.feature_cache import FeatureCache
from personmae.evaluation.features import Describe, FeatureArray, Precision, extract_features
from personmae.evaluation.inputs import Junk, count_zero_rows, feature_tensor, labels_from, labels_of_set
from personmae.evaluation.ranking import Labels, MatchRanks, match_ranks, match_ranks_of_distances
from personmae.evaluation.scores import MAX_RANK, Scores, score_ranks
from personmae.evaluation.single_shot import sampled_shot_curves, single_shot_curves
from personmae.evaluation.verification import PairCounts
from personmae.evaluation.whitening import whitened

# Distances of a tile of queries, of 8 bytes each.
_TILE_PAIRS = 4_000_000
Tiles = Iterable[tuple[slice, npt.NDArray[np.floating]]]


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """How features become scores.

    metric: None for the convention's own. reranking, expansion: None for neither. bootstrap: None for no confidence intervals. roc: whether to count
    all pairs for TPR at FPR, which takes a pass over all distances. seed: of the draws of single-gallery-shot, where the convention draws.
    """

    convention: Convention = CONVENTIONS["standard"]
    metric: Metric | None = None
    reranking: Reranking | None = None
    expansion: QueryExpansion | None = None
    bootstrap: Bootstrap | None = Bootstrap()
    roc: bool = False
    max_rank: int = MAX_RANK
    seed: int = 0

    def words(self) -> list[str]:
        """What is not the default, a word each, as in the name of a folder."""
        found = [] if self.convention.name == "standard" else [self.convention.name]
        found += [self.metric] if self.metric and self.metric != self.convention.metric else []
        found += ["expanded"] if self.expansion else []
        return found + ([f"reranked-{self.reranking.definition}"] if self.reranking else [])

    def __str__(self) -> str:
        said = [self.convention.name, self.metric or self.convention.metric, *(str(part) for part in (self.expansion, self.reranking) if part)]
        return ", ".join(said)


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found: scores by feature and variant, and the features themselves by name, for ranked lists."""

    scores: dict[str, Scores]
    query_features: dict[str, FeatureArray]
    gallery_features: dict[str, FeatureArray]
    unlabelled_features: dict[str, FeatureArray] | None

    @property
    def headline(self) -> str:
        """The feature that stands for an encoder: of the mean of the patch tokens, whitened if it is, else of the first feature."""
        wanted = [name for name in self.scores if name.split(", ")[0] == "mean"] or list(self.scores)
        return next((name for name in wanted if "whitened" in name.split(", ")), wanted[0])

    def headline_features(self) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.floating]]:
        """Its features of queries [Q, D] and gallery [G, D], as they were scored."""
        name, *variants = self.headline.split(", ")
        query, gallery = {name: self.query_features[name]}, {name: self.gallery_features[name]}
        if "whitened" not in variants:
            return query[name], gallery[name]
        assert self.unlabelled_features is not None
        white_query, white_gallery = whitened(query, gallery, {name: self.unlabelled_features[name]})
        return white_query[name], white_gallery[name]


def score(
    query_features: Any,
    gallery_features: Any,
    query: Labels,
    gallery: Labels,
    *,
    metric: Metric | None = None,
    scoring: ScoringConfig = ScoringConfig(),
    names: Sequence[str] | None = None,
    notes: Sequence[str] = (),
) -> Scores:
    """Scores of features [Q, D] and [G, D], numpy, torch on any device, or lists.

    metric: goes before the one in `scoring`. names: of the queries, for the table of queries. notes: what was done beforehand, to stand in the
    scores.

    Raises UserError if no query has a match from another camera, ValueError for features that do not fit the labels or are not finite.
    """
    metric = metric or scoring.metric or scoring.convention.metric
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f"metric is {metric!r}; allowed: cosine, euclidean")
    query_features, gallery_features = feature_tensor("query", query_features), feature_tensor("gallery", gallery_features)
    for part, features, labels in (("query", query_features, query), ("gallery", gallery_features, gallery)):
        if len(features) != len(labels):
            raise ValueError(f"{len(features)} {part} features, but labels of {len(labels)} images")
    if query_features.shape[1] != gallery_features.shape[1]:
        raise ValueError(f"query features have {query_features.shape[1]} dimensions, gallery features {gallery_features.shape[1]}")
    said = list(notes)
    num_zero = count_zero_rows(query_features), count_zero_rows(gallery_features)
    if any(num_zero):
        said.append(f"features of length zero: {num_zero[0]} of the queries, {num_zero[1]} of the gallery")
    if scoring.expansion:
        query_features, gallery_features = expand(query_features, gallery_features, scoring.expansion)
        said.append(str(scoring.expansion))
    if scoring.reranking:
        tiles = reranked_tiles(query_features, gallery_features, metric, scoring.reranking)
        return score_tiles(tiles, query, gallery, metric=metric, scoring=scoring, names=names, notes=[*said, str(scoring.reranking)])
    extras = _Extras(scoring, query, gallery)
    if extras.wanted:
        # Of single shots every tie counts; the bins of an ROC curve are coarser than float32.
        exact = scoring.convention.single_gallery_shot
        for rows, distance in (distance_tiles if exact else product_distances)(query_features, gallery_features, metric):
            extras.take(rows, distance)
    ranks = match_ranks(query_features, gallery_features, query, gallery, metric)
    return extras.score(ranks, metric, names, said)


def score_tiles(
    tiles: Tiles,
    query: Labels,
    gallery: Labels,
    *,
    metric: Metric,
    scoring: ScoringConfig = ScoringConfig(),
    names: Sequence[str] | None = None,
    notes: Sequence[str] = (),
) -> Scores:
    """Scores from distances, however they came about: (rows, distances [rows, G]), the queries in order, each once. metric: their name.

    Raises as `score`, and ValueError for tiles that do not fit the labels or do not hold each query once and in order, or distances that are NaN.
    """
    extras = _Extras(scoring, query, gallery)
    parts: list[MatchRanks] = []
    done = 0
    for rows, distance in tiles:
        if rows.start != done:
            raise ValueError(f"a tile begins with query {rows.start}, where query {done} is due")
        done += len(distance)
        parts.append(match_ranks_of_distances(distance, _part(query, rows), gallery))
        if extras.wanted:
            extras.take(rows, distance)
    if done != len(query):
        raise ValueError(f"distances of {done} queries, but labels of {len(query)}")
    return extras.score(MatchRanks.concatenate(parts), metric, names, notes)


class _Extras:
    """What ranks do not tell and distances do, where it is asked for: counts of pairs for ROC, and curves of single gallery shots."""

    def __init__(self, scoring: ScoringConfig, query: Labels, gallery: Labels) -> None:
        self.scoring, self.query, self.gallery = scoring, query, gallery
        self.pairs = PairCounts() if scoring.roc else None
        self.curves: list[FloatArray] = []
        self.generator = np.random.RandomState(scoring.seed)
        self.wanted = scoring.roc or scoring.convention.single_gallery_shot

    def take(self, rows: slice, distance: npt.NDArray[np.floating]) -> None:
        """The distances [rows, G] of the next queries."""
        part = _part(self.query, rows)
        convention, max_rank = self.scoring.convention, self.scoring.max_rank
        if self.pairs:
            self.pairs.add(distance, part, self.gallery)
        if convention.single_gallery_shot:
            num_repeats = convention.num_shot_repeats
            self.curves.append(
                sampled_shot_curves(
                    distance, part, self.gallery, max_rank, num_repeats=num_repeats, generator=self.generator, ties=convention.ties
                )
                if num_repeats
                else single_shot_curves(distance, part, self.gallery, max_rank, convention.ties)
            )

    def score(self, ranks: MatchRanks, metric: Metric, names: Sequence[str] | None, notes: Sequence[str]) -> Scores:
        """The scores from the ranks and what was taken."""
        return score_ranks(
            ranks,
            self.query,
            self.gallery,
            convention=self.scoring.convention,
            metric=metric,
            max_rank=self.scoring.max_rank,
            bootstrap=self.scoring.bootstrap,
            shot_curves=np.concatenate(self.curves) if self.curves else None,
            roc=self.pairs.roc() if self.pairs else None,
            names=names,
            notes=[*notes, *(["CMC of one gallery image a person"] if self.curves else [])],
        )


def distance_tiles(query: Tensor, gallery: Tensor, metric: Metric) -> Iterator[tuple[slice, npt.NDArray[np.floating]]]:
    """(rows, distances [rows, G]) of a few queries at a time, by the definition."""
    space = open_space(query, gallery, metric)
    at_once = max(1, _TILE_PAIRS // len(gallery))
    columns = torch.arange(len(gallery), device=space.device)
    for start in range(0, len(query), at_once):
        rows = torch.arange(start, min(start + at_once, len(query)), device=space.device)
        found = space.pair_distances(rows.repeat_interleave(len(gallery)), columns.repeat(len(rows)))
        yield slice(start, start + len(rows)), found.view(len(rows), -1).cpu().numpy()


def reranked_tiles(query: Tensor, gallery: Tensor, metric: Metric, reranking: Reranking) -> Tiles:
    """The same after k-reciprocal re-ranking."""
    from personmae.evaluation.reranking import reranked_distances

    return reranked_distances(
        query,
        gallery,
        definition=reranking.definition,
        k1=reranking.k1,
        k2=reranking.k2,
        weight=reranking.weight,
        metric="cosine" if metric == "cosine" else "sqeuclidean",
        resquare=reranking.resquare,
    )


def evaluate_features(
    query_features: Any,
    gallery_features: Any,
    query_people: Any,
    gallery_people: Any,
    query_cameras: Any = None,
    gallery_cameras: Any = None,
    *,
    convention: Convention | str = "standard",
    metric: Metric | None = None,
    flipped: tuple[Any, Any] | None = None,
    expansion: QueryExpansion | bool = False,
    rerank: Reranking | bool = False,
    single_gallery_shot: bool = False,
    junk: Junk = "refuse",
    bootstrap: Bootstrap | None = ScoringConfig.bootstrap,
    roc: bool = False,
    max_rank: int = MAX_RANK,
    query_names: Sequence[str] | None = None,
) -> Scores:
    """Scores of anyone's features: numpy, torch on any device, or lists.

        scores = evaluate_features(query_features, gallery_features, query_people, gallery_people, query_cameras, gallery_cameras)
        print(scores)            # mAP 55.27% [53.01%, 57.40%], mINP ..., rank-1 ...
        scores.mAP, scores.rank(1), scores.interval("mAP"), scores.average_precision

    Features: [Q, D] and [G, D]. People and cameras: whole numbers [Q] and [G]; people from 0, of which none is special. No cameras: nothing is left
    out.

    convention: whose scores, a name in `CONVENTIONS` or a `Convention`. metric: "cosine", "euclidean", or None for the convention's. flipped:
    features of the mirror images of query and gallery, taken in by the convention's rule. expansion, rerank: True for fast-reid's and the
    convention's parameters. single_gallery_shot: CMC of one gallery image a person. junk: what to do with gallery images of person -1: "refuse" or
    "drop". bootstrap: of the confidence intervals, or None. roc: TPR at FPR over all pairs too. query_names: paths, for the table of queries.

    Raises UserError if no query has a match or there is no such convention; ValueError or TypeError for bad features and ids, which the message
    names.
    """
    found = convention_of(convention)
    for name, value, kind in (("rerank", rerank, Reranking), ("expansion", expansion, QueryExpansion)):
        if not isinstance(value, bool | kind):
            raise TypeError(f"{name} is {value!r}; True, False or a {kind.__name__} is wanted")
    if single_gallery_shot:
        found = dataclasses.replace(found, single_gallery_shot=True)
    query_features, gallery_features = feature_tensor("query", query_features), feature_tensor("gallery", gallery_features)
    num_images = len(query_features), len(gallery_features)
    query, gallery, kept = labels_from(query_people, gallery_people, query_cameras, gallery_cameras, num_images, junk)
    notes = []
    if flipped is not None:
        query_features = combine_flipped(query_features, feature_tensor("flipped query", flipped[0]), found.flip)
        gallery_features = combine_flipped(gallery_features, feature_tensor("flipped gallery", flipped[1]), found.flip)
        notes.append("mirror images taken in")
    if not kept.all():
        notes.append(f"{int((~kept).sum())} junk images dropped")
        gallery_features = gallery_features[torch.from_numpy(kept)]
    if query_cameras is None:
        notes.append("no cameras, nothing left out")
    scoring = ScoringConfig(
        convention=found,
        metric=metric,
        reranking=found.reranking if rerank is True else rerank or None,
        expansion=QueryExpansion() if expansion is True else expansion or None,
        bootstrap=bootstrap,
        roc=roc,
        max_rank=max_rank,
    )
    return score(query_features, gallery_features, query, gallery, scoring=scoring, names=query_names, notes=notes)


def score_variants(
    query_features: Mapping[str, FeatureArray],
    gallery_features: Mapping[str, FeatureArray],
    query: Labels,
    gallery: Labels,
    *,
    unlabelled_features: Mapping[str, FeatureArray] | None = None,
    metrics: Sequence[Metric] = ("cosine",),
    scoring: ScoringConfig = ScoringConfig(),
    names: Sequence[str] | None = None,
    notes: Sequence[str] = (),
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
                found = score(queries[name], galleries[name], query, gallery, metric=metric, scoring=scoring, names=names, notes=notes)
                scores[name + variant + suffix] = found
    return scores


def evaluate(
    describe: Describe,
    reid_set: ReidSet,
    *,
    size: tuple[int, int],
    unlabelled: Sequence[PersonImage] | Sequence[Path] = (),
    metrics: Sequence[Metric] = ("cosine",),
    scoring: ScoringConfig = ScoringConfig(),
    flip: bool = False,
    batch_size: int = 64,
    num_threads: int = 2,
    device: torch.device | str = "cpu",
    precision: Precision = "auto",
    cache: FeatureCache | None = None,
    announce: Callable[[str], object] = print,
) -> Evaluation:
    """Features and scores of a describer on a set; see `extract_features` and `score_variants`.

    unlabelled: images that whitening is fitted on; without them there are no whitened scores. flip: take in the features of the mirror images, by
    the convention's rule. A set without cameras is scored without leaving anything out, and one of single gallery shots has such a CMC curve.
    """

    def extract(images: Sequence[PersonImage] | Sequence[Path]) -> dict[str, FeatureArray]:
        return extract_features(
            describe,
            images,
            size=size,
            batch_size=batch_size,
            num_threads=num_threads,
            device=device,
            precision=precision,
            flip_test=scoring.convention.flip if flip else "none",
            cache=cache,
            announce=announce,
        )

    query, gallery = extract(reid_set.query), extract(reid_set.gallery)
    fitted_on = extract(unlabelled) if unlabelled else None
    notes = ["mirror images taken in"] if flip else []
    if not reid_set.has_cameras:
        notes.append("no cameras, nothing left out")
    if reid_set.single_gallery_shot:
        scoring = dataclasses.replace(scoring, convention=dataclasses.replace(scoring.convention, single_gallery_shot=True))
    scores = score_variants(
        query,
        gallery,
        *labels_of_set(reid_set),
        unlabelled_features=fitted_on,
        metrics=metrics,
        scoring=scoring,
        names=[str(image.path) for image in reid_set.query],
        notes=notes,
    )
    return Evaluation(scores, query, gallery, fitted_on)


def _part(labels: Labels, rows: slice) -> Labels:
    return Labels(labels.people[rows], labels.cameras[rows])
