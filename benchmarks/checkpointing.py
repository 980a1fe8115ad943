"""How long a checkpoint keeps training waiting, written beside it and in its place: python benchmarks/checkpointing.py [--preset vit-base]

The state is that of a run after its first step: student, teacher, both moments. Files go into a temporary folder (--folder: on the disk of interest).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

# A program's own folder is on the path, the root is not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._measure import RESULTS, spread, write_result
from personmae.pretrain import build_models
from personmae.recipes.pretraining import pretrain_presets
from personmae.training.checkpoint_writer import CheckpointWriter
from personmae.training.checkpoints import load_checkpoint, save_checkpoint
from personmae.training.optimisers import build_optimiser
from personmae.training.resuming import checkpoint_state, state_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(pretrain_presets()), default="vit-base")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--num", type=int, default=5, help="checkpoints of each kind, after one that does not count")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder in it is removed afterwards")
    parser.add_argument("--output", type=Path, default=RESULTS / "checkpointing.json")
    options = parser.parse_args()
    device = torch.device(options.device)
    state, num_bytes = trained_state(options.preset, device)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = compare(state, num_bytes, Path(folder), options.num, device)
    for row in rows:
        print(f"{row['kind']:5s} training waits {row['blocking_seconds']} s; on the disk after {row['total_seconds']} s; {row['bytes']:,} bytes")
    write_result(options.output, "checkpointing", vars(options), rows)
    print(f"written to {options.output}")


def trained_state(preset: str, device: torch.device) -> tuple[dict[str, Any], int]:
    """What a checkpoint of a preset holds after a step, its gradients made up; and the bytes that a run reserves for it."""
    config = pretrain_presets()[preset][1]
    model, teacher = build_models(config)
    model.to(device)
    teacher.to(device)
    optimiser = build_optimiser(model, config.optimiser)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimiser.step()
    optimiser.zero_grad()
    return checkpoint_state(config, "made up", model, teacher, optimiser), state_bytes(model, teacher)


def compare(state: dict[str, Any], num_bytes: int, folder: Path, num: int, device: torch.device) -> list[dict[str, Any]]:
    """One row for each way of writing, in turns; the first copy, into memory that was reserved before training, has a row of its own."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    blocking: dict[str, list[float]] = {"first": [], "async": [], "sync": []}
    total: dict[str, list[float]] = {"first": [], "async": [], "sync": []}
    with CheckpointWriter(folder / "async", 1, print) as writer:
        writer.reserve(num_bytes, device)
        for number in range(num + 1):
            kind = "async" if number else "first"
            wait()
            started = time.perf_counter()
            writer.save(number, state)
            # On CUDA the host goes on at once, but the next step waits for the copies that are queued.
            wait()
            blocking[kind].append(time.perf_counter() - started)
            writer.wait()
            total[kind].append(time.perf_counter() - started)
            started = time.perf_counter()
            path = save_checkpoint(folder / "sync", number, state, keep_last=1)
            if number:
                blocking["sync"].append(time.perf_counter() - started)
                total["sync"].append(time.perf_counter() - started)
    num_bytes = path.stat().st_size
    beside = load_checkpoint(folder / "async" / path.name).state["model"]
    in_place = load_checkpoint(path).state["model"]
    assert all(torch.equal(tensor, beside[name]) for name, tensor in in_place.items()), "the two ways wrote different weights"
    return [
        {"kind": kind, "blocking_seconds": spread(blocking[kind]), "total_seconds": spread(total[kind]), "bytes": num_bytes} for kind in blocking
    ]


if __name__ == "__main__":
    main()
