"""The files of a source of images: a folder tree or a text list, sorted, with lengths and modification times."""

from __future__ import annotations

import os
import stat
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from personmae.configs import UserError

# How the names of image files end, in any case.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff")
_SUFFIX_BYTES = tuple(os.fsencode(suffix) for suffix in IMAGE_SUFFIXES)


@dataclass(frozen=True)
class Listing:
    """The files of a source, sorted: names as bytes, length and modification time (both -1 where the system does not
    tell)."""

    root: Path
    names: list[bytes]
    num_bytes: npt.NDArray[np.int64]
    modified_ns: npt.NDArray[np.int64]


def list_source(source: Path) -> Listing:
    """The files of a folder, by the rules of `build_index`, or those that a text list names.

    Raises UserError if the source cannot be opened or names no image.
    """
    try:
        is_folder = stat.S_ISDIR(os.stat(source).st_mode)
    except OSError as error:
        raise UserError(f"{source} cannot be opened ({error.strerror}): give a folder of images, or a text file with one path a line") from error
    names: list[bytes] = []
    numbers = array("q")
    for name, size, modified_ns in _scan(source) if is_folder else _read_list(source):
        names.append(name)
        numbers.extend((size, modified_ns))
    if not names and is_folder:
        raise UserError(f"{source} holds no JPEG, PNG, WebP, BMP or TIFF file, at any depth")
    if not names:
        raise UserError(f"{source} lists no image: it should have one path a line")
    order = sorted(range(len(names)), key=names.__getitem__)
    sizes, times = np.array(numbers, dtype=np.int64).reshape(-1, 2)[order].T
    root = source if is_folder else source.parent
    return Listing(root.absolute(), [names[row] for row in order], sizes.copy(), times.copy())


def _scan(root: Path) -> Iterator[tuple[bytes, int, int]]:
    """(relative name, length, modification time) of every image file below a folder, without recursion (trees may be
    deep)."""
    # Each folder comes with the identities of those above it: a link to one of them would go round for ever.
    first = os.stat(root)
    pending: list[tuple[bytes, frozenset[tuple[int, int]]]] = [(b"", frozenset([(first.st_dev, first.st_ino)]))]
    base = os.fsencode(root)
    while pending:
        folder, above = pending.pop()
        try:
            entries = os.scandir(os.path.join(base, folder))
        except OSError as error:
            if not folder:
                raise UserError(f"the folder {root} cannot be read: {error.strerror}") from error
            # Examined like a file, so that it is listed with its reason.
            yield folder, -1, -1
            continue
        with entries:
            for entry in entries:
                if entry.name.startswith(b"."):
                    continue
                name = os.path.join(folder, entry.name)
                try:
                    if entry.is_dir():
                        status = entry.stat()
                        identity = (status.st_dev, status.st_ino)
                        if identity not in above:
                            pending.append((name, above | {identity}))
                        continue
                    if not entry.name.lower().endswith(_SUFFIX_BYTES):
                        continue
                    status = entry.stat()
                except OSError:
                    # A broken link, or a file that vanished meanwhile: examined like the others, so that it is listed
                    # with its reason.
                    if entry.name.lower().endswith(_SUFFIX_BYTES):
                        yield name, -1, -1
                    continue
                yield name, status.st_size, status.st_mtime_ns


def _read_list(source: Path) -> Iterator[tuple[bytes, int, int]]:
    try:
        content = source.read_bytes()
    except OSError as error:
        raise UserError(f"the list {source} cannot be read: {error.strerror}") from error
    if b"\0" in content[:65536]:
        raise UserError(f"{source} is neither a folder nor a text list with one path a line")
    folder = os.fsencode(source.parent)
    lines = {line.strip() for line in content.removeprefix(b"\xef\xbb\xbf").splitlines()}
    for name in {os.path.normpath(line) for line in lines if line}:
        try:
            status = os.stat(os.path.join(folder, name))
        except OSError:
            yield name, -1, -1
        else:
            yield name, status.st_size, status.st_mtime_ns
