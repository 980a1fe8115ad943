"""The loader on NVIDIA DALI: decodes on the CPU (or with nvJPEG), crops, resizes, flips and recolours in DALI's graph, on the GPU where there is one.

DALI only executes the plan; it owns no order and no randomness. It has no way to skip a bad file: an image that it cannot decode costs the batch,
and some errors end the pipeline for good. So the contents are checked before they are fed (length and checksum of the index), and should a run of
the pipeline fail nevertheless, its batch is made on the host instead and a new pipeline takes over from the next one.

Ordinary RGB and grey JPEGs are fed as they are: DALI's CPU decoder gives the bits of simplejpeg. Anything else (PNG, WebP, BMP, CMYK, rare
subsampling) is decoded by `images.decode` and fed as an uncompressed PPM, so that both loaders see the same pixels.

On a GPU nothing of this has been run yet by the authors.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from personmae.data.delivery import Failure, Loader, LoaderConfig, PartPlan, Prepared, RegionBatch, assemble, fetch_or_replace, with_replacements
from personmae.data.image_index import ImageIndex
from personmae.data.images import ANTIALIAS_FROM, ERASED_COLOUR, UInt8Array, blur_windows, decode
from personmae.data.plan import BatchPlan, Plan
from personmae.data.row_painter import RowPainter
from personmae.data.thread_pool import ThreadPool

# So many batches in a row that DALI fails on are no longer about the images.
_MAX_FAILURES_IN_A_ROW = 3
_SAMPLES_PER_READ = 16


@dataclass(frozen=True)
class _Fed:
    """A batch given to DALI: its part, the plan of what is delivered, the encoded images, and the failures met when reading them.

    Of a sample that is repeated, one encoded image is fed for all its copies.
    """

    part: PartPlan
    delivered: BatchPlan
    contents: list[UInt8Array]
    failures: list[Failure]


class DaliLoader(Loader):
    """Executes the plan with DALI. Parameters as for `ThreadLoader`; with a CPU device DALI runs without a GPU (`device_id=None`).

    recoveries: batches that DALI failed on and the host made instead.
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
    ) -> None:
        self.recoveries = 0
        self._dali = _import_dali()
        self._painter = RowPainter(plan, config, size, index.image)
        self._plan = plan
        self._parts = parts
        self._size = size
        self._num_threads = num_threads
        self._host_decoded: set[int] = set()
        self._in_use: deque[tuple[torch.cuda.Event, RegionBatch]] = deque()
        # Fed to DALI and not delivered yet, oldest first; and batches to feed again to the next pipeline.
        self._outstanding: deque[_Fed] = deque()
        self._again: deque[_Fed] = deque()
        where = "CPU"
        if device.type == "cuda":
            where = "CPU decoding, GPU sampling" if config.dali_decode == "cpu" else "nvJPEG decoding, GPU sampling"
        super().__init__(index, config, device, f"DALI {self._dali.__version__}, {where}, {num_threads} threads")

    def _prepare(self) -> Generator[Prepared, None, None]:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        first = next(self._parts, None)
        if first is None:
            return
        self._parts = itertools.chain([first], self._parts)
        failures_in_a_row = 0
        with contextlib.closing(ThreadPool(self._num_threads, "files")) as readers:
            pipeline = None
            while True:
                if pipeline is None:
                    pipeline = self._build(readers, len(first.plan) // self._plan.repeats)
                outputs = None
                try:
                    outputs = pipeline.run()
                except StopIteration:
                    return
                except RuntimeError as error:
                    if not self._outstanding or failures_in_a_row == _MAX_FAILURES_IN_A_ROW:
                        raise
                    # Only the words are kept: the error's traceback would keep the dead pipeline and its memory.
                    reason, pipeline = str(error), None
                fed = self._outstanding.popleft()
                if outputs is not None:
                    failures_in_a_row = 0
                    # Of repeated samples the copies have an axis of their own, [B / R, R, H, W, 3].
                    regions = [torch.from_dlpack(output.as_tensor()).view(-1, *self._size, 3) for output in outputs[:-1]]
                    numbers, wanted = outputs[-1].as_array(), fed.delivered.samples[:: self._plan.repeats]
                    assert np.array_equal(numbers, wanted), f"DALI delivered samples {numbers}, not {wanted}"
                    yield Prepared(assemble(fed.part, fed.delivered, regions), fed.failures)
                else:
                    failures_in_a_row += 1
                    self.recoveries += 1
                    warnings.warn(f"DALI failed on a batch of step {fed.part.step}, which is made on the host instead: {reason}", stacklevel=2)
                    # Which image it was is not known, so none of them goes to DALI's decoder again.
                    self._host_decoded.update(fed.delivered.samples.tolist())
                    self._again, self._outstanding = deque([*self._outstanding, *self._again]), deque()
                    yield self._make_on_host(fed.part)

    def _build(self, readers: ThreadPool, batch_size: int) -> Any:
        def feed() -> list[Any]:
            # At the end `next` raises StopIteration, which DALI passes on after the batches it still holds.
            fed = self._again.popleft() if self._again else self._read(next(self._parts), readers)
            self._outstanding.append(fed)
            samples = np.ascontiguousarray(fed.delivered.samples[:: self._plan.repeats])
            return [fed.contents, samples, *_graph_inputs(fed.delivered, self._size, self._plan.repeats)]

        plan = self._plan.regions
        on_gpu = self._device.type == "cuda"
        graph = self._dali.pipeline_def(enable_conditionals=True)(_regions_graph)
        pipeline = graph(
            self._dali,
            feed,
            self._size,
            _Options(
                plan.has_colour,
                plan.blur_prob > 0,
                self._plan.has_shifts,
                plan.erasing_prob > 0,
                on_gpu,
                on_gpu and self._config.dali_decode == "mixed",
                self._plan.repeats,
                self._plan.num_regions,
            ),
            batch_size=batch_size,
            num_threads=self._num_threads,
            device_id=self._device.index if on_gpu else None,
            prefetch_queue_depth=2,
        )
        pipeline.build()
        return pipeline

    def _read(self, part: PartPlan, readers: ThreadPool) -> _Fed:
        def read_some(planned: npt.NDArray[np.int64]) -> list[tuple[int, UInt8Array, list[Failure]]]:
            epoch = part.plan.epoch
            fetched = (fetch_or_replace(self._content, self._plan, epoch, int(sample), self._config) for sample in planned)
            return [(one.sample, one.content, one.failures) for one in fetched]

        planned = part.plan.samples[:: self._plan.repeats]
        pieces = np.split(planned, range(_SAMPLES_PER_READ, len(planned), _SAMPLES_PER_READ))
        rows = [row for piece in readers.map(read_some, pieces) for row in piece]
        samples = np.repeat(np.array([sample for sample, _, _ in rows], dtype=np.int64), self._plan.repeats)
        delivered = with_replacements(self._plan, part.plan, samples)
        return _Fed(part, delivered, [content for _, content, _ in rows], [failure for _, _, failures in rows for failure in failures])

    def _content(self, sample: int) -> UInt8Array:  # -> [bytes]
        """What DALI is fed for a sample: its JPEG, or its pixels as a PPM."""
        data = self._index.read(sample)
        if not self._index.plain[sample] or sample in self._host_decoded:
            pixels = decode(data, self._index.path(sample))
            data = b"P6\n%d %d\n255\n" % (pixels.shape[1], pixels.shape[0]) + pixels.tobytes()
        return np.frombuffer(data, dtype=np.uint8)

    def _make_on_host(self, part: PartPlan) -> Prepared:
        """A batch that DALI failed on, from its plan: all reads and checks again, with strict decoding."""
        regions = torch.empty((self._plan.num_regions, len(part.plan), *self._size, 3), dtype=torch.uint8)
        samples = part.plan.samples.copy()
        failures = self._painter.paint(part.plan, range(len(samples)), regions.numpy(), samples)
        delivered = with_replacements(self._plan, part.plan, samples)
        return Prepared(assemble(part, delivered, regions).to(self._device), failures)

    def _to_device(self, batch: RegionBatch) -> RegionBatch:
        if self._device.type != "cuda":
            return batch
        # DALI takes its memory back as soon as Python lets go of it, and knows nothing of kernels of ours that still have to read it. So training
        # gets a copy made on its own stream, and DALI's tensors are kept until that copy has been made.
        while self._in_use and self._in_use[0][0].query():
            self._in_use.popleft()
        own = batch.clone_regions()
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(self._device))
        self._in_use.append((copied, batch))
        return own


@dataclass(frozen=True)
class _Options:
    colour: bool
    blur: bool
    shifts: bool
    erasing: bool
    on_gpu: bool
    mixed: bool
    repeats: int
    num_regions: int


def _graph_inputs(plan: BatchPlan, size: tuple[int, int], repeats: int) -> list[npt.NDArray]:
    """The plan as the graph takes it. For the first region of each copy, then for the next: start and end of the ROI (y, x), swapped in x when
    flipped; antialias or not; and, where the options are on, colour matrix, blur sigma and window, anchor of the shifted region, anchor and shape of
    the erased box."""
    erase_boxes = plan.erase_boxes(size)
    inputs: list[npt.NDArray] = []
    for region, copy in itertools.product(range(plan.boxes.shape[1]), range(repeats)):
        rows = slice(copy, None, repeats)
        boxes, flips = plan.boxes[rows, region].astype(np.float32), plan.flips[rows, region]
        starts = np.stack([boxes[:, 0], np.where(flips, boxes[:, 3], boxes[:, 1])], axis=1)
        ends = np.stack([boxes[:, 2], np.where(flips, boxes[:, 1], boxes[:, 3])], axis=1)
        shrink = np.maximum((boxes[:, 2] - boxes[:, 0]) / size[0], (boxes[:, 3] - boxes[:, 1]) / size[1])
        inputs += [starts, ends, shrink > ANTIALIAS_FROM]
        if plan.colour is not None:
            inputs.append(plan.colour[rows, region])
        if plan.blur_sigma is not None:
            inputs += [plan.blur_sigma[rows, region], blur_windows(plan.blur_sigma[rows, region])]
        if plan.shifts is not None:
            inputs.append(-plan.shifts[rows, region])
        if erase_boxes is not None:
            corners = erase_boxes[rows, region].astype(np.float32)
            inputs += [corners[:, :2], corners[:, 2:] - corners[:, :2]]
    # DALI takes dense arrays only.
    return [np.ascontiguousarray(array) for array in inputs]


def _regions_graph(dali: Any, feed: Callable[[], list[Any]], size: tuple[int, int], options: _Options) -> Any:
    """The graph of a `pipeline_def`. Returns regions, uint8 [H, W, 3] each (repeated: [copies, H, W, 3]), and sample number."""
    fn, types = dali.fn, dali.types
    kinds = [types.FLOAT, types.FLOAT, types.BOOL]
    dimensions = [1, 1, 0]
    if options.colour:
        kinds, dimensions = [*kinds, types.FLOAT], [*dimensions, 2]
    if options.blur:
        kinds, dimensions = [*kinds, types.FLOAT, types.INT32], [*dimensions, 0, 0]
    if options.shifts:
        kinds, dimensions = [*kinds, types.INT32], [*dimensions, 1]
    if options.erasing:
        kinds, dimensions = [*kinds, types.FLOAT, types.FLOAT], [*dimensions, 1, 1]
    num_drawn = options.num_regions * options.repeats
    inputs = fn.external_source(
        source=feed,
        num_outputs=2 + num_drawn * len(kinds),
        batch=True,
        dtype=[types.UINT8, types.INT64, *kinds * num_drawn],
        ndim=[1, 0, *dimensions * num_drawn],
    )
    images = fn.decoders.image(inputs[0], device="mixed" if options.mixed else "cpu", output_type=types.RGB, adjust_orientation=False)
    if options.on_gpu and not options.mixed:
        images = images.gpu()
    firsts = range(2, 2 + num_drawn * len(kinds), len(kinds))
    drawn = [_region_graph(dali, images, inputs[first : first + len(kinds)], size, options) for first in firsts]
    if options.repeats > 1:
        drawn = [fn.stack(*drawn[first : first + options.repeats]) for first in range(0, num_drawn, options.repeats)]
    return (*drawn, inputs[1])


def _region_graph(dali: Any, images: Any, inputs: list[Any], size: tuple[int, int], options: _Options) -> Any:
    """One region of each image, from its part of `_graph_inputs`."""
    fn, types = dali.fn, dali.types
    starts, ends, antialias = inputs[:3]
    rest = list(inputs[3:])
    # DALI turns this into a split of the batch: `antialias` is one value for each sample.
    if antialias:
        region = fn.resize(images, roi_start=starts, roi_end=ends, size=size, interp_type=types.INTERP_LINEAR, antialias=True)
    else:
        region = fn.resize(images, roi_start=starts, roi_end=ends, size=size, interp_type=types.INTERP_LINEAR, antialias=False)
    if options.colour:
        region = fn.reinterpret(fn.coord_transform(region, MT=rest.pop(0), dtype=types.UINT8), layout="HWC")
    if options.blur:
        region = fn.gaussian_blur(region, sigma=rest.pop(0), window_size=rest.pop(0))
    if options.shifts:
        region = fn.slice(region, start=rest.pop(0), shape=list(size), axes=(0, 1), out_of_bounds_policy="pad", fill_values=0)
    if options.erasing:
        region = fn.erase(region, anchor=rest.pop(0), shape=rest.pop(0), axes=(0, 1), fill_value=list(ERASED_COLOUR))
    return region


def _import_dali() -> Any:
    """The package, with its operators. Any, because its stubs, where it has them, do not describe graphs."""
    import nvidia.dali
    import nvidia.dali.fn
    import nvidia.dali.types

    return nvidia.dali
