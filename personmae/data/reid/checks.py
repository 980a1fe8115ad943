"""Is a labelled set complete and sound? Counts against the published ones, files that do not decode, images and people that are in two parts.

Each check is a function that returns findings; `personmae data check` prints them.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from tqdm import tqdm

from personmae.data.image_index import MAX_PIXELS
from personmae.data.images import UnreadableImage, decode, read_bytes, read_header
from personmae.data.records import PersonImage
from personmae.data.reid.published import PUBLISHED, Counts
from personmae.data.reid.sets import ReidSet

Level = Literal["ok", "note", "wrong"]
# Examples listed with a finding.
NUM_EXAMPLES = 3
_FILES_PER_TASK = 64


class Finding(NamedTuple):
    """One result in a sentence. note: worth knowing, harmless; wrong: scores on this set would not be what they claim."""

    level: Level
    text: str


class Examined(NamedTuple):
    """A file: 16 bytes of its content's hash (None if it could not be read), and why it is unusable (empty if it is not)."""

    digest: bytes | None
    problem: str


@dataclass(frozen=True)
class Part:
    """What is printed of one part of a set."""

    name: str
    counts: Counts
    images_per_person: tuple[int, float, int]  # least, mean, most; distractors (person 0) left out where there are other people
    cameras: Counter[int]


def summarise(name: str, images: Sequence[PersonImage]) -> Part:
    """Counts of a list that is not empty."""
    people, cameras = Counter(image.person for image in images), Counter(image.camera for image in images)
    sizes = sorted(size for person, size in people.items() if person != 0 or len(people) == 1)
    return Part(name, Counts(len(images), len(people), len(cameras)), (sizes[0], sum(sizes) / len(sizes), sizes[-1]), cameras)


def check_counts(name: str, reid_set: ReidSet) -> list[Finding]:
    """Images, people and cameras of each part against those published for the set of this name."""
    if name not in PUBLISHED:
        return [Finding("note", f"no counts are published for {name}")]
    wrong = []
    for part, images in reid_set.parts().items():
        published = PUBLISHED[name].get(part, Counts(0, 0, 0))
        found = summarise(part, images).counts if images else Counts(0, 0, 0)
        for what, number, expected in zip(Counts._fields, found, published, strict=True):
            # The convention of two cameras says nothing of the set.
            if expected is not None and number != expected and number is not None and (what != "cameras" or reid_set.has_cameras):
                more = f"{abs(number - expected):,} {'more' if number > expected else 'fewer'}"
                wrong.append(Finding("wrong", f"{part} has {number:,} {what}, {more} than published ({expected:,})"))
    return wrong or [Finding("ok", "images, people and cameras are as many as published")]


def check_labels(reid_set: ReidSet) -> list[Finding]:
    """People who stand in train and test, queries that can find nothing, images listed twice."""
    findings = []
    test_people = {image.person for image in reid_set.query + reid_set.gallery}
    if 0 not in {image.person for image in reid_set.query}:
        # Distractors: nobody in particular.
        test_people -= {0}
    shared = sorted({image.person for image in reid_set.train} & test_people)
    if shared:
        findings.append(Finding("wrong", f"{len(shared):,} people are in train and in query or gallery, as {_examples(map(str, shared))}"))
    elif reid_set.train:
        findings.append(Finding("ok", "no person is in train and in query or gallery"))
    seen_by: dict[int, set[int]] = {}
    for image in reid_set.gallery:
        seen_by.setdefault(image.person, set()).add(image.camera)
    lost = [image for image in reid_set.query if not seen_by.get(image.person, set()) - {image.camera}]
    if len(lost) == len(reid_set.query):
        findings.append(Finding("wrong", "no query has a match from another camera in the gallery: there is nothing to score"))
    elif lost:
        text = f"{len(lost):,} of {len(reid_set.query):,} queries have no match from another camera and are left out of scores, as {_names(lost)}"
        findings.append(Finding("note", text))
    else:
        findings.append(Finding("ok", f"every query has a match{' from another camera' if reid_set.has_cameras else ' (cameras are not told)'}"))
    for part, images in reid_set.parts().items():
        twice = [path for path, number in Counter(image.path for image in images).items() if number > 1]
        if twice:
            findings.append(Finding("wrong", f"{part} lists {len(twice):,} files more than once, as {_examples(map(str, twice))}"))
    return findings


def check_files(problems: dict[Path, str], num_files: int, decoded: bool) -> list[Finding]:
    """Files that cannot be read, or not be decoded to the end. problems: file -> why."""
    if problems:
        each = (Finding("wrong", f"{path}: {reason}") for path, reason in sorted(problems.items()))
        return [Finding("wrong", f"{len(problems):,} of {num_files:,} files are unreadable"), *each]
    return [Finding("ok", f"all {num_files:,} files are {'decoded to the end' if decoded else 'readable (not decoded)'}")]


def check_contents(reid_set: ReidSet, examined: dict[Path, Examined]) -> list[Finding]:
    """The same content under several names or in several parts, by hash."""
    places: dict[bytes, list[tuple[str, PersonImage]]] = {}
    for part, images in reid_set.parts().items():
        for image in images:
            digest = examined[image.path].digest
            if digest is not None:
                places.setdefault(digest, []).append((part, image))
    leaked: list[PersonImage] = []
    trivial: list[PersonImage] = []
    same_camera: list[PersonImage] = []
    two_people: list[PersonImage] = []
    copies: list[PersonImage] = []
    for found in places.values():
        if len(found) == 1:
            continue
        parts = {part: [image for place, image in found if place == part] for part in ("train", "query", "gallery")}
        if parts["train"] and (parts["query"] or parts["gallery"]):
            leaked.append(parts["train"][0])
        cameras = {(image.person, image.camera) for image in parts["query"]}
        if parts["query"] and parts["gallery"]:
            same = all((image.person, image.camera) in cameras for image in parts["gallery"]) and len(cameras) == 1
            (same_camera if same else trivial).append(parts["query"][0])
        if len({image.person for _, image in found}) > 1:
            two_people.append(found[0][1])
        if any(len({image.path for image in images}) > 1 for images in parts.values()):
            copies.append(found[0][1])
    kinds: tuple[tuple[list[PersonImage], Level, str], ...] = (
        (leaked, "wrong", "images of train are in query or gallery too"),
        (trivial, "wrong", "queries are in the gallery too, as another person or from another camera: matches that need no looking"),
        (same_camera, "note", "queries are in the gallery too, as the same person from the same camera, and so left out of scores"),
        (two_people, "note", "images have the labels of two people"),
        (copies, "note", "images are there several times in one part"),
    )
    findings = [Finding(level, f"{len(images):,} {text}, as {_names(images)}") for images, level, text in kinds if images]
    return findings or [Finding("ok", "no image is there twice")]


def problems_of(examined: dict[Path, Examined]) -> dict[Path, str]:
    return {path: result.problem for path, result in examined.items() if result.problem}


def examine_files(paths: Sequence[Path], *, decode_pixels: bool, num_threads: int | None = None, progress: bool = True) -> dict[Path, Examined]:
    """Reads, hashes and, if asked, strictly decodes files, with threads (decoding releases Python's lock)."""
    unique = list(dict.fromkeys(paths))

    def examine(path: Path) -> Examined:
        return examine_content(lambda: read_bytes(path), path, decode_pixels)

    return dict(zip(unique, _in_threads(examine, unique, num_threads, progress), strict=True))


def examine_content(read: Callable[[], bytes], path: Path, decode_pixels: bool) -> Examined:
    """One image, from wherever `read` takes it."""
    digest = None
    try:
        data = read()
        digest = hashlib.blake2b(data, digest_size=16).digest()
        header = read_header(data, path)
        if header.height * header.width > MAX_PIXELS:
            raise UnreadableImage(path, f"too large: {header.width} x {header.height} pixels (w x h), at most {MAX_PIXELS} in all")
        if decode_pixels:
            decode(data, path)
    except UnreadableImage as error:
        return Examined(digest, error.reason)
    return Examined(digest, "")


def examine_numbers(examine: Callable[[int], Examined], num: int, num_threads: int | None = None, progress: bool = True) -> Iterator[Examined]:
    """`examine` of 0 to num - 1, in order, with threads; bounded memory."""
    return _in_threads(examine, range(num), num_threads, progress)


def _in_threads(examine: Callable[..., Examined], items: Sequence[object], num_threads: int | None, progress: bool) -> Iterator[Examined]:
    num_threads = num_threads or len(os.sched_getaffinity(0))
    bar = tqdm(total=len(items), unit="img", desc="check", disable=None if progress else True)
    with bar, ThreadPoolExecutor(num_threads, thread_name_prefix="check") as pool:
        try:
            # Some tasks ahead, not millions.
            window = _FILES_PER_TASK * num_threads
            for first in range(0, len(items), window):
                for result in pool.map(examine, items[first : first + window]):
                    yield result
                    bar.update()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _names(images: Sequence[PersonImage]) -> str:
    return _examples(image.path.name for image in images)


def _examples(texts: Iterator[str]) -> str:
    return ", ".join(text for text, _ in zip(texts, range(NUM_EXAMPLES), strict=False))
