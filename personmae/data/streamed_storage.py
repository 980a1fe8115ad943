"""Images in the shards of a pack behind an address: the storage of a streamed run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from personmae.data.images import UnreadableImage
from personmae.data.packs.manifest import PackedFile
from personmae.data.remote import Store, StoreError
from personmae.data.shard_cache import ShardCache


@dataclass(frozen=True, eq=False)
class StreamedStorage:
    """Members of shards that come to this machine when they are needed, and better before that: see `ShardsAhead`.

    store: where the pack lies. cache: the folder of this machine that the shards come to. shards: as the manifest has them. shard_numbers: int32 [N],
    which of them holds a sample. positions: int64 [N], where its content begins there. lengths: int64 [N], its bytes. fetches: shards to fetch at the
    same time, over all processes of the machine.
    """

    store: Store
    cache: ShardCache
    shards: tuple[PackedFile, ...] = field(repr=False)
    shard_numbers: npt.NDArray[np.int32] = field(repr=False)
    positions: npt.NDArray[np.int64] = field(repr=False)
    lengths: npt.NDArray[np.int64] = field(repr=False)
    fetches: int = 1

    @property
    def root(self) -> Path:
        """The folder that the shards come to."""
        return self.cache.folder

    def path(self, sample: int, name: str) -> str:
        """The address of the shard, as it may be shown, and the name in it."""
        return f"{self.store.label}/{self.shards[self.shard_numbers[sample]].name}/{name}"

    def read(self, sample: int, name: str) -> bytes:
        """Its content, unchecked. Raises UnreadableImage if its shard cannot be fetched, or read once it is here."""
        shard, length = self.shards[self.shard_numbers[sample]], int(self.lengths[sample])
        try:
            data = self.cache.read(shard, length, int(self.positions[sample]))
        except StoreError as error:
            raise UnreadableImage(self.path(sample, name), f"its shard cannot be fetched: {error}", by_system=True, tried=True) from error
        except OSError as error:
            reason = f"its shard cannot be read in {self.cache.folder}: {error.strerror or error}"
            raise UnreadableImage(self.path(sample, name), reason, by_system=True) from error
        if len(data) != length:
            raise UnreadableImage(self.path(sample, name), f"its shard has been truncated in {self.cache.folder}")
        return data

    def is_there(self, sample: int, name: str) -> bool:
        """Whether its shard is here or in the store."""
        shard = self.shards[self.shard_numbers[sample]]
        if shard.sha256 in self.cache.here():
            return True
        try:
            return shard.name in self.store.sizes([shard.name])
        except StoreError:
            return False
