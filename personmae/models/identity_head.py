"""The head that is trained with a re-identification encoder and dropped at the test: a neck and a classifier of people for each feature.

BNNeck (Luo et al., "Bag of Tricks and a Strong Baseline for Deep Person Re-identification", 2019): batch normalisation without a trained shift
between feature and classifier, so that triplet loss and classification see different spaces.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from personmae.configs import UserError
from personmae.models.reid import ReidConfig, ReidEncoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class IdentityHeadConfig:
    """Shape of a head."""

    widths: tuple[int, ...]  # channels of each feature
    num_people: int  # 0: a neck alone, without classifiers
    neck: Literal["bn", "none"] = "bn"
    ghost_size: int | None = None  # samples that are normalised together in training; None: the whole batch

    def __post_init__(self) -> None:
        if self.num_people < 0:
            raise UserError(f"num_people is {self.num_people}; it is a number of people, or 0 for a neck without classifiers")
        if self.ghost_size is not None and self.ghost_size < 2:
            raise UserError(f"ghost_size is {self.ghost_size}; the variance of a group needs at least 2 samples")


class GhostBatchNorm(nn.BatchNorm1d):
    """Batch normalisation within groups of `ghost_size` consecutive samples, as if each were a batch of its own (Hoffer et al., "Train longer,
    generalize better", 2017). The running statistics move by the mean over the groups; eval mode is that of BatchNorm1d."""

    def __init__(self, width: int, ghost_size: int) -> None:
        super().__init__(width)
        self.ghost_size = ghost_size

    def forward(self, x: Tensor) -> Tensor:
        """[B, D] -> [B, D]. Raises ValueError in training if B is no multiple of ghost_size."""
        if not self.training:
            return super().forward(x)
        num_groups, rest = divmod(len(x), self.ghost_size)
        if rest:
            raise ValueError(f"a batch of {len(x)} samples does not divide into groups of {self.ghost_size}; change the batch size or ghost_size")
        running_mean, running_var, num_batches = self.running_mean, self.running_var, self.num_batches_tracked
        assert running_mean is not None
        assert running_var is not None
        assert num_batches is not None
        assert self.momentum is not None
        # Groups as further channels: each channel of each group is normalised by itself.
        channels = x.unflatten(0, (num_groups, self.ghost_size)).transpose(0, 1).flatten(1)
        mean, var = running_mean.repeat(num_groups), running_var.repeat(num_groups)
        out = F.batch_norm(channels, mean, var, self.weight.repeat(num_groups), self.bias.repeat(num_groups), True, self.momentum, self.eps)
        with torch.no_grad():
            running_mean.copy_(mean.unflatten(0, (num_groups, -1)).mean(0))
            running_var.copy_(var.unflatten(0, (num_groups, -1)).mean(0))
            num_batches.add_(1)
        return out.unflatten(1, (num_groups, -1)).transpose(0, 1).flatten(0, 1)


class HeadOutputs(NamedTuple):
    """What the head gives, for each feature."""

    logits: tuple[Tensor, ...]  # float32 [B, num_people]; none without classifiers
    necked: tuple[Tensor, ...]  # float32 [B, D_i], the features after the neck


class IdentityHead(nn.Module):
    """A neck and a classifier without bias for each feature, in float32 also under autocast."""

    def __init__(self, config: IdentityHeadConfig, seed: int = 0) -> None:
        """seed: of the classifiers, normal(0.001) as in TransReID."""
        super().__init__()
        self.config = config
        generator = torch.Generator().manual_seed(seed)
        self.necks = nn.ModuleList(self._make_neck(width) for width in config.widths)
        classifiers = [nn.Linear(width, config.num_people, bias=False) for width in config.widths if config.num_people]
        for classifier in classifiers:
            nn.init.normal_(classifier.weight, std=0.001, generator=generator)
        self.classifiers = nn.ModuleList(classifiers)

    def _make_neck(self, width: int) -> nn.Module:
        if self.config.neck == "none":
            return nn.Identity()
        neck = nn.BatchNorm1d(width) if self.config.ghost_size is None else GhostBatchNorm(width, self.config.ghost_size)
        neck.bias.requires_grad_(False)
        return neck

    def forward(self, features: tuple[Tensor, ...]) -> HeadOutputs:
        """features: float [B, D_i], as many as there are widths. Raises ValueError for another number of them."""
        with torch.autocast(features[0].device.type, enabled=False):
            necked = tuple(neck(feature.float()) for neck, feature in zip(self.necks, features, strict=True))
            logits = tuple(classify(own) for classify, own in zip(self.classifiers, necked, strict=True)) if self.config.num_people else ()
            return HeadOutputs(logits, necked)


def calibrate_necks(head: IdentityHead, features: Sequence[Tensor]) -> None:
    """Sets the running statistics of the necks, which begin as mean 0 and variance 1, to those of features [N, D_i], float, before the neck."""
    for neck, feature in zip(head.necks, features, strict=True):
        if isinstance(neck, nn.BatchNorm1d) and neck.running_mean is not None and neck.running_var is not None:
            wide = feature.double()
            neck.running_mean.copy_(wide.mean(0))
            neck.running_var.copy_(wide.var(0, correction=0))


class NeckedEncoder(nn.Module):
    """A model that is compared after its neck, as clustering does: in place of a ReidEncoder where one is scored."""

    def __init__(self, encoder: ReidEncoder, head: IdentityHead) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    @property
    def config(self) -> ReidConfig:
        """Of the encoder."""
        return self.encoder.config

    @property
    def num_cameras(self) -> int:
        """Of the encoder's embeddings."""
        return self.encoder.num_cameras

    def describe(self, images: Tensor, cameras: Tensor | None = None) -> dict[str, Tensor]:
        """As `ReidEncoder.describe`, each feature after its neck and at unit length."""
        necked = self.head(self.encoder(images, cameras)).necked
        return {"feature": torch.cat([F.normalize(feature, dim=1) for feature in necked], dim=1)}


def describe_of_camera(model: ReidEncoder | NeckedEncoder, camera: int, images: Tensor) -> dict[str, Tensor]:
    """The features of images that are all of one camera, by the number that the model knows it by; -1 for one that it does not know."""
    return model.describe(images, torch.full((len(images),), camera, device=images.device))
