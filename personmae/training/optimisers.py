"""The update of the weights: AdamW with decay groups, clipped gradients, the teacher's moving average.

    adamw       PyTorch's fused AdamW, then the average: the default
    adamw-ema   all of it in one pass over the weights (personmae_kernels.adamw_ema)

Both keep the same state, so that a run may go on with the other.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor, nn

from personmae.training.ema import MovingAverage
from personmae_kernels.adamw_ema import adamw_ema_, adamw_hyper


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    """AdamW as in MAE (He et al., 2022)."""

    kind: Literal["adamw", "adamw-ema"] = "adamw"  # adamw-ema: step, clipping and the teacher's average in one kernel
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


class AdamWEma(torch.optim.AdamW):
    """AdamW whose step also clips the gradients and moves the teacher's average. Its state is that of `torch.optim.AdamW`."""

    def __init__(self, groups: list[dict[str, object]], average: MovingAverage | None, **settings: Any) -> None:
        super().__init__(groups, **settings)
        self._averages = {} if average is None else dict(average.pairs())

    @torch.no_grad()
    def update(self, momentum: float, clip_norm: float | None) -> Tensor:
        """One step; returns the norm of the gradients before clipping, [] float32 on the device. No synchronisation with the host but in the first
        step after a state was loaded."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"] if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters], foreach=True)
        scale = 1.0 if clip_norm is None else (clip_norm / (norm + 1e-6)).clamp(max=1.0)
        step = self._begin_step(parameters)
        group = self.param_groups[0]
        hyper = adamw_hyper(group["lr"], group["betas"], group["eps"], step, scale, momentum, norm.device)
        for averaged in (True, False):
            chosen = [
                (parameter, group["weight_decay"])
                for group in self.param_groups
                for parameter in group["params"]
                if parameter.grad is not None and (parameter in self._averages) is averaged
            ]
            if not chosen:
                continue
            own = [parameter for parameter, _ in chosen]
            adamw_ema_(
                own,
                [parameter.grad for parameter in own],
                [self.state[parameter]["exp_avg"] for parameter in own],
                [self.state[parameter]["exp_avg_sq"] for parameter in own],
                hyper,
                [decay for _, decay in chosen],
                averages=[self._averages[parameter] for parameter in own] if averaged else (),
            )
        # What has no gradient stays as it is, and its average comes nearer to it all the same.
        still = [parameter for parameter in self._averages if parameter.grad is None]
        if still:
            torch._foreach_lerp_([self._averages[parameter] for parameter in still], still, 1.0 - momentum)
        return norm

    def _begin_step(self, parameters: list[nn.Parameter]) -> int:
        """Makes missing state and counts the step; returns its number, from 1."""
        for parameter in parameters:
            if not self.state[parameter]:
                moments = {name: torch.zeros_like(parameter, memory_format=torch.contiguous_format) for name in ("exp_avg", "exp_avg_sq")}
                self.state[parameter].update({"step": torch.zeros((), device=parameter.device), **moments})
        torch._foreach_add_([self.state[parameter]["step"] for parameter in parameters], 1)
        if self._num_steps is None:
            self._num_steps = int(self.state[parameters[0]]["step"]) - 1
        self._num_steps += 1
        return self._num_steps

    _num_steps: int | None = None  # done so far; None: as the state says

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in PyTorch."""
        super().load_state_dict(state_dict)
        self._num_steps = None


def build_optimiser(model: nn.Module, config: OptimiserConfig, average: MovingAverage | None = None) -> torch.optim.AdamW:
    """The optimiser of a run, on the CPU too; `update_weights` sets its learning rate. average: of the weights, which adamw-ema moves itself."""
    groups = decay_groups(model, config.weight_decay)
    settings: dict[str, Any] = {"lr": 0.0, "betas": config.betas, "eps": config.eps, "fused": True}
    return torch.optim.AdamW(groups, **settings) if config.kind == "adamw" else AdamWEma(groups, average, **settings)


def update_weights(
    optimiser: torch.optim.AdamW, model: nn.Module, average: MovingAverage | None, rate: float, momentum: float, clip_norm: float | None
) -> Tensor:
    """One update from the gradients, which are then dropped: clip, step, move the average. Returns the norm of the gradients before clipping, []
    float32 on the device.

    rate: the learning rate. momentum: of the average. clip_norm: the largest common norm of the gradients, None for no clipping.
    """
    set_learning_rate(optimiser, rate)
    if isinstance(optimiser, AdamWEma):
        norm = optimiser.update(momentum, clip_norm)
    else:
        norm = clip_gradients(model, clip_norm)
        optimiser.step()
        if average is not None:
            average.update(momentum)
    optimiser.zero_grad(set_to_none=True)
    return norm


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """The same rate for every group."""
    for group in optimiser.param_groups:
        group["lr"] = rate


def clip_gradients(model: nn.Module, max_norm: float | None) -> Tensor:  # -> [] float32, the norm before clipping, on the device
    """Scale all gradients so that their common norm is at most `max_norm`; no synchronisation with the host."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    return torch.nn.utils.clip_grad_norm_(parameters, float("inf") if max_norm is None else max_norm, foreach=True)
