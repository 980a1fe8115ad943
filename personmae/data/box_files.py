"""Files of boxes: which format one is in, and reading it.

MOTChallenge counts frames, identities and pixels from 1 (its evaluation kit says so), CSV and JSON from 0; `origin` says otherwise, since many
trackers write MOT files whose pixels count from 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from personmae.configs import UserError
from personmae.data.boxes import BadRow, Boxes, number
from personmae.data.boxes_json import read_json
from personmae.data.boxes_text import MotFlavour, read_csv, read_mot

BoxFormat = Literal["auto", "mot", "csv", "json"]


def read_boxes(path: Path, kind: BoxFormat = "auto", *, origin: int | None = None, relative: bool = False, mot_flavour: MotFlavour = "auto") -> Boxes:
    """The boxes of a file; rows that cannot be used are in `rejected`.

    kind: the format; "auto" by the file's beginning: { or [ is JSON, a number MOT, else CSV. origin: the coordinate of the first pixel's edge, 0 or
    1; None: 1 for MOT, 0 for the rest. relative: coordinates are shares of the frame's width and height (not in MOT).

    Raises UserError if the file cannot be read, is not text, or is not in the format as a whole.
    """
    try:
        # Strict UTF-8 would end at the first odd name; what cannot be decoded stays as it is, since names of files are bytes.
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            beginning = file.read(4096)
            if "\0" in beginning:
                raise UserError(f"{path} is no text; boxes come as MOT text, CSV or JSON")
            if kind == "auto":
                kind = _kind(beginning)
            file.seek(0)
            if kind == "json":
                return read_json(path, file.read(), origin or 0, relative)
            if kind == "csv":
                return read_csv(path, file, origin or 0, relative)
            if relative:
                raise UserError(f"{path} is MOT text, whose boxes are in pixels; leave --relative out")
            return read_mot(path, file, 1 if origin is None else origin, mot_flavour)
    except OSError as error:
        raise UserError(f"the boxes {path} cannot be read: {error.strerror or error}") from error


def _kind(beginning: str) -> BoxFormat:
    text = beginning.lstrip()
    if text[:1] in ("{", "["):
        return "json"
    first = text.split("\n", 1)[0].replace(",", " ").split()
    try:
        number(first[0] if first else "0", "the first field")
    except BadRow:
        return "csv"
    return "mot"
