"""The sequences that crops are cut from: pairs of frames and boxes, given one by one or found in MOTChallenge's layout."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from personmae.configs import UserError

MotBoxes = Literal["auto", "gt", "det"]
_MOT_FRAMES = "img1"
_MOT_FILES = {"gt": "gt/gt.txt", "det": "det/det.txt"}


@dataclass(frozen=True)
class FrameSequence:
    """name: safe in a file's name, its own. frames: a folder or a video. boxes: the file. camera: its number, where the box file does not say it."""

    name: str
    frames: Path
    boxes: Path
    camera: int


def pair_sequences(frames: Sequence[Path], boxes: Sequence[Path]) -> list[FrameSequence]:
    """One sequence for each pair, cameras numbered from 1. Raises UserError if the numbers differ."""
    if len(frames) != len(boxes):
        raise UserError(f"{len(frames)} --frames and {len(boxes)} --boxes; give as many of one as of the other, in the same order")
    return _named((path.absolute().parent if path.name == _MOT_FRAMES else path, path, file) for path, file in zip(frames, boxes, strict=True))


def mot_sequences(root: Path, kind: MotBoxes = "auto", match: str = "*") -> list[FrameSequence]:
    """The sequences below a folder in MOTChallenge's layout, or that one sequence: NAME/img1 with NAME/gt/gt.txt or NAME/det/det.txt.

    kind: which boxes; "auto": ground truth where there is some. match: of the names, with * and ?. Raises UserError if there are none, or boxes are
    missing.
    """
    if not root.is_dir():
        raise UserError(f"no such folder: {root}; give the one that holds sequences as NAME/{_MOT_FRAMES}")
    try:
        children = sorted(entry for entry in root.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"the folder {root} cannot be read: {error.strerror or error}") from error
    folders = [root] if (root / _MOT_FRAMES).is_dir() else [child for child in children if (child / _MOT_FRAMES).is_dir()]
    if not folders:
        deeper = [child for child in children if child.is_dir() and next(child.glob(f"*/{_MOT_FRAMES}"), None)]
        hint = f"; {deeper[0]} does" if deeper else ""
        raise UserError(f"{root} holds no sequence as NAME/{_MOT_FRAMES}{hint}")
    chosen = [folder for folder in folders if fnmatch.fnmatchcase(folder.absolute().name, match)]
    if not chosen:
        raise UserError(f"none of the {len(folders)} sequences of {root} is called {match!r}; the first is {folders[0].absolute().name}")
    return _named((folder.absolute(), folder / _MOT_FRAMES, _mot_file(folder, kind)) for folder in chosen)


def with_cameras(sequences: list[FrameSequence], cameras: Sequence[int]) -> list[FrameSequence]:
    """The sequences with their cameras' numbers, if some are given. Raises UserError if there are not as many, or one is negative."""
    if not cameras:
        return sequences
    if len(cameras) != len(sequences):
        raise UserError(
            f"{len(cameras)} --cameras for {len(sequences)} sequences ({', '.join(one.name for one in sequences[:8])}); give one for each"
        )
    if min(cameras) < 0:
        raise UserError(f"a camera is {min(cameras)}; they are numbered from 0 or 1")
    return [replace(sequence, camera=camera) for sequence, camera in zip(sequences, cameras, strict=True)]


def _mot_file(folder: Path, kind: MotBoxes) -> Path:
    names = list(_MOT_FILES.values()) if kind == "auto" else [_MOT_FILES[kind]]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder} has no {' or '.join(names)}; choose others by --mot-boxes, or leave sequences out by --mot-match")


def _named(found: Iterable[tuple[Path, Path, Path]]) -> list[FrameSequence]:
    """Of (what the sequence is called after, frames, boxes)."""
    taken: set[str] = set()
    sequences = []
    for number, (origin, frames, boxes) in enumerate(found, 1):
        name = base = _safe(origin.absolute().name if frames.is_dir() else origin.stem)
        again = 1
        # Compared in small letters: some file systems do not tell A from a.
        while name.lower() in taken:
            again += 1
            name = f"{base}_{again}"
        taken.add(name.lower())
        sequences.append(FrameSequence(name, frames, boxes, number))
    return sequences


def _safe(name: str) -> str:
    """A name of letters, digits, dots, dashes and underscores alone, neither hidden nor like a flag, and short enough."""
    text = os.fsencode(name).decode("utf-8", errors="replace")
    return re.sub(r"[^\w.-]", "_", text).lstrip(".-")[:60] or "sequence"
