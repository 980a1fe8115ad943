"""Conventions: what the known evaluators do differently from the same distances, as values under the evaluators' names.

All of them rank the gallery by distance, leave out the images of the query's own person from the query's own camera, drop junk (person -1)
and keep distractors (person 0). What differs is in the fields of `Convention`. Ours is "standard".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from personmae.configs import UserError
from personmae.evaluation.ranking import Metric

AveragePrecision = Literal["precision at hits", "trapezoid", "ties pooled"]
Ties = Literal["by index", "reversed"]
Unmatched = Literal["left out", "zero"]
Flip = Literal["mean", "unit-sum"]
RocPositive = Literal["same person", "different person"]


@dataclass(frozen=True, kw_only=True)
class Reranking:
    """k-reciprocal re-ranking; `reranking.py` has the two definitions. The defaults are those of Zhong et al., CVPR 2017.

    resquare: whether the classic definition squares once more what is a squared distance already, as some code bases do.
    """

    definition: Literal["classic", "fast-reid"] = "classic"
    k1: int = 20
    k2: int = 6
    weight: float = 0.3  # of the original distance, in [0, 1]
    resquare: bool = False

    def __post_init__(self) -> None:
        if self.definition not in ("classic", "fast-reid"):
            raise ValueError(f"re-ranking is {self.definition!r}; allowed: classic, fast-reid")
        if not 1 <= self.k2 <= self.k1 or not 0 <= self.weight <= 1:
            raise ValueError(f"re-ranking wants 1 <= k2 <= k1 and a weight from 0 to 1, not k1 {self.k1}, k2 {self.k2} and weight {self.weight}")
        if self.resquare and self.definition != "classic":
            raise ValueError("resquare belongs to the classic definition")

    def __str__(self) -> str:
        squared = ", squared again" if self.resquare else ""
        return f"re-ranked ({self.definition}, k1 {self.k1}, k2 {self.k2}, weight {self.weight:g}{squared})"


@dataclass(frozen=True, kw_only=True)
class Convention:
    """How scores follow from distances.

    about: whose it is, and what it does on ties, in words.
    average_precision: of n matches at ranks r_1 < r_2 < ...
        "precision at hits": the mean of i / r_i;
        "trapezoid": the mean of i / r_i and of the precision one rank earlier, (i - 1) / (r_i - 1), which counts as 1 at rank 1: the area under the
            precision-recall curve by trapezoids, as the Oxford Buildings and the official Market-1501 scripts have it; never above the former;
        "ties pooled": images at the same distance are found together, as scikit-learn's average_precision_score (0.19 and later) does it: each
            match has the precision at the end of its group.
    ties: of gallery images at the same distance the one of smaller index comes first, or the one of larger index.
    unmatched: a query without a match is left out of all means, or counts as zero in them.
    metric: the evaluator's default. Squared and plain Euclidean distance rank alike, and so does Euclidean distance of features at unit length
        and cosine distance: both are "cosine" here.
    feature: which feature that evaluator takes by default, in words; the caller hands it over.
    flip: how the features of an image and its mirror image are made one (see `expansion.combine_flipped`).
    single_gallery_shot: the CMC curve of one gallery image a person (see `single_shot`); mAP and mINP stay those of all images.
    num_shot_repeats: random draws of those images for each query as torchreid takes them, or 0 for the exact expectation.
    roc_positive: which pairs the "true positives" of an ROC curve are (see `verification`).
    reranking: the parameters of that code base, where re-ranking is asked for.
    """

    name: str
    about: str = ""
    average_precision: AveragePrecision = "precision at hits"
    ties: Ties = "by index"
    unmatched: Unmatched = "left out"
    metric: Metric = "cosine"
    feature: str = "as given"
    flip: Flip = "mean"
    single_gallery_shot: bool = False
    num_shot_repeats: int = 0
    roc_positive: RocPositive = "same person"
    reranking: Reranking = Reranking()

    def __post_init__(self) -> None:
        allowed = {
            "average_precision": ("precision at hits", "trapezoid", "ties pooled"),
            "ties": ("by index", "reversed"),
            "unmatched": ("left out", "zero"),
            "metric": ("cosine", "euclidean"),
            "flip": ("mean", "unit-sum"),
            "roc_positive": ("same person", "different person"),
        }
        for field, values in allowed.items():
            if getattr(self, field) not in values:
                raise ValueError(f"{field} is {getattr(self, field)!r}; allowed: {', '.join(values)}")
        if self.num_shot_repeats < 0:
            raise ValueError(f"num_shot_repeats is {self.num_shot_repeats}; 0 (exact) or more is wanted")


# Where evaluators sort with numpy's default (unstable) argsort, the order of images at the same distance is a matter of numpy's version and of the
# processor: no rule reproduces it. There the presets take the smaller index first, which is one of the orders such an evaluator may give.
_PRESETS = (
    Convention(
        name="standard",
        about="Ours. Ties by gallery index in all scores; the CMC curve stays constant once the gallery ends; curves of single gallery shots are "
        "exact.",
    ),
    Convention(
        name="transreid",
        about="TransReID, TransReID-SSL, SOLIDER, CLIP-ReID; re-ranking with the 50 and 15 of TransReID and CLIP-ReID (the others take 20 and 6: "
        "classic). On ties unspecified there (unstable sort), by index here. Distances are of float32 "
        "there. Fails there if fewer than 50 gallery images are left to rank.",
        feature="before BNNeck (all published configurations; the code's default is after)",
        reranking=Reranking(k1=50, k2=15),
    ),
    Convention(
        name="fast-reid",
        about="fast-reid. On ties unspecified there, by index here; its compiled form rounds distances to float32, which makes ties, and reads "
        "past its buffer in small galleries. TPR@FPR has the roles of same and different person exchanged, as there. Its flip test normalises the "
        "mirror image twice; that is not reproduced.",
        feature="after BNNeck",
        roc_positive="different person",
        reranking=Reranking(definition="fast-reid"),
    ),
    Convention(
        name="torchreid",
        about="torchreid. Features are not normalised. On ties unspecified there, by index here; its compiled form rounds distances to float32. "
        "Curves of single gallery shots are drawn 10 times a query, as there after numpy.random.seed.",
        metric="euclidean",
        feature="the model's output in evaluation mode",
        num_shot_repeats=10,
        reranking=Reranking(resquare=True),
    ),
    Convention(
        name="cluster-contrast",
        about="Cluster Contrast, SpCL, open-reid. On ties mAP pools, exactly as scikit-learn; CMC is unspecified there, by index here.",
        average_precision="ties pooled",
        feature="after BNNeck, at unit length",
        reranking=Reranking(resquare=True),
    ),
    Convention(
        name="market-matlab",
        about="The Matlab scripts of Market-1501 and of Zhong et al. (compute_AP.m). Their sort is stable: by index, so the same on ties too.",
        average_precision="trapezoid",
        unmatched="zero",
        feature="at unit length",
    ),
    Convention(
        name="layumi",
        about="layumi's Person_reID_baseline_pytorch. As market-matlab, but similarities are sorted upwards and turned round: on ties unspecified "
        "there (unstable sort), and here as a stable sort turned round gives them, the larger index first.",
        average_precision="trapezoid",
        ties="reversed",
        unmatched="zero",
        feature="512 dimensions after the bottleneck's batch normalisation, at unit length",
        flip="unit-sum",
        reranking=Reranking(resquare=True),
    ),
)

CONVENTIONS: Mapping[str, Convention] = MappingProxyType({convention.name: convention for convention in _PRESETS})


def convention_of(convention: Convention | str) -> Convention:
    """The convention of that name; a convention stays itself. Raises UserError for a name that is none."""
    if isinstance(convention, Convention):
        return convention
    if convention not in CONVENTIONS:
        raise UserError(f"there is no convention {convention!r}; known: {', '.join(CONVENTIONS)}")
    return CONVENTIONS[convention]
