"""What a source of images holds, whatever its kind: a folder, a text list, a zip or tar archive, an LMDB database."""

from __future__ import annotations

import hashlib
import os
import tarfile
import time
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from personmae.configs import UserError
from personmae.data.images import UnreadableImage, read_bytes
from personmae.data.packs.archives import ArchiveEntry, decompress_tar, list_tar, list_zip, read_tar_entry, read_zip_entry
from personmae.data.packs.lmdb_source import find_lmdb, list_keys, open_lmdb, read_value
from personmae.data.packs.manifest import is_pack
from personmae.data.sources import list_source

SourceKind = Literal["files", "zip", "tar", "tar.gz", "lmdb"]
# A read that the system refuses is tried again after these pauses.
RETRY_SECONDS = (0.1, 1.0)
_NOTHING: list[tuple[str, str]] = []


@dataclass(frozen=True)
class Entries:
    """The images of a source in the order of their names, which makes them samples.

    place: folder, archive or database. names: as bytes. numbers: int64 [N, 4], what the kind's reader needs. refused: (name, reason) of entries that
    are not even read. listing: changes with any name or length; digest: with any modification time as well.
    """

    kind: SourceKind
    place: Path
    names: list[bytes]
    numbers: npt.NDArray[np.int64]
    refused: list[tuple[str, str]]
    listing: str
    digest: str

    def __len__(self) -> int:
        return len(self.names)


def source_kind(source: Path) -> SourceKind:
    """Told by content, never by name. Raises UserError if the source cannot be opened."""
    if is_pack(source):
        raise UserError(f"{source} is a pack already, which pre-training reads as it is; to pack it otherwise, pack what it was made from")
    if find_lmdb(source) is not None:
        return "lmdb"
    if source.is_dir():
        return "files"
    try:
        with open(source, "rb") as file:
            start = file.read(512)
    except OSError as error:
        raise UserError(
            f"{source} cannot be opened ({error.strerror}): give a folder, a text list, a zip or tar archive, or an LMDB database"
        ) from error
    if start[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return "zip"
    if start[:2] == b"\x1f\x8b":
        return "tar.gz"
    if start[257:262] == b"ustar" or (len(start) == 512 and b"\0" in start[:100] and tarfile.is_tarfile(source)):
        return "tar"
    return "files"


def spool_file(source: Path, kind: SourceKind, work: Path) -> Path:
    """Where the entries are read from: the source itself, or its decompressed copy in the work folder."""
    if kind == "tar.gz":
        return work / "source.tar"
    return find_lmdb(source) or source if kind == "lmdb" else source


def decompress_source(source: Path, work: Path) -> None:
    """Write the decompressed copy of a .tar.gz, if it is not there yet."""
    target = spool_file(source, "tar.gz", work)
    if not target.exists():
        decompress_tar(source, target)


def compressed_identity(source: Path) -> str:
    """What tells a .tar.gz from another without decompressing it: its length, and its last 8 bytes, gzip's checksum and length of the content."""
    with open(source, "rb") as file:
        length = file.seek(0, os.SEEK_END)
        file.seek(max(0, length - 8))
        return f"{length}-{file.read(8).hex()}"


def list_entries(source: Path, kind: SourceKind, place: Path) -> Entries:
    """What the source holds. place: its `spool_file`. Raises UserError if that cannot be read or holds no image."""
    if kind == "files":
        listing = list_source(source)
        numbers = np.zeros((len(listing.names), 4), dtype=np.int64)
        numbers[:, 0], numbers[:, 1] = listing.num_bytes, listing.modified_ns
        digests = _digest(listing.names, numbers[:, 0]), _digest(listing.names, numbers)
        return Entries(kind, listing.root, listing.names, numbers, [], *digests)
    if kind == "lmdb":
        names = list(list_keys(place))
        found, refused = (names, np.zeros((len(names), 4), dtype=np.int64)), _NOTHING
    else:
        found, refused = _sorted_entries(list_zip(place) if kind == "zip" else list_tar(place))
    if not found[0] and not refused:
        raise UserError(f"{source} holds no JPEG, PNG, WebP or BMP file")
    status = os.stat(source if kind != "lmdb" else place)
    return Entries(kind, place, *found, refused, _digest(*found), _digest(*found, status.st_size, status.st_mtime_ns))


class EntryReader(ABC):
    """Reads entries of one source; a context manager. For one thread."""

    @abstractmethod
    def read(self, name: bytes, numbers: tuple[int, int, int, int], path: Path, max_bytes: int) -> bytes:
        """The content of an entry. path: what to call it in errors. Raises UnreadableImage."""

    def read_with_retries(self, name: bytes, numbers: tuple[int, int, int, int], path: Path, max_bytes: int) -> bytes:
        """The same, tried again after a pause where the system refused, unless the file was not there when it was listed."""
        for pause in RETRY_SECONDS:
            try:
                return self.read(name, numbers, path, max_bytes)
            except UnreadableImage as error:
                if not error.by_system or numbers[0] < 0:
                    raise
                time.sleep(pause)
        return self.read(name, numbers, path, max_bytes)

    @abstractmethod
    def __enter__(self) -> EntryReader: ...

    @abstractmethod
    def __exit__(self, *exception: object) -> None: ...


def open_reader(kind: SourceKind, place: Path) -> EntryReader:
    """The reader of a kind of source."""
    if kind == "files":
        return _FileReader()
    return _LmdbReader(place) if kind == "lmdb" else _ArchiveReader(place, is_zip=kind == "zip")


class _FileReader(EntryReader):
    def read(self, name: bytes, numbers: tuple[int, int, int, int], path: Path, max_bytes: int) -> bytes:
        data = read_bytes(path, max_bytes=max_bytes)
        if len(data) != numbers[0]:
            raise UnreadableImage(path, "changed while it was being packed")
        return data

    def __enter__(self) -> _FileReader:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


class _ArchiveReader(EntryReader):
    def __init__(self, place: Path, is_zip: bool) -> None:
        self._place, self._read = place, read_zip_entry if is_zip else read_tar_entry

    def read(self, name: bytes, numbers: tuple[int, int, int, int], path: Path, max_bytes: int) -> bytes:
        return self._read(self._descriptor, numbers, path, max_bytes)

    def __enter__(self) -> _ArchiveReader:
        try:
            self._descriptor = os.open(self._place, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"{self._place} cannot be opened any more: {error.strerror}") from error
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._descriptor)


class _LmdbReader(EntryReader):
    def __init__(self, place: Path) -> None:
        self._place = place
        self._environment: Any = None

    def read(self, name: bytes, numbers: tuple[int, int, int, int], path: Path, max_bytes: int) -> bytes:
        return read_value(self._environment, name, path, max_bytes)

    def __enter__(self) -> _LmdbReader:
        self._environment = open_lmdb(self._place)
        return self

    def __exit__(self, *exception: object) -> None:
        self._environment.close()


def _sorted_entries(entries: Iterable[ArchiveEntry]) -> tuple[tuple[list[bytes], npt.NDArray[np.int64]], list[tuple[str, str]]]:
    """((names, numbers), refused). Of entries of one name the last counts, as when the archive is unpacked."""
    rows: dict[bytes, int] = {}
    numbers = array("q")
    refused: list[tuple[str, str]] = []
    for entry in entries:
        if entry.refused:
            refused.append((entry.name, entry.refused))
            continue
        name = os.fsencode(entry.name)
        if name in rows:
            refused.append((entry.name, "another entry of the same name follows"))
        rows[name] = len(numbers) // 4
        numbers.extend(entry.numbers)
    names = sorted(rows)
    table = np.array(numbers, dtype=np.int64).reshape(-1, 4)[[rows[name] for name in names]]
    return (names, table.reshape(-1, 4)), sorted(refused)


def _digest(names: list[bytes], numbers: npt.NDArray[np.int64], *about: int) -> str:
    digest = hashlib.sha256(repr(about).encode())
    for name in names:
        digest.update(len(name).to_bytes(4, "little") + name)
    digest.update(np.ascontiguousarray(numbers).data)
    return digest.hexdigest()[:32]
