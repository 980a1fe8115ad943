"""The small sets of pairs, cut in halves many times: VIPeR, PRID-2011 (single shot), GRID, CUHK01.

Results are means over all splits. Splits come from a file as torchreid writes it (splits.json, splits_single_shot.json), from GRID's own
partitions, or, where there is neither, from a fixed seed (`splits.draw_train_people`); which of these is said in the notes. VIPeR and CUHK01 count
each half twice, as torchreid does: even splits look from the first camera to the second, odd ones back, so that splits 0 and 1 train alike.

VIPeR: Gray, Brennan and Tao, PETS 2007. PRID-2011: Hirzer et al., SCIA 2011. GRID: Loy, Liu and Gong, 2013. CUHK01: Li, Zhao and Wang, ACCV 2012.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from personmae.configs import UserError
from personmae.data.records import PersonImage
from personmae.data.reid.matlab import read_mat
from personmae.data.reid.names import NameParser, Who, list_images, parse_cuhk01, parse_grid, parse_leading, parse_prid, who_is_on
from personmae.data.reid.sets import ReidSet, by_name
from personmae.data.reid.splits import Split, by_folder_and_name, check_number, draw_train_people, find_file, read_json, read_split

NUM_HALVES = 10
# In PRID-2011 people 1 to 200 are seen by both cameras. The numbers above are other people in each: those of camera b are distractors.
PRID_SHARED = 200
GRID_DISTRACTOR = 0


def is_viper(root: Path) -> bool:
    return all((root / camera).is_dir() for camera in ("cam_a", "cam_b")) and not is_prid(root)


def is_prid(root: Path) -> bool:
    return (root / "cam_b").is_dir() and any((root / "cam_a").glob("person_*"))


def is_grid(root: Path) -> bool:
    return all((root / folder).is_dir() for folder in ("probe", "gallery"))


def is_cuhk01(root: Path) -> bool:
    return root.is_dir() and any(parse_cuhk01(path.name) for path in root.glob("*.png"))


def read_viper(root: Path, number: int) -> ReidSet:
    """Split `number` of 20. Files cam_a/000_45.bmp: the person comes first, and has the same number in cam_b.

    Raises UserError if the two cameras do not show the same people.
    """
    first, second = (_read_camera(root / f"cam_{letter}", parse_leading, camera, "000_45.bmp") for camera, letter in ((1, "a"), (2, "b")))
    if people_of(first) != people_of(second):
        odd = min(people_of(first) ^ people_of(second))
        raise UserError(f"{root}: person {odd} is seen by one camera alone; VIPeR's files have the same numbers in cam_a and cam_b")
    return _read_two_ways("viper", root, first, second, number)


def read_cuhk01(root: Path, number: int) -> ReidSet:
    """Split `number` of 20. Files 0001001.png: person 1, image 1; images 1 and 2 are of camera 1, images 3 and 4 of camera 2."""
    images = [PersonImage(path, *who_is_on(path, parse_cuhk01, "0001001.png")) for path in list_images(root)]
    first, second = ([image for image in images if image.camera == camera] for camera in (1, 2))
    return _read_two_ways("cuhk01", root, first, second, number)


def read_prid(root: Path, number: int) -> ReidSet:
    """Split `number` of 10: 100 of the 200 people of both cameras train; of the rest camera a looks for camera b, among 549 distractors."""
    first, second = (_read_camera(root / f"cam_{letter}", parse_prid, camera, "person_0001.png") for camera, letter in ((1, "a"), (2, "b")))
    shared = sorted(person for person in people_of(first) & people_of(second) if person <= PRID_SHARED)
    file = find_file(root, "splits_single_shot.json", levels=2)
    if file is not None:
        splits = read_json(file)
        split = splits[check_number(number, len(splits), str(file))] if isinstance(splits, list) else None
        people = split.get("train") if isinstance(split, dict) else None
        if not isinstance(people, list) or not all(isinstance(person, int) for person in people):
            raise UserError(f'{file} is not a list of {{"train": [people], "test": [people]}}; remove it or write it anew')
        train = set(people)
        if not train <= set(shared):
            raise UserError(f"{file} trains on a person who is not in {root}; remove the file, or complete the images")
        note = f"splits from {file}"
    else:
        check_number(number, NUM_HALVES, "prid2011")
        train = draw_train_people(shared, len(shared) // 2, number)
        note = _drawn("prid2011")
    test = set(shared) - train
    distractors = [image for image in second if image.person > PRID_SHARED]
    return ReidSet(
        "prid2011",
        by_name(image for image in first + second if image.person in train),
        by_name(image for image in first if image.person in test),
        by_name([*(image for image in second if image.person in test), *distractors]),
        split=f"split {number}",
        notes=(note, f"{len(distractors)} people of camera b alone are distractors; those of camera a alone are not used"),
    )


def read_grid(root: Path, number: int) -> ReidSet:
    """Split `number` of 10: half of the 250 people train; the rest is looked for in the gallery, among 775 distractors (person 0).

    Files probe/0001_1_25004_107_32_106_221.jpeg: person, camera. Partitions: splits.json, else features_and_partitions.mat, else drawn.
    """
    probe, gallery = (_read_folder(root / folder, parse_grid, "0001_1_25004_107_32_106_221.jpeg") for folder in ("probe", "gallery"))
    file = find_file(root, "splits.json", levels=1)
    partitions = root / "features_and_partitions.mat"
    if file is not None:
        split, _ = read_split(file, number, by_folder_and_name(probe + gallery))
        note = f"splits from {file}"
    else:
        check_number(number, NUM_HALVES, "grid")
        people = sorted(people_of(probe))
        if partitions.is_file():
            train, note = _read_grid_partition(partitions, number), f"the official partitions, from {partitions}"
        else:
            train, note = draw_train_people(people, len(people) // 2, number), _drawn("grid") + f"; put {partitions.name} there for the official ones"
        split = Split(
            [image for image in probe + gallery if image.person in train],
            [image for image in probe if image.person not in train],
            [image for image in gallery if image.person not in train],
        )
    return ReidSet("grid", by_name(split.train), by_name(split.query), by_name(split.gallery), split=f"split {number}", notes=(note,))


def people_of(images: Sequence[PersonImage]) -> set[int]:
    return {image.person for image in images}


def _read_two_ways(name: str, root: Path, first: list[PersonImage], second: list[PersonImage], number: int) -> ReidSet:
    file = find_file(root, "splits.json", levels=1)
    if file is not None:
        split, _ = read_split(file, number, by_folder_and_name(first + second))
        note = f"splits from {file}"
    else:
        check_number(number, 2 * NUM_HALVES, name)
        people = sorted(people_of(first) | people_of(second))
        train = draw_train_people(people, len(people) // 2, number // 2)
        query, gallery = (first, second) if number % 2 == 0 else (second, first)
        split = Split(
            [image for image in first + second if image.person in train],
            [image for image in query if image.person not in train],
            [image for image in gallery if image.person not in train],
        )
        note = _drawn(name)
    return ReidSet(name, by_name(split.train), by_name(split.query), by_name(split.gallery), split=f"split {number}", notes=(note,))


def _read_grid_partition(file: Path, number: int) -> set[int]:
    """The training people: the third field of the `number`-th structure in `trainIdxAll`."""
    partitions = read_mat(file, ("trainIdxAll",))["trainIdxAll"].flatten()
    structure = partitions[check_number(number, len(partitions), str(file))].flatten()[0]
    try:
        people = np.asarray(structure[2]).flatten()
        if not np.issubdtype(people.dtype, np.number) or not len(people):
            raise TypeError
    except (IndexError, TypeError) as error:
        raise UserError(f"{file}: trainIdxAll does not hold structures whose third field lists the training people; remove the file") from error
    return {int(person) for person in people}


def _read_camera(folder: Path, parse: Callable[..., Who | None], camera: int, form: str) -> list[PersonImage]:
    return _read_folder(folder, partial(parse, camera=camera), form)


def _read_folder(folder: Path, parse: NameParser, form: str) -> list[PersonImage]:
    images = [PersonImage(path, *who_is_on(path, parse, form)) for path in list_images(folder)]
    if not images:
        raise UserError(f"{folder} holds no image; is the data set unpacked completely?")
    return images


def _drawn(name: str) -> str:
    return f"splits drawn from the project's fixed seed; {name} as torchreid splits it needs its splits file beside the images"
