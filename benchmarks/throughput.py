"""Images per second of the pre-training step alone, data already on the device: python benchmarks/throughput.py [PRESET ...]

One step is what `personmae/pretrain.py` does in one: masks, teacher, both decoders, backward, clipping, AdamW, moving average. The presets take
turns, so that a busy machine slows all alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

# A program's own folder is on the path, the root is not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._measure import RESULTS, Spread, spread, time_calls, write_result
from personmae import pretrain
from personmae.data.loaders import RegionBatch
from personmae.data.plan import Plan
from personmae.models.attention import choose_attention, set_attention
from personmae.recipes import PretrainConfig, pretrain_presets
from personmae.training.ema import MovingAverage
from personmae.training.optimisers import build_optimiser, update_weights
from personmae.training.precision import autocast


def main() -> None:
    presets = {name: config for name, (_, config) in pretrain_presets().items()}
    cuda = torch.cuda.is_available()
    default = ["vit-small", "vit-base", "mae-small"] if cuda else ["vit-nano", "mae-nano", "vit-tiny"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", default=default, metavar="PRESET", help=f"of {', '.join(presets)}")
    parser.add_argument("--batch-size", type=int, default=1024 if cuda else 64)
    parser.add_argument("--num-steps", type=int, default=20 if cuda else 5, help="steps timed in each turn")
    parser.add_argument("--num-turns", type=int, default=3)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16" if cuda else "fp32")
    parser.add_argument("--num-threads", type=int, help="of PyTorch on a CPU; by default its own choice")
    parser.add_argument("--output", type=Path, default=RESULTS / "throughput.json")
    options = parser.parse_args()
    if unknown := [name for name in options.presets if name not in presets]:
        parser.error(f"unknown preset {unknown[0]!r}; choose of {', '.join(presets)}")
    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    results = compare({name: presets[name] for name in options.presets}, options)
    for row in results:
        print(f"{row['preset']:10} {row['images_per_second']} images/s")
    write_result(options.output, "throughput", {**vars(options), "num_threads": torch.get_num_threads()}, results)
    print(f"written to {options.output}")


def compare(presets: dict[str, PretrainConfig], options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each preset: images per second over the turns, and the memory that its steps took on a GPU."""
    device = torch.device(options.device)
    steps = {name: prepare(config, options.batch_size, device, options.precision) for name, config in presets.items()}
    seconds: dict[str, list[Spread]] = {name: [] for name in presets}
    for _ in range(options.num_turns):
        for name, step in steps.items():
            seconds[name].append(time_calls(step, num=options.num_steps, device=device))
    memory = round(torch.cuda.max_memory_allocated(device) / 2**30, 2) if device.type == "cuda" else None
    return [
        {
            "preset": name,
            "images_per_second": spread([options.batch_size / turn.median for turn in turns]),
            "step_seconds": spread([turn.median for turn in turns]),
            "peak_memory_gib_of_all": memory,
        }
        for name, turns in seconds.items()
    ]


def prepare(config: PretrainConfig, batch_size: int, device: torch.device, precision: str) -> Callable[[], None]:
    """The step of a run as a function without arguments, on one batch of noise with real boxes and masks."""
    config = dataclasses.replace(config, batch_size=batch_size)
    model, teacher = pretrain.build_models(config)
    attention = choose_attention("auto", device, precision)
    for part in (model, teacher):
        part.to(device)
        set_attention(part, attention.kind)
    average = MovingAverage(teacher.encoder, model.encoder)
    optimiser = build_optimiser(model, config.optimiser, average)
    batch = noise_batch(config).to(device)

    def step() -> None:
        inputs = pretrain.to_inputs(batch, config, device)
        with autocast(device, precision):
            features = teacher(inputs.region_b) if config.model.losses != "pixels" else None
            model(inputs, features).total.backward()
        update_weights(optimiser, model, average, 1e-4, 0.99, config.optimiser.clip_norm)

    return step


def noise_batch(config: PretrainConfig) -> RegionBatch:
    """Regions of noise, with the boxes and flips that images of 256x128 pixels get."""
    sides = np.full((2, config.batch_size), [[256], [128]])
    chosen = Plan(sides[0], sides[1], config.batch_size, 0, config.data.regions).batch(0, 0, 1)
    shape = (config.batch_size, *config.model.encoder.image_size, 3)
    generator = torch.Generator().manual_seed(0)
    region_a, region_b = (torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for _ in range(2))
    boxes, flips, samples = (torch.from_numpy(values) for values in (chosen.boxes, chosen.flips, chosen.samples))
    return RegionBatch(region_a, region_b, boxes, flips, samples, samples, epoch=0, step=0, micro=0)


if __name__ == "__main__":
    main()
