"""Where the contents of an index's images lie: a file each, or members of tar shards that are read in place."""

from __future__ import annotations

import os
import resource
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from personmae.data.images import UnreadableImage, read_bytes


class Storage(Protocol):
    """What an index reads from, by sample number and the name that the source gives it."""

    @property
    def root(self) -> Path:
        """The folder that holds it all."""

    def path(self, sample: int, name: str) -> Path | str:
        """Where the image lies, for people."""

    def read(self, sample: int, name: str) -> bytes:
        """Its content, unchecked. Raises UnreadableImage if the system cannot read it."""

    def is_there(self, sample: int, name: str) -> bool:
        """Whether the file that holds the image still exists."""


@dataclass(frozen=True)
class FileStorage:
    """A file for each image. root: the folder that relative names start from."""

    root: Path

    def path(self, sample: int, name: str) -> Path:
        return self.root / name

    def read(self, sample: int, name: str) -> bytes:
        return read_bytes(self.root / name)

    def is_there(self, sample: int, name: str) -> bool:
        return (self.root / name).exists()


@dataclass(frozen=True, eq=False)
class ShardStorage:
    """Members of the shards of a pack, read by offset without the tar around them.

    root: the pack's folder. shards: names of its shards. shard_numbers: int32 [N], which of them holds a sample. positions: int64 [N], where its
    content begins there. lengths: int64 [N], its bytes. Shards stay open once used, each process having its own descriptors and any number of threads
    sharing them; when half of what the process may open is in use, further shards are opened for one read at a time.
    """

    root: Path
    shards: tuple[str, ...]
    shard_numbers: npt.NDArray[np.int32] = field(repr=False)
    positions: npt.NDArray[np.int64] = field(repr=False)
    lengths: npt.NDArray[np.int64] = field(repr=False)
    _open: _OpenShards = field(default_factory=lambda: _OpenShards(), init=False, repr=False)

    def path(self, sample: int, name: str) -> Path:
        return self.root / self.shards[self.shard_numbers[sample]] / name

    def read(self, sample: int, name: str) -> bytes:
        number, length = int(self.shard_numbers[sample]), int(self.lengths[sample])
        shard = self.root / self.shards[number]
        try:
            data = self._open.read(shard, number, length, int(self.positions[sample]))
        except OSError as error:
            reason = f"{shard.name} cannot be read: {error.strerror or error}"
            raise UnreadableImage(self.path(sample, name), reason, by_system=True) from error
        if len(data) != length:
            raise UnreadableImage(self.path(sample, name), f"{shard.name} has been truncated since the start: copy it again from where it was packed")
        return data

    def is_there(self, sample: int, name: str) -> bool:
        return (self.root / self.shards[self.shard_numbers[sample]]).exists()

    def __getstate__(self) -> dict[str, Any]:
        # Descriptors are a process's own.
        return {name: value for name, value in self.__dict__.items() if name != "_open"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _open=_OpenShards())


class _OpenShards:
    """Descriptors by shard number. None is closed while others may be reading from it; they end with this object."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_number: dict[int, int] = {}
        self._retired: list[int] = []
        self._most = max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)

    def read(self, shard: Path, number: int, length: int, position: int) -> bytes:
        descriptor = self._by_number.get(number)
        if descriptor is None:
            descriptor = os.open(shard, os.O_RDONLY | os.O_CLOEXEC)
            with self._lock:
                if number in self._by_number or len(self._by_number) + len(self._retired) >= self._most:
                    close_after = True
                else:
                    close_after = False
                    self._by_number[number] = descriptor
            if close_after:
                try:
                    return read_fully(descriptor, length, position)
                finally:
                    os.close(descriptor)
        try:
            return read_fully(descriptor, length, position)
        except OSError:
            # The next try opens the shard anew: network disks forget descriptors.
            with self._lock:
                if self._by_number.get(number) == descriptor:
                    self._retired.append(self._by_number.pop(number))
            raise

    def __del__(self) -> None:
        for descriptor in [*self._by_number.values(), *self._retired]:
            os.close(descriptor)


def read_fully(descriptor: int, length: int, position: int) -> bytes:
    """`length` bytes, or fewer at the end of the file: one call nearly always, but the system may give less than asked for."""
    data = os.pread(descriptor, length, position)
    while len(data) < length:
        more = os.pread(descriptor, length - len(data), position + len(data))
        if not more:
            break
        data += more
    return data
