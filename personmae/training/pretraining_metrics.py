"""What a pre-training run logs of its losses and of its teacher."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from personmae.models.masked import MaskedConfig, MaskedOutput, RegionInputs
from personmae.models.regions import ORIGINS, OUTSIDE, cell_origins
from personmae.training.logbook import Share
from personmae.training.monitors import collapse_monitors, mean_token_loss
from personmae_kernels import patch_targets


def step_losses(outputs: Sequence[MaskedOutput], model: MaskedConfig) -> dict[str, Tensor | float | Share]:
    """What a step logs, from its micro-batches: means over the predicted cells, and over all cells by where they lie."""
    averages = torch.stack([output.averages for output in outputs]).mean(0)
    sums = torch.stack([output.sums for output in outputs]).sum(0)
    counts = torch.stack([output.counts for output in outputs]).sum(0)
    losses: dict[str, Tensor | float | Share] = {}
    total = torch.zeros((), device=averages.device)
    for row, name, weight in ((0, "pixels", model.pixel_weight), (1, "features", model.feature_weight)):
        if model.losses in ("both", name):
            total = total + weight * averages[row]
            losses[f"loss_{name}"] = averages[row]
            for column, origin in enumerate(ORIGINS):
                losses[f"loss_{name}_{origin}"] = Share(sums[row, column], counts[column])
    return {"loss": total, **losses}


@torch.no_grad()
def pretraining_monitors(config: MaskedConfig, inputs: RegionInputs, features: Tensor | None) -> dict[str, Tensor | float]:
    """Collapse monitors of the teacher and the losses of the best constant prediction, of the last micro-batch."""
    encoder = config.encoder
    found: dict[str, Tensor | float] = {}
    if config.losses != "features":
        targets = patch_targets(
            inputs.region_b, encoder.patch_px, encoder.mean, encoder.std, config.per_channel_pixels
        )
        found["mean_patch_loss"] = mean_token_loss(targets)
        outside = cell_origins(inputs.boxes, inputs.flips, inputs.mask, encoder.grid) == OUTSIDE
        found["mean_patch_loss_outside"] = mean_token_loss(targets, outside)
    if features is not None:
        values = collapse_monitors(features.float())
        found |= {
            "teacher_std": values.std,
            "teacher_cosine": values.cosine,
            "teacher_rank": values.rank,
            "mean_feature_loss": values.mean_token_loss,
        }
    return found
