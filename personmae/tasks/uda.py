"""Unsupervised domain adaptation: supervised on a source set, then on clusters of a target set whose labels are not used.

personmae train uda market --source msmt17=/data/msmt17 --data market1501=/data/market --init runs/vit-small
personmae train uda nano --source city-a --data city-b --init demo/run-seed0        on a CPU

The first stage is a run of `personmae train holistic` in RUN/source, the second one of `personmae train usl` in RUN, which begins with its weights. A
stage that is done is not done again. Images of the source are not shown in the second stage, but with --joint, where half of each batch is of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

from personmae.configs import UserError, parse_flags, user_errors_exit
from personmae.recipes.finetuning import FinetuneConfig, finetuning_presets
from personmae.recipes.unsupervised import AdaptConfig, UnsupervisedConfig, adaptation_presets
from personmae.tasks import finetuning, unsupervised

# Settings of the second stage that are those of the first, too.
_SHARED = (
    *("init", "foreign", "seed", "loader", "device", "precision", "attention", "operators", "compile", "checkpoint_activations"),
    *("deterministic", "resume", "log_every", "checkpoint_minutes", "keep_last"),
)


def main(config: AdaptConfig) -> int:
    """Run or continue both stages; returns the number of steps done in both. Raises UserError for what the user can mend."""
    if config.source is None:
        raise UserError("no source set was given; add --source NAME=FOLDER, the labelled set to begin on, beside the target's --data")
    if config.data is None:
        raise UserError("no target set was given; add --data NAME=FOLDER, beside --source")
    source = source_run(config)
    done = finetuning.main(source)
    target = unsupervised.main(target_run(config))
    return done + target


def source_run(config: AdaptConfig) -> FinetuneConfig:
    """The first stage: the recipe on the source, for a model of the target's sizes."""
    recipe = finetuning_presets("holistic")[config.source_recipe][1]
    model = replace(
        recipe.model, image_size=config.model.image_size, stride_px=config.model.stride_px, feature=config.model.feature, neck=config.model.neck
    )
    schedule = recipe.schedule if config.source_epochs is None else replace(recipe.schedule, epochs=config.source_epochs, warmup_epochs=min(
        recipe.schedule.warmup_epochs, config.source_epochs
    ))
    shared = {name: getattr(config, name) for name in _SHARED}
    return replace(recipe, **shared, run_dir=config.run_dir / "source", data=config.source, model=model, schedule=schedule, best_by="no")


def target_run(config: AdaptConfig) -> UnsupervisedConfig:
    """The second stage, from the weights of the first."""
    init = str(config.run_dir / "source" / "reid.safetensors")
    if config.joint:
        return replace(config, init=init)
    own = {field.name: getattr(config, field.name) for field in fields(UnsupervisedConfig)}
    return UnsupervisedConfig(**{**own, "init": init})


def from_command_line(arguments: Sequence[str] | None = None, program: str = "uda.py") -> AdaptConfig:
    """The run that the command line describes."""
    return parse_flags(adaptation_presets(), arguments, program, "Unsupervised domain adaptation: from a labelled source to a target without labels.")


if __name__ == "__main__":
    with user_errors_exit():
        main(from_command_line())
