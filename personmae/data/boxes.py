"""Boxes of people, whatever file they come from: `box_files.py` reads it.

A box is held by its edges (x0, y0, x1, y1) in pixels counted from 0, as continuous coordinates: pixel (0, 0) spans 0 to 1, so whole numbers cut
exactly `frame[y0:y1, x0:x1]`. Every row of a file that cannot be used is listed with its place and the reason.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

# A box with a longer side is a mistake (and would cost memory where the border is replicated); in shares of the frame, 16.
MAX_SIDE_PX = 16_384
MAX_SIDE_SHARE = 16
_MAX_PLACE = 1e9
# Numbers of frames and cameras stand in file names.
MAX_NUMBER = 10**9
PERSON = "person"


class Rejected(NamedTuple):
    """A row that cannot be used. place: "line 3" or "annotations[2]"."""

    path: Path
    place: str
    reason: str


class BadRow(ValueError):
    """Why a row cannot be used."""


class Row(NamedTuple):
    """One box. frame: its number, or the name of its image. edges: x0, y0, x1, y1 counted from 0. score, visibility: NaN = not given. identity:
    empty = none. labels: names of its class, in small letters; empty = not given. camera: -1 = not given. ignored: marked as not to be considered."""

    frame: int | str
    edges: tuple[float, float, float, float]
    identity: str = ""
    score: float = math.nan
    visibility: float = math.nan
    labels: frozenset[str] = frozenset()
    camera: int = -1
    ignored: bool = False


@dataclass(frozen=True)
class Boxes:
    """The N boxes of a file, in its order.

    place: how a row is named, "line {}" or "annotations[{}]"; places: int64 [N], what goes into it. images: None where frames are numbers, otherwise
    the names that `frames` (int64 [N]) points into. first_frame: how a video's first frame is numbered: 1 in MOT, else 0. edges: float64 [N, 4], see
    above, in pixels or (`relative`) shares of the frame. ids: int64 [N] into `identities`, -1 = none. scores, visibility: float64 [N], NaN = not
    given. classes: int64 [N] into `labels`, -1 = not given. cameras: int64 [N], -1 = not given. ignored: bool [N]. rejected: the rows that could not
    be used.
    """

    path: Path
    place: str
    relative: bool
    first_frame: int
    images: list[str] | None
    identities: list[str]
    labels: list[frozenset[str]]
    rejected: list[Rejected]
    places: npt.NDArray[np.int64]
    frames: npt.NDArray[np.int64]
    edges: npt.NDArray[np.float64]
    ids: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float64]
    visibility: npt.NDArray[np.float64]
    classes: npt.NDArray[np.int64]
    cameras: npt.NDArray[np.int64]
    ignored: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.places)

    def take(self, rows: npt.NDArray[Any]) -> Boxes:
        """The boxes of these rows (numbers or a mask) alone."""
        names = ("places", "frames", "edges", "ids", "scores", "visibility", "classes", "cameras", "ignored")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})

    def reject(self, row: int, reason: str) -> Rejected:
        """The record that says why a row cannot be used after all."""
        return Rejected(self.path, self.place.format(self.places[row]), reason)


class BoxTable:
    """Collects rows, and the reasons of those that are none."""

    def __init__(self, path: Path, place: str, relative: bool, first_frame: int = 0) -> None:
        self.path, self.place, self.relative, self.first_frame = path, place, relative, first_frame
        self.rejected: list[Rejected] = []
        self._by_name: bool | None = None
        self._images: dict[str, int] = {}
        self._identities: dict[str, int] = {}
        self._labels: dict[frozenset[str], int] = {}
        self._whole = {name: array("q") for name in ("places", "frames", "ids", "classes", "cameras")}
        self._broken = {name: array("d") for name in ("edges", "scores", "visibility")}
        self._ignored = bytearray()

    def add(self, place: int, read: Callable[[], Row]) -> None:
        """Takes over what `read` returns, or the reason of the BadRow that it raises."""
        try:
            row = read()
            self._check(row)
        except BadRow as error:
            self.rejected.append(Rejected(self.path, self.place.format(place), str(error)))
            return
        frame = row.frame if isinstance(row.frame, int) else self._images.setdefault(row.frame, len(self._images))
        identity = self._identities.setdefault(row.identity, len(self._identities)) if row.identity else -1
        kind = self._labels.setdefault(row.labels, len(self._labels)) if row.labels else -1
        for column, value in zip(self._whole.values(), (place, frame, identity, kind, row.camera), strict=True):
            column.append(value)
        self._broken["edges"].extend(row.edges)
        self._broken["scores"].append(row.score)
        self._broken["visibility"].append(row.visibility)
        self._ignored.append(row.ignored)

    def _check(self, row: Row) -> None:
        x0, y0, x1, y1 = row.edges
        if not all(abs(edge) < _MAX_PLACE for edge in row.edges):
            raise BadRow(f"the box lies absurdly far away or is no number: {x0:g}, {y0:g} to {x1:g}, {y1:g}")
        if not (x1 > x0 and y1 > y0):
            raise BadRow(f"the box has no area: width {x1 - x0:g}, height {y1 - y0:g}")
        longest, unit = (MAX_SIDE_SHARE, "times the frame") if self.relative else (MAX_SIDE_PX, "pixels")
        if max(x1 - x0, y1 - y0) > longest:
            hint = "; --relative is for boxes in shares of the frame, and these look like pixels" if self.relative else ""
            raise BadRow(f"the box is {x1 - x0:g} x {y1 - y0:g} {unit} (w x h), at most {longest} a side{hint}")
        if isinstance(row.frame, int) and not 0 <= row.frame <= MAX_NUMBER:
            raise BadRow(f"frame is {row.frame}; 0 to {MAX_NUMBER} is allowed")
        by_name = isinstance(row.frame, str)
        if self._by_name is None:
            self._by_name = by_name
        elif self._by_name != by_name:
            raise BadRow(f"frame is {row.frame!r}, while the rows before {'name images' if self._by_name else 'give numbers of frames'}")

    def boxes(self) -> Boxes:
        """What was collected."""
        columns: dict[str, Any] = {name: np.array(column, dtype=np.int64) for name, column in self._whole.items()}
        columns |= {name: np.array(column, dtype=np.float64) for name, column in self._broken.items()}
        edges = columns.pop("edges").reshape(-1, 4)
        return Boxes(
            path=self.path,
            place=self.place,
            relative=self.relative,
            first_frame=self.first_frame,
            images=list(self._images) if self._by_name else None,
            identities=list(self._identities),
            labels=list(self._labels),
            rejected=self.rejected,
            edges=edges,
            ignored=np.frombuffer(bytes(self._ignored), dtype=np.bool_),
            **columns,
        )


def number(value: object, name: str) -> float:
    """A finite number from a field. Raises BadRow naming the field and what stands there."""
    if isinstance(value, str) and "_" not in value:
        try:
            found = float(value)
        except ValueError:
            raise BadRow(f"{name} is {value!r}, not a number") from None
    elif isinstance(value, int | float) and not isinstance(value, bool):
        # A whole number may be too long for a float.
        found = float(value) if isinstance(value, float) or abs(value) < 10**300 else math.inf
    else:
        raise BadRow(f"{name} is {value!r}, not a number")
    if not math.isfinite(found):
        raise BadRow(f"{name} is {value!r}, not a finite number")
    return found


def whole_number(value: object, name: str) -> int:
    """A whole number from a field: 7, "7" or "7.0". Raises BadRow."""
    found = number(value, name)
    if found != int(found):
        raise BadRow(f"{name} is {value!r}, not a whole number")
    return int(found)


def identity_of(value: object) -> str:
    """An identity as text; "" for none: an empty field, null, or a number below 0."""
    text = _label(value)
    return "" if text.startswith("-") and text[1:].isdecimal() else text


def labels_of(*values: object) -> frozenset[str]:
    """The names of a class, in small letters; a pedestrian is a person."""
    labels = {text for value in values if (text := _label(value).lower())}
    return frozenset(labels | {PERSON} if "pedestrian" in labels else labels)


def _label(value: object) -> str:
    """A field as text; 3.0 and "3.0" are "3"."""
    if value is None:
        return ""
    text = str(value).strip()
    head, dot, tail = text.partition(".")
    return head if dot and head.removeprefix("-").isdecimal() and tail.strip("0") == "" else text


def moved(edges: tuple[float, float, float, float], origin: int) -> tuple[float, float, float, float]:
    """Edges counted from 0 of edges counted from `origin`."""
    x0, y0, x1, y1 = edges
    return x0 - origin, y0 - origin, x1 - origin, y1 - origin
