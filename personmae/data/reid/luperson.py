"""LUPerson (Fu et al., "Unsupervised pre-training for person re-identification", CVPR 2021) as the LMDB in which it is handed out.

An LMDB (`data.mdb`) of JPEG files under keys CC_YY_VVVV_MMMMMMMM (country, city, video, image), and `keys.pkl`: a list of the keys, as the authors'
converter writes it, or a dict {"keys": ..., "pids" or "vids": ...}, as their loaders expect it. It has no query or gallery: it is for pre-training.
As a folder of images it needs nothing from here: that folder is the `--data.source` of a run.

A pickle runs whatever it names, so keys.pkl is read by `plain_pickle`, which knows plain values and nothing else.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from personmae.configs import UserError
from personmae.data.images import UnreadableImage
from personmae.data.reid.plain_pickle import read_plain_pickle

DATABASE, KEYS = "data.mdb", "keys.pkl"
# Where the database lies, below the folder given: itself, and as the converter and the loaders of the authors name it.
FOLDERS = (".", "lmdb", "lup_lmdb")
LABELS = ("pids", "vids")
INSTALL = "pip install lmdb"


class LuPersonLmdb:
    """The images of an LMDB by number, in the order of its keys.

    The database is opened at the first read, and again in a forked or unpickled process: an open environment must not be carried over.
    """

    def __init__(self, database: Path, keys: list[str], labels: npt.NDArray[np.int64] | None, label_kind: str | None) -> None:
        """database: folder of data.mdb. labels: int64 [N], persons or videos as `label_kind` says ("pids", "vids"), or None."""
        self.database = database
        self.keys = keys
        self.labels = labels
        self.label_kind = label_kind
        self._environment: Any = None
        self._process = 0

    def __len__(self) -> int:
        return len(self.keys)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_environment": None, "_process": 0}

    def path(self, number: int) -> Path:
        """How an image is called in messages: no file has this path."""
        return self.database / DATABASE / self.keys[number]

    def read(self, number: int) -> bytes:
        """The content of an image file. Raises UnreadableImage if the database lacks it, UserError if it cannot be opened."""
        environment = self._open()
        with environment.begin(write=False) as transaction:
            data = transaction.get(self.keys[number].encode("utf-8"))
        if not data:
            raise UnreadableImage(self.path(number), "empty" if data is not None else "no such key in the database")
        return bytes(data)

    def num_entries(self) -> int:
        """Entries of the database, which should be as many as keys."""
        return int(self._open().stat()["entries"])

    def close(self) -> None:
        if self._environment is not None and self._process == os.getpid():
            self._environment.close()
        self._environment = None

    def _open(self) -> Any:
        if self._environment is None or self._process != os.getpid():
            lmdb = _lmdb()
            try:
                self._environment = lmdb.open(str(self.database), readonly=True, lock=False, readahead=False, meminit=False)
            except lmdb.Error as error:
                raise UserError(f"{self.database} cannot be opened as an LMDB: {error}; is {DATABASE} complete?") from error
            self._process = os.getpid()
        return self._environment


def find_database(root: Path) -> Path | None:
    """The folder of data.mdb: `root` itself or a folder of it named as the authors do."""
    return next((root / folder for folder in FOLDERS if (root / folder / DATABASE).is_file()), None)


def open_luperson(root: Path) -> LuPersonLmdb:
    """LUPerson's LMDB in a folder; keys.pkl lies in it, or beside the folder of data.mdb. The database itself is not opened yet.

    Raises UserError if a file is missing or keys.pkl holds anything but keys and labels.
    """
    database = find_database(root)
    if database is None:
        raise UserError(f"{root} holds no LMDB: looked for {DATABASE} in it and in {', '.join(FOLDERS[1:])}")
    for folder in (database, database.resolve().parent):
        if (folder / KEYS).is_file():
            return LuPersonLmdb(database, *read_keys(folder / KEYS))
    raise UserError(f"{database} has no {KEYS}, nor has the folder above it: it comes with the LMDB and lists its keys")


def read_keys(file: Path) -> tuple[list[str], npt.NDArray[np.int64] | None, str | None]:
    """(keys, labels int64 [N] or None, "pids" or "vids") of a keys.pkl. Raises UserError if it is damaged, unsafe or something else."""
    content = read_plain_pickle(file)
    labels, kind = None, None
    keys = content
    if isinstance(content, dict):
        if "keys" not in content:
            raise UserError(f"{file} holds a dict without 'keys'; it has {', '.join(map(repr, list(content)[:5])) or 'nothing'}")
        keys = content["keys"]
        kind = next((name for name in LABELS if name in content), None)
        if kind is not None:
            labels = _to_labels(content[kind], kind, file)
    if not isinstance(keys, list | tuple | np.ndarray) or len(keys) == 0:
        raise UserError(f"{file} holds no list of keys, but {type(keys).__name__}")
    texts = [key.decode("utf-8", "replace") if isinstance(key, bytes) else key for key in keys]
    odd = next((key for key in texts if not isinstance(key, str)), None)
    if odd is not None:
        raise UserError(f"{file}: a key is {odd!r}, not text like 00_01_0002_00000003")
    if labels is not None and len(labels) != len(texts):
        raise UserError(f"{file} holds {len(texts)} keys but {len(labels)} {kind}")
    return [str(key) for key in texts], labels, kind


def _to_labels(values: Any, kind: str, file: Path) -> npt.NDArray[np.int64]:
    try:
        labels = np.asarray(values)
    except ValueError as error:
        raise UserError(f"{file}: {kind} is no flat list of integers") from error
    if labels.ndim != 1 or not (np.issubdtype(labels.dtype, np.integer)):
        raise UserError(f"{file}: {kind} is no flat list of integers, but {labels.dtype} {list(labels.shape)}")
    return labels.astype(np.int64)


def _lmdb() -> ModuleType:
    try:
        import lmdb
    except ModuleNotFoundError as error:
        raise UserError(f"LUPerson's LMDB is read by the package lmdb, which is not installed: {INSTALL}") from error
    return lmdb  # type: ignore[no-any-return]
