"""The folder that crops go into: claimed for one set of parameters, filled by threads, atomic file by file, taken up where it was left.

crop.json says what the crops were cut from and how; boxes.csv has a line for each crop, rejected.tsv the rows of box files that could not be used,
unreadable.tsv the frames. The lists are written anew by every call.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import json
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from tqdm import tqdm

from personmae.configs import UserError, differences
from personmae.data.crop_names import CropNames
from personmae.data.crops import CropPlan, crop_size, cut
from personmae.data.frames import Delivery, Frames
from personmae.data.images import UInt8Array, UnreadableImage, read_header
from personmae.data.sequences import FrameSequence
from personmae.whole_files import PARTIAL_SUFFIX, whole_path

ImageKind = Literal["jpg", "png"]
PARAMETERS, BOXES, REJECTED, UNREADABLE = "crop.json", "boxes.csv", "rejected.tsv", "unreadable.tsv"
_ENDS = {"jpg": b"\xff\xd9", "png": b"IEND\xaeB`\x82"}


@dataclass(frozen=True)
class CropWriting:
    """How crops are written. quality: of a JPEG, 1 to 100. max_side: see `cut`."""

    kind: ImageKind
    quality: int
    max_side: int | None
    num_threads: int
    progress: bool = True


@dataclass(frozen=True)
class CutCrops:
    """What became of a plan. there: bool [N], which crops are there now; num_written: of them, by this call. unreadable: frame -> why."""

    there: npt.NDArray[np.bool_]
    num_written: int
    unreadable: dict[int, UnreadableImage]


@contextlib.contextmanager
def claimed(folder: Path, parameters: dict[str, Any]) -> Iterator[None]:
    """The folder is this call's, for these parameters. Raises UserError if it holds anything else, other parameters' crops included, if another call
    is writing there, or if the system refuses."""
    with refusals_told(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another `personmae crop` is writing into {folder}; wait for it, or give another folder") from None
            _check_same(folder, parameters)
            write_unflushed(folder / PARAMETERS, json.dumps(parameters, indent=2).encode())
            yield
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def refusals_told(folder: Path) -> Iterator[None]:
    """What the system refuses (no right, no room) as a sentence with its cure."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write into {folder}: {error.strerror or error}; give a folder that you may write and that has room, or make room and call "
            "again: what is cut is kept"
        ) from error


def _check_same(folder: Path, parameters: dict[str, Any]) -> None:
    try:
        found = json.loads((folder / PARAMETERS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if any(entry.name != PARAMETERS + PARTIAL_SUFFIX for entry in folder.iterdir()):
            raise UserError(f"{folder} holds files that are not of `personmae crop` (no {PARAMETERS}); give a new or empty folder") from None
        return
    except ValueError as error:
        raise UserError(f"{folder / PARAMETERS} cannot be read ({error}); remove {folder} to cut anew") from error
    if changes := differences(found, json.loads(json.dumps(parameters))):
        raise UserError(f"{folder} holds crops of other parameters ({'; '.join(changes)[:600]}); give another folder, or remove this one to cut anew")


def write_unflushed(path: Path, content: bytes) -> None:
    """A file, whole or not at all. Not flushed to the disk: there are very many, and a crop is looked at before it is taken for done."""
    with whole_path(path, flush=False, shared=False) as partial:
        partial.write_bytes(content)


class Cutter:
    """Cuts plans into a folder, counting the frames that cannot be read."""

    def __init__(self, folder: Path, writing: CropWriting, num_frames: int, max_unreadable: float) -> None:
        """num_frames: over all plans; max_unreadable: the run ends when more than this share of them (rounded up) cannot be read."""
        self._folder, self._writing = folder, writing
        self._num_frames, self._allowed = num_frames, math.ceil(max_unreadable * num_frames)
        self._max_unreadable, self._num_unreadable = max_unreadable, 0

    def cut(self, plan: CropPlan, names: CropNames, frames: Frames, title: str) -> CutCrops:
        """Cut what is not there yet. Each frame is read once, in order, and few are held at a time.

        Raises UserError past the allowed share of unreadable frames, or if the system refuses to write.
        """
        result = CutCrops(np.zeros(len(plan), dtype=bool), 0, dict(plan.unreadable))
        for error in plan.unreadable.values():
            self._count(error)
        starts = np.flatnonzero(np.diff(plan.frames, prepend=-1)).tolist()
        waiting: deque[tuple[int, range, Future[int]]] = deque()
        bar = tqdm(total=len(starts), unit="frame", desc=title, disable=None if self._writing.progress else True)
        num_written = 0

        def finish() -> None:
            nonlocal num_written
            index, rows, future = waiting.popleft()
            try:
                num_written += future.result()
                result.there[rows.start : rows.stop] = True
            except UnreadableImage as error:
                result.unreadable[index] = error
                self._count(error)
            bar.update()

        for name in sorted({names.folders[part] for part in np.unique(names.folder).tolist()}):
            (self._folder / name).mkdir(exist_ok=True)
        with bar, _opencv_alone(), ThreadPoolExecutor(self._writing.num_threads, thread_name_prefix="crops") as pool:
            try:
                for first, end in zip(starts, [*starts[1:], len(plan)], strict=True):
                    rows, index = range(first, end), int(plan.frames[first])
                    waiting.append((index, rows, self._start(pool, plan, names, frames, index, rows)))
                    if len(waiting) > 2 * self._writing.num_threads:
                        finish()
                while waiting:
                    finish()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
        return CutCrops(result.there, num_written, result.unreadable)

    def _start(self, pool: ThreadPoolExecutor, plan: CropPlan, names: CropNames, frames: Frames, index: int, rows: range) -> Future[int]:
        todo = [row for row in rows if not self._is_there(plan, names, row)]
        done: Future[int] = Future()
        if not todo:
            done.set_result(0)
            return done
        try:
            # A video's frames come one after the other, here; an image is read by the thread that cuts it.
            load = frames.deliver(index)
        except UnreadableImage as error:
            done.set_exception(error)
            return done
        return pool.submit(self._cut_frame, plan, names, load, todo, frames.source(index))

    def _cut_frame(self, plan: CropPlan, names: CropNames, load: Delivery, rows: list[int], source: str) -> int:
        frame = load()
        height, width = plan.sizes[rows[0]].tolist()
        if frame.shape[:2] != (height, width):
            raise UnreadableImage(Path(source), f"its header says {width} x {height} pixels (w x h), its content {frame.shape[1]} x {frame.shape[0]}")
        for row in rows:
            write_unflushed(self._folder / names.path(row), self._encode(cut(frame, plan.rectangles[row].tolist(), self._writing.max_side)))
        return len(rows)

    def _encode(self, pixels: UInt8Array) -> bytes:
        if self._writing.kind == "jpg":
            return bytes(simplejpeg.encode_jpeg(pixels, self._writing.quality, "RGB", "420"))
        return bytes(cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))[1])

    def _is_there(self, plan: CropPlan, names: CropNames, row: int) -> bool:
        """Whether a crop is there, whole, of the size it should have: a machine that went down may leave names of files that were never filled."""
        path = self._folder / names.path(row)
        try:
            content = path.read_bytes()
            header = read_header(content, path)
        except (OSError, UnreadableImage):
            return False
        return (header.height, header.width) == crop_size(plan.rectangles[row].tolist(), self._writing.max_side) and content.endswith(
            _ENDS[self._writing.kind]
        )

    def _count(self, error: UnreadableImage) -> None:
        self._num_unreadable += 1
        if self._num_unreadable > self._allowed:
            raise UserError(
                f"{self._num_unreadable} of {self._num_frames} frames cannot be read, more than max_unreadable = {self._max_unreadable:g} allows; "
                f"the last is {error}. Mend the frames, or allow more, and call again: what is cut is kept"
            )


@contextlib.contextmanager
def _opencv_alone() -> Iterator[None]:
    previous = cv2.getNumThreads()
    # OpenCV's own threads would fight with ours over the cores.
    cv2.setNumThreads(0)
    try:
        yield
    finally:
        cv2.setNumThreads(previous)


_HEADER = (
    *("crop", "sequence", "frame", "source", "id", "person", "camera", "score", "class", "visibility"),
    *("x", "y", "w", "h", "cut_x0", "cut_y0", "cut_x1", "cut_y1"),
)


def write_boxes(folder: Path, parts: Iterable[tuple[FrameSequence, CropPlan, CropNames, Frames, CutCrops]]) -> None:
    """boxes.csv: each crop with its frame, its box as given (pixels from 0), what was cut, and what the box file says of it; empty = it does not."""
    with whole_path(folder / BOXES, shared=False) as partial, open(partial, "wb") as file:
        lines = _Lines(file)
        table = csv.writer(lines, lineterminator="\n")
        table.writerow(_HEADER)
        for sequence, plan, names, frames, result in parts:
            boxes = plan.boxes
            for row in np.flatnonzero(result.there).tolist():
                x0, y0, x1, y1 = boxes.edges[row].tolist()
                identity = boxes.identities[boxes.ids[row]] if boxes.ids[row] >= 0 else ""
                kind = "|".join(sorted(boxes.labels[boxes.classes[row]])) if boxes.classes[row] >= 0 else ""
                place = [names.path(row), sequence.name, plan.numbers[row], frames.source(int(plan.frames[row]))]
                who = [identity, names.people[row] if names.people[row] >= 0 else "", names.cameras[row]]
                said = [_shown(boxes.scores[row]), kind, _shown(boxes.visibility[row])]
                table.writerow([*place, *who, *said, *map(_shown, (x0, y0, x1 - x0, y1 - y0)), *plan.rectangles[row].tolist()])


class _Lines:
    """Text into a binary file; names of files that are no text come out as the bytes that they are."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def write(self, text: str) -> int:
        return self._file.write(text.encode("utf-8", errors="surrogateescape"))


def write_table(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A tab-separated list, or no file where there is nothing to list."""
    if not rows:
        path.unlink(missing_ok=True)
        return
    clean = ("\t".join(field.replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r") for field in row) for row in [header, *rows])
    write_unflushed(path, "".join(line + "\n" for line in clean).encode("utf-8", errors="surrogateescape"))


def _shown(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.10g}"
