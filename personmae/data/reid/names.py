"""Person and camera from the names of image files, by the rules of each set.

Only the base name is read, from its first character, and numbers take all their digits: other readers search the whole path for one digit, and so
take a folder run_2024_c3 for person 2024 and camera 14 for camera 1.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from personmae.configs import UserError
from personmae.data.sources import IMAGE_SUFFIXES

# Labels are int64 from here on; the room above is for offsets between the parts of a set.
MAX_LABEL = 2**62


class Who(NamedTuple):
    """Person and camera as a name tells them."""

    person: int
    camera: int


# One parser: the base name of a file -> who is on it, or None if the name is not in the set's form.
NameParser = Callable[[str], Who | None]

# 0001_c1s1_001051_00.jpg (Market-1501), 0001_c2_f0046182.jpg (Duke), 0001_c14_0012.jpg (MSMT17 repacked), 0001_c1_1.png (CUHK03-NP).
_MARKET = re.compile(r"(?P<person>-1|[0-9]+)_c(?P<camera>[0-9]+)(?:s[0-9]+)?(?=[_.])")
# 0000_000_01_0303morning_0015_0.jpg (MSMT17): person, running number, camera.
_MSMT17 = re.compile(r"(?P<person>[0-9]+)_[0-9]+_(?P<camera>[0-9]+)_")
# 1_001_1_01.png (CUHK03 as torchreid extracts it): pair of cameras, person of that pair, view, image.
_CUHK03 = re.compile(r"(?P<pair>[0-9]+)_(?P<person>[0-9]{1,4})_(?P<view>[12])_[0-9]+(?=\.)")
# 0001001.png (CUHK01): person, image; images 1 and 2 are of one camera, 3 and 4 of the other.
_CUHK01 = re.compile(r"(?P<person>[0-9]{4})(?P<image>[0-9]{3})(?=\.)")
# 0001_1_25004_107_32_106_221.jpeg (GRID): person, camera, frame and place.
_GRID = re.compile(r"(?P<person>[0-9]+)_(?P<camera>[0-9]+)(?=[_.])")
# 000_45.bmp (VIPeR), 001_01.tif (Occluded-REID), 1.jpg (Partial-iLIDS): the person comes first; the camera is told by the folder.
_LEADING = re.compile(r"(?P<person>[0-9]+)(?=[_.])")
_PRID = re.compile(r"person_(?P<person>[0-9]+)(?=\.)")


def parse_market(name: str) -> Who | None:
    return _who(_MARKET.match(name))


def parse_msmt17(name: str) -> Who | None:
    return _who(_MSMT17.match(name))


def parse_grid(name: str) -> Who | None:
    return _who(_GRID.match(name))


def parse_cuhk03(name: str) -> Who | None:
    """Person = 10,000 times the pair of cameras, plus the number within the pair: the same in every split and protocol."""
    match = _CUHK03.match(name)
    if match is None or len(match["pair"]) > 9:
        return None
    return Who(10_000 * int(match["pair"]) + int(match["person"]), int(match["view"]))


def parse_cuhk01(name: str) -> Who | None:
    match = _CUHK01.match(name)
    return Who(int(match["person"]), 1 if int(match["image"]) <= 2 else 2) if match else None


def parse_leading(name: str, camera: int) -> Who | None:
    """The number that a name begins with; the camera is told by where the file lies."""
    return _who(_LEADING.match(name), camera)


def parse_prid(name: str, camera: int) -> Who | None:
    return _who(_PRID.match(name), camera)


def read_label(text: str) -> int | None:
    """An integer label, or None if the text is none or beyond what labels may be (2**62 either way)."""
    if not re.fullmatch(r"[+-]?[0-9]{1,19}", text):
        return None
    label = int(text)
    return label if abs(label) <= MAX_LABEL else None


def who_is_on(path: Path, parse: NameParser, form: str) -> Who:
    """Person and camera of a file. form: an example of a right name. Raises UserError for a name in another form."""
    found = parse(path.name)
    if found is None:
        raise UserError(f"{path}: no person and camera in the name as in {form}; rename or remove it")
    return found


def list_images(folder: Path) -> list[Path]:
    """The image files of one folder (not below it), by name; hidden files and files that are no images are passed over.

    Raises UserError if the folder cannot be read.
    """
    try:
        found = [entry for entry in folder.iterdir() if entry.suffix.lower() in IMAGE_SUFFIXES and not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be read: {error.strerror}") from error
    return sorted(found, key=lambda path: path.name)


def _who(match: re.Match[str] | None, camera: int | None = None) -> Who | None:
    if match is None:
        return None
    person = read_label(match["person"])
    if camera is None:
        camera = read_label(match["camera"])
    return None if person is None or camera is None else Who(person, camera)
