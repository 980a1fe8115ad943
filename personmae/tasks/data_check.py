"""Check a labelled data set: counts against the published ones, unreadable files, images and people that are in two parts.

personmae data check market1501 DATASETS        DATASETS is the set's own folder or the one above it
personmae data check auto FOLDER                find out which set it is
personmae data check csv my_set.csv --no-decode
personmae data check luperson LUP               the LMDB of LUPerson, or a folder of its images
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from personmae.configs import UserError
from personmae.data.reid.catalogue import LUPERSON, known_name, open_reid_set
from personmae.data.reid.checks import (
    Finding,
    check_contents,
    check_counts,
    check_files,
    check_labels,
    examine_content,
    examine_files,
    examine_numbers,
    problems_of,
    summarise,
)
from personmae.data.reid.luperson import find_database, open_luperson
from personmae.data.reid.published import NUM_LUPERSON, PUBLISHED
from personmae.data.reid.sets import ReidSet
from personmae.data.sources import list_source
from personmae.recipes.programs import DataCheckConfig


def main(config: DataCheckConfig, say: Callable[[str], object] = print) -> int:
    """Print what was found; returns the exit status: 0, or 1 if something is wrong. Raises UserError if the set is not there."""
    if config.name.lower() == LUPERSON:
        return check_luperson(config, say)
    name = None if config.name.lower() == "auto" else known_name(config.name)
    reid_set = open_reid_set(name, config.root, split=config.split)
    print_counts(reid_set, say)
    findings = [*check_counts(reid_set.name if name is None else name, reid_set), *check_labels(reid_set)]
    if name is None and reid_set.name not in PUBLISHED:
        findings += guess_name(reid_set)
    paths = [image.path for images in reid_set.parts().values() for image in images]
    examined = examine_files(paths, decode_pixels=config.decode, num_threads=config.num_threads)
    findings += check_files(problems_of(examined), len(examined), config.decode)
    findings += check_contents(reid_set, examined)
    return print_findings(findings, config.max_listed, say)


def print_counts(reid_set: ReidSet, say: Callable[[str], object]) -> None:
    """A table of the parts, and the notes of the reader."""
    split = f", {reid_set.split}" if reid_set.split else ""
    shot = ", one random gallery image a person" if reid_set.single_gallery_shot else ""
    say(f"{reid_set.name}{split}{shot}")
    for note in reid_set.notes:
        say(f"  {note}")
    say(f"{'':8} {'images':>9} {'people':>8}  {'images a person (least to most)':32} cameras")
    for part, images in reid_set.parts().items():
        if not images:
            say(f"{part:8} {0:9,} {0:8,}")
            continue
        found = summarise(part, images)
        least, mean, most = found.images_per_person
        cameras = ", ".join(f"{camera}: {number:,}" for camera, number in sorted(found.cameras.items())[:20])
        told = "not told" if not reid_set.has_cameras else f"{len(found.cameras)} ({cameras})"
        say(f"{part:8} {found.counts.images:9,} {found.counts.people:8,}  {f'{mean:.1f} ({least:,} to {most:,})':32} {told}")
    say(f"{reid_set.num_junk:,} junk images (person -1) dropped")


def guess_name(reid_set: ReidSet) -> list[Finding]:
    """The published sets that have the same numbers of images."""
    sizes = {part: len(images) for part, images in reid_set.parts().items() if images}
    same = [name for name, parts in PUBLISHED.items() if {part: counts.images for part, counts in parts.items()} == sizes]
    return [Finding("note", f"it has as many images as {' and '.join(same)}")] if same else []


def print_findings(findings: Iterable[Finding], max_listed: int, say: Callable[[str], object]) -> int:
    """A line for each finding, at most `max_listed` that are wrong; returns the exit status."""
    listed: Counter[str] = Counter()
    for finding in findings:
        listed[finding.level] += 1
        if finding.level != "wrong" or listed["wrong"] <= max_listed:
            say(f"{finding.level:5}  {finding.text}")
    if listed["wrong"] > max_listed:
        say(f"...    {listed['wrong'] - max_listed:,} more; --max-listed shows more of them")
    return 1 if listed["wrong"] else 0


def check_luperson(config: DataCheckConfig, say: Callable[[str], object]) -> int:
    """LUPerson has no labels to check: its number of images, the entries of the database, and files that do not decode."""
    if not config.root.is_dir():
        raise UserError(f"no such folder: {config.root}; give the folder with LUPerson's LMDB or with its images")
    findings: list[Finding] = []
    if find_database(config.root) is None:
        listing = list_source(config.root)
        paths = [listing.root / Path(name.decode("utf-8", "surrogateescape")) for name in listing.names]
        say(f"luperson: a folder of {len(paths):,} images")
        num_images = len(paths)
        problems = problems_of(examine_files(paths, decode_pixels=config.decode, num_threads=config.num_threads))
    else:
        images = open_luperson(config.root)
        num_images, num_entries = len(images), images.num_entries()
        labels = f", {images.label_kind} of {len(set(images.labels.tolist())):,} kinds" if images.labels is not None else ", no labels"
        say(f"luperson: an LMDB in {images.database} with {num_images:,} keys{labels}")
        if num_entries != num_images:
            findings.append(Finding("wrong", f"keys.pkl lists {num_images:,} keys, but the database has {num_entries:,} entries"))
        if len(set(images.keys)) != num_images:
            findings.append(Finding("wrong", f"{num_images - len(set(images.keys)):,} keys are there more than once"))
        results = examine_numbers(
            lambda number: examine_content(lambda: images.read(number), images.path(number), config.decode), num_images, config.num_threads
        )
        problems = {images.path(number): result.problem for number, result in enumerate(results) if result.problem}
        images.close()
    if num_images == NUM_LUPERSON:
        findings.append(Finding("ok", "as many images as published"))
    else:
        findings.append(Finding("note", f"{num_images:,} images; {NUM_LUPERSON:,} are published, subsets are common"))
    findings += check_files(problems, num_images, config.decode)
    return print_findings(findings, config.max_listed, say)
