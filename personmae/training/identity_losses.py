"""Losses of supervised re-identification: which person it is, and that the farthest image of the same person is nearer than the nearest of another.

    total = id_weight * cross-entropy + triplet_weight * triplet
    soft triplet    mean over anchors of log(1 + exp(d_positive - d_negative))
    margin triplet  mean over anchors of max(0, d_positive - d_negative + 0.3)

with the batch-hard distances of Hermans et al., "In Defense of the Triplet Loss", 2017. Of several features the first has half the weight of both
losses and the others share the other half (TransReID; for two features that is MALE's mean).

pytorch-metric-learning has the same loss as BatchHardMiner, TripletMarginLoss and MeanReducer. It is not used here: it leaves out anchors without a
positive, so that the mean is over others than TransReID's, and finds pairs with `nonzero`, which on a GPU waits for the device several times in each
step.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from personmae.configs import UserError
from personmae.models.identity_head import HeadOutputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights and kinds; the defaults are TransReID's."""

    id_weight: float = 1.0
    triplet_weight: float = 1.0
    label_smoothing: float = 0.0
    triplet: Literal["soft", "margin", "none"] = "soft"
    margin: float = 0.3  # triplet margin only
    normalise: bool = False  # features to unit length before their distances

    def __post_init__(self) -> None:
        if self.id_weight < 0 or self.triplet_weight < 0:
            raise UserError(f"id_weight is {self.id_weight} and triplet_weight {self.triplet_weight}; weights are 0 or more")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise UserError(f"label_smoothing is {self.label_smoothing}; it is a share, from 0 to below 1")


class HardPairs(NamedTuple):
    """Distances of each anchor, float32 [B]."""

    positive: Tensor  # to the farthest sample of the same person; 0 if there is no other
    negative: Tensor  # to the nearest sample of another person
    has_negative: Tensor  # bool


class Losses(NamedTuple):
    """Float32 numbers [] on the device; all but `total` without gradient."""

    total: Tensor
    id: Tensor  # cross-entropy
    triplet: Tensor
    accuracy: Tensor  # share of the batch that the first classifier gets right
    positive_distance: Tensor  # mean over anchors, of the first feature
    negative_distance: Tensor


def hard_pairs(features: Tensor, labels: Tensor) -> HardPairs:
    """The batch-hard pairs by Euclidean distance. features: float32 [B, D]. labels: int64 [B].

    An anchor is a positive of itself, at distance 0, as in TransReID: it counts where the batch has no other image of the person. No synchronisation
    with the host. Distances of 0 have the gradient 0.
    """
    with torch.no_grad():
        # Not by a matrix product, whose rounding may choose another pair and under TF32 is coarse.
        distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
        same = labels[:, None] == labels[None, :]
        farthest = distances.masked_fill(~same, -1.0).argmax(1)
        nearest = distances.masked_fill(same, torch.inf).argmin(1)
        has_negative = ~same.all(1)
    # The two chosen distances once more, with gradients: exact, and without the [B, B, D] that the gradient of cdist needs on a GPU.
    return HardPairs(_distance(features, features[farthest]), _distance(features, features[nearest]), has_negative)


def _distance(one: Tensor, other: Tensor) -> Tensor:  # [B, D], [B, D] -> [B]
    squares = (one - other).square().sum(1)
    # TransReID's floor; below it the gradient is 0, where that of the root would be infinite.
    return squares.clamp(min=1e-12).sqrt()


def triplet_loss(pairs: HardPairs, config: LossConfig) -> Tensor:  # -> []
    """Mean over all anchors of the batch; one without a sample of another person adds 0."""
    excess = pairs.positive - pairs.negative
    each = F.softplus(excess) if config.triplet == "soft" else F.relu(excess + config.margin)
    return torch.where(pairs.has_negative, each, 0.0).mean()


def identity_loss(outputs: HeadOutputs, features: tuple[Tensor, ...], labels: Tensor, config: LossConfig) -> Losses:
    """The losses of one batch.

    outputs: of the head. features: those before the neck, float [B, D_i], which the triplets compare. labels: int64 [B], below the number of people.
    In float32, also under autocast. Pairs are sought within the batch that is given. With triplet none its loss is 0, the distances are given still.
    """
    with torch.autocast(labels.device.type, enabled=False):
        identity = _shared([F.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing) for logits in outputs.logits])
        used = features if config.triplet != "none" else features[:1]
        wide = [F.normalize(feature.float(), dim=1) if config.normalise else feature.float() for feature in used]
        pairs = [hard_pairs(feature, labels) for feature in wide]
        triplet = _shared([triplet_loss(own, config) for own in pairs]) if config.triplet != "none" else torch.zeros_like(identity)
        total = config.id_weight * identity + config.triplet_weight * triplet
        with torch.no_grad():
            accuracy = (outputs.logits[0].argmax(1) == labels).float().mean()
            positive, negative = pairs[0].positive.mean(), pairs[0].negative.mean()
        return Losses(total, identity.detach(), triplet.detach(), accuracy, positive, negative)


def _shared(losses: list[Tensor]) -> Tensor:
    """Half of the first and half of the mean of the others; the first alone if there are none."""
    return losses[0] if len(losses) == 1 else 0.5 * losses[0] + 0.5 * torch.stack(losses[1:]).mean()
