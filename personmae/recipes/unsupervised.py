"""Unsupervised runs, composed from the parts' own configs: one function per recipe, named as on the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from personmae.configs import UserError, require_positive
from personmae.data.identity_plan import ViewConfig
from personmae.evaluation.pseudo_labels import PseudoLabelConfig
from personmae.models.reid import ReidConfig
from personmae.recipes import finetuning
from personmae.recipes.finetuning import TrainConfig
from personmae.training.cluster_memory import MemoryConfig
from personmae.training.finetuning_optimisers import FinetuneOptimiserConfig
from personmae.training.schedules import StepScheduleConfig

FREE_SETTINGS = (*finetuning.FREE_SETTINGS, "num_sheets")


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnsupervisedConfig(TrainConfig):
    """A run on clusters: the labels of the set are only used to say how good the clusters are."""

    pseudo: PseudoLabelConfig = PseudoLabelConfig()
    memory: MemoryConfig = MemoryConfig(momentum=0.2, update="hard")
    schedule: StepScheduleConfig = StepScheduleConfig()
    num_people: int = 32  # clusters in a batch
    images_each: int = 8
    cross_camera: bool = True
    steps_per_epoch: int = 200  # between two clusterings
    ghost_size: int | None = 64  # images that the neck normalises together: published runs were on 4 GPUs with 64 each; None: the whole batch
    # Before the first clustering, set the neck's statistics to those of the images. Without (as published), features are first compared as they are,
    # in which those of masked pre-training all point nearly the same way.
    calibrate_neck: bool = False
    if_too_few: Literal["stop", "widen"] = "stop"  # clusters for a batch: end with advice, or try larger eps by 0.05
    best_by: Literal["no", "test"] = "no"  # the epoch whose weights are kept as the best: none, or by the test sets
    num_sheets: int = 12  # clusters pictured in the report

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "steps_per_epoch")
        if self.model.parts != "none":
            raise UserError(f"parts {self.model.parts} are of supervised training; clusters are of one feature: set --model.parts none")
        if self.ghost_size is not None and (self.ghost_size < 2 or self.batch_size % self.ghost_size):
            raise UserError(f"ghost_size is {self.ghost_size}; it must divide the batch of {self.batch_size}, or be None")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptConfig(UnsupervisedConfig):
    """Unsupervised domain adaptation: supervised on a source set, then on clusters of the target (`data`)."""

    source: str | None = None  # the labelled set to begin on: NAME=FOLDER, or a folder or CSV alone
    source_recipe: Literal["nano", "transreid", "male"] = "transreid"  # of `personmae train holistic`
    source_epochs: int | None = None  # by default those of the recipe
    # In the second stage half of each batch is of the source, with its labels, in one memory with the target's clusters (SpCL); each has its own
    # statistics in the neck where ghost_size divides half the batch.
    joint: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        half = self.batch_size // 2
        if self.joint and (self.num_people % 2 or self.ghost_size is None or half % self.ghost_size):
            raise UserError(f"joint needs an even --num-people and a --ghost-size that divides half the batch ({half}), not {self.ghost_size}")


def market() -> UnsupervisedConfig:
    """Cluster Contrast on Market-1501 with a ViT: eps 0.6, 32 clusters x 8 images, 50 epochs of 200 steps."""
    return UnsupervisedConfig(
        model=ReidConfig(drop_path=0.3),
        optimiser=FinetuneOptimiserConfig(learning_rate=3.5e-4, weight_decay=5e-4, bias_lr_factor=1.0),
    )


def msmt17() -> UnsupervisedConfig:
    """The same on MSMT17: eps 0.7."""
    return replace(market(), pseudo=PseudoLabelConfig(eps=0.7))


def nano() -> UnsupervisedConfig:
    """For `vit-nano`, the built-in set and a laptop's CPU: 8 clusters x 4 images, 128x64."""
    return UnsupervisedConfig(
        model=ReidConfig(image_size=(128, 64), feature="mean", drop_path=0.0),
        views=ViewConfig(pad_px=4, erasing_prob=0.3),
        pseudo=PseudoLabelConfig(eps=0.5, k1=15, k2=4),
        num_people=8,
        images_each=4,
        ghost_size=None,
        calibrate_neck=True,
        optimiser=FinetuneOptimiserConfig(kind="adamw", learning_rate=1e-3, weight_decay=0.05, bias_lr_factor=1.0, layer_decay=0.75),
        schedule=StepScheduleConfig(epochs=30, decay_every=20),
        steps_per_epoch=100,
        evaluate_every=5,
    )


_RECIPES: tuple[Callable[[], UnsupervisedConfig], ...] = (nano, market, msmt17)


def unsupervised_presets() -> dict[str, tuple[str, UnsupervisedConfig]]:
    """Name on the command line -> (what it is, config)."""
    named = {recipe.__name__: ((recipe.__doc__ or "").strip(), recipe()) for recipe in _RECIPES}
    return {name: (about, replace(config, preset=name, run_dir=Path(f"runs/usl-{name}"))) for name, (about, config) in named.items()}


def adaptation_presets() -> dict[str, tuple[str, AdaptConfig]]:
    """The same recipes, on the target, after the supervised start on a source."""
    presets = {}
    for name, (about, config) in unsupervised_presets().items():
        fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(UnsupervisedConfig)}
        source_recipe: Literal["nano", "transreid"] = "nano" if name == "nano" else "transreid"
        presets[name] = about, AdaptConfig(**{**fields, "run_dir": Path(f"runs/uda-{name}"), "source_recipe": source_recipe})
    return presets
