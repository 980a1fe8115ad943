"""Boxes of people from MOTChallenge text and from CSV with a header.

MOT text: frame, id, left, top, width, height, confidence and then, by the number of columns, class and visibility (9: ground truth of MOT16 and
later) or a place in the world that is not used (7 or 10: detections, results, MOT15). In ground truth the confidence is a flag, 0 = not to be
considered.

CSV: a header, in any order and case, separated by commas, semicolons or tabs. `frame` (a number) or `image` (a file's name), a box as x, y, w, h
(left, top, width, height) or x0, y0, x1, y1 or x1, y1, x2, y2 or cx, cy, w, h; optional: id, score, camera, class, visibility. `_ALIASES` has what
else these may be called; other columns are passed over.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from personmae.configs import UserError
from personmae.data.boxes import (
    MAX_NUMBER,
    PERSON,
    BadRow,
    Boxes,
    BoxTable,
    Rejected,
    Row,
    identity_of,
    labels_of,
    moved,
    number,
    whole_number,
)

MotFlavour = Literal["auto", "gt", "det"]
# The classes of MOT16 and later. Other people of theirs (on a vehicle, standing for good, mirrored) are classes of their own.
MOT_CLASSES = {
    1: PERSON,
    2: "person on vehicle",
    3: "car",
    4: "bicycle",
    5: "motorbike",
    6: "non motorized vehicle",
    7: "static person",
    8: "distractor",
    9: "occluder",
    10: "occluder on the ground",
    11: "occluder full",
    12: "reflection",
    13: "crowd",
}


_ALIASES = {
    "frame": ("frame_number", "frame_id"),
    "image": ("file_name", "filename", "image_name"),
    "x": ("left",),
    "y": ("top",),
    "w": ("width",),
    "h": ("height",),
    "x0": ("xmin",),
    "y0": ("ymin",),
    "x1": ("xmax",),
    "y1": ("ymax",),
    "x2": (),
    "y2": (),
    "cx": (),
    "cy": (),
    "id": ("track_id", "track"),
    "score": ("conf", "confidence"),
    "camera": ("cam",),
    "class": ("category", "label"),
    "visibility": (),
}
_CANONICAL = {alias: name for name, aliases in _ALIASES.items() for alias in (name, *aliases)}
_SHAPES = (("x", "y", "w", "h"), ("x0", "y0", "x1", "y1"), ("x1", "y1", "x2", "y2"), ("cx", "cy", "w", "h"))


class BoxColumns:
    """Which columns of a header (or keys of an object) say what."""

    def __init__(self, header: Sequence[str]) -> None:
        """Raises BadRow if a column is missing or one thing stands twice."""
        self.where: dict[str, int] = {}
        for position, name in enumerate(header):
            canonical = _CANONICAL.get(name.strip().lower())
            if canonical in self.where:
                raise BadRow(f"two columns say {canonical}: {header[self.where[canonical]]!r} and {name!r}")
            if canonical:
                self.where[canonical] = position
        if "frame" not in self.where and "image" not in self.where:
            raise BadRow(f"no column 'frame' (a number) or 'image' (a file's name) among {_shown(header)}")
        shapes = [shape for shape in _SHAPES if all(name in self.where for name in shape)]
        if not shapes:
            raise BadRow(f"no box among {_shown(header)}: {', or '.join(' '.join(shape) for shape in _SHAPES)}")
        if len(shapes) > 1:
            raise BadRow(f"more than one box in a row: {' as well as '.join(' '.join(shape) for shape in shapes)}; leave one of them out")
        self.shape = shapes[0]

    def row(self, values: Sequence[object], origin: int) -> Row:
        """A row's box. Raises BadRow."""

        def field(name: str) -> object:
            value = values[self.where[name]] if name in self.where else None
            return None if isinstance(value, str) and not value.strip() else value

        def optional(name: str) -> float:
            value = field(name)
            return math.nan if value is None else number(value, name)

        first, second, third, fourth = (number("" if field(name) is None else field(name), name) for name in self.shape)
        if self.shape[0] == "cx":
            edges = (first - third / 2, second - fourth / 2, first + third / 2, second + fourth / 2)
        elif self.shape[2] == "w":
            edges = (first, second, first + third, second + fourth)
        else:
            edges = (first, second, third, fourth)
        image, camera = field("image"), field("camera")
        if "image" in self.where and not isinstance(image, str):
            raise BadRow(f"image is {image!r}, not the name of a file")
        camera_number = -1 if camera is None else whole_number(camera, "camera")
        if camera is not None and not 0 <= camera_number <= MAX_NUMBER:
            raise BadRow(f"camera is {camera_number}; 0 to {MAX_NUMBER} is allowed")
        return Row(
            frame=image.strip() if isinstance(image, str) else whole_number(field("frame"), "frame"),
            edges=moved(edges, origin),
            identity=identity_of(field("id")),
            score=optional("score"),
            visibility=optional("visibility"),
            labels=labels_of(field("class")),
            camera=camera_number,
        )


def read_mot(path: Path, lines: Iterable[str], origin: int, flavour: MotFlavour) -> Boxes:
    """The boxes of MOTChallenge text, columns separated by commas or blanks. flavour: what the columns after the seventh are; "auto": by their
    number, see above."""
    table = BoxTable(path, "line {}", relative=False, first_frame=1)
    for line_number, line in enumerate(lines, 1):
        if text := line.strip():
            table.add(line_number, lambda text=text: _mot_row(text, origin, flavour))  # type: ignore[misc]
    return table.boxes()


def _mot_row(text: str, origin: int, flavour: MotFlavour) -> Row:
    fields = text.split(",") if "," in text else text.split()
    if not 6 <= len(fields) <= 10 or (flavour == "auto" and len(fields) == 8) or (flavour == "gt" and len(fields) < 7):
        allowed = {"auto": "6, 7, 9 or 10 are allowed; --mot-flavour says what 8 mean", "gt": "7 to 10 are allowed", "det": "6 to 10 are allowed"}
        raise BadRow(f"{len(fields)} columns; {allowed[flavour]}")
    frame = whole_number(fields[0], "frame")
    if frame < 1:
        raise BadRow(f"frame is {frame}; MOT counts frames from 1")
    left, top, width, height = (number(field, name) for field, name in zip(fields[2:6], ("left", "top", "width", "height"), strict=True))
    score = number(fields[6], "confidence") if len(fields) > 6 else math.nan
    truth = flavour == "gt" or (flavour == "auto" and len(fields) == 9)
    kind = whole_number(fields[7], "class") if truth and len(fields) > 7 else -1
    visibility = number(fields[8], "visibility") if truth and len(fields) > 8 else math.nan
    return Row(
        frame=frame,
        edges=moved((left, top, left + width, top + height), origin),
        identity=identity_of(whole_number(fields[1], "id")),
        score=score,
        # MOT15 writes -1 where nothing is known.
        visibility=math.nan if visibility < 0 else visibility,
        labels=labels_of(kind, MOT_CLASSES.get(kind)) if kind >= 0 else frozenset(),
        ignored=truth and score == 0,
    )


def read_csv(path: Path, lines: Iterable[str], origin: int, relative: bool) -> Boxes:
    """The boxes of a CSV file with a header. Raises UserError if the header does not say what a box and a frame are."""
    rows = iter(lines)
    above, header = next(((count, line) for count, line in enumerate(rows, 1) if line.strip()), (0, ""))
    separator = max(",;\t", key=header.count)
    names = next(csv.reader([header], delimiter=separator), [])
    try:
        columns = BoxColumns(names)
    except BadRow as error:
        raise UserError(f"{path}: the first line is no header of a CSV file of boxes: {error}") from error
    table = BoxTable(path, "line {}", relative)
    reader = csv.reader(rows, delimiter=separator)

    def read(values: list[str]) -> Row:
        if len(values) != len(names):
            raise BadRow(f"{len(values)} fields, the header has {len(names)}")
        return columns.row(values, origin)

    while True:
        try:
            values = next(reader)
        except StopIteration:
            return table.boxes()
        except csv.Error as error:
            table.rejected.append(Rejected(path, f"line {above + reader.line_num}", f"no CSV: {error}"))
            continue
        if any(value.strip() for value in values):
            table.add(above + reader.line_num, lambda values=values: read(values))  # type: ignore[misc]


def _shown(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:12])) or "nothing"
