"""Packing and opening packs: images per second and core, memory and time of an index: python benchmarks/packing.py [--source DIR]

Packing runs in this process alone, on one core; `personmae pack` starts such a process for each core. Its ways take turns, so that a busy machine
slows all alike. Without --source the images are drawn: JPEGs of person shape, 363 x 149 pixels in the mean. The operating system's cache is warm.

Opening is timed on packs of --num-opened crops that were never drawn: their index is made up, their shards are empty files of the right length, and
nothing is read from them (--data.verify no). The memory is that of a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

# A program's own folder is on the path, the root is not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._measure import RESULTS, spread, write_result
from benchmarks.loading import draw_people
from personmae.configs import UserError
from personmae.data.packs.duplicates import find_near
from personmae.data.packs.examining import PackSettings
from personmae.data.packs.joining import write_column
from personmae.data.packs.making import Share, make_pack
from personmae.data.packs.manifest import MANIFEST_FILE, Manifest, PackedFile, manifest_bytes
from personmae.data.packs.transcoding import Transcoding
from personmae.data.worker_environment import worker_environment

WAYS = {
    "kept byte for byte": PackSettings(),
    "near duplicates left out": PackSettings(duplicates="near"),
    "encoded anew": PackSettings(transcoding=Transcoding(re_encode=True)),
    "longest side 256": PackSettings(transcoding=Transcoding(max_side_px=256)),
}
IMAGES_PER_SHARD, IMAGE_BYTES = 10_000, 15_000
# Of a process of its own: what an open index takes, in seconds and MiB, and after all of it has been used once.
OPENING = """
import json, sys, time
from pathlib import Path
import numpy as np
from personmae.data.image_index import build_index

def resident_mib(kind):
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines[kind].split()[0]) / 1024

before = [resident_mib(kind) for kind in ("RssAnon", "RssFile")]
started = time.perf_counter()
index = build_index(Path(sys.argv[1]), Path(sys.argv[2]), verify="no", announce=lambda text: None)
opened = time.perf_counter() - started
index.digest()
digested = time.perf_counter() - started - opened
after = [resident_mib(kind) for kind in ("RssAnon", "RssFile")]
print(json.dumps([opened, digested, after[0] - before[0], after[1] - before[1]]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="what to pack; drawn if not given")
    parser.add_argument("--num-images", type=int, default=2000, help="how many to draw")
    parser.add_argument("--num-opened", type=int, nargs="+", default=[200_000, 4_000_000], help="images in the packs that are opened")
    parser.add_argument("--num-turns", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "packing.json")
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            results = time_packing(Path(folder), options) + [time_opening(Path(folder), number, options.num_turns) for number in options.num_opened]
    except UserError as error:
        parser.error(str(error))
    for row in results:
        print(row.pop("text"))
    write_result(options.output, "packing", vars(options), results)
    print(f"written to {options.output}")


def time_packing(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each way of packing: images per second on one core, and the bytes of the pack for each of the source."""
    source = options.source
    if source is None:
        source = folder / "people"
        draw_people(source, options.num_images)
    cv2.setNumThreads(1)
    taken: dict[str, list[tuple[float, float, float]]] = {way: [] for way in WAYS}
    for turn in range(options.num_turns + 1):
        for number, (way, settings) in enumerate(WAYS.items()):
            busy, started = time.process_time(), time.perf_counter()
            manifest = make_pack(source, folder / f"pack {turn} {number}", settings, Share(), say=lambda text: None, progress=False)
            seconds, busy = time.perf_counter() - started, time.process_time() - busy
            assert manifest is not None
            num_images = manifest.counts["listed"]
            # The first turn warms the system's cache.
            if turn:
                taken[way].append((num_images / seconds, 1e6 * busy / num_images, manifest.statistics["total_bytes"] / manifest.num_images))
    rows = []
    for way, turns in taken.items():
        speed, cost, num_bytes = (spread(list(values)) for values in zip(*turns, strict=True))
        text = f"{way:26s} {speed} images/s on one core\n{'':26s} {cost} us of processor time, {num_bytes.median:,.0f} bytes an image"
        rows.append({"what": way, "images_per_second": speed, "cpu_microseconds_per_image": cost, "bytes_per_image": num_bytes.median, "text": text})
    return rows


def time_opening(folder: Path, num_images: int, num_turns: int) -> dict[str, Any]:
    """Seconds and memory of opening a made-up pack, and of finding the near duplicates among as many hashes."""
    pack = folder / f"pack of {num_images}"
    make_up(pack, num_images)
    environment = {**worker_environment(), "PYTHONPATH": os.pathsep.join(sys.path)}
    runs = []
    for _ in range(num_turns):
        ran = subprocess.run(
            [sys.executable, "-c", OPENING, str(pack), str(folder / "cache")], env=environment, check=True, capture_output=True, text=True
        )
        runs.append(json.loads(ran.stdout))
    opened, digested, own, mapped = (spread(list(values)) for values in zip(*runs, strict=True))
    hashes = np.random.default_rng(0).integers(0, 2**64, num_images, dtype=np.uint64)
    started = time.perf_counter()
    find_near(hashes, np.ones(num_images, dtype=bool), 3)
    seconds = time.perf_counter() - started
    index_bytes = sum(path.stat().st_size for path in (pack / "index").iterdir()) / num_images
    text = (
        f"index of {num_images:,}: opened in {opened} s, read once in {digested} s; {index_bytes:.0f} bytes an image, "
        f"{own.median:,.0f} MiB of its own, {mapped.median:,.0f} MiB mapped\n{'':26s} near duplicates among as many: {seconds:.1f} s"
    )
    return {
        "what": f"index of {num_images}",
        "open_seconds": opened,
        "digest_seconds": digested,
        "own_mib": own,
        "mapped_mib": mapped,
        "bytes_per_image": index_bytes,
        "near_duplicates_seconds": seconds,
        "text": text,
    }


def make_up(pack: Path, num_images: int) -> None:
    """A pack with an index as of LUPerson's crops, in names and sizes, and shards without content."""
    pack.mkdir()
    generator = np.random.default_rng(0)
    names = [b"part_%02d/%07d_%05d.jpg" % (row // 500_000, row, row % 100_000) for row in range(num_images)]
    columns: dict[str, npt.NDArray[Any]] = {
        "shards": generator.permutation(np.arange(num_images) // IMAGES_PER_SHARD).astype(np.int32),
        "positions": generator.integers(0, IMAGES_PER_SHARD, num_images) * IMAGE_BYTES,
        "lengths": np.full(num_images, IMAGE_BYTES),
        "heights": generator.integers(100, 600, num_images).astype(np.int32),
        "widths": generator.integers(50, 300, num_images).astype(np.int32),
        "checksums": generator.integers(0, 2**32, num_images, dtype=np.uint32),
        "names": np.frombuffer(b"".join(names), dtype=np.uint8),
        "offsets": np.concatenate([[0], np.cumsum([len(name) for name in names])]),
    }
    shards = []
    for number, num_inside in enumerate(np.bincount(columns["shards"]).tolist()):
        shards.append(PackedFile(f"shard-{number:06d}.tar", (IMAGES_PER_SHARD + 1) * IMAGE_BYTES, "0" * 64, num_inside))
        with open(pack / shards[-1].name, "wb") as file:
            file.truncate(shards[-1].num_bytes)
    files = tuple(write_column(pack, name, column) for name, column in columns.items())
    manifest = Manifest(num_images=num_images, counts={}, statistics={}, settings={}, source={}, shards=tuple(shards), columns=files)
    (pack / MANIFEST_FILE).write_bytes(manifest_bytes(manifest))


if __name__ == "__main__":
    main()
