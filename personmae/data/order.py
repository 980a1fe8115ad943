"""The order of an epoch that suits a stream: shards in random order, and samples in random order within a window of shards.

The order over the whole set, `permutation`, touches all shards at any moment, so that all of them have to be at hand. Here the shards are shuffled in
each epoch and dealt out to windows; the samples of a window are shuffled together, and the next window follows. It is a pure function of (seed,
epoch), so it is the same for any number of processes, either loader, and a pack on a disk or behind an address. Which shard a sample lies in is
random to begin with (see `packs/making.py`), so a window is a random part of the set.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from personmae.configs import UserError
from personmae.data.storage import ShardStorage, Storage
from personmae.data.streamed_storage import StreamedStorage
from personmae_kernels.sample_random import Stream, sample_seeds

Int64Array = npt.NDArray[np.int64]

# "global": over the whole set; "windows": of shards; "auto": windows for a pack behind an address, else global.
OrderKind = Literal["auto", "global", "windows"]
GLOBAL_ORDER = "global"
# Epochs kept: training is in one, what is fetched ahead may be of the next.
_EPOCHS_KEPT = 2


@dataclass(frozen=True)
class _Epoch:
    """order: int64 [N]. windows: int64 [shards], which window a shard is in. ends: int64 [windows], where each ends in the order."""

    order: Int64Array
    windows: Int64Array
    ends: Int64Array


class WindowOrder:
    """The order of the epochs of a pack; an `order` for `Plan`, with its `neighbours`.

    shard_numbers: integers [N], the shard of each sample, from 0 to num_shards - 1. window: shards in a window at most, at least 1. With as many as
    there are it is the order over the whole set. identity: changes with anything that the order depends on but the seed.
    """

    def __init__(self, shard_numbers: npt.NDArray[np.int32], num_shards: int, window: int, seed: int) -> None:
        if window < 1:
            raise UserError(f"order_window is {window}; it must be at least 1 shard")
        self._shard_numbers, self._num_shards, self._seed = shard_numbers, num_shards, seed
        self._num_windows = -(-num_shards // window)
        self._epochs: dict[int, _Epoch] = {}
        digest = hashlib.sha256(np.ascontiguousarray(shard_numbers, dtype=np.int32).data).hexdigest()[:8]
        self.identity = f"windows of {min(window, num_shards)} shards ({digest})"

    def __call__(self, epoch: int) -> Int64Array:  # -> [N]
        """The samples in the order of an epoch."""
        return self._epoch(epoch).order

    def neighbours(self, epoch: int, sample: int) -> Int64Array:
        """What may take the place of a sample in an epoch: those of its window in other shards, since its own may be lost; int64 [M], M >= 0."""
        found = self._epoch(epoch)
        shard = self._shard_numbers[sample]
        number = found.windows[shard]
        window = found.order[found.ends[number - 1] if number else 0 : found.ends[number]]
        return window[self._shard_numbers[window] != shard]

    def _epoch(self, epoch: int) -> _Epoch:
        found = self._epochs.get(epoch)
        if found is None:
            found = self._make(epoch)
            # A new dict, so that other threads see the old one or the new one.
            self._epochs = dict([*list(self._epochs.items())[1 - _EPOCHS_KEPT :], (epoch, found)])
        return found

    def _make(self, epoch: int) -> _Epoch:
        turn = np.argsort(sample_seeds(self._seed, epoch, np.arange(self._num_shards), Stream.SHARDS), kind="stable")
        windows = np.empty(self._num_shards, dtype=np.int64)
        # As even as they can be: a small one at the end would be shuffled among little.
        windows[turn] = np.arange(self._num_shards) * self._num_windows // max(self._num_shards, 1)
        of_samples = windows[self._shard_numbers]
        keys = sample_seeds(self._seed, epoch, np.arange(len(self._shard_numbers)), Stream.ORDER)
        order = np.lexsort((keys, of_samples)).astype(np.int64)
        return _Epoch(order, windows, np.cumsum(np.bincount(of_samples, minlength=self._num_windows)))


def choose_order(kind: OrderKind, window: int, storage: Storage, seed: int) -> WindowOrder | None:
    """The order of a run over what lies in `storage`; None for the order over the whole set. Raises UserError if there are no shards to go by."""
    if kind == "global" or (kind == "auto" and not isinstance(storage, StreamedStorage)):
        return None
    if isinstance(storage, ShardStorage | StreamedStorage):
        return WindowOrder(storage.shard_numbers, len(storage.shards), window, seed)
    raise UserError('the order "windows" goes by the shards of a pack, and the source is none: choose the order "global", or pack it first')
