"""Images per second of both loaders, from files to batches: python benchmarks/loading.py [--source DIR]

An image counts once, though it gives two regions. Without --source the images are drawn: JPEGs of person shape, 363 x 149 pixels in the mean. The
loaders take turns, so that a busy machine slows both alike. The operating system's cache is warm; the threads loader's own is off unless asked for.
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

from benchmarks._measure import RESULTS, spread, write_result
from personmae.configs import UserError
from personmae.data.image_index import ImageIndex, build_index
from personmae.data.loaders import LoaderConfig, has_dali, open_loader
from personmae.data.plan import Plan
from personmae.data.region_draws import RegionConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="folder or list of images; drawn if not given")
    parser.add_argument("--num-images", type=int, default=2000, help="how many to draw")
    parser.add_argument("--kinds", nargs="+", choices=["threads", "dali"], help="loaders; all that are installed if not given")
    parser.add_argument("--num-threads", type=int, nargs="+", default=[0], help="thread counts to try, 0 = one for each core")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--size", type=int, nargs=2, default=[256, 128], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--cache-gib", type=float, default=0.0, help="decoded images that the threads loader may keep")
    parser.add_argument("--num-batches", type=int, default=15, help="batches timed in each turn")
    parser.add_argument("--num-turns", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dali-decode", choices=["cpu", "mixed"], default="cpu")
    parser.add_argument("--colour", action="store_true", help="colour jitter, blur and erasing as well")
    parser.add_argument("--output", type=Path, default=RESULTS / "loading.json")
    options = parser.parse_args()
    kinds = options.kinds or (["threads", "dali"] if has_dali() else ["threads"])
    try:
        with tempfile.TemporaryDirectory() as folder:
            if options.source is None:
                draw_people(Path(folder) / "people", options.num_images)
            index = build_index(options.source or Path(folder) / "people", Path(folder) / "index")
            results = compare(index, kinds, options)
    except UserError as error:
        parser.error(str(error))
    for row in results:
        print(f"{row['kind']:8s} {row['num_threads']:2d} threads: {row['images_per_second']} images/s")
        print(f"{'':20s} {row['cpu_microseconds_per_image']} us of processor time for each")
    about = {"images": len(index), "mean_height_px": float(index.heights.mean()), "mean_width_px": float(index.widths.mean())}
    write_result(options.output, "loading", {**vars(options), **about, "mean_bytes": float(index.num_bytes.mean())}, results)
    print(f"written to {options.output}")


def compare(index: ImageIndex, kinds: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each loader and number of threads, timed in turns."""
    coloured = RegionConfig(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, blur_prob=0.2, erasing_prob=0.3)
    plan = Plan(index.heights, index.widths, options.batch_size, 0, coloured if options.colour else RegionConfig())
    variants: list[tuple[Any, int]] = [(kind, num_threads) for kind in kinds for num_threads in options.num_threads]
    speeds: dict[tuple[str, int], list[float]] = {variant: [] for variant in variants}
    costs: dict[tuple[str, int], list[float]] = {variant: [] for variant in variants}
    for turn in range(options.num_turns):
        for kind, num_threads in variants:
            config = LoaderConfig(kind=kind, num_threads=num_threads, cache_gib=options.cache_gib, dali_decode=options.dali_decode)
            speed, cost = time_loader(index, plan, config, turn * options.num_batches, options)
            speeds[kind, num_threads].append(speed)
            costs[kind, num_threads].append(cost)
    return [
        {
            "kind": kind,
            "num_threads": num_threads or len(os.sched_getaffinity(0)),
            "images_per_second": spread(speeds[kind, num_threads]),
            "cpu_microseconds_per_image": spread(costs[kind, num_threads]),
        }
        for kind, num_threads in variants
    ]


def time_loader(index: ImageIndex, plan: Plan, config: LoaderConfig, first: int, options: argparse.Namespace) -> tuple[float, float]:
    """(images per second, microseconds of processor time per image) once the loader is running, its queue empty at both ends of the time."""
    num_warm_up = config.prefetch + 4
    last = first + num_warm_up + options.num_batches + config.prefetch + 4
    device = torch.device(options.device)
    with open_loader(index, plan, config, size=tuple(options.size), device=device, first_step=first, last_step=last, announce=_ignore) as loader:
        for _ in range(num_warm_up):
            next(loader)
        busy, started = time.process_time(), time.perf_counter()
        for _ in range(options.num_batches):
            next(loader)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds, busy = time.perf_counter() - started, time.process_time() - busy
    num_images = options.num_batches * plan.batch_size
    return num_images / seconds, 1e6 * busy / num_images


def _ignore(message: str) -> None:
    del message


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
    main()
