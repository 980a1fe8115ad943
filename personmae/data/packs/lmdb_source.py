"""Images of an LMDB database: its keys, and the value of one. The values are encoded image files, as in LUPerson's; no pickle is read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from personmae.configs import UserError
from personmae.data.images import UnreadableImage

# Bytes 16 to 20 of the file's first page.
_MAGIC = b"\xde\xc0\xef\xbe"


def find_lmdb(source: Path) -> Path | None:
    """The data.mdb of a source that is such a file or a folder with one; None for anything else."""
    file = source / "data.mdb" if source.is_dir() else source
    try:
        with open(file, "rb") as opened:
            return file if opened.read(20)[16:] == _MAGIC else None
    except OSError:
        return None


def list_keys(file: Path) -> Iterator[bytes]:
    """The keys, ascending. Raises UserError if the package is missing or the database cannot be read."""
    environment = open_lmdb(file)
    try:
        with environment.begin() as transaction:
            yield from (bytes(key) for key in transaction.cursor().iternext(keys=True, values=False))
    except _lmdb().Error as error:
        raise UserError(f"the LMDB database {file} cannot be read: {error}") from error
    finally:
        environment.close()


def read_value(environment: Any, key: bytes, path: Path, max_bytes: int) -> bytes:
    """The value of a key of an open database. path: what to call it. Raises UnreadableImage if it is missing or longer than `max_bytes`."""
    try:
        with environment.begin(buffers=True) as transaction:
            value = transaction.get(key)
            if value is None:
                raise UnreadableImage(path, "its key is no longer in the database")
            if len(value) > max_bytes:
                raise UnreadableImage(path, f"too large: {len(value)} bytes, at most {max_bytes}")
            data = bytes(value)
    except _lmdb().Error as error:
        raise UnreadableImage(path, f"cannot be read: {error}", by_system=True) from error
    if not data:
        raise UnreadableImage(path, "empty file")
    return data


def open_lmdb(file: Path) -> Any:
    """The database for reading, without its lock file, so that it may lie on a read-only disk. Close it. Raises UserError if it cannot be opened."""
    lmdb = _lmdb()
    try:
        return lmdb.open(os.fspath(file), subdir=False, readonly=True, lock=False, readahead=False, max_dbs=0)
    except lmdb.Error as error:
        raise UserError(f"the LMDB database {file} cannot be opened: {error}") from error


def _lmdb() -> Any:
    try:
        import lmdb
    except ModuleNotFoundError as error:
        raise UserError("LMDB databases need the package lmdb: pip install lmdb") from error
    return lmdb
