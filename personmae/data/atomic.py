"""Files that are there whole or not at all, whatever ends the process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from personmae.configs import UserError

PARTIAL_SUFFIX = ".partial"


@contextlib.contextmanager
def whole_file(path: Path, cure: str = "make room or give write permission there, then start it again") -> Iterator[IO[bytes]]:
    """A new file under a temporary name, which gets its own when the body ends: flushed to the disk, in place of an older one.

    Raises UserError naming the file and the cure, in words, if the disk refuses; nothing is left behind then.
    """
    # The process in the name: one that outlived its killed parent may still be writing the same file.
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL_SUFFIX}")
    try:
        with open(partial, "wb", buffering=1 << 20) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _flush_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; {cure}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """The same for a content at hand."""
    with whole_file(path) as file:
        file.write(content)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
