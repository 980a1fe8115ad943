"""Unsupervised re-identification: from a set without labels.

personmae train usl market --data market1501=/data/market --init runs/vit-small
torchrun --nproc_per_node=4 personmae/tasks/usl.py msmt17 --data msmt17=/data/msmt17 --init runs/vit-small
personmae train usl nano --data demo/mannequins --init demo/run-seed0        on a CPU
"""

from __future__ import annotations

from collections.abc import Sequence

from personmae.configs import parse_flags, user_errors_exit
from personmae.recipes.unsupervised import UnsupervisedConfig, unsupervised_presets
from personmae.tasks import unsupervised


def main(config: UnsupervisedConfig) -> int:
    """Run or continue a run; returns the number of steps done. Raises UserError for what the user can mend."""
    return unsupervised.main(config)


def from_command_line(arguments: Sequence[str] | None = None, program: str = "usl.py") -> UnsupervisedConfig:
    """The run that the command line describes."""
    return parse_flags(unsupervised_presets(), arguments, program, "Unsupervised re-identification: from a set without labels.")


if __name__ == "__main__":
    with user_errors_exit():
        main(from_command_line())
