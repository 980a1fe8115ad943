"""What both loaders share: the batch they deliver, retries, replacement of what cannot be read, and the thread that stays ahead of training."""

from __future__ import annotations

import math
import os
import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Generic, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from personmae.configs import UserError
from personmae.data.image_index import ImageIndex
from personmae.data.images import UnreadableImage
from personmae.data.plan import BatchPlan, Plan
from personmae.data.thread_pool import ThreadPool

# An unreadable sample has this many replacements; if all are unreadable too, the storage is gone rather than a file.
MAX_REPLACEMENTS = 8
# A batch that takes longer than this is spoken of: reads that hang (a network disk that is gone for a while) are waited for.
SLOW_SECONDS = 60.0

Content = TypeVar("Content")


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How images get from files to the training step.

    kind: "dali", "threads", "processes", or "auto": DALI where training runs on CUDA and DALI is installed, else threads of this process while they
    are few, and processes of one thread each where there are more (Python's lock lets through what few threads do, not what many do). num_threads:
    of them; 0 = the cores this process may use, shared among the processes of this machine. prefetch: batches made ahead. dali_decode: where DALI
    decodes JPEGs, "cpu" (bit-equal to the threads loader's) or "mixed" (nvJPEG on the GPU). cache_gib: the other loaders keep all decoded images in
    memory if they fit in this many GiB per training process. decoded_dir: a folder where it keeps them all in one file instead, shared by the
    processes of the machine; see `decoded_file`. retries: further tries at a read that fails, the first after retry_seconds, each later one after
    four times as long. max_bad_ratio: the run stops when more than this fraction of all images turned out to be unreadable after indexing.
    """

    kind: Literal["auto", "threads", "processes", "dali"] = "auto"
    num_threads: int = 0
    prefetch: int = 2
    dali_decode: Literal["cpu", "mixed"] = "cpu"
    cache_gib: float = 0.5
    decoded_dir: Path | None = None
    retries: int = 2
    retry_seconds: float = 0.05
    max_bad_ratio: float = 0.01

    def __post_init__(self) -> None:
        for name, allowed in (("kind", ("auto", "threads", "processes", "dali")), ("dali_decode", ("cpu", "mixed"))):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")
        for name, least, most in (
            ("num_threads", 0, 1024),
            ("prefetch", 1, 64),
            ("cache_gib", 0, math.inf),
            ("retries", 0, 100),
            ("retry_seconds", 0, 60),
            ("max_bad_ratio", 0, 1),
        ):
            value = getattr(self, name)
            if not least <= value <= most:
                raise UserError(f"{name} is {value}; it must lie between {least} and {most}")
        if self.kind == "dali" and self.decoded_dir is not None:
            raise UserError("decoded_dir is for the threads and processes loaders, and kind is dali: leave one of them out")


@dataclass(frozen=True)
class RegionBatch:
    """One micro-batch: the R regions of B images, R as the plan has it (two in pre-training, one in fine-tuning).

    regions: R times uint8 [B, H, W, 3] RGB, C-contiguous, on the training device. boxes: int32 [B, R, 4], (y0, x0, y1, x1) pixels of the
    unflipped stored image; flips: bool [B, R]; samples: int64 [B], the samples delivered; planned: int64 [B], those the plan asked for (they
    differ where one was unreadable); copies: int64 [B], which drawing of its image a row is, from 0 (None: 0 throughout): all on the CPU.
    epoch; step: optimiser step; micro: micro-batch of the step.
    """

    regions: tuple[Tensor, ...]
    boxes: Tensor
    flips: Tensor
    samples: Tensor
    planned: Tensor
    epoch: int
    step: int
    micro: int
    copies: Tensor | None = None

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def region_a(self) -> Tensor:
        """The first region: the input of pre-training, the only one of fine-tuning."""
        return self.regions[0]

    @property
    def region_b(self) -> Tensor:
        """The second region: the target of pre-training."""
        return self.regions[1]

    def to(self, device: torch.device) -> RegionBatch:
        """The batch with its regions on a device; from pinned memory the copies do not make the host wait."""
        return replace(self, regions=tuple(region.to(device, non_blocking=True) for region in self.regions))

    def clone_regions(self) -> RegionBatch:
        """The batch with its regions copied, on the current stream."""
        return replace(self, regions=tuple(region.clone() for region in self.regions))


@dataclass(frozen=True)
class Failure:
    """A sample that could not be read: where and why."""

    sample: int
    path: Path | str
    reason: str


@dataclass(frozen=True)
class Prepared:
    """A batch, and the failures met on the way to it in the order of its samples."""

    batch: RegionBatch
    failures: list[Failure]


@dataclass(frozen=True)
class PartPlan:
    """The plan of one micro-batch of this process."""

    step: int
    micro: int
    plan: BatchPlan


def part_plans(plan: Plan, *, first_step: int, last_step: int, rank: int, world_size: int, accumulation: int) -> Iterator[PartPlan]:
    """The micro-batches of one process, in order. Micro-batch m of rank r is part m * world_size + r, so a step's parts join to the same batch."""
    for step in range(first_step, last_step):
        for micro in range(accumulation):
            yield PartPlan(step, micro, plan.batch(step, micro * world_size + rank, world_size * accumulation))


def fetch_with_retries(fetch: Callable[[int], Content], sample: int, config: LoaderConfig) -> Content:
    """What `fetch(sample)` gives, tried again after a pause when it raises UnreadableImage; the last such error is passed on, and at once what was
    tried long enough already."""
    pause = config.retry_seconds
    for _ in range(config.retries):
        try:
            return fetch(sample)
        except UnreadableImage as error:
            if error.tried:
                raise
            time.sleep(pause)
            pause *= 4
    return fetch(sample)


@dataclass(frozen=True)
class Fetched(Generic[Content]):
    """The sample delivered, what was fetched for it, and the failures before."""

    sample: int
    content: Content
    failures: list[Failure]


def fetch_or_replace(fetch: Callable[[int], Content], plan: Plan, epoch: int, planned: int, config: LoaderConfig) -> Fetched[Content]:
    """The planned sample, or the first of its replacements that can be fetched.

    Which one is a function of (seed, epoch, sample, attempt) alone, never of what failed before, so a resumed run takes the same.
    Raises UserError if all replacements fail.
    """
    failures: list[Failure] = []
    for attempt in range(MAX_REPLACEMENTS + 1):
        sample = plan.replacement(epoch, planned, attempt) if attempt else planned
        try:
            return Fetched(sample, fetch_with_retries(fetch, sample, config), failures)
        except UnreadableImage as error:
            failures.append(Failure(sample, error.path, error.reason))
    last = failures[-1]
    raise UserError(f"{len(failures)} images in a row could not be read, the last is {last.path}: {last.reason}; is the storage still there?")


def assemble(part: PartPlan, delivered: BatchPlan, regions: Iterable[Tensor]) -> RegionBatch:
    """The batch of a part; `delivered` is its plan with the replacements in place."""
    return RegionBatch(
        regions=tuple(regions),
        boxes=torch.from_numpy(delivered.boxes),
        flips=torch.from_numpy(delivered.flips),
        samples=torch.from_numpy(delivered.samples),
        # A copy: the plan's own array is a view of the epoch's order.
        planned=torch.from_numpy(part.plan.samples.copy()),
        epoch=part.plan.epoch,
        step=part.step,
        micro=part.micro,
        copies=torch.from_numpy(delivered.copies),
    )


def with_replacements(plan: Plan, planned: BatchPlan, samples: npt.NDArray[np.int64]) -> BatchPlan:
    """The plan of what is delivered: `planned`, with boxes, flips and colour of their own for the rows whose sample is another in `samples`."""
    rows = np.flatnonzero(samples != planned.samples)
    return planned.with_rows(rows, plan.for_samples(planned.epoch, samples[rows], planned.copies[rows])) if len(rows) else planned


class Loader(ABC):
    """Batches in order, made ahead by a thread of their own; a context manager and an iterator of RegionBatch.

    wait_seconds: how long the consumer has waited for batches so far. quarantine: (path, reason) of each file that could not be read, once,
    in the order of the batches delivered. description: which loader this is, in a few words.
    """

    def __init__(self, index: ImageIndex, config: LoaderConfig, device: torch.device, description: str) -> None:
        self.wait_seconds = 0.0
        self.quarantine: list[tuple[str, str]] = []
        self.description = description
        self._index = index
        self._config = config
        self._device = device
        self._bad_samples: set[int] = set()
        self._batches = self._prepare()
        # One thread drives; each task of it makes one batch, so at most `prefetch` batches lie ready and nothing ever blocks for good.
        self._driver = ThreadPool(1, "loader")
        self._ahead: deque[Future[Prepared | None]] = deque()
        self._closed = self._left_behind = False
        self._end: Callable[[], None] | None = None
        self._closing = threading.Lock()

    @abstractmethod
    def _prepare(self) -> Iterator[Prepared]:
        """Makes the batches, in order; runs in the driving thread. Cleans up when the generator is closed."""

    def _to_device(self, batch: RegionBatch) -> RegionBatch:
        """The batch as the consumer gets it; runs in the consumer's thread."""
        return batch

    def __iter__(self) -> Iterator[RegionBatch]:
        return self

    def __next__(self) -> RegionBatch:
        self._top_up()
        if self._closed:
            raise StopIteration
        started = time.perf_counter()
        try:
            prepared = self._wait(self._ahead.popleft())
        except CancelledError:
            # Closed by another thread while this one waited.
            raise StopIteration from None
        finally:
            self.wait_seconds += time.perf_counter() - started
        if prepared is None:
            self.close()
            raise StopIteration
        self._top_up()
        self._note_failures(prepared.failures)
        return self._to_device(prepared.batch)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stops the threads and frees what they hold, at any time and from any thread, as often as you like. Delivered batches stay valid.

        A thread whose read does not return is left behind after some seconds, with a warning.
        """
        with self._closing:
            if self._closed:
                return
            self._closed = True
        if self._end is not None:
            self._end()
        if self._driver.close():
            # The driving thread is gone, so the generator is idle and its clean-up can run here.
            self._batches.close()  # type: ignore[attr-defined]
        else:
            self._left_behind = True

    def ends_with(self, end: Callable[[], None]) -> None:
        """Have something else closed with the loader."""
        self._end = end

    def _wait(self, future: Future[Prepared | None]) -> Prepared | None:
        """What a task gives. Raises CancelledError if the loader is closed meanwhile."""
        waited = 0.0
        while not wait([future], timeout=1.0).done:
            waited += 1.0
            if self._left_behind:
                raise CancelledError
            if waited == SLOW_SECONDS:
                warnings.warn(f"training has waited for images for {SLOW_SECONDS:g} s, and waits on: does the storage still answer?", stacklevel=3)
        return future.result()

    def _top_up(self) -> None:
        with self._closing:
            while len(self._ahead) < self._config.prefetch and not self._closed:
                self._ahead.append(self._driver.submit(next, self._batches, None))

    def _note_failures(self, failures: list[Failure]) -> None:
        for failure in failures:
            if failure.sample not in self._bad_samples:
                self._bad_samples.add(failure.sample)
                self.quarantine.append((str(failure.path), failure.reason))
        allowed = math.ceil(self._config.max_bad_ratio * len(self._index))
        if len(self.quarantine) > allowed:
            path, reason = self.quarantine[-1]
            self.close()
            raise UserError(
                f"{len(self.quarantine)} of {len(self._index)} images can no longer be read, more than max_bad_ratio = "
                f"{self._config.max_bad_ratio:g} allows; the last is {path}: {reason}. Mend the files or index the source again, then resume"
            )


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))
