"""The loader on the host: simplejpeg decodes and OpenCV samples, on a pool of threads or on processes. The fastest one without a GPU."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from personmae.data.decoded_file import DecodedFile, image_lengths
from personmae.data.delivery import Failure, Loader, LoaderConfig, PartPlan, Prepared, RegionBatch, assemble, with_replacements
from personmae.data.image_index import ImageIndex
from personmae.data.images import UInt8Array
from personmae.data.painting_processes import Images, PaintingProcesses
from personmae.data.plan import BatchPlan, Plan
from personmae.data.row_painter import RowPainter
from personmae.data.shared_pixels import SharedPixels
from personmae.data.thread_pool import ThreadPool

# Rows of a batch that one task makes, about. Short tasks spread a batch evenly; much shorter ones would cost more than they give.
_ROWS_PER_TASK = 8
_ROWS_PER_PROCESS_TASK = 16
_FEWEST_ROWS = 4
# Batches whose tasks may stand in the pool's queue together: the threads stay busy while the last tasks of a batch finish.
_BATCHES_IN_POOL = 2


class ThreadLoader(Loader):
    """Executes the plan on `num_threads` threads of this process, or as many processes (see `painting_processes`).

    parts: the micro-batches to make. size: (H, W) of the regions. device: where the regions go; to a GPU they travel from pinned memory, without
    making the host wait. decoded: where pixels come from instead of files. The other parameters are those of `open_loader`. Batches depend on neither
    the number of threads nor the kind.
    """

    def __init__(
        self,
        index: ImageIndex,
        plan: Plan,
        config: LoaderConfig,
        parts: Iterator[PartPlan],
        *,
        size: tuple[int, int],
        device: torch.device,
        num_threads: int,
        in_processes: bool = False,
        decoded: DecodedFile | None = None,
    ) -> None:
        decoded_bytes = int(image_lengths(index).sum())
        # All or nothing: with part of the images in memory, an epoch would still take as long as its slowest batches.
        keep = decoded is None and decoded_bytes <= config.cache_gib * 2**30
        self._images: Images = decoded or (SharedPixels(index) if keep else index)
        self._painter = RowPainter(plan, config, size, self._images.image)
        self._plan = plan
        self._parts = parts
        self._size = size
        self._num_threads, self._in_processes = num_threads, in_processes
        kept = f", decoded images kept in memory ({decoded_bytes / 2**30:.2f} GiB)" if keep else ""
        kept = kept if decoded is None else ", decoded images from a file"
        super().__init__(index, config, device, f"{num_threads} {'processes' if in_processes else 'threads'} with simplejpeg and OpenCV{kept}")

    def _prepare(self) -> Generator[Prepared, None, None]:
        if self._device.type == "cuda":
            # Pinned memory belongs to the current device, which is a thread's own affair.
            torch.cuda.set_device(self._device)
        previous = cv2.getNumThreads()
        # OpenCV's own threads would fight with ours over the cores.
        cv2.setNumThreads(0)
        processes = self._start_processes() if self._in_processes else None
        pool = ThreadPool(self._num_threads, "images")
        try:
            started: deque[_Started] = deque()
            for part in self._parts:
                started.append(self._start(pool, part, processes))
                if len(started) == _BATCHES_IN_POOL:
                    yield self._finish(started.popleft())
            while started:
                yield self._finish(started.popleft())
        finally:
            # First, so that no thread waits for one.
            if processes is not None:
                processes.close()
            pool.close()
            if isinstance(self._images, SharedPixels):
                self._images.close()
            cv2.setNumThreads(previous)

    def _start_processes(self) -> PaintingProcesses:
        return PaintingProcesses(
            self._images,
            self._config,
            self._size,
            num_regions=self._plan.num_regions,
            rows_at_once=self._rows_per_task(),
            repeats=self._plan.repeats,
            num_processes=self._num_threads,
        )

    def _rows_per_task(self, num_rows: int | None = None) -> int:
        """Of a batch of so many rows; without it the most of any batch. Those of an image stay together."""
        rows = _ROWS_PER_PROCESS_TASK if self._in_processes else _ROWS_PER_TASK
        if num_rows is not None:
            # The batches in the pool give every thread a task.
            rows = min(rows, max(_FEWEST_ROWS, _BATCHES_IN_POOL * num_rows // self._num_threads))
        return max(1, rows // self._plan.repeats) * self._plan.repeats

    def _start(self, pool: ThreadPool, part: PartPlan, processes: PaintingProcesses | None) -> _Started:
        shape = (self._plan.num_regions, len(part.plan), *self._size, 3)
        regions = torch.empty(shape, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        pixels = regions.numpy()
        samples = part.plan.samples.copy()
        per_task = self._rows_per_task(len(samples))
        tasks = [range(first, min(first + per_task, len(samples))) for first in range(0, len(samples), per_task)]
        paint = self._painter.paint if processes is None else partial(self._paint, processes)
        futures = [pool.submit(paint, part.plan, rows, pixels, samples) for rows in tasks]
        return _Started(part, regions, samples, futures)

    def _finish(self, started: _Started) -> Prepared:
        failures = [failure for future in started.futures for failure in future.result()]
        delivered = with_replacements(self._plan, started.part.plan, started.samples)
        return Prepared(assemble(started.part, delivered, started.regions), failures)

    def _paint(
        self, processes: PaintingProcesses, planned: BatchPlan, rows: range, pixels: UInt8Array, samples: npt.NDArray[np.int64]
    ) -> list[Failure]:
        failures = []
        for first in processes.paint(planned, rows, pixels):
            # Here the image is tried again, and replaced.
            failures += self._painter.paint(planned, range(first, first + self._plan.repeats), pixels, samples)
        return failures

    def _to_device(self, batch: RegionBatch) -> RegionBatch:
        return batch.to(self._device)


@dataclass(frozen=True)
class _Started:
    """A batch whose tasks are in the pool."""

    part: PartPlan
    regions: Tensor
    samples: npt.NDArray[np.int64]
    futures: list[Future[list[Failure]]]
