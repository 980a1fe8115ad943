"""The optimiser: AdamW with decay groups, the learning rate scaled by the batch."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    """AdamW as in MAE (He et al., 2022)."""

    learning_rate: float = 1.5e-4  # at a global batch of 256; the peak is learning_rate * batch_size / 256
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.05
    clip_norm: float | None = 1.0  # of the gradient of all parameters; None: no clipping


NO_DECAY = ("cls_token", "mask_token", "pos_embed")


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two parameter groups: matrices decay; vectors (norms, biases) and tokens do not."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim <= 1 or name.rsplit(".", 1)[-1] in NO_DECAY
            (free if plain else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def peak_learning_rate(config: OptimiserConfig, batch_size: int) -> float:
    """batch_size: images of one optimiser step, over all processes and accumulation."""
    return config.learning_rate * batch_size / 256


def build_optimiser(model: nn.Module, config: OptimiserConfig) -> torch.optim.Optimizer:
    """PyTorch's fused AdamW, on the CPU too. The learning rate is set before each step by the training loop."""
    return torch.optim.AdamW(decay_groups(model, config.weight_decay), lr=0.0, betas=config.betas, eps=config.eps, fused=True)


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """The same rate for every group."""
    for group in optimiser.param_groups:
        group["lr"] = rate


def clip_gradients(model: nn.Module, max_norm: float | None) -> Tensor:  # -> [] float32, the norm before clipping, on the device
    """Scale all gradients so that their common norm is at most `max_norm`; no synchronisation with the host."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    return torch.nn.utils.clip_grad_norm_(parameters, float("inf") if max_norm is None else max_norm, foreach=True)
