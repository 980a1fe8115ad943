"""The update of the weights: AdamW or LAMB with decay groups, clipped gradients, the teacher's moving average.

    adamw       PyTorch's fused AdamW, then the average: the default
    adamw-ema   all of it in one pass over the weights (personmae_kernels.adamw_ema)
    apex-adam   FusedAdam of NVIDIA's apex: the arithmetic of AdamW
    apex-lamb   FusedLAMB of NVIDIA's apex (You et al., 2020): the step of each matrix is scaled to the norm of its weights

The first two keep the same state, so that a run may go on with the other; that of the apex kinds is read by the same kind only. Gradients are clipped
before the step, alike for all. The only file that imports apex.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from personmae.configs import UserError
from personmae.training.ema import MovingAverage
from personmae.training.parallel import is_part
from personmae_kernels.adamw_ema import adamw_ema_, adamw_hyper


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    """AdamW as in MAE (He et al., 2022)."""

    kind: Literal["adamw", "adamw-ema", "apex-adam", "apex-lamb"] = "adamw"  # adamw-ema: step, clipping and the average in one kernel; apex: NVIDIA's
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
        self._num_steps: dict[Tensor, int] = {}  # that each parameter has done; empty after loading a state

    @torch.no_grad()
    def update(self, momentum: float, clip_norm: float | None) -> Tensor:
        """One step; returns the norm of the gradients before clipping, [] float32 on the device. No synchronisation with the host but in the first
        step after a state was loaded."""
        chosen = [(parameter, group) for group in self.param_groups for parameter in group["params"] if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter, _ in chosen if parameter.grad is not None], foreach=True)
        scale = 1.0 if clip_norm is None else (clip_norm / (norm + 1e-6)).clamp(max=1.0)
        self._count_step([parameter for parameter, _ in chosen])
        # One launch for what has done as many steps (as a rule all) and has an average, one for what has none.
        launches: dict[tuple[int, bool], list[tuple[nn.Parameter, dict[str, Any]]]] = {}
        for parameter, group in chosen:
            launches.setdefault((self._num_steps[parameter], parameter in self._averages), []).append((parameter, group))
        for (step, averaged), members in launches.items():
            own, group = [parameter for parameter, _ in members], members[0][1]
            adamw_ema_(
                own,
                [parameter.grad for parameter in own if parameter.grad is not None],
                [self.state[parameter]["exp_avg"] for parameter in own],
                [self.state[parameter]["exp_avg_sq"] for parameter in own],
                adamw_hyper(group["lr"], group["betas"], group["eps"], step, scale, momentum, norm.device),
                [group["weight_decay"] for _, group in members],
                averages=[self._averages[parameter] for parameter in own] if averaged else (),
            )
        # What has no gradient stays as it is, and its average comes nearer to it all the same.
        still = [parameter for parameter in self._averages if parameter.grad is None]
        if still:
            torch._foreach_lerp_([self._averages[parameter] for parameter in still], still, 1.0 - momentum)
        return norm

    def _count_step(self, parameters: list[nn.Parameter]) -> None:
        """Makes missing state and counts the step, on the device for the state and here for the corrections."""
        for parameter in parameters:
            if not self.state[parameter]:
                moments = {name: torch.zeros_like(parameter, memory_format=torch.contiguous_format) for name in ("exp_avg", "exp_avg_sq")}
                self.state[parameter].update({"step": torch.zeros((), device=parameter.device), **moments})
                self._num_steps[parameter] = 0
        loaded = [parameter for parameter in parameters if parameter not in self._num_steps]
        if loaded:
            done = torch.stack([self.state[parameter]["step"] for parameter in loaded]).tolist()
            self._num_steps.update({parameter: int(steps) for parameter, steps in zip(loaded, done, strict=True)})
        if parameters:
            torch._foreach_add_([self.state[parameter]["step"] for parameter in parameters], 1)
        for parameter in parameters:
            self._num_steps[parameter] += 1

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in PyTorch."""
        super().load_state_dict(state_dict)
        self._num_steps = {}


def build_optimiser(model: nn.Module, config: OptimiserConfig, average: MovingAverage | None = None) -> torch.optim.Optimizer:
    """The optimiser of a run, of a model that is on its device; `update_weights` sets its learning rate.

    average: of the weights, which adamw-ema moves itself. Raises UserError with the cure where an apex kind is asked for and does not work. Loading
    the state of another kind that keeps other things raises UserError too.
    """
    groups = decay_groups(model, config.weight_decay)
    settings: dict[str, Any] = {"lr": 0.0, "betas": config.betas, "eps": config.eps}
    optimiser: torch.optim.Optimizer
    if config.kind == "adamw":
        optimiser = torch.optim.AdamW(groups, **settings, fused=True)
    elif config.kind == "adamw-ema":
        optimiser = AdamWEma(groups, average, **settings, fused=True)
    else:
        _require_cuda(config.kind, next(model.parameters()).device)
        optimiser = _build_apex(config.kind, groups, settings)
    kind = config.kind if config.kind.startswith("apex") else "adamw"
    optimiser.register_load_state_dict_pre_hook(lambda _, state: _check_kind(kind, state))
    return optimiser


# The head of its master branch on 2026-07-08; the tags are of NVIDIA's containers.
APEX_COMMIT = "6424da3b4faa6c8f062da4a48c424fff3f02d42d"
APEX_INSTALL = f"APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation git+https://github.com/NVIDIA/apex@{APEX_COMMIT}"
APEX_CURE = f"it is built from its repository, with the nvcc of CUDA {{cuda}}: {APEX_INSTALL}"


def _require_cuda(kind: str, device: torch.device) -> None:
    if device.type != "cuda":
        raise UserError(f"optimiser {kind} runs on CUDA only, and this run is on {device}; use --optimiser.kind adamw")


def _build_apex(kind: str, groups: list[dict[str, object]], settings: dict[str, Any]) -> torch.optim.Optimizer:
    """FusedAdam or FusedLAMB. Raises UserError with the command that installs apex where it is missing, another project or without its kernels."""
    cure = APEX_CURE.format(cuda=torch.version.cuda)
    spec = importlib.util.find_spec("apex")
    if spec is None:
        raise UserError(f"optimiser {kind} needs NVIDIA's apex, which is not installed; {cure}")
    # Looked for as a file: to import the other project may fail in any way.
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any((folder / "optimizers" / "fused_lamb.py").exists() for folder in folders):
        raise UserError(f"the apex that is installed{_apex_summary()} is not NVIDIA's, which PyPI does not have: pip uninstall apex, then {cure}")
    try:
        from apex.optimizers import FusedAdam, FusedLAMB

        if kind == "apex-adam":
            return FusedAdam(groups, **settings, adam_w_mode=True)
        # LAMB would clip by itself, at 1.0: the bound is set to where it never does, as gradients come clipped.
        return FusedLAMB(groups, **settings, adam_w_mode=True, max_grad_norm=torch.finfo(torch.float32).max)
    except (ImportError, RuntimeError) as error:
        raise UserError(f"apex is installed but does not give its optimiser ({error}); {cure}") from error


def _apex_summary() -> str:
    """What the package says it is, in brackets; empty if it says nothing."""
    try:
        about = importlib.metadata.metadata("apex")
    except importlib.metadata.PackageNotFoundError:
        return ""
    return f" ({about['Summary']})" if "Summary" in about else ""


def _check_kind(kind: str, state: dict[str, Any]) -> None:
    """Raises UserError if the state is of a kind that keeps other things: "adamw" (both of ours), "apex-adam" or "apex-lamb"."""
    group = state["param_groups"][0]
    saved = "apex-lamb" if "max_grad_norm" in group else "apex-adam" if "bias_correction" in group else "adamw"
    if saved != kind:
        raise UserError(f"the optimiser's state is that of {saved}, and this run's is {kind}; go on with --optimiser.kind {saved}")


def update_weights(
    optimiser: torch.optim.Optimizer, model: nn.Module, average: MovingAverage | None, rate: float, momentum: float, clip_norm: float | None
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
    # Not the optimiser's own: apex's takes no arguments.
    model.zero_grad(set_to_none=True)
    return norm


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """The rate of every group: `rate`, times the group's `lr_scale` where it has one."""
    for group in optimiser.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def clip_gradients(model: nn.Module, max_norm: float | None) -> Tensor:  # -> [] float32, the norm before clipping, on the device
    """Scale all gradients so that their common norm is at most `max_norm`; no synchronisation with the host."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(parameters, float("inf") if max_norm is None else max_norm, foreach=True)
    return norm.full_tensor() if is_part(norm) else norm
