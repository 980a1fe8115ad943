"""The jobs of packing, one for each shard: examine its images, or write it. A job is the same wherever and however often it is done."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from personmae.configs import UserError
from personmae.data.images import UnreadableImage
from personmae.data.packs.entries import EntryReader, SourceKind, open_reader
from personmae.data.packs.examining import EXAMINED, REJECTED, PackSettings, examine, plan_again
from personmae.data.packs.manifest import WORK_FOLDER
from personmae.data.packs.shards import ShardWriter, member_name, shard_name
from personmae.data.packs.transcoding import Planned, packed_bytes
from personmae.whole_files import whole_file

# So many images that the system does not read, and such a share of a shard, are no longer about the images.
MAX_LOST, MAX_LOST_RATIO = 32, 0.1
_REPORT_EVERY = 64


@dataclass(frozen=True)
class Job:
    """The images of one shard, in its order.

    folder: the pack's. stage: "examine" writes verdicts and figures; "write" the shard, with the verdicts of the first stage if there are any. rows:
    int64 [K], positions among the entries of the source. names, numbers: of these entries. left_out: bool [K], duplicates.
    """

    folder: Path
    number: int
    stage: Literal["examine", "write"]
    kind: SourceKind
    place: Path
    rows: npt.NDArray[np.int64]
    names: list[bytes]
    numbers: npt.NDArray[np.int64]
    left_out: npt.NDArray[np.bool_]
    settings: PackSettings


@dataclass(frozen=True)
class Verdicts:
    """figures: EXAMINED [K], of all images of a shard. reasons: position in the shard -> why it is rejected."""

    figures: npt.NDArray[Any]
    reasons: dict[int, str]


@dataclass(frozen=True)
class ShardRecord:
    """What is known of a written shard of M images. num_bytes, sha256: of the tar; an empty shard has none of M, and no file. columns: rows,
    positions, lengths, heights, widths, checksums, changes, each [M]. rejected: row -> reason. sums, squares: float64 [3]; num_pixels: as in
    EXAMINED."""

    num_bytes: int
    sha256: str
    columns: dict[str, npt.NDArray[Any]]
    rejected: dict[int, str]
    sums: npt.NDArray[np.float64]
    squares: npt.NDArray[np.float64]
    num_pixels: int


COLUMNS = {
    "rows": np.int64,
    "positions": np.int64,
    "lengths": np.int64,
    "heights": np.int32,
    "widths": np.int32,
    "checksums": np.uint32,
    "changes": np.int8,
}


def do_job(job: Job, report: Callable[[int], object]) -> None:
    """Do a job, reporting numbers of images done. Raises UserError if the disk refuses, or if the source has gone away."""
    with open_reader(job.kind, job.place) as reader:
        if job.stage == "examine":
            _examine_shard(job, reader, report)
        else:
            _write_shard(job, reader, report)


def verdicts_file(folder: Path, number: int) -> Path:
    return folder / WORK_FOLDER / f"examined-{number:06d}.npz"


def record_file(folder: Path, number: int) -> Path:
    return folder / WORK_FOLDER / f"shard-{number:06d}.npz"


def read_verdicts(folder: Path, number: int) -> Verdicts | None:
    """What the first stage found, None if it has not been done."""
    saved = _load(verdicts_file(folder, number))
    if saved is None:
        return None
    return Verdicts(saved["figures"].view(EXAMINED).reshape(-1), _reasons(saved["reasons"]))


def read_record(folder: Path, number: int) -> ShardRecord | None:
    """The record of a shard; None if it has not been written, or if its file has gone or changed its length since."""
    saved = _load(record_file(folder, number))
    if saved is None:
        return None
    num_bytes, num_pixels = saved["figures"].tolist()
    record = ShardRecord(
        num_bytes=num_bytes,
        sha256=saved["sha256"].tobytes().decode("ascii"),
        columns={name: saved[name] for name in COLUMNS},
        rejected=_reasons(saved["rejected"]),
        sums=saved["sums"],
        squares=saved["squares"],
        num_pixels=num_pixels,
    )
    shard = folder / shard_name(number)
    there = shard.stat().st_size if shard.exists() else 0
    return record if there == num_bytes and (not num_bytes or shard.with_suffix(".idx").exists()) else None


def _examine_shard(job: Job, reader: EntryReader, report: Callable[[int], object]) -> None:
    figures = np.zeros(len(job.rows), dtype=EXAMINED)
    figures["change"] = REJECTED
    reasons: dict[int, str] = {}
    for position, path, data in _contents(job, reader, reasons, report):
        try:
            figures[position] = examine(data, path, job.settings).figures
        except UnreadableImage as error:
            reasons[position] = error.reason
    # As bytes: a structured array would need pickle, or a header that older versions of numpy do not read.
    _save(verdicts_file(job.folder, job.number), figures=figures.view(np.uint8), reasons=_as_bytes(reasons))


def _write_shard(job: Job, reader: EntryReader, report: Callable[[int], object]) -> None:
    before = read_verdicts(job.folder, job.number) if job.settings.duplicates != "keep" else None
    reasons: dict[int, str] = {} if before is None else dict(before.reasons)
    figures = np.zeros(len(job.rows), dtype=EXAMINED)
    packed: list[tuple[int, int, int]] = []
    shard = job.folder / shard_name(job.number)
    with whole_file(shard) as file:
        writer = ShardWriter(file)
        for position, path, data in _contents(job, reader, reasons, report):
            try:
                if before is None:
                    examined = examine(data, path, job.settings)
                    figures[position], planned = examined.figures, examined.planned
                else:
                    figures[position] = before.figures[position]
                    planned = plan_again(data, figures[position], path, job.settings)
            except UnreadableImage as error:
                reasons[position] = error.reason
                continue
            content = _add(writer, job, position, data, planned)
            packed.append((position, len(content), zlib.crc32(content)))
        written = writer.finish(shard.with_suffix(".idx"))
    if not packed:
        shard.unlink()
        shard.with_suffix(".idx").unlink()
    positions = np.array([position for position, _, _ in packed], dtype=np.int64)
    chosen = figures[positions]
    columns = {
        "rows": job.rows[positions],
        "positions": written.positions,
        "lengths": [length for _, length, _ in packed],
        "heights": chosen["height"],
        "widths": chosen["width"],
        "checksums": [checksum for _, _, checksum in packed],
        "changes": chosen["change"],
    }
    _save(
        record_file(job.folder, job.number),
        figures=np.array([written.num_bytes if packed else 0, (chosen["height"].astype(np.int64) * chosen["width"]).sum()], dtype=np.int64),
        sha256=np.frombuffer(written.sha256.encode("ascii"), dtype=np.uint8),
        sums=chosen["sums"].sum(axis=0),
        squares=chosen["squares"].sum(axis=0),
        rejected=_as_bytes({int(job.rows[position]): reason for position, reason in reasons.items()}),
        **{name: np.asarray(values, dtype=COLUMNS[name]) for name, values in columns.items()},
    )


def _add(writer: ShardWriter, job: Job, position: int, data: bytes, planned: Planned) -> bytes:
    content = packed_bytes(data, planned, job.settings.transcoding)
    writer.add(member_name(int(job.rows[position]), os.fsdecode(job.names[position])), content)
    return content


def _contents(job: Job, reader: EntryReader, reasons: dict[int, str], report: Callable[[int], object]) -> Iterator[tuple[int, Path, bytes]]:
    """(position, path, content) of the images that can be read, but for duplicates and those with a reason already; notes the reason of the
    others."""
    lost = done = 0
    for position, name in enumerate(job.names):
        if position and position % _REPORT_EVERY == 0:
            report(position - done)
            done = position
        if job.left_out[position] or position in reasons:
            continue
        path = job.place / os.fsdecode(name)
        first, second, third, fourth = job.numbers[position].tolist()
        try:
            data = reader.read_with_retries(name, (first, second, third, fourth), path, job.settings.limits.max_bytes)
        except UnreadableImage as error:
            reasons[position] = error.reason
            lost += error.by_system and first >= 0
            if lost > max(MAX_LOST, MAX_LOST_RATIO * len(job.names)):
                raise UserError(f"{lost} images of one shard could not be read, the last is {error}; is the storage still there?") from error
            continue
        yield position, path, data
    report(len(job.names) - done)


def _save(path: Path, **arrays: npt.NDArray[Any]) -> None:
    with whole_file(path) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _load(path: Path) -> dict[str, npt.NDArray[Any]] | None:
    try:
        with np.load(path, allow_pickle=False) as saved:
            return {name: saved[name] for name in saved.files}
    except FileNotFoundError:
        return None
    # Damaged, as after the loss of a disk: it is made anew.
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def _as_bytes(reasons: dict[int, str]) -> npt.NDArray[np.uint8]:
    return np.frombuffer(json.dumps(reasons).encode(), dtype=np.uint8)


def _reasons(saved: npt.NDArray[Any]) -> dict[int, str]:
    return {int(key): reason for key, reason in json.loads(saved.tobytes()).items()}
