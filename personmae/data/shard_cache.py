"""Whole shards from a store in a bounded folder of this machine, shared by all its processes.

A shard is named by its SHA-256, which is compared when it arrives, so nothing that a manifest says becomes a path, and packs with the same shards
share them. Each is fetched by one process at a time, which holds a lock on it (`flock`, so a process that dies lets go), and becomes visible when it
is whole. When room is needed, those go that were used longest ago. One that goes while it is being read stays readable to whoever has it open; so
readers open it for each read and the room is free at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from personmae.configs import UserError
from personmae.data.packs.manifest import PackedFile
from personmae.data.remote import Store, StoreError, retried
from personmae.data.storage import read_fully
from personmae.whole_files import PARTIAL_SUFFIX, explained_write, whole_file

_SHARD_SUFFIX = ".tar"
_POLL_SECONDS = 0.05
# How exactly it is known when a shard was last used.
_TOUCH_SECONDS = 5.0
# A shard that could not be fetched is asked for again only after so long, so that its thousands of images do not each wait for it.
_GIVEN_UP_SECONDS = 600.0
_GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """How a pack behind an address is read.

    folder: where its shards are kept on this machine, by default in the user's cache; packs and runs share it. gib: how much may lie there, in GiB.
    fetches: shards fetched at the same time, over all processes of this machine. retries: further tries at a shard that does not arrive, the first
    after retry_seconds, each later one after twice as long.
    """

    folder: Path | None = None
    gib: float = 20.0
    fetches: int = 4
    retries: int = 5
    retry_seconds: float = 0.5

    def __post_init__(self) -> None:
        for name, least, most in (("gib", 0, 2**40), ("fetches", 1, 256), ("retries", 0, 100), ("retry_seconds", 0, 60)):
            value = getattr(self, name)
            if not least <= value <= most:
                raise UserError(f"stream.{name} is {value}; it must lie between {least} and {most}")

    @property
    def max_bytes(self) -> int:
        return int(self.gib * _GIB)


class ShardCache:
    """Shards of one store in a folder; see above.

    max_bytes: of all that lies in the folder, shards on their way at their full length; at least as large as the largest shard. retries,
    retry_seconds: see `StreamConfig`. It can be sent to another process.
    """

    def __init__(self, folder: Path, store: Store, max_bytes: int, retries: int, retry_seconds: float) -> None:
        self.folder, self.store, self.max_bytes = folder, store, max_bytes
        self._retries, self._retry_seconds = retries, retry_seconds
        self._touched: dict[str, float] = {}
        self._given_up: dict[str, tuple[float, str]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # What was met here says nothing of another machine.
        return {**self.__dict__, "_touched": {}, "_given_up": {}}

    def read(self, shard: PackedFile, length: int, position: int) -> bytes:
        """`length` bytes of a shard, which is fetched if it is not here. Raises StoreError if it cannot be, OSError if this machine's disk fails, and
        UserError if it refuses."""
        descriptor = self._open(shard)
        if descriptor is None:
            descriptor = self._fetch(shard, frozenset(), None)
            assert descriptor is not None
        try:
            return read_fully(descriptor, length, position)
        finally:
            os.close(descriptor)

    def prefetch(self, shard: PackedFile, keep: Set[str], stop: threading.Event) -> bool:
        """Fetch a shard; False if it cannot be done now: another process is at it, or there is no room but that of the shards in `keep` (SHA-256).

        Raises as `read` does, and StoreError when `stop` is set meanwhile.
        """
        descriptor = self._fetch(shard, keep, stop)
        if descriptor is None:
            return False
        os.close(descriptor)
        return True

    def here(self) -> set[str]:
        """SHA-256 of the shards that are here."""
        try:
            return {name.removesuffix(_SHARD_SUFFIX) for name in os.listdir(self.folder) if name.endswith(_SHARD_SUFFIX)}
        except FileNotFoundError:
            return set()

    def why_given_up(self, shard: PackedFile) -> str | None:
        """Why a shard is not asked for at the moment, or None."""
        until, reason = self._given_up.get(shard.sha256, (0.0, ""))
        return reason if time.monotonic() < until else None

    def _path(self, shard: PackedFile) -> Path:
        return self.folder / f"{shard.sha256}{_SHARD_SUFFIX}"

    def _open(self, shard: PackedFile) -> int | None:
        path = self._path(shard)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        if os.fstat(descriptor).st_size != shard.num_bytes:
            # Cut by somebody else: fetched anew.
            os.close(descriptor)
            path.unlink(missing_ok=True)
            return None
        now = time.monotonic()
        if now - self._touched.get(shard.sha256, -_TOUCH_SECONDS) >= _TOUCH_SECONDS:
            self._touched[shard.sha256] = now
            os.utime(descriptor)
        return descriptor

    def _fetch(self, shard: PackedFile, keep: Set[str], stop: threading.Event | None) -> int | None:
        """A descriptor of the shard, once it is here. stop: of a fetch that need not be, which returns None rather than wait for others."""
        if reason := self.why_given_up(shard):
            raise StoreError(reason, lasting=True)
        with self._lock_file(f"locks/{shard.sha256}") as lock:
            while not _try_lock(lock):
                if stop is not None:
                    return None
                time.sleep(_POLL_SECONDS)
            if (descriptor := self._open(shard)) is not None:
                return descriptor
            # Another thread may have waited for it in vain while this one waited for the lock.
            if reason := self.why_given_up(shard):
                raise StoreError(reason, lasting=True)
            sleep = time.sleep if stop is None else stop.wait
            try:
                return retried(lambda: self._download(shard, keep, stop), self._retries, self._retry_seconds, sleep)
            except StoreError as error:
                if stop is None or not stop.is_set():
                    self._given_up[shard.sha256] = time.monotonic() + _GIVEN_UP_SECONDS, str(error)
                raise

    def _download(self, shard: PackedFile, keep: Set[str], stop: threading.Event | None) -> int | None:
        cure = "make room or give write permission there, or choose another --data.stream.folder"
        digest, length = hashlib.sha256(), 0
        descriptor = None
        try:
            with whole_file(self._path(shard), cure) as file:
                if not self._reserve(file, shard.num_bytes, keep, wait=stop is None):
                    raise _NoRoom
                for block in self.store.blocks(shard.name):
                    length += len(block)
                    if stop is not None and stop.is_set():
                        raise StoreError("training has ended", lasting=True)
                    if length > shard.num_bytes:
                        break
                    digest.update(block)
                    file.write(block)
                if length != shard.num_bytes:
                    longer = length > shard.num_bytes
                    raise StoreError(f"{shard.name} is {'longer than' if longer else f'truncated: {length} of'} {shard.num_bytes} bytes")
                if digest.hexdigest() != shard.sha256:
                    raise StoreError(f"{shard.name} is altered: its bytes are not those that were packed (SHA-256)")
                # Opened before anybody can make room of it.
                descriptor = os.open(file.name, os.O_RDONLY | os.O_CLOEXEC)
        except _NoRoom:
            return None
        except UserError:
            if descriptor is not None:
                os.close(descriptor)
            raise
        return descriptor

    def _reserve(self, file: IO[bytes], num_bytes: int, keep: Set[str], *, wait: bool) -> bool:
        """Give a new file its length, so that others count it; room is made if need be, with `wait` of what lies in `keep` too."""
        while True:
            with self._lock_file("lock") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if self._make_room(num_bytes, keep, everything=wait):
                    file.truncate(num_bytes)
                    return True
            if not wait:
                return False
            # All that is left are shards on their way.
            time.sleep(_POLL_SECONDS)

    def _make_room(self, num_bytes: int, keep: Set[str], *, everything: bool) -> bool:
        used, shards = 0, []
        for entry in os.scandir(self.folder):
            sha256, _, rest = entry.name.partition(".")
            if not rest.startswith(_SHARD_SUFFIX[1:]):
                continue
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            if not rest.endswith(PARTIAL_SUFFIX):
                shards.append((sha256 in keep, status.st_mtime, status.st_size, entry.path))
            elif self._is_nobodys(sha256):
                os.unlink(entry.path)
                continue
            used += status.st_size
        for kept, _, size, path in sorted(shards):
            if used + num_bytes <= self.max_bytes or (kept and not everything):
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            used -= size
        return used + num_bytes <= self.max_bytes

    def _is_nobodys(self, sha256: str) -> bool:
        """Whether nobody is fetching a shard, so that what lies there of it was left by a process that died."""
        with self._lock_file(f"locks/{sha256}") as lock:
            return _try_lock(lock)

    @contextlib.contextmanager
    def _lock_file(self, name: str) -> Iterator[int]:
        """A descriptor of a file to lock; the lock ends with it, or with the process."""
        path = self.folder / name
        with explained_write(path, "choose another --data.stream.folder"):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


class _NoRoom(Exception):
    """There is no room for a shard that is not wanted yet."""


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
