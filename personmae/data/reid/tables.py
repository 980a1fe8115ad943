"""A set of one's own as a CSV file with columns path, person, camera and split (train, query or gallery)."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from personmae.configs import UserError
from personmae.data.records import JUNK_PERSON, PersonImage
from personmae.data.reid.names import read_label
from personmae.data.reid.sets import ReidSet, by_name

COLUMNS = ("path", "person", "camera", "split")
PARTS = ("train", "query", "gallery")


def is_table(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() == ".csv"


def read_table(file: Path) -> ReidSet:
    """The set that a CSV file lists; paths are relative to the file's folder, or absolute.

    The first line names the columns, in any order; others are passed over. Encoding UTF-8, separator a comma. person: an integer from 0, or -1 for
    junk, which is dropped. camera: an integer; without the column, queries are of camera 0 and the gallery of camera 1, by convention. An image may
    stand in query and gallery, but only once in each part.

    Raises UserError naming file and line.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"the table {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the table {file} is not in UTF-8: {error.reason} at byte {error.start}") from error
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip().lower() for name in next(rows, [])]
        has_cameras = "camera" in header
        places = _find_columns(file, header)
        parts: dict[str, list[PersonImage]] = {part: [] for part in PARTS}
        lines: dict[tuple[str, str], int] = {}
        num_junk = 0
        for row in rows:
            if not any(field.strip() for field in row):
                continue
            where = f"{file}, line {rows.line_num}"
            part, image = _read_row(file.parent, where, row, len(header), places)
            if image.person == JUNK_PERSON:
                num_junk += 1
                continue
            first = lines.setdefault((part, str(image.path)), rows.line_num)
            if first != rows.line_num:
                raise UserError(f"{where}: {image.path} is in {part} already, by line {first}")
            parts[part].append(image)
    except csv.Error as error:
        raise UserError(f"{file}, line {rows.line_num}: {error}") from error
    for part in ("query", "gallery"):
        if not parts[part]:
            raise UserError(f"{file} lists no image of a person with split {part!r}")
    notes = () if has_cameras else ("the table has no column camera: by convention every query is of camera 0, every gallery image of camera 1",)
    train, query, gallery = (by_name(parts[part]) for part in PARTS)
    return ReidSet(file.stem, train, query, gallery, num_junk=num_junk, has_cameras=has_cameras, notes=notes)


def _find_columns(file: Path, header: list[str]) -> dict[str, int]:
    for name in COLUMNS:
        if header.count(name) > 1:
            raise UserError(f"{file}, line 1: the column {name!r} is there {header.count(name)} times")
        if name not in header and name != "camera":
            found = ", ".join(name for name in header if name)[:200] or "nothing"
            raise UserError(f"{file}, line 1: no column {name!r}; the first line should be {','.join(COLUMNS)}, and is: {found}")
    return {name: header.index(name) for name in COLUMNS if name in header}


def _read_row(folder: Path, where: str, row: list[str], width: int, places: dict[str, int]) -> tuple[str, PersonImage]:
    if len(row) != width:
        raise UserError(f"{where}: {len(row)} fields, but the first line has {width}")
    values = {name: row[place].strip() for name, place in places.items()}
    part = values["split"].lower()
    if part not in PARTS:
        raise UserError(f"{where}: split is {values['split']!r}; it must be {', '.join(PARTS[:-1])} or {PARTS[-1]}")
    path = values["path"]
    if not path or "\0" in path:
        raise UserError(f"{where}: {'a path with a NUL character' if path else 'the path is empty'}")
    person = read_label(values["person"])
    if person is None or person < JUNK_PERSON:
        raise UserError(f"{where}: person is {values['person'][:40]!r}; it must be an integer from 0 to 2**62, or -1 for junk")
    camera = read_label(values["camera"]) if "camera" in values else int(part == "gallery")
    if camera is None:
        raise UserError(f"{where}: camera is {values['camera'][:40]!r}; it must be an integer, at most 2**62 either way")
    return part, PersonImage(folder / path, person, camera)
