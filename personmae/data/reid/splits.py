"""Splits of the small sets: read from a file as torchreid writes it, or drawn from a fixed seed.

A splits.json holds absolute paths of the machine that wrote it, and labels that begin anew in each part. So only the last two names of each path
are taken (folder and file), and people and cameras come from the files' own names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from personmae.configs import UserError
from personmae.data.records import PersonImage
from personmae_kernels.sample_random import Stream, sample_seeds

# Part of what a drawn split is: another seed would be other splits under the same numbers.
SEED = 0


class Split(NamedTuple):
    """Images of each part."""

    train: list[PersonImage]
    query: list[PersonImage]
    gallery: list[PersonImage]


def draw_train_people(people: Sequence[int], num_train: int, number: int) -> set[int]:
    """Which people train in drawn split `number`: the first `num_train` in the order of the project's hash of (seed 0, split number, person).

    people: from 0. A pure function of its arguments, the same on every machine and for ever; unlike torchreid's unseeded draw.
    """
    known = np.array(sorted(set(people)), dtype=np.int64)
    order = np.argsort(sample_seeds(SEED, number, known, Stream.ORDER), kind="stable")
    return set(known[order[:num_train]].tolist())


def find_file(root: Path, name: str, levels: int) -> Path | None:
    """The file beside the images or in one of the `levels` folders above them."""
    root = root.absolute()
    for folder in [root, *root.parents][: levels + 1]:
        if (folder / name).is_file():
            return folder / name
    return None


def read_json(path: Path) -> Any:
    """Raises UserError if the file is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}; remove it or write it anew") from error


def read_split(path: Path, number: int, images: Mapping[str, PersonImage]) -> tuple[Split, int]:
    """Split `number` of a splits.json of torchreid, and how many splits the file holds. images: those that exist, by `folder/file`.

    The file: a list of {"train": [[path, person, camera], ...], "query": ..., "gallery": ...}. Raises UserError for another form, a number beyond the
    list, or a path that does not exist.
    """
    splits = read_json(path)
    if not isinstance(splits, list) or not splits:
        raise UserError(f"{path} is not a list of splits as torchreid writes it; remove it or write it anew")
    chosen = splits[check_number(number, len(splits), str(path))]
    parts: list[list[PersonImage]] = []
    for part in Split._fields:
        rows = chosen.get(part) if isinstance(chosen, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, list) and row and isinstance(row[0], str) for row in rows):
            raise UserError(f"{path}: split {number} has no list {part!r} of [path, person, camera]; remove it or write it anew")
        parts.append([_look_up(images, row[0], path) for row in rows])
    return Split(*parts), len(splits)


def check_number(number: int, num_splits: int, what: str) -> int:
    """The number itself. Raises UserError if there is no such split."""
    if not 0 <= number < num_splits:
        raise UserError(f"there is no split {number} of {what}: it has {num_splits}, numbered from 0")
    return number


def by_folder_and_name(images: Sequence[PersonImage]) -> dict[str, PersonImage]:
    return {f"{image.path.parent.name}/{image.path.name}": image for image in images}


def _look_up(images: Mapping[str, PersonImage], path: str, file: Path) -> PersonImage:
    # Written on Windows, too.
    name = "/".join(path.replace("\\", "/").split("/")[-2:])
    if name not in images:
        raise UserError(f"{file} names {path}, but there is no {name} here; remove the file, or complete the images")
    return images[name]
