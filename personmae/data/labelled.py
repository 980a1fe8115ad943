"""The labelled images that a model is fine-tuned on: an index with the person and the camera of each sample, and people held out of it."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from personmae.configs import UserError
from personmae.data.image_index import ImageIndex, build_index
from personmae.data.records import GALLERY_CAMERA, QUERY_CAMERA, PersonImage
from personmae.data.reid.sets import ReidSet
from personmae.whole_files import write_whole
from personmae_kernels.sample_random import Stream, sample_seeds

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LabelledImages:
    """N readable images in the order of their index.

    labels: int64 [N], the person of each, from 0 without gaps. cameras: int64 [N], likewise. people, camera_names: int64, what the set calls label
    and camera i.
    """

    index: ImageIndex
    labels: Int64Array
    cameras: Int64Array
    people: Int64Array
    camera_names: Int64Array

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_people(self) -> int:
        """Different people."""
        return len(self.people)

    @property
    def num_cameras(self) -> int:
        """Different cameras."""
        return len(self.camera_names)

    def describe(self) -> str:
        """Counts in one line, with what a sampler of people should know."""
        counts = np.bincount(self.labels, minlength=self.num_people)
        alone = int((counts == 1).sum())
        single = f", {alone:,} of them in one image alone" if alone else ""
        return f"{len(self):,} images of {self.num_people:,} people{single} from {self.num_cameras:,} cameras"


@dataclass(frozen=True)
class TrainingSets:
    """name: of the set. train: what is trained on. held_out: with query and gallery of the people who are not, or None. tests: (name, set), scored at
    the end."""

    name: str
    train: LabelledImages
    held_out: ReidSet | None
    tests: list[tuple[str, ReidSet]]

    def digest(self) -> str:
        """Changes with any image, person or camera of the training; says their numbers, too."""
        train = self.train
        labels = hashlib.sha256(train.people[train.labels].tobytes() + train.camera_names[train.cameras].tobytes())
        return f"{train.index.digest()}-{labels.hexdigest()[:8]} ({train.describe()})"


def open_labelled(images: Sequence[PersonImage], list_file: Path, announce: Callable[[str], None]) -> LabelledImages:
    """The index of labelled images. list_file: a text list of their paths, written here; the index is kept beside it, in a folder of that name.

    Raises UserError if there are none, if none can be read, if a path comes twice or holds a line break, or if the disk refuses.
    """
    if not images:
        raise UserError("the set has no training images; give one with a training part, as market1501=/data/market")
    records: dict[str, PersonImage] = {}
    for image in images:
        path = os.path.normpath(os.path.abspath(image.path))
        if path in records:
            raise UserError(f"{path} stands twice in the training part of the set")
        if "\n" in path or "\r" in path:
            raise UserError(f"{path!r} holds a line break; rename it")
        records[path] = image
    write_whole(list_file, "".join(f"{path}\n" for path in records), parents=True)
    index = build_index(list_file, list_file.with_suffix(""), announce=announce)
    found = [records[str(index.path(sample))] for sample in range(len(index))]
    people, labels = np.unique([image.person for image in found], return_inverse=True)
    camera_names, cameras = np.unique([image.camera for image in found], return_inverse=True)
    return LabelledImages(index, labels.astype(np.int64), cameras.astype(np.int64), people.astype(np.int64), camera_names.astype(np.int64))


def hold_out(reid_set: ReidSet, share: float, seed: int) -> ReidSet:
    """The training part divided by people: `train` without the held-out ones, who are its query (one image of each camera) and gallery (the rest).

    share: of the people who can be looked for (seen by two cameras, or twice where cameras are not told), rounded, at least two. Which ones follows
    from seed and the person's number alone. Raises UserError if that leaves nobody, on either side.
    """
    if not 0 < share < 1:
        raise UserError(f"hold_out is {share}; it is a share of the training people, between 0 and 1")
    of_person: dict[int, list[PersonImage]] = defaultdict(list)
    for image in reid_set.train:
        of_person[image.person].append(image)

    def is_able(images: list[PersonImage]) -> bool:
        return len({image.camera for image in images}) > 1 if reid_set.has_cameras else len(images) > 1

    able = sorted(person for person, images in of_person.items() if is_able(images))
    number = max(2, round(share * len(able)))
    if len(able) < 2 or len(of_person) - number < 2:
        seen = "seen by two cameras" if reid_set.has_cameras else "with two images"
        raise UserError(f"{len(able)} of the {len(of_person)} training people are {seen}: too few to hold some out; set hold_out 0")
    keys = sample_seeds(seed, 0, np.array(able, dtype=np.int64), Stream.HOLD_OUT)
    chosen = {able[place] for place in np.argsort(keys, kind="stable")[:number].tolist()}
    query: list[PersonImage] = []
    gallery: list[PersonImage] = []
    for person in sorted(chosen):
        asked: set[int] = set()
        for image in of_person[person]:
            if reid_set.has_cameras:
                (gallery if image.camera in asked else query).append(image)
                asked.add(image.camera)
            else:
                (gallery if asked else query).append(replace(image, camera=GALLERY_CAMERA if asked else QUERY_CAMERA))
                asked.add(0)
    if reid_set.has_cameras:
        # Who was seen once by each camera is looked for among the queries' images, too.
        gallery = [*gallery, *query]
    train = [image for image in reid_set.train if image.person not in chosen]
    name = f"{reid_set.name} held out"
    return replace(reid_set, name=name, train=train, query=query, gallery=gallery, num_junk=0, single_gallery_shot=False, notes=())
