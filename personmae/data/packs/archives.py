"""Entries of zip and tar archives, listed and read in place: nothing is unpacked, so no entry can be written anywhere.

An archive may come from anyone. Entries whose names lead out of it, links, devices and encrypted entries are refused, each with its reason; lengths
are checked before anything is decompressed, and an entry that decompresses to over 100 times its size is refused too.
"""

from __future__ import annotations

import gzip
import os
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from personmae.configs import UserError
from personmae.data.images import UnreadableImage
from personmae.data.sources import IMAGE_SUFFIXES
from personmae.whole_files import whole_file

# JPEG, PNG and WebP hardly shrink any further; a flat bitmap may, so the rule begins at some size.
MAX_EXPANSION = 100
EXPANSION_FROM_BYTES = 1 << 20
# Headers of tar entries: names are at most a few kilobytes, whatever an archive claims.
MAX_HEADER_BYTES = 1 << 20
_COPY_BYTES = 1 << 20
_DRIVE = re.compile(r"[A-Za-z]:")
_LOCAL_HEADER = struct.Struct("<4s22xHH")


@dataclass(frozen=True)
class ArchiveEntry:
    """An image in an archive. numbers: where it lies, as `read_zip_entry` or `read_tar_entry` take it; refused: why it is left out, or empty."""

    name: str
    numbers: tuple[int, int, int, int] = (0, 0, 0, 0)
    refused: str = ""


def list_zip(path: Path) -> Iterator[ArchiveEntry]:
    """The images of a zip archive. numbers: offset of the local header, compressed length, length, CRC-32.

    Raises UserError if the archive is damaged, or if entries share their bytes (a bomb).
    """
    damaged = f"{path} is no whole zip archive"
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    # What zipfile raises on a directory that makes no sense.
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error, IndexError) as error:
        raise UserError(f"{damaged} ({error}): get it again") from error
    size = path.stat().st_size
    if sum(entry.compress_size for entry in entries) > size:
        raise UserError(f"{path} claims more compressed bytes than it has: its entries overlap, which no honest archive's do")
    for entry in entries:
        # The name first: it may be empty, which is_dir cannot take.
        if not _is_wanted(entry.filename) or entry.is_dir():
            continue
        kind = stat.S_IFMT(entry.external_attr >> 16)
        reason = _name_problem(entry.filename)
        if not reason and kind not in (0, stat.S_IFREG):
            reason = "a link, not a regular file" if kind == stat.S_IFLNK else "not a regular file"
        if not reason and entry.flag_bits & 0x1:
            reason = "encrypted"
        if not reason and entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            reason = f"compressed by method {entry.compress_type}; stored and deflated entries can be read"
        if not reason and not 0 <= entry.header_offset < size:
            reason = "damaged in the archive: it lies outside of it"
        if not reason and entry.file_size > max(EXPANSION_FROM_BYTES, MAX_EXPANSION * entry.compress_size):
            reason = f"decompresses to {entry.file_size} bytes from {entry.compress_size}, more than {MAX_EXPANSION} times its size"
        yield ArchiveEntry(_plain_name(entry.filename), (entry.header_offset, entry.compress_size, entry.file_size, entry.CRC), reason)


def read_zip_entry(descriptor: int, numbers: tuple[int, int, int, int], path: Path, max_bytes: int) -> bytes:
    """The content of an entry of an open archive. path: what to call it. Raises UnreadableImage if it is damaged or longer than `max_bytes`."""
    offset, stored, length, checksum = numbers
    if max(length, stored) > max_bytes:
        raise UnreadableImage(path, f"too large: {length} bytes, at most {max_bytes}")
    header = _pread(descriptor, _LOCAL_HEADER.size, offset, path)
    if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
        raise UnreadableImage(path, "damaged in the archive: no entry begins where its directory says")
    _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    data = _pread(descriptor, stored, offset + _LOCAL_HEADER.size + name_length + extra_length, path)
    method = int.from_bytes(header[8:10], "little")
    if method == zipfile.ZIP_DEFLATED:
        try:
            # One byte more shows that it is longer than said.
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, length + 1)
        except zlib.error as error:
            raise UnreadableImage(path, f"damaged in the archive: {error}") from error
    if len(data) != length or zlib.crc32(data) != checksum:
        raise UnreadableImage(path, "damaged in the archive: length or checksum are not those of its directory")
    if not data:
        raise UnreadableImage(path, "empty file")
    return data


def list_tar(path: Path) -> Iterator[ArchiveEntry]:
    """The images of an uncompressed tar archive. numbers: offset and length of the content, 0, 0. Raises UserError if the archive is cut or
    damaged."""
    try:
        size = path.stat().st_size
        with open(path, "rb", buffering=0) as file, tarfile.TarFile(fileobj=cast(IO[bytes], _HeaderReader(file))) as archive:
            before = -1
            while (entry := archive.next()) is not None:
                # A negative length would lead back to where the reading comes from, for ever.
                if entry.offset <= before or entry.size < 0:
                    raise UserError(f"{path} is damaged at byte {entry.offset}: get it again")
                before = entry.offset
                # They are kept otherwise, a kilobyte for each.
                archive.members.clear()  # type: ignore[attr-defined]
                if entry.isdir() or not _is_wanted(entry.name):
                    continue
                yield _tar_entry(entry, size)
            rest = os.pread(file.fileno(), tarfile.BLOCKSIZE, archive.offset)
    # tarfile's own errors, and those that its parsing of numbers and names lets through.
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{path} is no whole tar archive ({error}): get it again") from error
    # tarfile takes a header that makes no sense for the end.
    if rest.strip(b"\0"):
        raise UserError(f"{path} is damaged at byte {archive.offset}: get it again")


def read_tar_entry(descriptor: int, numbers: tuple[int, int, int, int], path: Path, max_bytes: int) -> bytes:
    """The content of an entry of an open archive. path: what to call it. Raises UnreadableImage if it is cut or longer than `max_bytes`."""
    offset, length = numbers[:2]
    if length > max_bytes:
        raise UnreadableImage(path, f"too large: {length} bytes, at most {max_bytes}")
    data = _pread(descriptor, length, offset, path)
    if len(data) != length:
        raise UnreadableImage(path, "cut off: the archive ends before it does")
    if not data:
        raise UnreadableImage(path, "empty file")
    return data


def decompress_tar(path: Path, target: Path) -> None:
    """Write a .tar.gz as a plain tar, whose entries can be read in any order. Raises UserError if it is damaged, is a bomb, or the disk is full."""
    most = MAX_EXPANSION * path.stat().st_size + EXPANSION_FROM_BYTES
    written = 0
    with whole_file(target) as out:
        try:
            with gzip.open(path, "rb") as file:
                while block := file.read(_COPY_BYTES):
                    written += len(block)
                    if written > most:
                        raise UserError(f"{path} decompresses to more than {MAX_EXPANSION} times its size: that is no archive of images")
                    out.write(block)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{path} is damaged or cut ({error}): get it again") from error


class _HeaderReader:
    """A file for tarfile, from which headers alone can be read: an archive may claim a header of gigabytes."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"an entry's header claims {size} bytes")
        return self._file.read(size)

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(position, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


def _tar_entry(entry: tarfile.TarInfo, archive_bytes: int) -> ArchiveEntry:
    reason = _name_problem(entry.name)
    if not reason and (entry.issym() or entry.islnk()):
        reason = "a link, not a regular file"
    if not reason and (not entry.isreg() or entry.issparse()):
        reason = "not a regular file"
    if not reason and not (entry.offset_data >= 0 and 0 <= entry.size <= archive_bytes - entry.offset_data):
        reason = "cut off: the archive ends before it does"
    return ArchiveEntry(_plain_name(entry.name), (entry.offset_data, entry.size, 0, 0), reason)


def _is_wanted(name: str) -> bool:
    """As in folders: image files by their suffix, none that is hidden or lies in a hidden folder."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    return bool(parts) and parts[-1].lower().endswith(IMAGE_SUFFIXES) and not any(part.startswith(".") for part in parts)


def _name_problem(name: str) -> str:
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or name.startswith(("/", "\\")) or _DRIVE.match(name) or "\0" in name:
        return "its name leads out of the archive"
    return ""


def _plain_name(name: str) -> str:
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _pread(descriptor: int, length: int, offset: int, path: Path) -> bytes:
    try:
        return os.pread(descriptor, length, offset)
    except OSError as error:
        raise UnreadableImage(path, f"cannot be read: {error.strerror or error}", by_system=True) from error
