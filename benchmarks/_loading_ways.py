"""The ways from JPEG files to batches that `loading.py` times, each as an iterator of batches that is open for a while.

    usual           PIL and torchvision's transforms v2 in PyTorch's DataLoader, one worker for each core: what public ReID and MAE code has
    threads         the loader of a run on few cores: one thread for each, in one process
    processes       the loader of a run on many cores: one process for each
    threads, 2 pairs; 4 pairs    the same with so many pairs of regions from each decoded image (--data.repeats); processes likewise
    threads, decoded             the same from a file of decoded pixels (--data.loader.decoded-dir); processes likewise
    dali, cpu       DALI with all of it on the CPU
    dali, gpu; dali, mixed       DALI that crops on the GPU, and decodes on the CPU or by nvJPEG
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.transforms import v2

from personmae.data.image_index import ImageIndex
from personmae.data.loaders import LoaderConfig, has_dali, open_loader
from personmae.data.plan import Plan
from personmae.data.region_draws import RegionConfig

REPEATS = {"threads, 2 pairs": 2, "threads, 4 pairs": 4, "processes, 4 pairs": 4}
WAYS = ("usual", "threads", "processes", *REPEATS, "threads, decoded", "processes, decoded", "dali, cpu", "dali, gpu", "dali, mixed")


@dataclass(frozen=True)
class Task:
    """What is loaded, and how."""

    index: ImageIndex
    batch_size: int
    size: tuple[int, int]  # (H, W) of the regions
    regions: RegionConfig
    device: torch.device  # where batches are delivered
    folder: Path  # for decoded pixels


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """Two random crops of each image, as torchvision does it: uint8 [3, H, W]."""

    def __init__(self, task: Task) -> None:
        self._paths = [str(task.index.path(sample)) for sample in range(len(task.index))]
        regions = task.regions
        jitter = (regions.brightness, regions.contrast, regions.saturation, regions.hue)
        self._transform = v2.Compose(
            [
                v2.RandomResizedCrop(task.size, scale=regions.crop_scale, ratio=regions.crop_aspect, antialias=True),
                v2.RandomHorizontalFlip(regions.flip_prob),
                *([v2.ColorJitter(*jitter)] if any(jitter) else []),
                v2.PILToTensor(),
            ]
        )

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        with Image.open(self._paths[number]) as file:
            image = file.convert("RGB")
        return self._transform(image), self._transform(image)


def why_not(way: str, device: torch.device) -> str | None:
    """Why a way cannot be timed here."""
    if way.startswith("dali") and not has_dali():
        return "DALI is not installed (pip install nvidia-dali-cuda120)"
    if way in ("dali, gpu", "dali, mixed") and device.type != "cuda":
        return "it needs a GPU"
    return None


@contextlib.contextmanager
def open_way(way: str, task: Task, num_cores: int, num_batches: int, first_step: int) -> Iterator[Iterator[Any]]:
    """An iterator over at least `num_batches` batches of pairs of regions on the task's device."""
    if way == "usual":
        sampler = RandomSampler(range(len(task.index)), replacement=True, num_samples=num_batches * task.batch_size)
        cuda = task.device.type == "cuda"
        loader = DataLoader(Pairs(task), task.batch_size, sampler=sampler, num_workers=num_cores, pin_memory=cuda, drop_last=True)
        batches = iter(loader)
        try:
            yield (tuple(part.to(task.device, non_blocking=True) for part in batch) for batch in batches)
        finally:
            # Its workers end with it.
            del batches, loader
        return
    repeats = REPEATS.get(way, 1)
    plan = Plan(task.index.heights, task.index.widths, task.batch_size, 0, task.regions, repeats=repeats)
    kind, _, detail = way.partition(", ")
    config = LoaderConfig(
        kind=kind,  # type: ignore[arg-type]
        num_threads=num_cores,
        cache_gib=0.0,
        dali_decode="mixed" if detail == "mixed" else "cpu",
        decoded_dir=task.folder if detail == "decoded" else None,
    )
    device = torch.device("cpu") if way == "dali, cpu" else task.device
    last = first_step + num_batches
    with open_loader(task.index, plan, config, size=task.size, device=device, first_step=first_step, last_step=last, announce=_ignore) as ours:
        yield itertools.islice(ours, num_batches)


def _ignore(message: str) -> None:
    del message
