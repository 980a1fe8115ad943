"""What one image costs on one core, stage by stage: reading, decoding, two regions, the copy into a batch; ours and the usual ones."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from benchmarks._loading_ways import Task
from benchmarks._measure import spread
from personmae.data.images import decode, sample_box
from personmae.data.plan import Plan


def time_stages(task: Task, num_images: int, num_turns: int) -> list[dict[str, Any]]:
    """A row for each stage of both: microseconds an image, and its share of the sum."""
    samples = list(range(min(num_images, len(task.index))))
    index, size = task.index, task.size
    drawn = Plan(index.heights, index.widths, 1, 0, task.regions).for_samples(0, samples)
    contents = [index.read(sample) for sample in samples]
    arrays = [decode(content, Path("image")) for content in contents]
    pictures = [Image.fromarray(array) for array in arrays]
    resized_crop = v2.RandomResizedCrop(size, scale=task.regions.crop_scale, ratio=task.regions.crop_aspect, antialias=True)
    crop = v2.Compose([resized_crop, v2.RandomHorizontalFlip()])
    batch = np.empty((2, len(samples), *size, 3), dtype=np.uint8)
    region = np.zeros((*size, 3), dtype=np.uint8)
    to_tensor = v2.PILToTensor()
    small = Image.fromarray(region)

    def two_boxes(row: int) -> None:
        for side in (0, 1):
            y0, x0, y1, x1 = drawn.boxes[row, side].tolist()
            sample_box(arrays[row], (y0, x0, y1, x1), bool(drawn.flips[row, side]), size, batch[side, row])

    def two_crops(row: int) -> None:
        crop(pictures[row])
        crop(pictures[row])

    def to_batch(row: int) -> None:
        # As the DataLoader stacks them.
        for side in (0, 1):
            torch.from_numpy(batch[side, row]).copy_(to_tensor(small).permute(1, 2, 0))

    # Ours draws into the batch itself, so its copy is part of the regions.
    ways: dict[str, dict[str, Callable[[int], object]]] = {
        "threads": {"read": index.read, "decode": lambda row: decode(contents[row], Path("image")), "two regions, into the batch": two_boxes},
        "usual": {
            "read": lambda row: Path(index.path(row)).read_bytes(),
            "decode": lambda row: Image.open(io.BytesIO(contents[row])).convert("RGB"),
            "two regions": two_crops,
            "into the batch": to_batch,
        },
    }
    rows = []
    for way, stages in ways.items():
        times = {stage: spread([1e6 * _seconds(call, samples) / len(samples) for _ in range(num_turns)]) for stage, call in stages.items()}
        total = sum(value.median for value in times.values())
        rows += [{"way": way, "stage": stage, "microseconds": value, "share": value.median / total} for stage, value in times.items()]
    return rows


def _seconds(call: Callable[[int], object], samples: list[int]) -> float:
    started = time.perf_counter()
    for sample in samples:
        call(sample)
    return time.perf_counter() - started
