"""Pairs of regions per second from JPEG files to batches, for each way to load them: python benchmarks/loading.py [--source DIR]

The ways (`_loading_ways.py`) are the loaders of a run with their options, and the usual one, PIL and torchvision in a DataLoader, with the same
crops of the same files; on one core, and on all. Without --source the files are drawn: JPEGs of person shape, 363 x 149 pixels in the mean. Ways take
turns, so that a busy machine slows all alike. The operating system's cache is warm, decoded images are kept only where the way says so. Then the
stages of one image, on one core.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch

# A program's own folder is on the path, the root is not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._loading_stages import time_stages
from benchmarks._loading_ways import WAYS, Task, open_way, why_not
from benchmarks._measure import RESULTS, spread, write_result
from personmae.configs import UserError
from personmae.data.image_index import build_index
from personmae.data.region_draws import RegionConfig

# Batches that are loaded before any is timed: more than are made ahead.
_NUM_WARM_UP = 8


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="folder or list of images; drawn if not given")
    parser.add_argument("--num-images", type=int, default=2000, help="how many to draw")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--num-cores", type=int, nargs="+", help="how many to use; one and all if not given")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--size", type=int, nargs=2, default=[256, 128], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--num-batches", type=int, default=15, help="batches timed in each turn")
    parser.add_argument("--num-turns", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where batches are delivered")
    parser.add_argument("--colour", action="store_true", help="colour jitter as well")
    parser.add_argument("--output", type=Path, default=RESULTS / "loading.json")
    options = parser.parse_args(arguments)
    all_cores = len(os.sched_getaffinity(0))
    num_cores = options.num_cores or sorted({1, all_cores})
    if not 1 <= min(num_cores) <= max(num_cores) <= all_cores:
        parser.error(f"--num-cores is {' '.join(map(str, num_cores))}; this machine has {all_cores}")
    try:
        with tempfile.TemporaryDirectory() as folder:
            if options.source is None:
                draw_people(Path(folder) / "people", options.num_images)
            index = build_index(options.source or Path(folder) / "people", Path(folder) / "index", progress=False)
            regions = RegionConfig(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1) if options.colour else RegionConfig()
            task = Task(index, options.batch_size, tuple(options.size), regions, torch.device(options.device), Path(folder) / "decoded")
            rows = compare(task, num_cores, options)
            stages = time_stages(task, 500, options.num_turns)
    except UserError as error:
        parser.error(str(error))
    show(rows, stages)
    about = {"images": len(index), "mean_height_px": float(index.heights.mean()), "mean_width_px": float(index.widths.mean())}
    settings = {**vars(options), "num_cores": num_cores, **about, "mean_bytes": float(index.num_bytes.mean())}
    write_result(options.output, "loading", settings, [*rows, *stages])
    print(f"written to {options.output}")
    return 0


def compare(task: Task, num_cores: list[int], options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each way and number of cores, timed in turns; those that cannot run here say why."""
    left_out = {way: reason for way in options.ways if (reason := why_not(way, task.device))}
    variants = [(way, cores) for cores in num_cores for way in options.ways if way not in left_out]
    speeds: dict[tuple[str, int], list[float]] = {variant: [] for variant in variants}
    for turn in range(options.num_turns):
        for way, cores in variants:
            speeds[way, cores].append(time_way(way, task, cores, turn * options.num_batches, options.num_batches))
    usual = {cores: spread(speeds["usual", cores]).median for cores in num_cores if ("usual", cores) in speeds}
    rows: list[dict[str, Any]] = []
    for way, cores in variants:
        row = {"way": way, "num_cores": cores, "pairs_per_second": spread(speeds[way, cores])}
        if cores in usual and way != "usual":
            row["times_as_fast_as_usual"] = row["pairs_per_second"].median / usual[cores]
        rows.append(row)
    return rows + [{"way": way, "left_out": reason} for way, reason in left_out.items()]


def time_way(way: str, task: Task, num_cores: int, first_step: int, num_batches: int) -> float:
    """Pairs per second once the loader runs, on this many cores: the queue of ready batches is as full at the end as at the beginning."""
    cores = os.sched_getaffinity(0)
    # Threads and processes that are started from here on stay on these.
    os.sched_setaffinity(0, sorted(cores)[:num_cores])
    try:
        with open_way(way, task, num_cores, num_batches + 2 * _NUM_WARM_UP, first_step) as batches:
            for _ in range(_NUM_WARM_UP):
                next(batches)
            started = time.perf_counter()
            for _ in range(num_batches):
                next(batches)
            if task.device.type == "cuda":
                torch.cuda.synchronize(task.device)
            return num_batches * task.batch_size / (time.perf_counter() - started)
    finally:
        os.sched_setaffinity(0, cores)


def show(rows: list[dict[str, Any]], stages: list[dict[str, Any]]) -> None:
    """Prints a line for each row."""
    for row in rows:
        if "left_out" in row:
            print(f"{row['way']:18s} left out: {row['left_out']}")
            continue
        ratio = f", {row['times_as_fast_as_usual']:.2f} times as fast as the usual one" if "times_as_fast_as_usual" in row else ""
        print(f"{row['way']:18s} {row['num_cores']:2d} cores: {row['pairs_per_second']} pairs/s{ratio}")
    for row in stages:
        print(f"{row['way']:18s} {row['stage']:28s} {row['microseconds']} us an image, {row['share']:.0%}")


def draw_people(folder: Path, num_images: int) -> None:
    """JPEGs with the sizes, qualities and lengths of a mixed set of person crops: height log-normal, 75 % with halved colour resolution."""
    generator = np.random.default_rng(0)
    for number in range(num_images):
        height = int(np.clip(generator.lognormal(5.85, 0.33), 120, 700))
        width = int(height * generator.uniform(0.33, 0.5))
        coarse = generator.integers(0, 256, (height // 12 + 2, width // 12 + 2, 3), dtype=np.uint8)
        image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC) + generator.normal(0, 3, (height, width, 3))
        quality, subsampling = int(generator.integers(85, 96)), "420" if generator.random() < 0.75 else "444"
        path = folder / f"{number % 50:02d}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(simplejpeg.encode_jpeg(image.clip(0, 255).astype(np.uint8), quality, colorsubsampling=subsampling))


if __name__ == "__main__":
    sys.exit(main())
