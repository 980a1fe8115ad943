"""Cut person crops from frames with given boxes.

personmae crop OUT --frames FOLDER_OR_VIDEO ... --boxes FILE ...
personmae crop OUT --mot MOT17/train --mot-match '*-FRCNN' --layout market-train
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from personmae.configs import UserError, to_plain
from personmae.data.box_files import read_boxes
from personmae.data.boxes import Rejected
from personmae.data.crop_folder import REJECTED, UNREADABLE, CropWriting, Cutter, claimed, refusals_told, write_boxes, write_table
from personmae.data.crop_names import name_crops
from personmae.data.crops import CropPlan, plan_crops
from personmae.data.frames import FrameFolder, Frames, open_frames
from personmae.data.sequences import FrameSequence, mot_sequences, pair_sequences, with_cameras
from personmae.recipes.programs import CropConfig

# Goes up when the same parameters give other crops.
CROPS_VERSION = 1
# Settings that change how fast it runs and what is tolerated, not what is cut.
_FREE = ("folder", "frames", "boxes", "mot", "mot_match", "mot_boxes", "cameras", "skip_bad", "max_unreadable", "num_threads")


def main(config: CropConfig, say: Callable[[str], object] = print, *, progress: bool = True) -> None:
    """Plan, then cut. Raises UserError before anything is written if a box cannot be used (unless skip_bad) or nothing would be cut."""
    sequences = _sequences(config)
    num_threads = config.num_threads or len(os.sched_getaffinity(0))
    sources, plans = [], []
    for sequence in sequences:
        frames, plan = _plan(config, sequence, num_threads)
        # Hundreds of open videos would take gigabytes; they are opened again when their turn comes.
        frames.close()
        sources.append(frames)
        plans.append(plan)
        say(f"{sequence.name}: {frames.extent()}; {len(plan):,} crops to cut from {_num_frames(plan):,} frames{_left_out(plan)}")
    rejected = [row for plan in plans for row in plan.rejected]
    _check(config, plans, rejected)
    names = name_crops(sequences, plans, config.layout, config.ids, f".{config.image_format}")
    writing = CropWriting(config.image_format, config.quality, config.rules.max_side, num_threads, progress)
    cutter = Cutter(config.folder, writing, sum(_num_frames(plan) + len(plan.unreadable) for plan in plans), config.max_unreadable)
    with claimed(config.folder, _parameters(config, sequences, sources)), refusals_told(config.folder):
        write_table(config.folder / REJECTED, ("file", "place", "reason"), [(str(row.path), row.place, row.reason) for row in rejected])
        results = []
        for sequence, plan, name, frames in zip(sequences, plans, names, sources, strict=True):
            results.append(cutter.cut(plan, name, frames, sequence.name))
            frames.close()
            for note in frames.notes():
                say(note)
        parts = list(zip(sequences, plans, names, sources, results, strict=True))
        write_boxes(config.folder, parts)
        unreadable = [(frames.source(index), error.reason) for _, _, _, frames, result in parts for index, error in sorted(result.unreadable.items())]
        write_table(config.folder / UNREADABLE, ("frame", "reason"), unreadable)
    num_there, num_written = sum(int(result.there.sum()) for result in results), sum(result.num_written for result in results)
    kept = f", {num_there - num_written:,} of them there already" if num_there > num_written else ""
    say(f"{config.folder}: {num_there:,} crops{kept}; boxes.csv has the frame, box and id of each")
    if rejected:
        say(f"{len(rejected):,} boxes could not be used and were skipped, listed in {config.folder / REJECTED}")
    if unreadable:
        say(f"{len(unreadable):,} frames could not be read, first {unreadable[0][0]}: {unreadable[0][1]}; listed in {config.folder / UNREADABLE}")


def _sequences(config: CropConfig) -> list[FrameSequence]:
    if (config.mot is None) == (not config.frames and not config.boxes):
        raise UserError("give --frames and --boxes, or the folder of a MOT set by --mot")
    found = mot_sequences(config.mot, config.mot_boxes, config.mot_match) if config.mot else pair_sequences(config.frames, config.boxes)
    for sequence in found:
        if config.folder.absolute().resolve().is_relative_to(sequence.frames.resolve()):
            raise UserError(f"{config.folder} lies inside the frames {sequence.frames}, so crops would be taken for frames; give a folder elsewhere")
    return with_cameras(found, config.cameras)


def _plan(config: CropConfig, sequence: FrameSequence, num_threads: int) -> tuple[Frames, CropPlan]:
    boxes = read_boxes(sequence.boxes, config.box_format, origin=config.origin, relative=config.relative, mot_flavour=config.mot_flavour)
    frames = open_frames(sequence.frames, by_name=boxes.images is not None, first=boxes.first_frame, pattern=config.frame_pattern)
    if config.frame_offset is None and boxes.first_frame == 1 and isinstance(frames, FrameFolder) and frames.first == 0:
        raise UserError(
            f"MOT counts frames from 1, as {sequence.boxes}, and the images of {sequence.frames} begin with 0: boxes would be cut from other "
            "frames than their own. Give --frame-offset -1, or --frame-offset 0 if the boxes have the numbers of the images"
        )
    return frames, plan_crops(boxes, frames, config.rules, num_threads, frame_offset=config.frame_offset or 0)


def _check(config: CropConfig, plans: Sequence[CropPlan], rejected: Sequence[Rejected]) -> None:
    if rejected and not config.skip_bad:
        first, others = rejected[0], f" ({len(rejected) - 1:,} more)" if len(rejected) > 1 else ""
        raise UserError(f"{first.path}, {first.place}: {first.reason}{others}; mend the file, or skip such boxes by --skip-bad")
    if not sum(map(len, plans)):
        unreadable = next((error for plan in plans for error in plan.unreadable.values()), None)
        reasons = sum((Counter(plan.left_out) for plan in plans), Counter({"that cannot be used": len(rejected)} if rejected else {}))
        why = f"; the first frame that cannot be read is {unreadable}" if unreadable else ""
        told = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items()) or "the box files hold none"
        raise UserError(f"no box is left to cut: {told}{why}")


def _parameters(config: CropConfig, sequences: Sequence[FrameSequence], sources: Sequence[Frames]) -> dict[str, Any]:
    """What decides what is cut: settings, the contents of the box files and the names of the frames, wherever they lie."""
    settings = {name: value for name, value in to_plain(config).items() if name not in _FREE}
    inputs = {
        sequence.name: {"boxes": _digest(sequence.boxes), "frames": frames.digest(), "camera": sequence.camera}
        for sequence, frames in zip(sequences, sources, strict=True)
    }
    return {"version": CROPS_VERSION, "settings": settings, "sequences": inputs}


def _digest(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise UserError(f"the boxes {path} cannot be read: {error.strerror or error}") from error


def _num_frames(plan: CropPlan) -> int:
    return len(np.unique(plan.frames))


def _left_out(plan: CropPlan) -> str:
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in plan.left_out.items())
    return f"; left out: {reasons}" if reasons else ""
