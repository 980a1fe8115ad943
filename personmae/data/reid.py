"""Readers of labelled ReID sets: the layout of Market-1501, DukeMTMC-reID, Occluded-Duke and the Mannequins."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from personmae.configs import UserError
from personmae.data.records import PersonImage
from personmae.data.sources import IMAGE_SUFFIXES

TRAIN_FOLDER, QUERY_FOLDER, GALLERY_FOLDER = "bounding_box_train", "query", "bounding_box_test"
JUNK_PERSON = -1

# 0001_c1s1_001051_00.jpg (Market-1501), 0001_c2_f0046182.jpg (Duke). Only the base name is searched, from its first
# character, and the camera takes all its digits: other readers search the whole path for one digit, and so take a
# folder run_2024_c3 for person 2024 and camera 14 for camera 1.
NAME = re.compile(r"(?P<person>-1|\d+)_c(?P<camera>\d+)(?:s\d+)?(?=[_.])")


@dataclass(frozen=True)
class ReidSet:
    """A labelled set. The gallery keeps distractors (person 0 in Market-1501); junk (person -1) is dropped, counted."""

    name: str
    train: list[PersonImage]
    query: list[PersonImage]
    gallery: list[PersonImage]
    num_junk: int = 0

    def describe(self) -> str:
        """One line with the number of images, people and cameras of each part."""
        parts = []
        for part, images in (("train", self.train), ("query", self.query), ("gallery", self.gallery)):
            num_people = len({image.person for image in images})
            num_cameras = len({image.camera for image in images})
            parts.append(f"{part} {len(images):,} images of {num_people:,} people from {num_cameras} cameras")
        return f"{self.name}: {'; '.join(parts)}; {self.num_junk:,} junk images dropped"


def read_market_layout(root: Path) -> ReidSet:
    """The set in folder `root` with `query`, `bounding_box_test` and, where there is one, `bounding_box_train`.

    Each list is sorted by file name, so that it is the same on every machine. Hidden files and files that are no images
    are passed over.

    Raises UserError if a folder is missing or holds no person, or if an image's name is not in the form
    0001_c1s1_000000_00.jpg.
    """
    if not root.is_dir():
        raise UserError(f"no such folder: {root}; give the folder that holds {QUERY_FOLDER} and {GALLERY_FOLDER}")
    for folder in (QUERY_FOLDER, GALLERY_FOLDER):
        if not (root / folder).is_dir():
            raise UserError(f"{root} has no folder {folder!r}, so it is not in Market-1501's layout{_suggestion(root)}")
    train, train_junk = _read_folder(root / TRAIN_FOLDER) if (root / TRAIN_FOLDER).is_dir() else ([], 0)
    query, query_junk = _read_folder(root / QUERY_FOLDER)
    gallery, gallery_junk = _read_folder(root / GALLERY_FOLDER)
    for folder, images in ((QUERY_FOLDER, query), (GALLERY_FOLDER, gallery)):
        if not images:
            raise UserError(f"{root / folder} holds no image of a person; is the data set unpacked completely?")
    return ReidSet(root.resolve().name, train, query, gallery, train_junk + query_junk + gallery_junk)


def _read_folder(folder: Path) -> tuple[list[PersonImage], int]:
    images, num_junk = [], 0
    for path in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if path.name.startswith(".") or path.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        match = NAME.match(path.name)
        if match is None:
            raise UserError(
                f"{path}: no person and camera in the name as in 0001_c1s1_000000_00.jpg; rename or remove it"
            )
        person = int(match["person"])
        if person == JUNK_PERSON:
            num_junk += 1
        else:
            images.append(PersonImage(path, person, int(match["camera"])))
    return images, num_junk


def _suggestion(root: Path) -> str:
    # Archives unpack into a folder of their own (Market-1501-v15.09.15), so the right folder is often one level down.
    for child in sorted(root.iterdir()):
        if (child / QUERY_FOLDER).is_dir() and (child / GALLERY_FOLDER).is_dir():
            return f"; {child} is"
    return ""
