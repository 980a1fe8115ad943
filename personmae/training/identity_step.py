"""The gradients of one fine-tuning step: losses over the whole batch, however many processes and micro-batches it is divided into.

Pairs are sought, and batch statistics taken, over all P * K samples. The features of all parts are put together, the losses and their gradients with
respect to the features are computed on that whole batch by every process alike, and each part's gradient goes back through its own encoder pass. With
several micro-batches the features come from a first pass without gradients, and a second one with them (Gao et al., "Scaling Deep Contrastive
Learning Batch Size under Memory Limited Setup", 2021): twice the forward passes, the memory of one micro-batch, the same gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from personmae.models.identity_head import IdentityHead
from personmae.models.reid import ReidEncoder
from personmae.training.identity_losses import LossConfig, Losses, identity_loss
from personmae.training.precision import autocast

Result = TypeVar("Result")


class MicroBatch(NamedTuple):
    """What the encoder takes, on the device: uint8 [B, H, W, 3], int64 [B] or None, and the draws of stochastic depth or None."""

    images: Tensor
    cameras: Tensor | None
    drop_paths: Tensor | None


def identity_gradients(
    encoder: ReidEncoder,
    head: IdentityHead,
    parts: Sequence[MicroBatch],
    labels: Tensor,
    config: LossConfig,
    *,
    precision: str,
    rank: int = 0,
    world_size: int = 1,
) -> Losses:
    """Puts the gradients of a supervised step into the parameters, and returns the losses of the whole batch. labels: int64 [P * K], of the whole
    batch in the plan's order, on the device. The rest as in `whole_batch_gradients`."""

    def compute(features: tuple[Tensor, ...]) -> tuple[Tensor, Losses]:
        losses = identity_loss(head(features), features, labels, config)
        return losses.total, losses._replace(total=losses.total.detach())

    return whole_batch_gradients(encoder, head, parts, compute, precision=precision, rank=rank, world_size=world_size)


def whole_batch_gradients(
    encoder: ReidEncoder,
    head: IdentityHead,
    parts: Sequence[MicroBatch],
    compute: Callable[[tuple[Tensor, ...]], tuple[Tensor, Result]],
    *,
    precision: str,
    rank: int = 0,
    world_size: int = 1,
) -> Result:
    """Puts the gradients of a step into the parameters of encoder and head, in every process the same.

    parts: the micro-batches of this process, of equal size, in their order; micro-batch m of rank r is part m * world_size + r of the batch. compute:
    from the features of the whole batch in the plan's order, float32 [P * K, D_i] each, the loss [] and what is returned. Gradients must be none
    before. precision: "fp32" or "bf16" (autocast).
    """
    device = parts[0].images.device
    with torch.set_grad_enabled(len(parts) == 1), autocast(device, precision):
        joined = [torch.cat(encoder(*part), dim=1) for part in parts]
    own = torch.stack([features.detach() for features in joined])  # [micro, B, sum of widths]
    whole = _whole(own, world_size)  # [micro, rank, B, sum of widths]
    leaf = whole.flatten(0, 2).requires_grad_()
    total, result = compute(leaf.split(list(encoder.widths), dim=1))
    total.backward()
    assert leaf.grad is not None
    gradients = leaf.grad.view_as(whole)[:, rank]
    if len(parts) == 1:
        joined[0].backward(gradients[0])
    else:
        for part, gradient in zip(parts, gradients, strict=True):
            with autocast(device, precision):
                features_again = torch.cat(encoder(*part), dim=1)
            features_again.backward(gradient)
    if world_size > 1:
        _sum_gradients(encoder, 1.0)
        # Equal already but for what the devices' arithmetic may differ by: this keeps the copies from drifting apart.
        _sum_gradients(head, 1.0 / world_size)
    return result


def _whole(own: Tensor, world_size: int) -> Tensor:
    """[micro, B, D] of each process -> [micro, rank, B, D] in all."""
    if world_size == 1:
        return own[:, None]
    found = [torch.empty_like(own) for _ in range(world_size)]
    dist.all_gather(found, own)
    return torch.stack(found, dim=1)


def _sum_gradients(module: nn.Module, factor: float) -> None:
    """The sum over all processes of each gradient, times a factor; one exchange for all of a kind."""
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
        chosen = [gradient for gradient in gradients if gradient.dtype == dtype]
        joined = torch.cat([gradient.reshape(-1) for gradient in chosen])
        dist.all_reduce(joined)
        pieces = joined.mul_(factor).split([gradient.numel() for gradient in chosen])
        torch._foreach_copy_(chosen, [piece.view_as(gradient) for piece, gradient in zip(pieces, chosen, strict=True)])
