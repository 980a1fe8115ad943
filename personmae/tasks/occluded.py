"""Supervised re-identification where people are hidden in part: training images are covered in part by another person's.

personmae train occluded transreid --data occluded-duke=/data/occluded-duke --init runs/vit-base --test occluded-duke=/data/occluded-duke
torchrun --nproc_per_node=4 personmae/tasks/occluded.py male --data occluded-duke=/data/occluded-duke --init runs/vit-base
personmae train occluded nano --data demo/data/occluded --init demo/run      on a CPU

Occluded-REID and Partial-REID have no training part: models trained on Market-1501 are tested on them (--test).
"""

from __future__ import annotations

from collections.abc import Sequence

from personmae.configs import parse_flags, user_errors_exit
from personmae.recipes.finetuning import FinetuneConfig, finetuning_presets
from personmae.tasks import finetuning


def main(config: FinetuneConfig) -> int:
    """Run or continue a run; returns the number of steps done. Raises UserError for what the user can mend."""
    return finetuning.main(config)


def from_command_line(arguments: Sequence[str] | None = None, program: str = "occluded.py") -> FinetuneConfig:
    """The run that the command line describes."""
    return parse_flags(finetuning_presets("occluded"), arguments, program, "Supervised re-identification where people are hidden in part.")


if __name__ == "__main__":
    with user_errors_exit():
        main(from_command_line())
