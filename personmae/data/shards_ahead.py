"""Shards of a streamed pack on their way before training needs them, in the order of the plan."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator
from typing import NamedTuple

import numpy as np

from personmae.configs import UserError
from personmae.data.delivery import PartPlan
from personmae.data.plan import Plan
from personmae.data.remote import StoreError
from personmae.data.streamed_storage import StreamedStorage
from personmae.data.thread_pool import ThreadPool

# Batches of so many steps may still be read when a later one is begun.
_STEPS_IN_WORK = 4
_IDLE_SECONDS = 0.25


class _Use(NamedTuple):
    """An epoch's use of a shard. first, last: steps of the run, from 0."""

    first: int
    last: int
    number: int


class ShardsAhead:
    """Fetches what the steps to come will read, as far as the folder has room beside what is being read.

    plan: of the same images as the storage. first_step, last_step: of the loader, the last not included. num_threads: shards at the same time.
    Failures are passed over: whoever reads the shard then meets them. The threads start with the first part of `watch`, and end with `close`.
    """

    def __init__(self, storage: StreamedStorage, plan: Plan, first_step: int, last_step: int, num_threads: int) -> None:
        self._storage, self._plan, self._last_step, self._num_threads = storage, plan, last_step, num_threads
        self._step = first_step
        # A step may show an image several times.
        self._images_per_step = len(np.unique(plan.step_samples(first_step)))
        self._uses_of_epochs: dict[int, list[_Use]] = {}
        self._stop = threading.Event()
        self._choosing = threading.Lock()
        # SHA-256 -> when it may be chosen again.
        self._set_aside: dict[str, float] = {}
        self._pool: ThreadPool | None = None

    def watch(self, parts: Iterator[PartPlan]) -> Generator[PartPlan, None, None]:
        """The same parts; what they say of where training stands is taken note of."""
        for part in parts:
            self._step = part.step
            if self._pool is None and not self._stop.is_set():
                self._pool = ThreadPool(self._num_threads, "shards")
                for _ in range(self._num_threads):
                    self._pool.submit(self._fetch_on)
            yield part

    def close(self) -> None:
        """End the threads, in the middle of a shard too."""
        self._stop.set()
        if self._pool is not None:
            self._pool.close()

    def _fetch_on(self) -> None:
        shards = self._storage.shards
        while not self._stop.is_set():
            number, keep = self._choose()
            if number is None:
                self._stop.wait(_IDLE_SECONDS)
                continue
            fetched = False
            try:
                fetched = self._storage.cache.prefetch(shards[number], keep, self._stop)
            except (StoreError, UserError, OSError):
                self._stop.wait(_IDLE_SECONDS)
            finally:
                with self._choosing:
                    self._set_aside[shards[number].sha256] = time.monotonic() + (0.0 if fetched else _IDLE_SECONDS)

    def _choose(self) -> tuple[int | None, set[str]]:
        """The next shard to fetch, if there is one and room for it; and SHA-256 of those that are not to make room for it."""
        cache = self._storage.cache
        with self._choosing:
            here, now, total, chosen = cache.here(), time.monotonic(), 0, None
            keep: set[str] = set()
            for use in self._uses():
                shard = self._storage.shards[use.number]
                if shard.sha256 in keep or use.last < self._step - _STEPS_IN_WORK:
                    continue
                total += shard.num_bytes
                if total > cache.max_bytes:
                    break
                keep.add(shard.sha256)
                free = shard.sha256 not in here and self._set_aside.get(shard.sha256, 0.0) <= now
                if chosen is None and free and cache.why_given_up(shard) is None:
                    chosen = use.number
            if chosen is not None:
                self._set_aside[self._storage.shards[chosen].sha256] = float("inf")
            return chosen, keep

    def _uses(self) -> Iterator[_Use]:
        """By first use, from the epoch that is being read to the end of the one after training's."""
        steps = self._plan.steps_per_epoch
        epoch = max(self._step - _STEPS_IN_WORK, 0) // steps
        self._uses_of_epochs = {number: uses for number, uses in self._uses_of_epochs.items() if number >= epoch}
        for number in range(epoch, self._step // steps + 2):
            if number * steps >= self._last_step:
                return
            if number not in self._uses_of_epochs:
                self._uses_of_epochs[number] = self._find_uses(number)
            yield from self._uses_of_epochs[number]

    def _find_uses(self, epoch: int) -> list[_Use]:
        steps = self._plan.steps_per_epoch
        wanted = min(steps, self._last_step - epoch * steps)
        numbers = self._storage.shard_numbers[self._plan.order(epoch)[: wanted * self._images_per_step]]
        step_of = epoch * steps + np.arange(len(numbers)) // self._images_per_step
        first = np.full(len(self._storage.shards), -1)
        last = first.copy()
        # Of several values for one place the last one stays.
        first[numbers[::-1]] = step_of[::-1]
        last[numbers] = step_of
        used = np.flatnonzero(first >= 0)
        return [_Use(int(first[number]), int(last[number]), int(number)) for number in used[np.argsort(first[used], kind="stable")]]
