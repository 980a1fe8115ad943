"""Files that are there whole or not at all, whatever ends the process."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from personmae.configs import UserError

PARTIAL_SUFFIX = ".partial"
CURE = "make room or give write permission there, or choose another path, then start it again"


@contextlib.contextmanager
def whole_path(path: Path, *, flush: bool = True, shared: bool = True) -> Iterator[Path]:
    """A temporary name beside `path` to write a file under. It gets `path`, in place of an older file, when the body ends, and is gone if that fails.

    flush: not before the disk has it, so that a machine that goes down leaves no empty file either; too slow for very many small files. shared: other
    processes may be writing the same file, so the temporary name is this process's own; else it is PATH.partial, which the next attempt takes again,
    so that killed ones leave nothing for long. Raises OSError as the system does.
    """
    # A process that outlived its killed parent is another process too.
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL_SUFFIX}" if shared else path.name + PARTIAL_SUFFIX)
    try:
        yield partial
        if flush:
            _flush(partial)
        os.replace(partial, path)
        if flush:
            flush_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def explained_write(path: Path, cure: str = CURE) -> Iterator[None]:
    """Around writing `path`: what the system refuses (a full disk, no permission) becomes a UserError naming it and the cure, in words."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; {cure}") from error


@contextlib.contextmanager
def whole_file(path: Path, cure: str = CURE, *, parents: bool = False) -> Iterator[IO[bytes]]:
    """The same as an open file. parents: missing folders are made. Raises UserError naming the file and the cure if the system refuses."""
    with explained_write(path, cure):
        if parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        with whole_path(path) as partial, open(partial, "wb", buffering=1 << 20) as file:
            yield file


def write_whole(path: Path, content: bytes | str, cure: str = CURE, *, parents: bool = False) -> None:
    """The same for a content at hand; text as UTF-8, in which names of files that are no text come out as the bytes that they are."""
    with whole_file(path, cure, parents=parents) as file:
        file.write(content.encode("utf-8", errors="surrogateescape") if isinstance(content, str) else content)


def flush_folder(folder: Path) -> None:
    """Bring to the disk which files a folder has. Raises OSError as the system does."""
    try:
        _flush(folder, os.O_DIRECTORY)
    except OSError as error:
        # Some network file systems cannot flush a folder; what was done there is done.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def _flush(path: Path, kind: int = 0) -> None:
    descriptor = os.open(path, os.O_RDONLY | kind)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
