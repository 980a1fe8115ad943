"""Schedules: pure functions of the optimiser step, so that a resumed run continues them exactly."""

from __future__ import annotations

import dataclasses
import math

from personmae.configs import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Length of a run and the course of its rates."""

    epochs: float = 300.0  # ignored where steps is given
    steps: int | None = None  # optimiser steps
    warmup_ratio: float = 0.05  # of all steps, linear from 0
    final_ratio: float = 0.0  # of the peak learning rate, at the end of the cosine
    feature_ramp_ratio: float = 0.25  # of all steps, the feature loss rises linearly from 0 to its weight (BootMAE)
    ema_start: float = 0.996  # momentum of the teacher; use 0.99 for runs under 5,000 steps
    ema_end: float = 1.0

    def __post_init__(self) -> None:
        if self.epochs <= 0 or (self.steps is not None and self.steps < 1):
            raise UserError(f"schedule.epochs is {self.epochs} and schedule.steps {self.steps}; a run has more than 0 epochs, or at least 1 step")
        for name in ("warmup_ratio", "final_ratio", "feature_ramp_ratio", "ema_start", "ema_end"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"schedule.{name} is {getattr(self, name)}; it must lie between 0 and 1")


def num_steps(config: ScheduleConfig, steps_per_epoch: int) -> int:
    """Optimiser steps of the whole run, at least 1."""
    return config.steps if config.steps is not None else max(1, round(config.epochs * steps_per_epoch))


def learning_rate(step: int, total: int, peak: float, config: ScheduleConfig) -> float:
    """Linear warm-up, then half a cosine. step: 0 for the first update, which already has a rate above 0."""
    warmup = round(total * config.warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * (config.final_ratio + (1.0 - config.final_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress)))


def feature_ramp(step: int, total: int, config: ScheduleConfig) -> float:
    """Factor of the feature loss, 0 to 1."""
    ramp = total * config.feature_ramp_ratio
    return 1.0 if ramp <= 0 else min(1.0, (step + 1) / ramp)


def ema_momentum(step: int, total: int, config: ScheduleConfig) -> float:
    """Momentum of the teacher after update `step`: a cosine from ema_start to ema_end (Grill et al., BYOL, 2020)."""
    return config.ema_end - (config.ema_end - config.ema_start) * 0.5 * (1.0 + math.cos(math.pi * step / total))
