"""MSMT17 (Wei et al., "Person transfer GAN to bridge domain gap for person re-identification", CVPR 2018), in its three layouts.

V1: `train`, `test`; V2, with faces blurred: `mask_train_v2`, `mask_test_v2`; both with list_{train,val,query,gallery}.txt, whose lines are
`0000/0000_000_01_0303morning_0015_0.jpg 0`. Repacked: Market-1501's layout, without lists, as several code bases ask for. All three go by the
same folder names, so they are told apart by their lists, and which one was found is said in the notes.

Papers train on train (30,248 images) or on train and val (32,621), so the name says which: `msmt17` or `msmt17-trainval`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from personmae.configs import UserError
from personmae.data.records import PersonImage
from personmae.data.reid.market import is_market_layout, read_market_layout
from personmae.data.reid.names import parse_msmt17, read_label, who_is_on
from personmae.data.reid.sets import ReidSet, by_name

VERSIONS = {"V1": ("train", "test"), "V2 (faces blurred)": ("mask_train_v2", "mask_test_v2")}
TRAIN_LIST, VAL_LIST, QUERY_LIST, GALLERY_LIST = "list_train.txt", "list_val.txt", "list_query.txt", "list_gallery.txt"
# The lists number train and test people from 0 each. Test people are moved up by the number of train people, as fast-reid does.
NUM_TRAIN_PEOPLE = 1041
NUM_TRAIN_IMAGES, NUM_TRAIN_AND_VAL_IMAGES = 30_248, 32_621


def has_lists(root: Path) -> bool:
    return any((root / name).is_file() for name in (TRAIN_LIST, QUERY_LIST, GALLERY_LIST))


def is_msmt17(root: Path) -> bool:
    return has_lists(root) or is_market_layout(root)


def read_msmt17(root: Path, *, with_val: bool) -> ReidSet:
    """MSMT17 in any layout. with_val: the training part is train and val, else train alone.

    Raises UserError for a missing list or folder, a line that is not `path person`, and a repacked set whose training part is the other one: there
    train and val cannot be told apart.
    """
    if not has_lists(root):
        return _read_repacked(root, with_val)
    version, train_folder, test_folder = _find_version(root)
    train = _read_list(root / TRAIN_LIST, root / train_folder) if (root / TRAIN_LIST).is_file() else []
    val = _read_list(root / VAL_LIST, root / train_folder) if (root / VAL_LIST).is_file() else []
    query = _read_list(_existing(root / QUERY_LIST), root / test_folder)
    gallery = _read_list(_existing(root / GALLERY_LIST), root / test_folder)
    if with_val:
        _existing(root / VAL_LIST)
    if train or with_val:
        _existing(root / TRAIN_LIST)
    used = f"train and val, {len(train) + len(val):,} images" if with_val else f"train alone, {len(train):,} images without val"
    note = f"MSMT17 {version}, from the lists in {root}; the training part is {used}"
    offset = max([NUM_TRAIN_PEOPLE, *(1 + image.person for image in train + val)])
    return ReidSet(
        "msmt17-trainval" if with_val else "msmt17",
        by_name(train + val if with_val else train),
        by_name(_moved_up(query, offset)),
        by_name(_moved_up(gallery, offset)),
        notes=(note, f"test people are numbered from {offset} on: the lists number train and test people from 0 each"),
    )


def _read_repacked(root: Path, with_val: bool) -> ReidSet:
    found = read_market_layout(root)
    is_train_alone = len(found.train) == NUM_TRAIN_IMAGES
    if is_train_alone == with_val and len(found.train) in (NUM_TRAIN_IMAGES, NUM_TRAIN_AND_VAL_IMAGES):
        holds = f"{len(found.train):,} images: {'train alone' if is_train_alone else 'train and val in one'}"
        other = "msmt17" if with_val else "msmt17-trainval"
        raise UserError(f"{root} is MSMT17 repacked in Market-1501's layout, and holds {holds}; name it {other}")
    notes = [f"MSMT17 repacked in Market-1501's layout (no lists in {root})"]
    if {image.person for image in found.train} & {image.person for image in found.query + found.gallery}:
        offset = max([NUM_TRAIN_PEOPLE, *(1 + image.person for image in found.train)])
        found = replace(found, query=_moved_up(found.query, offset), gallery=_moved_up(found.gallery, offset))
        notes.append(f"test people are numbered from {offset} on: the names number train and test people from 0 each")
    return replace(found, name="msmt17-trainval" if with_val else "msmt17", notes=tuple(notes))


def _find_version(root: Path) -> tuple[str, str, str]:
    found = [(version, train, test) for version, (train, test) in VERSIONS.items() if (root / test).is_dir()]
    if len(found) == 1:
        return found[0]
    folders = " or ".join(f"{train} and {test} ({version})" for version, (train, test) in VERSIONS.items())
    raise UserError(f"{root} holds {'both versions of MSMT17' if found else 'lists but no images'}: it should hold {folders}, one of the two")


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UserError(
            f"{path} is missing: MSMT17's archive holds list_train.txt, list_val.txt, list_query.txt and list_gallery.txt beside the folders of "
            "images; copy it from there"
        )
    return path


def _read_list(path: Path, folder: Path) -> list[PersonImage]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the list {path} cannot be read: {error}") from error
    images = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ")
        person = read_label(label)
        if not name or person is None or person < 0:
            raise UserError(f"{path}, line {number}: {line!r} is not a path and a person, as in 0000/0000_000_01_0303morning_0015_0.jpg 0")
        image = folder / name.strip()
        images.append(PersonImage(image, person, who_is_on(image, parse_msmt17, "0000_000_01_0303morning_0015_0.jpg").camera))
    return images


def _moved_up(images: list[PersonImage], offset: int) -> list[PersonImage]:
    return [PersonImage(image.path, image.person + offset, image.camera) for image in images]
