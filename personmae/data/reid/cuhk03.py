"""CUHK03 as torchreid extracts it: `images_labeled` or `images_detected` with files 1_001_1_01.png, and files that say which image is in which part.

Classic (Li et al., "DeepReID", CVPR 2014): 20 splits of about 1,367 and 100 people in splits_classic_{labeled,detected}.json; query and gallery are
the same images, scored single-gallery-shot. New protocol, CUHK03-NP (Zhong et al., "Re-ranking person re-identification with k-reciprocal encoding",
CVPR 2017): 767 and 700 people; from Market-1501's layout in `labeled` or `detected`, or from splits_new_{labeled,detected}.json or
cuhk03_new_protocol_config_{labeled,detected}.mat over the extracted images.

The raw cuhk-03.mat is not read: it is a MATLAB 7.3 file and needs h5py; torchreid's CUHK03 extracts it once.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from personmae.configs import UserError
from personmae.data.records import PersonImage
from personmae.data.reid.market import is_market_layout, read_market_layout
from personmae.data.reid.matlab import read_mat
from personmae.data.reid.names import list_images, parse_cuhk03, who_is_on
from personmae.data.reid.sets import ReidSet, by_name
from personmae.data.reid.splits import Split, by_folder_and_name, read_split

Kind = Literal["labeled", "detected"]
NUM_CLASSIC_SPLITS = 20
_MAT_NAMES = ("filelist", "train_idx", "query_idx", "gallery_idx")


def is_classic(root: Path, kind: Kind) -> bool:
    return (root / f"images_{kind}").is_dir() or (root / f"splits_classic_{kind}.json").is_file()


def is_new(root: Path, kind: Kind) -> bool:
    """Market-1501's layout in `root` or in a folder of it named for the kind, or extracted images with a file of the new protocol."""
    if is_market_layout(root) or is_market_layout(root / kind):
        return True
    return (root / f"images_{kind}").is_dir() and any(path.is_file() for path in _new_files(root, kind))


def read_classic(root: Path, kind: Kind, number: int) -> ReidSet:
    """Classic split `number`. Raises UserError if the images or the file of the 20 splits are missing."""
    file = root / f"splits_classic_{kind}.json"
    images = _read_images(root, kind)
    if not file.is_file():
        raise UserError(
            f"{file} is missing: it holds the 20 splits of the classic protocol. They come from the raw cuhk-03.mat, which is not read here (it "
            "needs h5py): let torchreid's CUHK03 extract it once, and copy images_*, splits_classic_*.json and splits_new_*.json"
        )
    split, num_splits = read_split(file, number, by_folder_and_name(images))
    return _to_set(f"cuhk03-classic-{_named(kind)}", split, f"classic split {number} of {num_splits}", file, single_gallery_shot=True)


def read_new(root: Path, kind: Kind) -> ReidSet:
    """The new protocol. Raises UserError if there is neither Market-1501's layout nor a file of the protocol."""
    name = f"cuhk03-np-{_named(kind)}"
    other: Kind = "detected" if kind == "labeled" else "labeled"
    if root.resolve().name == other:
        raise UserError(f"{root} holds the {other} images of CUHK03-NP: name it cuhk03-np-{_named(other)}, or give the folder {kind}")
    for folder in (root / kind, root):
        if is_market_layout(folder):
            return replace(read_market_layout(folder), name=name, notes=(f"CUHK03-NP in Market-1501's layout, from {folder}",))
    images = _read_images(root, kind)
    json_file, mat_file = _new_files(root, kind)
    if json_file.is_file():
        split, _ = read_split(json_file, 0, by_folder_and_name(images))
        return _to_set(name, split, "", json_file)
    return _to_set(name, _read_mat_split(mat_file, images), "", mat_file)


def _read_images(root: Path, kind: Kind) -> list[PersonImage]:
    folder = root / f"images_{kind}"
    if not folder.is_dir():
        raise UserError(
            f"{folder} is missing: it should hold the images as 1_001_1_01.png. The raw cuhk-03.mat is not read here (it needs h5py): let "
            "torchreid's CUHK03 extract it once"
        )
    images = [PersonImage(path, *who_is_on(path, parse_cuhk03, "1_001_1_01.png")) for path in list_images(folder)]
    if not images:
        raise UserError(f"{folder} holds no image; is the data set extracted completely?")
    return images


def _read_mat_split(file: Path, images: list[PersonImage]) -> Split:
    content = read_mat(file, _MAT_NAMES)
    existing = {image.path.name: image for image in images}
    names = [str(_unwrapped(cell)) for cell in content["filelist"].flatten()]
    parts = []
    for variable in _MAT_NAMES[1:]:
        part = []
        # MATLAB counts from 1.
        for index in content[variable].flatten().tolist():
            if not isinstance(index, int | float) or not 1 <= index <= len(names):
                raise UserError(f"{file}: {variable} names file {index} of {len(names)}")
            name = names[int(index) - 1]
            if name not in existing:
                raise UserError(f"{file} names {name}, which is not among the images in {images[0].path.parent}; complete them")
            part.append(existing[name])
        parts.append(part)
    return Split(*parts)


def _unwrapped(cell: Any) -> Any:
    # A cell array of strings comes as arrays of one string each.
    while isinstance(cell, np.ndarray) and cell.size:
        cell = cell.flatten()[0]
    return cell


def _to_set(name: str, split: Split, words: str, file: Path, single_gallery_shot: bool = False) -> ReidSet:
    notes = (f"parts from {file}", "a person's number is 10,000 times its pair of cameras, plus its number in the pair")
    parts = (by_name(split.train), by_name(split.query), by_name(split.gallery))
    return ReidSet(name, *parts, single_gallery_shot=single_gallery_shot, split=words, notes=notes)


def _new_files(root: Path, kind: Kind) -> tuple[Path, Path]:
    return root / f"splits_new_{kind}.json", root / f"cuhk03_new_protocol_config_{kind}.mat"


def _named(kind: Kind) -> str:
    return "labelled" if kind == "labeled" else kind
