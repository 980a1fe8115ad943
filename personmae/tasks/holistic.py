"""Supervised re-identification on sets of whole people.

personmae train holistic transreid --data market1501=/data/market --init runs/vit-base
torchrun --nproc_per_node=4 personmae/tasks/holistic.py male --data msmt17=/data/msmt17 --init runs/vit-base
personmae train holistic nano --data demo/data --init demo/run          on a CPU
"""

from __future__ import annotations

from collections.abc import Sequence

from personmae.configs import parse_flags, user_errors_exit
from personmae.recipes.finetuning import FinetuneConfig, finetuning_presets
from personmae.tasks import finetuning


def main(config: FinetuneConfig) -> int:
    """Run or continue a run; returns the number of steps done. Raises UserError for what the user can mend."""
    return finetuning.main(config)


def from_command_line(arguments: Sequence[str] | None = None, program: str = "holistic.py") -> FinetuneConfig:
    """The run that the command line describes."""
    return parse_flags(finetuning_presets("holistic"), arguments, program, "Supervised re-identification on sets of whole people.")


if __name__ == "__main__":
    with user_errors_exit():
        main(from_command_line())
