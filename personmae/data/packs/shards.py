"""Tar shards in WebDataset's layout, each with DALI's index file beside it: member names, headers, writing."""

from __future__ import annotations

import hashlib
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from personmae.whole_files import write_whole

INDEX_VERSION = "v1.2"
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")
_MAX_STEM = 60


@dataclass(frozen=True)
class WrittenShard:
    """Length and SHA-256 of a shard, and where each member's content begins and how long it is."""

    num_bytes: int
    sha256: str
    positions: list[int]
    lengths: list[int]


class ShardWriter:
    """Writes members into an open file, one after the other; `finish` ends the archive.

    USTAR, with owner, time and mode left out of account, so that the bytes depend on the members alone.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self._length = 0
        self._names: list[str] = []
        self._positions: list[int] = []
        self._lengths: list[int] = []

    def add(self, name: str, content: bytes) -> None:
        """A member. name: ASCII, at most 100 characters."""
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        entry.mode = 0o644
        self._write(entry.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict"))
        self._names.append(name)
        self._positions.append(self._length)
        self._lengths.append(len(content))
        self._write(content + bytes(-len(content) % tarfile.BLOCKSIZE))

    def finish(self, index_file: Path) -> WrittenShard:
        """End the archive, and write DALI's index of it."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self._length % tarfile.RECORDSIZE))
        write_whole(index_file, dali_index(self._names, self._positions, self._lengths))
        return WrittenShard(self._length, self._hash.hexdigest(), self._positions, self._lengths)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._length += len(data)


def dali_index(names: list[str], positions: list[int], lengths: list[int]) -> bytes:
    """What DALI's wds2idx writes for a shard with one file a sample."""
    lines = [f"{name.partition('.')[2]} {position} {length} {name}" for name, position, length in zip(names, positions, lengths, strict=True)]
    return "\n".join([f"{INDEX_VERSION} {len(names)}", *lines, ""]).encode("ascii")


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def member_name(row: int, source_name: str) -> str:
    """Number and stem of the source's name in characters that are safe everywhere. Before the only dot stands WebDataset's key, unique in the
    pack."""
    stem = source_name.rpartition("/")[2].rpartition(".")
    safe = _UNSAFE.sub("_", stem[0] or stem[2])[:_MAX_STEM]
    return f"{row:09d}_{safe}.jpg"
