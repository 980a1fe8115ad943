"""Occluded and partial people without camera numbers: Occluded-REID, Partial-REID, Partial-iLIDS, P-DukeMTMC-reID.

By the convention of bpbreid and light-reid every query is of camera 0 and every gallery image of camera 1. fast-reid takes the image's running number
for a camera, and so loses one true match of each query.

Occluded-REID: Zhuo et al., ICME 2018. Partial-REID: Zheng et al., ICCV 2015. Partial-iLIDS: He et al., "Deep spatial feature reconstruction",
CVPR 2018. These three are test sets, for models trained elsewhere. P-DukeMTMC-reID: Zhuo et al., 2018, with a training part: `p-dukemtmc` is the
supervised setting, `p-dukemtmc-zero-shot` the same test part without one.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from personmae.configs import UserError
from personmae.data.records import GALLERY_CAMERA, QUERY_CAMERA, PersonImage
from personmae.data.reid.names import list_images, parse_leading, who_is_on
from personmae.data.reid.sets import ReidSet, by_name

OCCLUDED_FOLDERS = ("occluded_body_images", "whole_body_images")
PARTIAL_FOLDERS = ("partial_body_images", "whole_body_images")
# As the archives have them, then as fast-reid and light-reid want them.
FOLDERS = (OCCLUDED_FOLDERS, PARTIAL_FOLDERS, ("query", "gallery"), ("Probe", "Gallery"))
# Paths of the images, one a line: what light-reid reads, and the archives of Partial-REID and Partial-iLIDS hold.
LISTS = ("Probe.txt", "Gallery.txt")
NOTE = "cameras are not told: by convention every query is of camera 0, every gallery image of camera 1"


def is_query_and_gallery(root: Path) -> bool:
    return _find_folders(root) is not None or all((root / name).is_file() for name in LISTS)


def is_occluded_reid(root: Path) -> bool:
    return all((root / folder).is_dir() for folder in OCCLUDED_FOLDERS)


def is_partial_reid(root: Path) -> bool:
    """Several images a person, 001_001.jpg; Partial-iLIDS has one, 1.jpg."""
    return all((root / folder).is_dir() for folder in PARTIAL_FOLDERS) and any("_" in path.stem for path in list_images(root / PARTIAL_FOLDERS[0]))


def is_partial_ilids(root: Path) -> bool:
    return all((root / folder).is_dir() for folder in PARTIAL_FOLDERS) and not is_partial_reid(root)


def is_p_duke(root: Path) -> bool:
    return is_occluded_reid(root / "test")


def read_query_and_gallery(root: Path, name: str) -> ReidSet:
    """A test set of two folders, images in them or one level below in a folder for each person, or of two lists of paths.

    The person is the number that a file's name begins with. Raises UserError for a name without one, or one that contradicts its folder's.
    """
    if all((root / file).is_file() for file in LISTS):
        query, gallery = (_read_list(root / file, camera) for file, camera in zip(LISTS, (QUERY_CAMERA, GALLERY_CAMERA), strict=True))
        return ReidSet(name, [], query, gallery, has_cameras=False, notes=(NOTE, f"images from the lists {' and '.join(LISTS)}"))
    folders = _find_folders(root)
    if folders is None:
        raise UserError(f"{root} holds none of {', '.join(' and '.join(pair) for pair in FOLDERS)}")
    query, gallery = _read_folder(root / folders[0], QUERY_CAMERA), _read_folder(root / folders[1], GALLERY_CAMERA)
    return ReidSet(name, [], query, gallery, has_cameras=False, notes=(NOTE,))


def read_p_duke(root: Path, *, supervised: bool) -> ReidSet:
    """P-DukeMTMC-reID: {train,test}/{occluded,whole}_body_images/<person>/*.jpg. supervised: with the training part.

    File names tell real cameras, which the literature does not use: occluded images are of camera 0, whole ones of camera 1, in training too.
    """
    test = read_query_and_gallery(root / "test", "p-dukemtmc" if supervised else "p-dukemtmc-zero-shot")
    train: list[PersonImage] = []
    if supervised:
        if not is_occluded_reid(root / "train"):
            raise UserError(f"{root / 'train'} should hold {' and '.join(OCCLUDED_FOLDERS)}; without a training part it is p-dukemtmc-zero-shot")
        for folder, camera in zip(OCCLUDED_FOLDERS, (QUERY_CAMERA, GALLERY_CAMERA), strict=True):
            train += _read_folder(root / "train" / folder, camera)
    setting = "supervised setting: train on its training part" if supervised else "zero-shot setting: its training part is not used"
    return ReidSet(test.name, by_name(train), test.query, test.gallery, has_cameras=False, notes=(*test.notes, setting))


def _find_folders(root: Path) -> tuple[str, str] | None:
    return next((pair for pair in FOLDERS if all((root / folder).is_dir() for folder in pair)), None)


def _read_folder(folder: Path, camera: int) -> list[PersonImage]:
    paths = list_images(folder)
    for child in sorted(folder.iterdir()):
        if child.is_dir() and not child.name.startswith("."):
            paths += list_images(child)
    images = [_read_image(path, camera, path.parent.name if path.parent != folder else "") for path in paths]
    if not images:
        raise UserError(f"{folder} holds no image, nor do the folders in it; is the data set unpacked completely?")
    return by_name(images)


def _read_list(file: Path, camera: int) -> list[PersonImage]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the list {file} cannot be read: {error}") from error
    images = [_read_image(file.parent / line.strip().replace("\\", "/"), camera) for line in lines if line.strip()]
    if not images:
        raise UserError(f"{file} lists no image: it should have one path a line")
    return by_name(images)


def _read_image(path: Path, camera: int, person_folder: str = "") -> PersonImage:
    who = who_is_on(path, partial(parse_leading, camera=camera), "001_01.tif")
    if re.fullmatch("[0-9]{1,18}", person_folder) and int(person_folder) != who.person:
        raise UserError(f"{path}: the name says person {who.person}, its folder person {int(person_folder)}; rename one")
    return PersonImage(path, *who)
