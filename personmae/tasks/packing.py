"""Pack images into tar shards with an index: few large files in place of millions of small ones, all of them checked.

personmae pack SOURCE FOLDER
torchrun --nproc_per_node=1 --nnodes=4 … -m personmae pack SOURCE FOLDER     on a disk that all machines share

The pack is then a source of pre-training: --data.source FOLDER.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from personmae.configs import UserError
from personmae.data.image_index import ImageIndex
from personmae.data.images import UnreadableImage
from personmae.data.packs.making import Share, make_pack, workers_of_this_process
from personmae.data.packs.manifest import Manifest
from personmae.data.packs.opening import map_pack
from personmae.recipes.programs import PackConfig
from personmae.visuals.pack_picture import draw_pack

PICTURE_FILE = "manifest.png"
NUM_PICTURED = 48


def main(config: PackConfig, say: Callable[[str], object] = print) -> Manifest | None:
    """Pack, go on with a pack, or find it done; print what it holds. Returns its manifest in process 0, None in the others.

    Raises UserError for a source without a usable image, a folder that holds something else, or a full disk.
    """
    share = share_of_this_process(config.num_workers)
    manifest = make_pack(config.source, config.folder, config.settings(), share, say=say if share.rank == 0 else silence)
    if manifest is None:
        return None
    picture = config.folder / PICTURE_FILE
    if not picture.exists():
        draw_picture(config.folder, manifest, picture)
    for line in describe(manifest, config.folder):
        say(line)
    return manifest


def share_of_this_process(num_workers: int | None) -> Share:
    """Which of the processes that torchrun (or a launcher that sets RANK and WORLD_SIZE) has started this one is.

    They need no network: see `make_pack`. Raises UserError for numbers that make no sense.
    """
    try:
        rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        num_local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    except ValueError as error:
        raise UserError(f"RANK, WORLD_SIZE and LOCAL_WORLD_SIZE must be numbers ({error}); start with torchrun, or unset them") from error
    if not 0 <= rank < world_size or num_local < 1:
        raise UserError(f"RANK is {rank} and WORLD_SIZE {world_size}; start with torchrun, or unset them")
    return Share(rank, world_size, num_workers or workers_of_this_process(num_local))


def describe(manifest: Manifest, folder: Path) -> list[str]:
    """What a pack holds, in sentences."""
    counts, statistics = manifest.counts, manifest.statistics
    lines = [
        f"{folder}: {manifest.num_images} images in {len(manifest.shards)} shards, {statistics['total_bytes'] / 2**30:.3f} GiB; "
        f"{counts['kept']} kept byte for byte, {counts['encoded']} encoded anew, {counts['shrunk']} shrunk, {counts['trimmed']} cut at their end"
    ]
    if counts["duplicates_exact"] or counts["duplicates_near"]:
        found = f"{counts['duplicates_exact']} exact and {counts['duplicates_near']} near duplicates"
        lines.append(f"{found} left out, listed in {folder / 'duplicates.tsv'}")
    if counts["rejected"]:
        lines.append(f"{counts['rejected']} images left out, listed in {folder / 'rejected.tsv'}")
    return lines


def draw_picture(folder: Path, manifest: Manifest, picture: Path) -> None:
    """The sizes and aspects of a pack, its mean and spread, and images spread evenly over it."""
    index = map_pack(folder, manifest)
    chosen = np.unique(np.linspace(0, len(index) - 1, NUM_PICTURED).round().astype(int))
    images = [image for sample in chosen.tolist() if (image := image_or_none(index, sample)) is not None]
    draw_pack(picture, manifest.num_images, manifest.counts, manifest.statistics, images)


def image_or_none(index: ImageIndex, sample: int) -> np.ndarray | None:
    """A sample's pixels; None if it has gone bad, which is told when the pack is opened."""
    try:
        return index.image(sample)
    except UnreadableImage:
        return None


def silence(text: str) -> None:
    """What processes other than the first say."""
