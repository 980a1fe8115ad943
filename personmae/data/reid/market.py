"""The layout of Market-1501, in which most sets come: `query`, `bounding_box_test` and, where there is one, `bounding_box_train`.

Market-1501, DukeMTMC-reID, Occluded-Duke, CUHK03-NP, the repacked MSMT17, the Mannequins, and any folder of one's own.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from personmae.configs import UserError
from personmae.data.records import JUNK_PERSON, PersonImage
from personmae.data.reid.names import list_images, parse_market, who_is_on
from personmae.data.reid.sets import ReidSet, by_name

TRAIN_FOLDER, QUERY_FOLDER, GALLERY_FOLDER = "bounding_box_train", "query", "bounding_box_test"
# The 500,000 distractors of Market-1501, unpacked beside the other folders.
DISTRACTORS_FOLDER = "images"
DISTRACTOR_PERSON = 0


def is_market_layout(root: Path) -> bool:
    return (root / QUERY_FOLDER).is_dir() and (root / GALLERY_FOLDER).is_dir()


def read_market_layout(root: Path, *, with_distractors: bool = False) -> ReidSet:
    """The set in folder `root` with `query`, `bounding_box_test` and, where there is one, `bounding_box_train`.

    Each list is sorted by file name, so that it is the same on every machine. Hidden files and files that are no images
    are passed over. with_distractors: the files of `images` are appended to the gallery as person 0, whatever their names say.

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
    found = ReidSet(root.resolve().name, train, query, gallery, train_junk + query_junk + gallery_junk)
    return _append_distractors(found, root) if with_distractors else found


def _append_distractors(found: ReidSet, root: Path) -> ReidSet:
    folder = root / DISTRACTORS_FOLDER
    if not folder.is_dir():
        raise UserError(f"{root} has no folder {DISTRACTORS_FOLDER!r} with the 500,000 distractors of Market-1501; unpack them there")
    distractors = []
    for path in list_images(folder):
        # As elsewhere, a name that says -1 is junk; one that says nothing is still a distractor, of no camera.
        who = parse_market(path.name)
        if who is None or who.person != JUNK_PERSON:
            distractors.append(PersonImage(path, DISTRACTOR_PERSON, who.camera if who else 0))
    if not distractors:
        raise UserError(f"{folder} holds no image; are the distractors unpacked completely?")
    note = f"{len(distractors):,} distractors from {folder}"
    return replace(found, gallery=by_name([*found.gallery, *distractors]), notes=(*found.notes, note))


def _read_folder(folder: Path) -> tuple[list[PersonImage], int]:
    images, num_junk = [], 0
    for path in list_images(folder):
        person, camera = who_is_on(path, parse_market, "0001_c1s1_000000_00.jpg")
        if person == JUNK_PERSON:
            num_junk += 1
        else:
            images.append(PersonImage(path, person, camera))
    return images, num_junk


def _suggestion(root: Path) -> str:
    # Archives unpack into a folder of their own (Market-1501-v15.09.15), so the right folder is often one level down.
    for child in sorted(os.listdir(root)):
        if is_market_layout(root / child):
            return f"; {root / child} is"
    return ""
