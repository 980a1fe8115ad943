"""The names of crops: by sequence and frame, which sort as they were filmed; or Market-1501's, by which a set of people with identities is
labelled."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from personmae.configs import UserError
from personmae.data.crops import CropPlan
from personmae.data.reid.market import GALLERY_FOLDER, QUERY_FOLDER, TRAIN_FOLDER
from personmae.data.sequences import FrameSequence

CropLayout = Literal["unlabelled", "market-train", "market-test"]
IdScope = Literal["sequence", "all"]


@dataclass(frozen=True)
class CropNames:
    """The names of a sequence's N crops. people: int64 [N], as numbered over all sequences; -1 = nobody's. cameras: int64 [N]."""

    folders: list[str]  # what `folder` points into
    people: npt.NDArray[np.int64]
    cameras: npt.NDArray[np.int64]
    folder: npt.NDArray[np.int8]
    stems: list[str] | None  # of Market-1501's
    plan: CropPlan
    digits: tuple[int, int]
    suffix: str

    def path(self, crop: int) -> str:
        """Path of a crop below the output folder."""
        if self.stems is not None:
            return f"{self.folders[self.folder[crop]]}/{self.stems[crop]}{self.suffix}"
        frame, ordinal = self.digits
        return f"{self.folders[0]}/{self.plan.numbers[crop]:0{frame}d}_{self.plan.ordinals[crop]:0{ordinal}d}{self.suffix}"


def name_crops(sequences: Sequence[FrameSequence], plans: Sequence[CropPlan], layout: CropLayout, ids: IdScope, suffix: str) -> list[CropNames]:
    """The names of all crops, for each sequence.

    layout: "unlabelled": SEQUENCE/FRAME_BOX, box as counted in its frame in the box file. "market-train": all in bounding_box_train, as
    0001_c1s1_000001_00 (person, camera, sequence of that camera, frame). "market-test": for each person and camera the middle crop in query, the
    others in bounding_box_test; people that one camera alone sees are in bounding_box_test only. ids: whether an id is the same person in its own
    sequence alone or in all. suffix: of the files, with its dot.

    Raises UserError if identities are asked for and there are none, or a test set would have no query.
    """
    frame_digits, box_digits = (
        len(str(max((int(column.max(initial=0)) for column in columns), default=0)))
        for columns in ([plan.numbers for plan in plans], [plan.ordinals for plan in plans])
    )
    widths = max(6, frame_digits), max(2, box_digits)
    people = _number_people([plan.boxes.identities for plan in plans], ids)
    persons = [_look_up(numbers, plan.boxes.ids) for numbers, plan in zip(people, plans, strict=True)]
    cameras = [
        np.where(plan.boxes.cameras >= 0, plan.boxes.cameras, sequence.camera).astype(np.int64)
        for sequence, plan in zip(sequences, plans, strict=True)
    ]
    if layout == "unlabelled":
        return [
            CropNames([sequence.name], who, camera, np.zeros(len(plan), np.int8), None, plan, widths, suffix)
            for sequence, plan, who, camera in zip(sequences, plans, persons, cameras, strict=True)
        ]
    if any((who < 0).any() for who in persons):
        plan = next(plan for plan, who in zip(plans, persons, strict=True) if (who < 0).any())
        count = sum(int((who < 0).sum()) for who in persons)
        where = f"{count:,} boxes to cut have no id (first in {plan.boxes.path})"
        raise UserError(f"{where}, so --layout {layout} cannot name them; give ids, or --layout unlabelled")
    folders = [TRAIN_FOLDER] if layout == "market-train" else [GALLERY_FOLDER, QUERY_FOLDER]
    queries = _choose_queries(persons, cameras) if layout == "market-test" else [np.zeros(len(plan), np.int8) for plan in plans]
    ranks = _sequence_ranks(cameras)
    person_digits = max(4, len(str(max((int(who.max(initial=0)) for who in persons), default=0))))
    names = []
    for plan, who, camera, query, rank in zip(plans, persons, cameras, queries, ranks, strict=True):
        stems = [
            f"{person:0{person_digits}d}_c{number}s{rank[number]}_{frame:0{widths[0]}d}_00"
            for person, number, frame in zip(who.tolist(), camera.tolist(), plan.numbers.tolist(), strict=True)
        ]
        names.append(CropNames(folders, who, camera, query, stems, plan, widths, suffix))
    return names


def _number_people(identities: Sequence[list[str]], ids: IdScope) -> list[list[int]]:
    """The number of each identity of each sequence, from 1: the identity itself where all are such numbers and mean one person each, else by
    order."""
    keys = [[("" if ids == "all" or len(identities) == 1 else f"{number:09d}", name) for name in names] for number, names in enumerate(identities)]
    everyone = {key for some in keys for key in some}
    texts = [name for _, name in everyone]
    plain = len({scope for scope, _ in everyone}) <= 1 and all(re.fullmatch(r"[1-9][0-9]{0,8}", text) for text in texts)
    if plain:
        return [[int(name) for _, name in some] for some in keys]
    order = sorted(everyone, key=lambda key: (key[0], *_natural(key[1])))
    numbers = {key: number for number, key in enumerate(order, 1)}
    return [[numbers[key] for key in some] for some in keys]


def _natural(text: str) -> tuple[int, int, str]:
    """Numbers by size, before words."""
    return (0, int(text), text) if re.fullmatch(r"[0-9]{1,18}", text) else (1, 0, text)


def _look_up(numbers: list[int], ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.append(np.array(numbers, dtype=np.int64), -1)[ids]


def _sequence_ranks(cameras: Sequence[npt.NDArray[np.int64]]) -> list[dict[int, int]]:
    """For each sequence, camera -> how many sequences so far that camera is in."""
    counts: dict[int, int] = {}
    ranks = []
    for some in cameras:
        for camera in np.unique(some).tolist():
            counts[camera] = counts.get(camera, 0) + 1
        ranks.append(dict(counts))
    return ranks


def _choose_queries(persons: Sequence[npt.NDArray[np.int64]], cameras: Sequence[npt.NDArray[np.int64]]) -> list[npt.NDArray[np.int8]]:
    """1 for the middle crop of each person in each camera, for people that several cameras see."""
    who, where = np.concatenate([*persons, np.zeros(0, np.int64)]), np.concatenate([*cameras, np.zeros(0, np.int64)])
    order = np.lexsort((where, who))
    changes = (np.diff(who[order], prepend=-1) != 0) | (np.diff(where[order], prepend=-1) != 0)
    starts = np.flatnonzero(changes)
    middles = order[(starts + np.append(starts[1:], len(order)) - 1) // 2]
    people, num_cameras = np.unique(who[middles], return_counts=True)
    queries = np.zeros(len(who), dtype=np.int8)
    queries[middles[np.isin(who[middles], people[num_cameras > 1])]] = 1
    if not queries.any():
        raise UserError(
            "no person is seen by two cameras, so a test set would have no query; --layout market-train needs no second camera, --ids all says that "
            "an id is the same person in every sequence"
        )
    return np.split(queries, np.cumsum([len(some) for some in persons])[:-1])
