"""Schedules: pure functions of the optimiser step, so that a resumed run continues them exactly."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneScheduleConfig:
    """Course of the learning rate of fine-tuning, in epochs, whose number of steps may differ. Defaults: TransReID-SSL's."""

    epochs: int = 120
    warmup_epochs: int = 20
    warmup_start: float = 0.01  # share of the peak from which the warm-up rises linearly
    final_ratio: float = 0.002  # share of the peak at the end of the cosine
    by: Literal["epoch", "step"] = "epoch"  # epoch: one rate for each, that of its end (TransReID); step: at each step (MALE)
    cosine_from: Literal["start", "warmup"] = "start"  # the cosine's begin: the run's (the rate jumps down after the warm-up), or the warm-up's end

    def __post_init__(self) -> None:
        if self.epochs < 1 or not 0 <= self.warmup_epochs <= self.epochs:
            raise UserError(f"schedule.epochs is {self.epochs} and warmup_epochs {self.warmup_epochs}; both must fit: 0 <= warmup_epochs <= epochs")
        for name in ("warmup_start", "final_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"schedule.{name} is {getattr(self, name)}; it must lie between 0 and 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepScheduleConfig:
    """Course of the learning rate of unsupervised training: Cluster Contrast's."""

    epochs: int = 50
    warmup_epochs: int = 0  # in which the rate rises linearly from a tenth
    decay_every: int = 20  # epochs, after which the rate is multiplied by decay
    decay: float = 0.1

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.decay_every < 1 or not 0 <= self.warmup_epochs <= self.epochs:
            raise UserError(
                f"schedule.epochs is {self.epochs}, decay_every {self.decay_every}, warmup_epochs {self.warmup_epochs}; "
                "the first two are at least 1, and the last at most epochs"
            )
        if not 0 < self.decay <= 1:
            raise UserError(f"schedule.decay is {self.decay}; it is a factor above 0, at most 1")


def stepwise_rate(epoch: int, peak: float, config: StepScheduleConfig) -> float:
    """The learning rate of an epoch (from 0)."""
    warmup = 0.1 + 0.9 * epoch / config.warmup_epochs if epoch < config.warmup_epochs else 1.0
    return peak * warmup * config.decay ** (epoch // config.decay_every)


# MALE's: 5 epochs from 0, then half a cosine to 0.
MALE_SCHEDULE = FinetuneScheduleConfig(epochs=100, warmup_epochs=5, warmup_start=0.0, final_ratio=0.0, by="step", cosine_from="warmup")


def finetuning_rate(epoch: int, done: float, peak: float, config: FinetuneScheduleConfig) -> float:
    """The learning rate of a step: a pure function, with the values of timm's CosineLRScheduler.

    epoch: from 0. done: share of the epoch's steps that lie before this one, from 0 to below 1.
    """
    time = epoch + 1 if config.by == "epoch" else epoch + done
    if time < config.warmup_epochs:
        return peak * (config.warmup_start + (1.0 - config.warmup_start) * time / config.warmup_epochs)
    begin = config.warmup_epochs if config.cosine_from == "warmup" else 0
    progress = min(1.0, (time - begin) / max(1, config.epochs - begin))
    return peak * (config.final_ratio + (1.0 - config.final_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress)))
