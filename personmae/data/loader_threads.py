"""The loader on a pool of threads: simplejpeg decodes, OpenCV samples, both without Python's lock. The fastest one without a GPU."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from personmae.data.decoded_file import DecodedFile
from personmae.data.delivery import (
    Failure,
    Loader,
    LoaderConfig,
    PartPlan,
    Prepared,
    RegionBatch,
    assemble,
    fetch_or_replace,
    with_replacements,
)
from personmae.data.image_index import ImageIndex
from personmae.data.images import UInt8Array, recolour, sample_box
from personmae.data.plan import BatchPlan, Plan
from personmae.data.thread_pool import ThreadPool

# Short tasks spread a batch evenly; much shorter ones would cost more than they give.
_IMAGES_PER_TASK = 8
# Batches whose tasks may stand in the pool's queue together: the threads stay busy while the last tasks of a batch finish.
_BATCHES_IN_POOL = 2


class ThreadLoader(Loader):
    """Executes the plan on `num_threads` threads of this process.

    parts: the micro-batches to make. size: (H, W) of the regions. device: where the regions go; to a GPU they travel from pinned memory, without
    making the host wait. decoded: where pixels come from instead of files. The other parameters are those of `open_loader`. Batches do not depend on
    the number of threads.
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
        decoded: DecodedFile | None = None,
    ) -> None:
        self._decoded = decoded
        decoded_bytes = 3 * int((index.heights.astype(np.int64) * index.widths).sum())
        # All or nothing: with part of the images in memory, an epoch would still take as long as its slowest batches.
        keep = decoded is None and decoded_bytes <= config.cache_gib * 2**30
        self._cache: dict[int, UInt8Array] | None = {} if keep else None
        self._painter = RowPainter(plan, config, size, self._image)
        self._plan = plan
        self._parts = parts
        self._size = size
        self._num_threads = num_threads
        kept = f", decoded images kept in memory ({decoded_bytes / 2**30:.2f} GiB)" if self._cache is not None else ""
        kept = kept if decoded is None else ", decoded images from a file"
        super().__init__(index, config, device, f"{num_threads} threads with simplejpeg and OpenCV{kept}")

    def _prepare(self) -> Generator[Prepared, None, None]:
        if self._device.type == "cuda":
            # Pinned memory belongs to the current device, which is a thread's own affair.
            torch.cuda.set_device(self._device)
        previous = cv2.getNumThreads()
        # OpenCV's own threads would fight with ours over the cores.
        cv2.setNumThreads(0)
        pool = ThreadPool(self._num_threads, "images")
        try:
            started: deque[_Started] = deque()
            for part in self._parts:
                started.append(self._start(pool, part))
                if len(started) == _BATCHES_IN_POOL:
                    yield self._finish(started.popleft())
            while started:
                yield self._finish(started.popleft())
        finally:
            pool.close()
            cv2.setNumThreads(previous)

    def _start(self, pool: ThreadPool, part: PartPlan) -> _Started:
        shape = (self._plan.num_regions, len(part.plan), *self._size, 3)
        regions = torch.empty(shape, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        pixels = regions.numpy()
        samples = part.plan.samples.copy()
        per_task = _IMAGES_PER_TASK * self._plan.repeats
        futures = [
            pool.submit(self._painter.paint, part.plan, range(first, min(first + per_task, len(samples))), pixels, samples)
            for first in range(0, len(samples), per_task)
        ]
        return _Started(part, regions, samples, futures)

    def _finish(self, started: _Started) -> Prepared:
        failures = [failure for future in started.futures for failure in future.result()]
        delivered = with_replacements(self._plan, started.part.plan, started.samples)
        return Prepared(assemble(started.part, delivered, started.regions), failures)

    def _image(self, sample: int) -> UInt8Array:
        if self._decoded is not None:
            return self._decoded.image(sample)
        if self._cache is None:
            return self._index.image(sample)
        image = self._cache.get(sample)
        if image is None:
            image = self._cache[sample] = self._index.image(sample)
        return image

    def _to_device(self, batch: RegionBatch) -> RegionBatch:
        return batch.to(self._device)


@dataclass(frozen=True)
class RowPainter:
    """Draws the regions of single images on the host, replacing what cannot be read.

    image: sample -> uint8 [H', W', 3], or raises UnreadableImage. size: (H, W) of the regions.
    """

    plan: Plan
    config: LoaderConfig
    size: tuple[int, int]
    image: Callable[[int], UInt8Array]

    def paint(self, planned: BatchPlan, rows: range, pixels: UInt8Array, samples: npt.NDArray[np.int64]) -> list[Failure]:
        """Writes some rows of a batch into pixels, uint8 [R, B, H, W, 3], and the samples they show in the end into samples, int64 [B].

        rows: all copies of each sample among them, which are drawn from one decoded image.
        """
        failures: list[Failure] = []
        erase_boxes = planned.erase_boxes(self.size)
        repeats = self.plan.repeats
        for first in rows[::repeats]:
            copies = slice(first, first + repeats)
            fetched = fetch_or_replace(self.image, self.plan, planned.epoch, int(planned.samples[first]), self.config)
            drawn, erased, start = planned, erase_boxes, first
            if fetched.failures:
                failures += fetched.failures
                samples[copies] = fetched.sample
                drawn, start = self.plan.for_samples(planned.epoch, samples[copies], planned.copies[copies]), 0
                erased = drawn.erase_boxes(self.size)
            for copy in range(repeats):
                self._draw(fetched.content, drawn, erased, start + copy, pixels[:, first + copy])
        return failures

    def _draw(self, image: UInt8Array, plan: BatchPlan, erase_boxes: npt.NDArray[np.int32] | None, row: int, out: UInt8Array) -> None:
        for region in range(len(out)):
            y0, x0, y1, x1 = plan.boxes[row, region].tolist()
            sample_box(image, (y0, x0, y1, x1), bool(plan.flips[row, region]), self.size, out[region])
            recolour(
                out[region],
                None if plan.colour is None else plan.colour[row, region],
                0.0 if plan.blur_sigma is None else float(plan.blur_sigma[row, region]),
                None if plan.shifts is None else plan.shifts[row, region],
                None if erase_boxes is None else erase_boxes[row, region],
            )


@dataclass(frozen=True)
class _Started:
    """A batch whose tasks are in the pool."""

    part: PartPlan
    regions: Tensor
    samples: npt.NDArray[np.int64]
    futures: list[Future[list[Failure]]]
