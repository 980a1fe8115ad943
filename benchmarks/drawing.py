"""Images per second of drawing the Mannequins, on one core: python benchmarks/drawing.py [--sizes HEIGHTxWIDTH ...]

One worker, in this process, from the configuration to JPEG files in a temporary folder; draw_mannequins starts one such worker for each core. The
sizes take turns, so that a busy machine slows all alike. Every turn draws other people before other cameras, whose backdrops are made before the
time is taken: a worker makes them once.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2

# A program's own folder is on the path, the root is not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._measure import RESULTS, spread, write_result
from personmae.configs import UserError
from personmae.data.mannequins import MannequinsConfig, draw_mannequins, picture_pixels, plan_pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=parse_size, nargs="+", default=[(256, 128), (128, 64)], metavar="HEIGHTxWIDTH")
    parser.add_argument("--num-images", type=int, default=150, help="unlabelled pictures drawn in each turn")
    parser.add_argument("--num-turns", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "drawing.json")
    options = parser.parse_args()
    if options.num_images < 1 or options.num_turns < 1:
        parser.error(f"--num-images {options.num_images} --num-turns {options.num_turns}: both must be at least 1")
    try:
        results = compare(options)
    except UserError as error:
        parser.error(str(error))
    for row in results:
        print(f"{row['size'][0]} x {row['size'][1]}: {row['images_per_second']} images/s on one core")
        print(f"{'':11s}{row['cpu_milliseconds_per_image']} ms of processor time for each")
    write_result(options.output, "drawing", {**vars(options), "num_workers": 1}, results)
    print(f"written to {options.output}")


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each size: pictures per second, processor time and length of a picture over the turns."""
    cv2.setNumThreads(1)
    turns: dict[tuple[int, int], list[tuple[float, float, float]]] = {size: [] for size in options.sizes}
    for turn in range(options.num_turns):
        for size in options.sizes:
            turns[size].append(time_drawing(size, turn, options.num_images))
    return [
        {
            "size": size,
            "images_per_second": spread([speed for speed, _, _ in taken]),
            "cpu_milliseconds_per_image": spread([cost for _, cost, _ in taken]),
            "bytes_per_image": spread([num_bytes for _, _, num_bytes in taken]),
        }
        for size, taken in turns.items()
    ]


def time_drawing(size: tuple[int, int], seed: int, num_images: int) -> tuple[float, float, float]:
    """(images per second, milliseconds of processor time per image, bytes per image) of unlabelled pictures."""
    config = MannequinsConfig(
        size_px=size, num_train_ids=0, num_test_ids=0, num_occluded_train_ids=0, num_occluded_test_ids=0, num_unlabelled=num_images, seed=seed
    )
    one_of_each_camera = {picture.camera: picture for picture in plan_pictures(config)}
    for picture in one_of_each_camera.values():
        picture_pixels(config, picture)
    with tempfile.TemporaryDirectory() as folder:
        busy, started = time.process_time(), time.perf_counter()
        layout = draw_mannequins(Path(folder) / "set", config, num_workers=1, progress=False)
        seconds, busy = time.perf_counter() - started, time.process_time() - busy
        num_bytes = sum(path.stat().st_size for path in layout.unlabelled.iterdir())
    return num_images / seconds, 1e3 * busy / num_images, num_bytes / num_images


def parse_size(text: str) -> tuple[int, int]:
    """256x128 as (256, 128)."""
    height, _, width = text.partition("x")
    return int(height), int(width)


if __name__ == "__main__":
    main()
