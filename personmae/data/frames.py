"""Where frames come from: a folder of images or a video, found by number or by name, delivered in order.

A folder's image belongs to the frame that its name says: `000001.jpg`, `frame_12.png`, `cam3_0012_left.jpg`. Among names that differ in their numbers
alone, the frame is the number that varies; names without a number are no frames. Where that does not decide, or two files have the same number, it
is an error that names both. Boxes that name images are matched by path below the folder, else by file name, else by file name without its ending.

A video is decoded by OpenCV's FFmpeg, from the first frame on, without seeking (which is inexact in many formats).
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
import numpy.typing as npt

from personmae.configs import UserError
from personmae.data.images import UInt8Array, UnreadableImage, decode, read_bytes, read_header, read_orientation, turn_upright
from personmae.data.sources import list_source

# What a header fits into, but for some with long profiles or previews.
_HEADER_BYTES = 1 << 16
# A frame of 8K video is 33 million pixels.
MAX_FRAME_NUMBER = 2**53
MAX_FRAME_PIXELS = 200_000_000
# Reading on past frames that do not decode: so many at most, then the video has ended.
_MAX_DAMAGED_FRAMES = 64
_DIGITS = re.compile(r"(\d+)", re.ASCII)

Delivery = Callable[[], UInt8Array]  # the frame's pixels, RGB [H, W, 3]; raises UnreadableImage


@dataclass(frozen=True)
class FrameSizes:
    """heights, widths: int32 [N], 0 where the frame cannot be read. unreadable: frame -> why."""

    heights: npt.NDArray[np.int32]
    widths: npt.NDArray[np.int32]
    unreadable: dict[int, UnreadableImage]


class Frames(Protocol):
    """The frames of a sequence. A frame's index is its position among them, from 0."""

    path: Path
    by_name: bool  # whether boxes name images, rather than give numbers
    first: int  # the number of the first

    def find(self, frames: Iterable[int | str]) -> npt.NDArray[np.int64]:
        """Index of each frame, given by number or name; -1 = there is none."""

    def number(self, index: int) -> int:
        """The number by which a frame is called in the crops' names."""

    def source(self, index: int) -> str:
        """Where a frame comes from, for people."""

    def extent(self) -> str:
        """Which frames there are, in words."""

    def sizes(self, indexes: npt.NDArray[np.int64], num_threads: int) -> FrameSizes:
        """Dimensions of frames, without decoding them all."""

    def deliver(self, index: int) -> Delivery:
        """A frame, to be called with rising indexes; what is returned may be called from another thread. Raises UnreadableImage."""

    def digest(self) -> str:
        """Changes with the names of the frames."""

    def notes(self) -> list[str]:
        """What came to light while frames were delivered, a sentence each."""

    def close(self) -> None:
        """Lets go of the file; what is asked for later opens it again."""


class FrameFolder:
    """Images of a folder, at any depth. by_name: boxes name them. pattern: finds a frame's number in a file's name without its ending, by its one
    group; None = the number that varies."""

    def __init__(self, path: Path, *, by_name: bool = False, pattern: str | None = None) -> None:
        """Raises UserError if there are no images, or it is ambiguous which frame one of them is."""
        self.path, self.by_name = path, by_name
        listing = list_source(path)
        self._root, self._names = listing.root, listing.names
        self._numbers = {} if by_name else _numbers(path, [os.fsdecode(name) for name in listing.names], pattern)
        self._index_of_number = {number: index for index, number in self._numbers.items()}
        self.first = 1 if by_name else min(self._index_of_number)

    def find(self, frames: Iterable[int | str]) -> npt.NDArray[np.int64]:
        if not self.by_name:
            return np.fromiter((self._index_of_number.get(int(frame), -1) for frame in frames), dtype=np.int64)
        # Ever shorter names: the first that a file answers to decides.
        tables: list[dict[str, list[int]]] = []
        for way in (str, posixpath.basename, _stem):
            tables.append({})
            for index, name in enumerate(self._names):
                tables[-1].setdefault(way(os.fsdecode(name)), []).append(index)
        asked = [posixpath.normpath(str(frame).replace("\\", "/")) for frame in frames]
        # Where folders are those of the images, a namesake in another folder is another image.
        with_folders = any("/" in name and name in tables[0] for name in asked)
        found = (self._find_name(name, tables[:1] if with_folders and "/" in name else tables) for name in asked)
        return np.fromiter(found, dtype=np.int64)

    def _find_name(self, asked: str, tables: list[dict[str, list[int]]]) -> int:
        base = posixpath.basename(asked)
        for key, table in zip((asked, base, base), tables, strict=False):
            if found := table.get(key):
                if len(found) > 1:
                    raise UserError(f"{self.path}: the image {asked!r} may be {self.source(found[0])} or {self.source(found[1])}; give its path")
                return found[0]
        return -1

    def number(self, index: int) -> int:
        return index + 1 if self.by_name else self._numbers[index]

    def source(self, index: int) -> str:
        return str(self._root / os.fsdecode(self._names[index]))

    def extent(self) -> str:
        if self.by_name:
            return f"{len(self._names):,} images"
        return f"{len(self._numbers):,} images, numbered {self.first} to {max(self._index_of_number)}"

    def sizes(self, indexes: npt.NDArray[np.int64], num_threads: int) -> FrameSizes:
        sizes = FrameSizes(np.zeros(len(indexes), np.int32), np.zeros(len(indexes), np.int32), {})

        def read(rows: range) -> None:
            for row in rows:
                path = Path(self.source(int(indexes[row])))
                try:
                    sizes.heights[row], sizes.widths[row] = _size_of(path)
                except UnreadableImage as error:
                    sizes.unreadable[int(indexes[row])] = error

        with ThreadPoolExecutor(num_threads, thread_name_prefix="headers") as pool:
            list(pool.map(read, (range(first, min(first + 256, len(indexes))) for first in range(0, len(indexes), 256))))
        return sizes

    def deliver(self, index: int) -> Delivery:
        return partial(_read_frame, Path(self.source(index)))

    def digest(self) -> str:
        return hashlib.sha256(b"\0".join(self._names)).hexdigest()[:16]

    def notes(self) -> list[str]:
        return []

    def close(self) -> None:
        """Nothing is held open."""


class FrameVideo:
    """A video file. first: the number of its first frame."""

    def __init__(self, path: Path, first: int) -> None:
        """Raises UserError if OpenCV cannot open it."""
        self.path, self.first, self.by_name = path, first, False
        self._video: cv2.VideoCapture | None = None
        self._next = 0  # index of the frame that the next grab gives; the one before is at hand
        self._ended = False
        self._damaged: set[int] = set()
        self._time_ms = 0.0
        self._doubtful: int | None = None
        try:
            self._digest = _digest_of_beginning(path)
        except OSError as error:
            raise UserError(f"the video {path} cannot be read: {error.strerror or error}") from error
        self._length = max(0, int(self._opened().get(cv2.CAP_PROP_FRAME_COUNT)))

    def _opened(self) -> cv2.VideoCapture:
        if self._video is not None:
            return self._video
        try:
            # Absolute: FFmpeg takes a colon in a relative name for a protocol. FFmpeg alone: another backend may take % for a series of images.
            video = cv2.VideoCapture(os.fspath(self.path.absolute()), cv2.CAP_FFMPEG)
        except UnicodeEncodeError as error:
            raise UserError(f"the name of the video {os.fspath(self.path)!r} is no valid text, so OpenCV cannot open it; rename it") from error
        if not video.isOpened():
            raise UserError(f"{self.path} is no video that OpenCV can read; give a folder of images, or convert it (ffmpeg -i IN OUT.mp4)")
        self._video, self._next, self._ended = video, 0, False
        self._damaged.clear()
        return video

    def find(self, frames: Iterable[int | str]) -> npt.NDArray[np.int64]:
        indexes = np.fromiter((frame if isinstance(frame, int) else -1 for frame in frames), dtype=np.int64) - self.first
        return np.where(indexes < 0, -1, indexes)

    def number(self, index: int) -> int:
        return self.first + index

    def source(self, index: int) -> str:
        return f"{self.path} frame {self.number(index)}"

    def extent(self) -> str:
        return f"a video of {self._length} frames, numbered from {self.first}"

    def sizes(self, indexes: npt.NDArray[np.int64], num_threads: int) -> FrameSizes:
        # The header may speak of the picture before it is turned upright, so the first frame is asked.
        self._advance_to(0)
        try:
            height, width = self._retrieve().shape[:2]
        except UnreadableImage as error:
            raise UserError(f"{self.path}: no frame of the video decodes; convert it (ffmpeg -i IN OUT.mp4)") from error
        return FrameSizes(np.full(len(indexes), height, np.int32), np.full(len(indexes), width, np.int32), {})

    def deliver(self, index: int) -> Delivery:
        self._advance_to(index)
        if index in self._damaged:
            raise UnreadableImage(Path(self.source(index)), "damaged: it does not decode")
        if index >= self._next:
            raise UnreadableImage(Path(self.source(index)), f"the video ends early: it has {self._next} frames and says {self._length}")
        frame = self._retrieve()
        return lambda: frame

    def _advance_to(self, index: int) -> None:
        """Reads until a frame is at hand, or the video has ended."""
        video = self._opened()
        while self._next <= index and not self._ended:
            # A frame that does not decode is a failure just like the end: only what comes after tells them apart.
            failures = 0
            while not video.grab():
                failures += 1
                if failures > _MAX_DAMAGED_FRAMES:
                    self._ended = True
                    return
            self._damaged.update(range(self._next, self._next + failures))
            self._next += failures + 1
            self._check_time(video, failures + 1)

    def _check_time(self, video: cv2.VideoCapture, step: int) -> None:
        """Remembers the first frame that does not follow the one `step` before it in time as its number says: then the decoder left frames out, or
        they are not evenly spaced."""
        rate, time_ms = video.get(cv2.CAP_PROP_FPS), video.get(cv2.CAP_PROP_POS_MSEC)
        # The first frame may begin at any time; a quarter of a frame is for times that the file has rounded.
        uneven = rate > 0 and self._next > step and abs((time_ms - self._time_ms) / 1000 * rate - step) > 0.75
        if uneven and self._doubtful is None:
            self._doubtful = self._next - 1
        self._time_ms = time_ms

    def _retrieve(self) -> UInt8Array:
        success, frame = self._opened().retrieve()
        if not success or frame is None:
            raise UnreadableImage(Path(self.source(self._next - 1)), "damaged: it does not decode")
        return np.asarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), dtype=np.uint8)

    def digest(self) -> str:
        return self._digest

    def notes(self) -> list[str]:
        if self._doubtful is None:
            return []
        return [
            f"{self.path}: from frame {self.number(self._doubtful)} on, times do not fit the numbers of frames. Either its frame rate varies (then "
            "all is well if the boxes were made by counting frames), or the decoder left out damaged frames, and later boxes belong to earlier frames"
        ]

    def close(self) -> None:
        if self._video is not None:
            self._video.release()
        self._video = None


def open_frames(path: Path, *, by_name: bool, first: int, pattern: str | None = None) -> Frames:
    """The frames of a folder or a video. Raises UserError if there are none, or if boxes name images and this is a video."""
    if path.is_dir():
        return FrameFolder(path, by_name=by_name, pattern=pattern)
    if not path.exists():
        raise UserError(f"no such frames: {path}; give a folder of images or a video")
    if not path.is_file():
        raise UserError(f"{path} is neither a folder of images nor a video file")
    if by_name:
        raise UserError(f"the boxes name images, but {path} is a video; give the number of each frame (a column 'frame')")
    return FrameVideo(path, first)


def _digest_of_beginning(path: Path) -> str:
    """Of a file's first MiB and its length: hours of video are not read twice for this."""
    with open(path, "rb") as file:
        return hashlib.sha256(file.read(1 << 20) + str(os.fstat(file.fileno()).st_size).encode()).hexdigest()[:16]


def _size_of(path: Path) -> tuple[int, int]:
    """(height, width) of an image file, from its beginning where that will do."""
    try:
        with open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            beginning = file.read(_HEADER_BYTES) or b""
    except OSError as error:
        raise UnreadableImage(path, f"cannot be read: {error.strerror or error}", by_system=True) from error
    try:
        header = read_header(beginning, path)
    except UnreadableImage:
        header = read_header(read_bytes(path), path)
    if header.height * header.width > MAX_FRAME_PIXELS:
        raise UnreadableImage(path, f"too large: {header.width} x {header.height} pixels (w x h), at most {MAX_FRAME_PIXELS} in all")
    # As the tools show it that boxes come from.
    return (header.width, header.height) if read_orientation(beginning) >= 5 else (header.height, header.width)


def _read_frame(path: Path) -> UInt8Array:
    data = read_bytes(path)
    return turn_upright(decode(data, path), read_orientation(data))


def _stem(name: str) -> str:
    return posixpath.splitext(posixpath.basename(name))[0]


def _numbers(folder: Path, names: list[str], pattern: str | None) -> dict[int, int]:
    """Index -> number of the frame, of the files that have one."""
    found = _by_pattern(names, pattern) if pattern else _by_variation(folder, names)
    taken: dict[int, int] = {}
    for index, number in found.items():
        other = taken.setdefault(number, index)
        if other != index:
            raise UserError(
                f"{folder}: {names[other]} and {names[index]} are both frame {number}; give one sequence's folder, or say by --frame-pattern which "
                "files are frames"
            )
    if found and max(found.values()) > MAX_FRAME_NUMBER:
        raise UserError(f"{folder}: frame number {max(found.values())} has too many digits; say by --frame-pattern where the number stands")
    if not found:
        how = f"matches --frame-pattern {pattern!r}" if pattern else "has a number in its name, such as 000001.jpg"
        raise UserError(f"{folder}: none of its {len(names)} images {how}")
    return found


def _by_pattern(names: list[str], pattern: str) -> dict[int, int]:
    try:
        search = re.compile(pattern)
    except re.error as error:
        raise UserError(f"--frame-pattern {pattern!r} is no regular expression: {error}") from error
    if search.groups != 1:
        raise UserError(f"--frame-pattern {pattern!r} has {search.groups} groups; one should hold the frame's number, as in 'frame_(\\d+)'")
    matches = ((index, search.search(_stem(name))) for index, name in enumerate(names))
    try:
        return {index: int(match[1]) for index, match in matches if match}
    except (ValueError, TypeError) as error:
        raise UserError(f"--frame-pattern {pattern!r}: its group holds something that is no number ({error})") from error


def _by_variation(folder: Path, names: list[str]) -> dict[int, int]:
    # What stands between the numbers of a name -> its files.
    kinds: dict[tuple[str, ...], list[tuple[int, list[int]]]] = {}
    for index, name in enumerate(names):
        parts = _DIGITS.split(_stem(name))
        if len(parts) > 1:
            kinds.setdefault(tuple(parts[::2]), []).append((index, [int(part) for part in parts[1::2]]))
    return dict(chain.from_iterable(_of_one_kind(folder, names, files) for files in kinds.values()))


def _of_one_kind(folder: Path, names: list[str], files: list[tuple[int, list[int]]]) -> list[tuple[int, int]]:
    first, numbers = files[0]
    varying = [place for place in range(len(numbers)) if any(others[place] != numbers[place] for _, others in files)]
    if len(varying) > 1:
        other = next(index for index, others in files if all(others[place] != numbers[place] for place in varying[:2]) or index == files[-1][0])
        raise UserError(
            f"{folder}: {names[first]} and {names[other]} differ in more than one number; say by --frame-pattern which is the frame's, as in "
            "'frame_(\\d+)', or name the images in the boxes"
        )
    place = varying[0] if varying else len(numbers) - 1
    return [(index, others[place]) for index, others in files]
