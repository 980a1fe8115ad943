"""Opening a pack as an index of images: its files are checked, its columns mapped into memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from personmae.configs import UserError
from personmae.data.image_index import ImageIndex
from personmae.data.packs.joining import REJECTED_FILE
from personmae.data.packs.manifest import Manifest, PackedFile, Verify, read_manifest
from personmae.data.storage import ShardStorage
from personmae.data.verdicts import MAX_SIDE_PX
from personmae.whole_files import write_whole

_COLUMNS: dict[str, type[np.generic]] = {
    "shards": np.int32,
    "positions": np.int64,
    "lengths": np.int64,
    "heights": np.int32,
    "widths": np.int32,
    "checksums": np.uint32,
    "names": np.uint8,
    "offsets": np.int64,
}
# The same as files of the pack.
COLUMN_FILES = frozenset(f"index/{name}.npy" for name in _COLUMNS)
_BLOCK_BYTES = 4 << 20
_CURE = "copy it again from where the pack was made, or pack again into a new folder"


def open_pack(
    folder: Path,
    cache_dir: Path,
    *,
    verify: Verify = "auto",
    num_workers: int | None = None,
    announce: Callable[[str], object] = print,
) -> ImageIndex:
    """The index of a pack: the samples in the order of the names in its source, as an index of those files would have them.

    cache_dir: where the verdict over the files is kept. verify, num_workers: see `check_files`. announce: receives a line.

    Raises UserError naming each file that is missing, truncated or altered, with the cure.
    """
    folder = folder.absolute()
    manifest = read_manifest(folder)
    num_hashed = check_files(folder, manifest, cache_dir, verify=verify, num_workers=num_workers)
    index = map_pack(folder, manifest)
    checks = {True: f"SHA-256 of {num_hashed} files checked", False: "its files are as they were when last checked"}[num_hashed > 0]
    if verify == "no":
        checks = "checked by length alone"
    left_out = f" ({len(index.rejected)} left out when packing, listed in {index.rejected_file})" if index.rejected else ""
    announce(f"pack {folder}: {manifest.num_images} images in {len(manifest.shards)} shards, {checks}{left_out}")
    return index


def map_pack(folder: Path, manifest: Manifest) -> ImageIndex:
    """The index of a pack without a look at its shards. Raises UserError if it is damaged."""
    folder = folder.absolute()
    columns = {name: _map_column(folder, name, kind) for name, kind in _COLUMNS.items()}
    problem = _problem(columns, manifest)
    if problem:
        raise UserError(f"the index of the pack {folder} is damaged ({problem}): {_CURE}")
    rejected = _read_rejected(folder / REJECTED_FILE)
    return ImageIndex(
        storage=ShardStorage(
            folder, tuple(shard.name for shard in manifest.shards), columns["shards"], columns["positions"], columns["lengths"]
        ),
        heights=columns["heights"],
        widths=columns["widths"],
        num_bytes=columns["lengths"],
        checksums=columns["checksums"],
        plain=np.broadcast_to(np.True_, manifest.num_images),
        rejected=rejected,
        rejected_file=folder / REJECTED_FILE if rejected else None,
        names=columns["names"],
        offsets=columns["offsets"],
    )


def check_files(folder: Path, manifest: Manifest, cache_dir: Path, *, verify: Verify, num_workers: int | None = None) -> int:
    """Check lengths, and SHA-256 unless verify is "no"; "auto" passes over files whose length and modification time are those of their last check.

    num_workers: threads that read, by default one for each core. Returns how many files were read. Raises UserError naming those that are wrong.
    """
    remembered = _read_remembered(cache_dir / "verified.json") if verify == "auto" else {}
    verdicts: dict[str, list[Any]] = {}
    problems: list[str] = []
    to_read: list[PackedFile] = []
    for file in (*manifest.shards, *manifest.columns):
        path = folder / file.name
        try:
            status = os.stat(path)
        except OSError as error:
            problems.append(f"{path} cannot be opened ({error.strerror}), {_CURE}")
            continue
        if status.st_size != file.num_bytes:
            word = "truncated" if status.st_size < file.num_bytes else "altered"
            problems.append(f"{path} is {word}: {status.st_size} bytes, {file.num_bytes} when it was packed; {_CURE}")
            continue
        verdicts[file.name] = [status.st_size, status.st_mtime_ns, file.sha256]
        if verify != "no" and remembered.get(file.name) != verdicts[file.name]:
            to_read.append(file)
    with ThreadPoolExecutor(num_workers or len(os.sched_getaffinity(0)), thread_name_prefix="verify") as pool:
        for file, found in zip(to_read, pool.map(lambda file: _sha256(folder / file.name), to_read), strict=True):
            if found != file.sha256:
                problems.append(f"{folder / file.name} is altered: its bytes are not those that were packed (SHA-256); {_CURE}")
    if problems:
        more = f" (and {len(problems) - 5} more files)" if len(problems) > 5 else ""
        raise UserError("; ".join(problems[:5]) + more)
    if to_read:
        _remember(cache_dir / "verified.json", verdicts)
    return len(to_read)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb", buffering=0) as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}), {_CURE}") from error
    return digest.hexdigest()


def _read_remembered(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _remember(file: Path, verdicts: dict[str, list[Any]]) -> None:
    """Kept if the folder can be written: otherwise the files are read again next time."""
    with contextlib.suppress(UserError):
        write_whole(file, json.dumps(verdicts), parents=True)


def _map_column(folder: Path, name: str, kind: type[np.generic]) -> npt.NDArray[Any]:
    path = folder / "index" / f"{name}.npy"
    try:
        column = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read ({error}): {_CURE}") from error
    if column.dtype != kind or column.ndim != 1:
        raise UserError(f"{path} is damaged ({column.dtype} of {column.ndim} dimensions): {_CURE}")
    # A plain array over the mapped memory, which can be sent to another process.
    return np.asarray(column)


def _problem(columns: dict[str, npt.NDArray[Any]], manifest: Manifest) -> str | None:
    """Why the columns do not fit together, or None: whatever they say, nothing outside of the shards is read."""
    if any(len(columns[name]) != manifest.num_images + (name == "offsets") for name in _COLUMNS if name != "names"):
        return f"its columns have not {manifest.num_images} rows each"
    offsets, shards = columns["offsets"], columns["shards"]
    if offsets[0] != 0 or offsets[-1] != len(columns["names"]) or (np.diff(offsets) < 0).any():
        return "its names overlap"
    if len(shards) and not (shards.min() >= 0 and shards.max() < len(manifest.shards)):
        return "it names a shard that is not there"
    lengths = np.array([shard.num_bytes for shard in manifest.shards], dtype=np.int64)
    # Not their sum, which may be beyond 64 bits.
    if (columns["positions"] < 0).any() or (columns["lengths"] < 0).any() or (columns["positions"] > lengths[shards] - columns["lengths"]).any():
        return "an image lies outside of its shard"
    if (np.minimum(columns["heights"], columns["widths"]) < 1).any():
        return "an image has no pixels"
    if (np.maximum(columns["heights"], columns["widths"]) > MAX_SIDE_PX).any():
        return f"an image has a side of more than {MAX_SIDE_PX} pixels"
    return None


def _read_rejected(file: Path) -> list[tuple[str, str]]:
    try:
        lines = file.read_text(encoding="utf-8", errors="surrogateescape").split("\n")[1:]
    except OSError:
        return []
    return [(path, reason) for path, _, reason in (line.partition("\t") for line in lines if line)]
