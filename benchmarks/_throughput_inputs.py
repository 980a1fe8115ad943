"""Where the batches of `throughput.py` come from: noise that is on the device already, or JPEG files of drawn people through the loader."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from personmae.data.image_index import build_index
from personmae.data.loaders import LoaderConfig, RegionBatch, open_loader
from personmae.data.mannequins import MannequinsConfig, draw_mannequins
from personmae.data.plan import Plan
from personmae.recipes.pretraining import PretrainConfig


class Feed(Protocol):
    """Batches with their regions on the device."""

    wait_seconds: float  # that its consumer has waited so far

    def __next__(self) -> RegionBatch: ...


# (first step, number of steps) -> a feed of these
Source = Callable[[int, int], contextlib.AbstractContextManager[Feed]]


class NoiseFeed:
    """The same few batches again and again."""

    wait_seconds = 0.0

    def __init__(self, batches: list[RegionBatch]) -> None:
        self._batches = itertools.cycle(batches)

    def __next__(self) -> RegionBatch:
        return next(self._batches)


def noise_source(config: PretrainConfig, num_batches: int, device: torch.device) -> Source:
    """Batches of noise on the device, in turn."""
    batches = [noise_batch(config, number).to(device) for number in range(num_batches)]

    @contextlib.contextmanager
    def open_feed(first: int, num: int) -> Iterator[Feed]:
        del first, num
        yield NoiseFeed(batches)

    return open_feed


def noise_batch(config: PretrainConfig, number: int = 0) -> RegionBatch:
    """Regions of noise, with the boxes and flips that images of 256x128 pixels get."""
    B = config.batch_size
    plan = Plan(np.full(B, 256), np.full(B, 128), B, 0, config.data.regions)
    chosen = plan.batch(number, 0, 1)
    generator = torch.Generator().manual_seed(number)
    shape = (B, *config.model.encoder.image_size, 3)
    region_a, region_b = (torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for _ in range(2))
    boxes, flips, samples = (torch.from_numpy(values.copy()) for values in (chosen.boxes, chosen.flips, chosen.samples))
    return RegionBatch((region_a, region_b), boxes, flips, samples, samples, epoch=0, step=number, micro=0)


def jpeg_source(config: PretrainConfig, folder: Path, num_images: int, device: torch.device, announce: Callable[[str], None] = print) -> Source:
    """People drawn into `folder` as JPEG files of the model's size, then loaded as a run does it. Each image is decoded each time."""
    size = config.model.encoder.image_size
    drawn = MannequinsConfig(
        size_px=size, num_train_ids=0, num_test_ids=0, num_occluded_train_ids=0, num_occluded_test_ids=0, num_unlabelled=num_images
    )
    # For a few, starting other processes takes longer than drawing.
    people = draw_mannequins(folder / "people", drawn, num_workers=1 if num_images < 64 else None, progress=False).unlabelled
    index = build_index(people, folder / "index", progress=False, announce=lambda line: None)
    plan = Plan(index.heights, index.widths, config.batch_size, config.seed, config.data.regions)
    told: set[str] = set()

    def tell(line: str) -> None:
        if line not in told:
            announce(line)
        told.add(line)

    def open_feed(first: int, num: int) -> contextlib.AbstractContextManager[Feed]:
        loader = LoaderConfig(cache_gib=0.0)
        # It goes on making batches while the last are timed.
        last = first + num + loader.prefetch + 4
        return open_loader(index, plan, loader, size=size, device=device, first_step=first, last_step=last, announce=tell)

    return open_feed
