"""What a checkpoint of pre-training holds, and how a run goes on from one: only with the settings and over the images that it was saved with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from personmae.configs import UserError, differences, from_plain, to_plain
from personmae.data.order import GLOBAL_ORDER
from personmae.training.checkpoints import Checkpoint, load_newest, restore_module, restore_optimiser
from personmae.training.parallel import divided_moments


def checkpoint_state(
    config: object, digest: str, model: nn.Module, teacher: nn.Module | None, optimiser: torch.optim.Optimizer, *, order: str = GLOBAL_ORDER
) -> dict[str, Any]:
    """What a checkpoint holds. digest: of the run's index. teacher: None if it does not change. order: which one the samples come in.

    Order, boxes, flips and masks need no state: they follow from the seed and the step.
    """
    return {
        "config": to_plain(config),
        "index": digest,
        "order": order,
        "model": model.state_dict(),
        "teacher": None if teacher is None else teacher.state_dict(),
        "optimiser": optimiser.state_dict(),
    }


def state_bytes(model: nn.Module, teacher: nn.Module | None) -> int:
    """About as many bytes as the tensors of a checkpoint have: weights, two moments of what is trained, teacher."""
    weights = sum(value.nbytes for part in (model, teacher) if part is not None for value in part.state_dict().values())
    return weights + 2 * sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)


def load_to_resume(
    folder: Path,
    config: Any,
    free: Sequence[str],
    digest: str,
    source: str | Path,
    say: Callable[[str], object],
    *,
    allowed: bool,
    order: str = GLOBAL_ORDER,
) -> Checkpoint | None:
    """The newest good checkpoint of a folder, checked against this run; None to start from nothing.

    config: of this run. free: the settings that may differ. digest: of the run's index. source: of its images, for the message. say: is told of
    broken checkpoints. order: that the samples come in. Every process reads the same file. Raises UserError if it is of other settings, other images
    or another order, or if there are checkpoints and continuing is not `allowed`.
    """
    saved = load_newest(folder, say)
    if saved is None:
        return None
    if not allowed:
        raise UserError(f"{folder} holds checkpoints and --resume is never; choose another --run-dir, or remove it")
    changed = changed_settings(from_plain(type(config), saved.state["config"]), config, free)
    if changed:
        raise UserError(
            f"{saved.path} is of a run with other settings ({'; '.join(changed[:5])}); "
            "choose another --run-dir, or give the settings of that one"
        )
    if saved.state["index"] != digest:
        raise UserError(
            f"{saved.path} was trained on other images than {source} holds now; choose another --run-dir, or restore the images"
        )
    # Those of before there was a choice say nothing.
    saved_order = saved.state.get("order", GLOBAL_ORDER)
    if saved_order != order:
        cure = "--data.order global" if saved_order == GLOBAL_ORDER else "--data.order windows with that --data.order-window, on the same shards"
        raise UserError(f"{saved.path} was trained in another order of the images ({saved_order}; now: {order}): give {cure}, or another --run-dir")
    return saved


def changed_settings(saved: object, config: object, free: Sequence[str]) -> list[str]:
    """The settings that make it another run, one line each. free: those that do not, with all below them."""
    return [line for line in differences(saved, config) if not any(line.startswith((f"{name}:", f"{name}.")) for name in free)]


def restore_weights(saved: Checkpoint, preset: str, model: nn.Module, teacher: nn.Module | None) -> None:
    """Load a checkpoint into the modules of the run. preset: of this run, for messages. teacher: None if it does not change."""
    names = {"source": saved.path, "saved_preset": saved.state["config"]["preset"], "preset": preset}
    restore_module(model, saved.state["model"], part="model", **names)
    if teacher is not None:
        restore_module(teacher, saved.state["teacher"], part="teacher", **names)


def restore_moments(saved: Checkpoint, preset: str, optimiser: torch.optim.Optimizer) -> None:
    """Load a checkpoint into the optimiser of the run."""
    state = divided_moments(saved.state["optimiser"], optimiser)
    restore_optimiser(optimiser, state, source=saved.path, saved_preset=saved.state["config"]["preset"], preset=preset)
