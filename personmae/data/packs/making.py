"""Packing a source, from its listing to the manifest; resumable, and shared among processes of several machines.

The entries of the source, in the order of their names, are put into a random order (a function of the seed), which is cut into shards. What a shard
holds is thus known before anything is read, and shards are made independently: by any process, in any order, once. Process r of W takes the shards
whose number is r modulo W. Processes see one another through the files under work/ alone, so all they need is a disk that they share: process 0
writes plan.json, which the others wait for; decides on the duplicates, when all have examined their shares; and joins what all have written. work/ is
removed in the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from personmae.configs import UserError
from personmae.data.packs.crew import do_jobs
from personmae.data.packs.duplicates import Duplicates, find_exact, find_near
from personmae.data.packs.entries import Entries, SourceKind, compressed_identity, decompress_source, list_entries, source_kind, spool_file
from personmae.data.packs.examining import REJECTED, PackSettings
from personmae.data.packs.jobs import Job, Verdicts, read_record, read_verdicts, record_file, verdicts_file
from personmae.data.packs.joining import join_shards
from personmae.data.packs.manifest import MANIFEST_FILE, WORK_FOLDER, Manifest, read_manifest
from personmae.whole_files import PARTIAL_SUFFIX, explained_write, whole_file, write_whole
from personmae_kernels.sample_random import permutation

# Another process that has finished nothing for so long is taken to be gone.
STALL_SECONDS = 1800.0
POLL_SECONDS = 1.0

Value = TypeVar("Value")


@dataclass(frozen=True)
class Share:
    """Which process of how many this one is, and how many processes of its own it may start."""

    rank: int = 0
    world_size: int = 1
    num_workers: int = 1


def make_pack(
    source: Path, folder: Path, settings: PackSettings, share: Share, *, say: Callable[[str], object], progress: bool = True
) -> Manifest | None:
    """Pack a source into a folder, or go on with it, or find it done. Returns the manifest in process 0, None in the others.

    The result is the same, byte for byte, for any number of processes and after any interruption. say: receives sentences for the user.

    Raises UserError if the source cannot be read, holds no image that can, or has changed since packing began; if the folder holds something else;
    and if the disk refuses.
    """
    source, folder = source.expanduser().absolute(), folder.expanduser().absolute()
    kind = source_kind(source)
    if share.rank == 0:
        return _finished(source, folder, settings, say) or _pack(source, kind, folder, settings, share, say, progress)
    try:
        _pack(source, kind, folder, settings, share, say, progress)
    except UserError:
        # Process 0 may have found everything done, and removed what this one was about to read.
        if not (folder / MANIFEST_FILE).exists():
            raise
    return None


def _pack(
    source: Path, kind: SourceKind, folder: Path, settings: PackSettings, share: Share, say: Callable[[str], object], progress: bool
) -> Manifest | None:
    work, manifest_file = folder / WORK_FOLDER, folder / MANIFEST_FILE
    plan_file = work / "plan.json"
    if share.rank == 0:
        _prepare_folder(source, folder)
        if kind == "tar.gz":
            say(f"decompressing {source}: it is read in random order afterwards")
            decompress_source(source, work)
    else:
        _wait_for(lambda: plan_file.exists() or manifest_file.exists() or None, lambda: _sizes(work), "process 0 to begin", say)
    entries = list_entries(source, kind, spool_file(source, kind, work))
    _check_plan(plan_file, entries, settings, writes=share.rank == 0)
    shards = _Shards(folder, entries, permutation(settings.seed, 0, len(entries)), settings, np.zeros(len(entries), dtype=bool))
    mine = range(share.rank, shards.number, share.world_size)
    _remove_partial(folder, mine)

    duplicates = None
    if settings.duplicates != "keep":
        duplicates = _find_duplicates(shards, mine, share, say, progress)
        shards.left_out[duplicates.rows] = True

    todo = [number for number in mine if read_record(folder, number) is None]
    if share.rank and manifest_file.exists():
        # Nothing was missing: the records are gone because all is done.
        return None
    if len(todo) < len(mine):
        say(f"{len(mine) - len(todo)} of {len(mine)} shards were written before")
    shards.do("write", todo, share, progress)
    if share.rank:
        return None
    records = _wait_for_all(lambda number: read_record(folder, number), record_file, folder, shards.number, "written", say)
    manifest = join_shards(source, folder, entries, records, duplicates, settings)
    shutil.rmtree(work)
    return manifest


def _find_duplicates(shards: _Shards, mine: range, share: Share, say: Callable[[str], object], progress: bool) -> Duplicates:
    """Examine this process's shards; process 0 decides when all are examined, the others wait for its decision."""
    folder = shards.folder
    file = folder / WORK_FOLDER / "duplicates.npz"
    shards.do("examine", [number for number in mine if read_verdicts(folder, number) is None], share, progress)
    if share.rank == 0:
        verdicts = _wait_for_all(lambda number: read_verdicts(folder, number), verdicts_file, folder, shards.number, "examined", say)
        return _decide(verdicts, shards.order, shards.settings, file, say)
    work = folder / WORK_FOLDER
    _wait_for(lambda: file.exists() or (folder / MANIFEST_FILE).exists() or None, lambda: _sizes(work), "process 0 to find the duplicates", say)
    try:
        with np.load(file, allow_pickle=False) as saved:
            return Duplicates(saved["rows"], saved["originals"], saved["bits"])
    except FileNotFoundError as error:
        raise UserError(f"{file} has gone; start the same command again") from error


@dataclass(frozen=True)
class _Shards:
    """What the jobs are made from."""

    folder: Path
    entries: Entries
    order: npt.NDArray[np.int64]
    settings: PackSettings
    left_out: npt.NDArray[np.bool_]

    @property
    def number(self) -> int:
        """How many there are."""
        return -(-len(self.entries) // self.settings.images_per_shard)

    def rows(self, number: int) -> npt.NDArray[np.int64]:
        size = self.settings.images_per_shard
        return self.order[number * size : (number + 1) * size]

    def do(self, stage: Literal["examine", "write"], numbers: list[int], share: Share, progress: bool) -> None:
        def jobs() -> Iterator[Job]:
            for number in numbers:
                rows, entries = self.rows(number), self.entries
                yield Job(
                    folder=self.folder,
                    number=number,
                    stage=stage,
                    kind=entries.kind,
                    place=entries.place,
                    rows=rows,
                    names=[entries.names[row] for row in rows.tolist()],
                    numbers=entries.numbers[rows],
                    left_out=self.left_out[rows],
                    settings=self.settings,
                )

        if numbers:
            num_images = sum(len(self.rows(number)) for number in numbers)
            do_jobs(jobs(), num_images, min(share.num_workers, len(numbers)), stage, progress and share.rank == 0)


def _finished(source: Path, folder: Path, settings: PackSettings, say: Callable[[str], object]) -> Manifest | None:
    """The manifest if the folder is a whole pack of this source already. Raises UserError if it is one of other settings or another source."""
    if not (folder / MANIFEST_FILE).exists():
        return None
    manifest = read_manifest(folder)
    another = "choose another folder, or remove it"
    changed = _changed(manifest.settings, settings)
    if changed:
        raise UserError(f"{folder} is a pack with other settings ({'; '.join(changed)}); {another}")
    kind = source_kind(source)
    # The listing of a .tar.gz would take as long as decompressing it.
    if kind == "tar.gz":
        same = compressed_identity(source) == manifest.source.get("compressed")
    else:
        same = list_entries(source, kind, spool_file(source, kind, folder)).listing == manifest.source.get("listing")
    if not same:
        raise UserError(f"{folder} is a pack of another source than {source} is now; {another}")
    shutil.rmtree(folder / WORK_FOLDER, ignore_errors=True)
    say(f"{folder} is packed already: {manifest.num_images} images")
    return manifest


def _prepare_folder(source: Path, folder: Path) -> None:
    """A new or empty folder, or one in which packing has begun. Raises UserError for anything else."""
    if source.is_dir() and folder.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{folder} lies in the source {source}, which would then hold its own pack; choose a folder elsewhere")
    work = folder / WORK_FOLDER
    with explained_write(folder):
        if folder.exists() and not work.is_dir() and any(folder.iterdir()):
            raise UserError(f"{folder} holds something else; choose a new or empty folder")
        work.mkdir(parents=True, exist_ok=True)


def _check_plan(plan_file: Path, entries: Entries, settings: PackSettings, writes: bool) -> None:
    """Begin, or make sure that what was begun is the same. Raises UserError if the source or the settings are others."""
    plan: dict[str, Any] = {"settings": settings.describe(), "source": entries.digest}
    if not plan_file.exists() and writes:
        write_whole(plan_file, json.dumps(plan).encode())
        return
    try:
        begun = json.loads(plan_file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{plan_file} cannot be read ({error}); remove {plan_file.parent.parent} and begin anew") from error
    changed = _changed(begun["settings"], settings)
    if changed:
        raise UserError(f"packing was begun with other settings ({'; '.join(changed)}): give those, or choose another folder")
    if begun["source"] != plan["source"]:
        raise UserError("the source has changed since packing began (names, lengths or modification times): choose another folder, or restore it")


def _changed(before: dict[str, Any], settings: PackSettings) -> list[str]:
    return [f"{name}: {before.get(name)} -> {value}" for name, value in settings.describe().items() if before.get(name) != value]


def _remove_partial(folder: Path, mine: range) -> None:
    """What killed processes have left of our shards, and of the index and the manifest."""
    places = (folder, folder / WORK_FOLDER, folder / "index")
    for path in [path for place in places for path in place.glob(f"*{PARTIAL_SUFFIX}")]:
        number = re.match(r"(?:shard|examined)-(\d+)\.", path.name)
        # What has no number is written by the process that joins all shards, which has the first of them.
        if int(number[1]) in mine if number is not None else 0 in mine:
            path.unlink(missing_ok=True)


def _decide(verdicts: list[Verdicts], order: npt.NDArray[np.int64], settings: PackSettings, file: Path, say: Callable[[str], object]) -> Duplicates:
    """The duplicates among the examined images, written for the other processes."""
    num_images = len(order)
    contents, near = np.empty((num_images, 2), dtype=np.uint64), np.empty(num_images, dtype=np.uint64)
    usable = np.empty(num_images, dtype=bool)
    # From the order of the shards to that of the entries.
    contents[order] = np.concatenate([part.figures["contents"] for part in verdicts])
    near[order] = np.concatenate([part.figures["near"] for part in verdicts])
    usable[order] = np.concatenate([part.figures["change"] != REJECTED for part in verdicts])
    found = find_exact(contents, usable)
    say(f"{len(found)} images have the content of another")
    if settings.duplicates == "near":
        usable[found.rows] = False
        close = find_near(near, usable, settings.near_bits)
        say(f"{len(close)} more differ from another in at most {settings.near_bits} of 64 bits of their difference hash")
        joined = [np.concatenate(pair) for pair in ((found.rows, close.rows), (found.originals, close.originals), (found.bits, close.bits))]
        ascending = np.argsort(joined[0])
        found = Duplicates(*(column[ascending] for column in joined))
    with whole_file(file) as written:
        np.savez(written, rows=found.rows, originals=found.originals, bits=found.bits)
    return found


def _wait_for_all(
    read: Callable[[int], Value | None],
    file: Callable[[Path, int], Path],
    folder: Path,
    num_shards: int,
    word: str,
    say: Callable[[str], object],
) -> list[Value]:
    """What `read` gives for every shard, once it gives something."""
    missing = set(range(num_shards))

    def all_there() -> bool | None:
        missing.difference_update([number for number in missing if file(folder, number).exists()])
        return None if missing else True

    _wait_for(all_there, lambda: len(missing), f"the other processes: not all shards are {word}", say)
    values = [read(number) for number in range(num_shards)]
    lost = [number for number, value in enumerate(values) if value is None]
    if lost:
        raise UserError(f"shard {lost[0]} has gone since it was {word}; start the same command again")
    return [value for value in values if value is not None]


def _sizes(folder: Path) -> list[tuple[str, int]]:
    """The files of a folder with their lengths: they change as long as any process works."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(folder):
            with contextlib.suppress(FileNotFoundError):
                found.append((entry.name, entry.stat().st_size))
    return sorted(found)


def _wait_for(ready: Callable[[], Value | None], state: Callable[[], Any], what: str, say: Callable[[str], object]) -> Value:
    """Ask until there is an answer. Raises UserError when `state()` has stayed the same for too long."""
    told, seen, since = False, state(), time.monotonic()
    while (answer := ready()) is None:
        now = state()
        if now != seen:
            seen, since = now, time.monotonic()
        if time.monotonic() - since > STALL_SECONDS:
            raise UserError(f"waited {STALL_SECONDS:.0f} s for {what}, and nothing came; start the same command again in all processes")
        if not told:
            say(f"waiting for {what}")
            told = True
        time.sleep(POLL_SECONDS)
    return answer


def workers_of_this_process(num_local: int) -> int:
    """How many processes each of `num_local` on this machine may start: an equal share of the cores."""
    return max(1, len(os.sched_getaffinity(0)) // num_local)
