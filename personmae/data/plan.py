"""The plan of a run: which samples a step sees, their crop boxes, flips and colour. Pure functions of (seed, epoch,
sample number).

Loaders only execute it. The same batches therefore come out of one process or eight, of either loader, and of a run
that was stopped and resumed. Boxes are drawn in float64 and rounded to int32 once, here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from personmae.configs import UserError
from personmae.data.region_draws import BOX_DRAWS, RegionConfig, colour_matrices, draw_boxes
from personmae_kernels.sample_random import GOLDEN, Stream, draws, integers_below, permutation, sample_seeds, uniforms

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class BatchPlan:
    """What to do with some samples of one epoch. Each has R regions: two in pre-training, 0 = A (input) and 1 = B (target).

    epoch: the epoch they are drawn in. samples: int64 [B]. copies: int64 [B], which of its pairs of regions this is, from
    0 (0 throughout unless samples are repeated); the copies of a sample stand side by side. boxes: int32 [B, R, 4], (y0, x0, y1, x1) pixels of the
    unflipped stored image. flips: bool [B, R]. The rest is None when the option is off: colour: float32 [B, R, 3, 4],
    output level = matrix @ (R, G, B, 1) with levels 0 to 255. blur_sigma: float32 [B, R], output pixels, 0 = no blur.
    shifts: int32 [B, R, 2], (down, right) in output pixels, black comes in. erase_fractions: float32 [B, R, 4], (y0, x0, y1, x1) as
    fractions of the region, all 0 = nothing erased; see `erase_boxes`.
    """

    epoch: int
    samples: Int64Array
    copies: Int64Array
    boxes: Int32Array
    flips: BoolArray
    colour: Float32Array | None = None
    blur_sigma: Float32Array | None = None
    shifts: Int32Array | None = None
    erase_fractions: Float32Array | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def erase_boxes(self, size: tuple[int, int]) -> Int32Array | None:
        """The erased boxes in pixels of regions of (height, width): int32 [B, R, 4], (y0, x0, y1, x1)."""
        if self.erase_fractions is None:
            return None
        height, width = size
        return np.rint(self.erase_fractions * np.array([height, width, height, width], dtype=np.float32)).astype(np.int32)

    def cut(self, rows: slice) -> BatchPlan:
        """The plan of some rows alone, its arrays views of this one's."""

        def option(array: Any) -> Any:
            return None if array is None else array[rows]

        return BatchPlan(
            epoch=self.epoch,
            samples=self.samples[rows],
            copies=self.copies[rows],
            boxes=self.boxes[rows],
            flips=self.flips[rows],
            colour=option(self.colour),
            blur_sigma=option(self.blur_sigma),
            shifts=option(self.shifts),
            erase_fractions=option(self.erase_fractions),
        )

    def with_rows(self, rows: Int64Array, other: BatchPlan) -> BatchPlan:
        """This plan with the samples at positions `rows` (int64 [R]) replaced by those of `other` (R samples of the
        same epoch)."""

        def merged(ours: npt.NDArray, theirs: npt.NDArray) -> npt.NDArray:
            result = ours.copy()
            result[rows] = theirs
            return result

        def merged_option(ours: Any, theirs: Any) -> Any:
            return None if ours is None or theirs is None else merged(ours, theirs)

        return replace(
            self,
            samples=merged(self.samples, other.samples),
            copies=merged(self.copies, other.copies),
            boxes=merged(self.boxes, other.boxes),
            flips=merged(self.flips, other.flips),
            colour=merged_option(self.colour, other.colour),
            blur_sigma=merged_option(self.blur_sigma, other.blur_sigma),
            shifts=merged_option(self.shifts, other.shifts),
            erase_fractions=merged_option(self.erase_fractions, other.erase_fractions),
        )


class Plan:
    """Order, boxes, flips and colour for a set of images.

    heights, widths: integer arrays [N], pixels of the stored images, N >= 1. batch_size: pairs of regions in a step of
    the whole run (all processes, all accumulation parts). seed: of the run. regions: how regions are drawn. repeats: R,
    pairs drawn of each image in a step (repeated sampling: Hoffer et al., "Augment your batch", CVPR 2020), each with
    boxes, flips and colour of its own. order: epoch -> the samples in their order, int64 [N]; by default all of them at
    random. neighbours: (epoch, sample) -> those that may take its place, int64 [M]; by default all others. Both must be
    pure functions.

    Steps count from 0 through all epochs; a step shows batch_size / R images R times each, side by side, and an epoch has
    N // (batch_size / R) steps; the few samples left over sit out (other ones each epoch). Raises UserError if batch_size
    is larger than N * R or no multiple of R.

    num_regions: R of its batches. has_shifts: whether they are shifted.
    """

    num_regions = 2
    has_shifts = False

    def __init__(
        self,
        heights: npt.ArrayLike,
        widths: npt.ArrayLike,
        batch_size: int,
        seed: int,
        regions: RegionConfig,
        *,
        repeats: int = 1,
        order: Callable[[int], Int64Array] | None = None,
        neighbours: Callable[[int, int], Int64Array] | None = None,
    ) -> None:
        self.heights = np.asarray(heights, dtype=np.int32)
        self.widths = np.asarray(widths, dtype=np.int32)
        if self.heights.shape != self.widths.shape or self.heights.ndim != 1:
            raise ValueError(f"heights and widths must be [N], not {self.heights.shape} and {self.widths.shape}")
        if batch_size < 1:
            raise UserError(f"the batch size is {batch_size}; it must be at least 1")
        if repeats < 1:
            raise UserError(f"repeats is {repeats}; it must be at least 1")
        if batch_size % repeats:
            raise UserError(f"the batch ({batch_size}) is no multiple of repeats ({repeats}), the pairs of regions of an image")
        most = len(self.heights) * repeats
        if batch_size > most:
            shown = f"{len(self.heights)} images" + (f", {repeats} pairs of each" if repeats > 1 else "")
            raise UserError(f"the batch ({batch_size}) is larger than the data set ({shown}): use a batch of at most {most}, or more images")
        self.batch_size = batch_size
        self.repeats = repeats
        self.seed = seed
        self.regions = regions
        self.order = order or self._any_order
        self._neighbours = neighbours
        self._order: tuple[int, Int64Array] | None = None

    @property
    def num_samples(self) -> int:
        return len(self.heights)

    @property
    def steps_per_epoch(self) -> int:
        return self.num_samples // self.images_per_step

    @property
    def images_per_step(self) -> int:
        """Different images of a step: batch_size / repeats."""
        return self.batch_size // self.repeats

    def step_samples(self, step: int) -> Int64Array:  # -> [batch_size]
        """The samples of optimiser step `step` (from 0), int64 [batch_size], in order; copies of a sample side by side."""
        epoch, within = divmod(step, self.steps_per_epoch)
        images = self._epoch_order(epoch)[within * self.images_per_step : (within + 1) * self.images_per_step]
        return np.repeat(images, self.repeats) if self.repeats > 1 else images

    def batch(self, step: int, part: int, num_parts: int) -> BatchPlan:
        """Part `part` (from 0) of `num_parts` contiguous parts of the batch of a step. Raises UserError if the parts
        would not be equal, or would part the copies of a sample."""
        if num_parts < 1 or self.batch_size % num_parts:
            raise UserError(
                f"the batch ({self.batch_size}) cannot be cut into {num_parts} equal parts (processes x accumulation): "
                f"use a batch that is a multiple of {num_parts}"
            )
        if self.batch_size // num_parts % self.repeats:
            raise UserError(
                f"a part of the batch ({self.batch_size} / {num_parts} = {self.batch_size // num_parts}) is no multiple of repeats "
                f"({self.repeats}), whose pairs come from one decoded image: use a batch that is a multiple of {num_parts * self.repeats}"
            )
        if not 0 <= part < num_parts:
            raise ValueError(f"part {part} is not one of {num_parts}")
        size = self.batch_size // num_parts
        samples = self.step_samples(step)[part * size : (part + 1) * size]
        return self.for_samples(step // self.steps_per_epoch, samples, np.arange(size) % self.repeats)

    def for_samples(self, epoch: int, samples: npt.ArrayLike, copies: npt.ArrayLike | None = None) -> BatchPlan:
        """Boxes, flips and colour of these samples (integers [B], repetition allowed) in an epoch. copies: integers [B],
        which copy of its sample each is; None = the first."""
        samples = np.asarray(samples, dtype=np.int64)
        copies = np.zeros_like(samples) if copies is None else np.asarray(copies, dtype=np.int64)
        heights, widths = self.heights[samples], self.widths[samples]
        seeds = sample_seeds(self.seed, epoch, samples, Stream.REGIONS, copies)
        # Region B takes the draws that follow those of region A; both are drawn in one go, which is twice as fast.
        both = np.stack([seeds, seeds + np.uint64(BOX_DRAWS * GOLDEN % (1 << 64))], axis=1)
        boxes = draw_boxes(np.repeat(heights, 2), np.repeat(widths, 2), both.ravel(), self.regions).boxes
        colour, blur_sigma = self._draw_colour(epoch, samples, copies)
        return BatchPlan(
            epoch=epoch,
            samples=samples,
            copies=copies,
            boxes=boxes.reshape(len(samples), 2, 4),
            flips=self._draw_flips(epoch, samples, copies),
            colour=colour,
            blur_sigma=blur_sigma,
            erase_fractions=self._draw_erasing(epoch, samples, copies),
        )

    def replacement(self, epoch: int, sample: int, attempt: int) -> int:
        """The sample to take instead of an unreadable one, at attempt 1, 2, 3, ...; another sample wherever there is
        one."""
        others = self.num_samples - 1
        if others == 0:
            return sample
        word = draws(sample_seeds(self.seed, epoch, [sample], Stream.REPLACEMENT), 1, first=attempt - 1)
        near = self._neighbours(epoch, sample) if self._neighbours else ()
        if len(near):
            return int(near[integers_below(word, len(near))[0, 0]])
        return (sample + 1 + int(integers_below(word, others)[0, 0])) % self.num_samples

    def _any_order(self, epoch: int) -> Int64Array:
        return permutation(self.seed, epoch, self.num_samples)

    def _epoch_order(self, epoch: int) -> Int64Array:
        cached = self._order
        if cached is None or cached[0] != epoch:
            # One assignment of a pair, so that a second thread sees the old order or the new one.
            cached = (epoch, self.order(epoch))
            self._order = cached
        return cached[1]

    def _draw_flips(self, epoch: int, samples: Int64Array, copies: Int64Array) -> BoolArray:
        words = draws(sample_seeds(self.seed, epoch, samples, Stream.FLIPS, copies), 2)
        flips = uniforms(words) < self.regions.flip_prob
        if not self.regions.independent_flips:
            flips[:, 1] = flips[:, 0]
        return flips

    def _draw_colour(self, epoch: int, samples: Int64Array, copies: Int64Array) -> tuple[Float32Array | None, Float32Array | None]:
        config = self.regions
        if not config.has_colour and config.blur_prob == 0:
            return None, None
        values = uniforms(draws(sample_seeds(self.seed, epoch, samples, Stream.COLOUR, copies), 10))
        colour = blur_sigma = None
        if config.has_colour:
            matrices = np.repeat(colour_matrices(config, values[:, :6])[:, None], 2, axis=1)
            if config.colour_on == "a":
                matrices[:, 1] = np.eye(3, 4, dtype=np.float32)
            colour = np.ascontiguousarray(matrices)
        if config.blur_prob > 0:
            low, high = config.blur_sigma
            sigmas = np.where(values[:, 6:8] < config.blur_prob, low + values[:, 8:10] * (high - low), 0.0)
            if config.colour_on == "a":
                sigmas[:, 1] = 0
            blur_sigma = sigmas.astype(np.float32)
        return colour, blur_sigma

    def _draw_erasing(self, epoch: int, samples: Int64Array, copies: Int64Array) -> Float32Array | None:
        config = self.regions
        if config.erasing_prob == 0:
            return None
        words = draws(sample_seeds(self.seed, epoch, samples, Stream.ERASING, copies), 10)
        values = uniforms(words).reshape(-1, 2, 5)
        low, high = config.erasing_scale
        area = low + values[..., 1] * (high - low)
        # Height over width of the box as fractions of the region, log-uniform as in random erasing (Zhong et al., AAAI
        # 2020).
        shape = np.exp(np.log(0.3) + values[..., 2] * (np.log(1 / 0.3) - np.log(0.3)))
        heights, widths = np.minimum(np.sqrt(area * shape), 1.0), np.minimum(np.sqrt(area / shape), 1.0)
        top, left = values[..., 3] * (1 - heights), values[..., 4] * (1 - widths)
        fractions = np.stack([top, left, top + heights, left + widths], axis=-1)
        fractions[values[..., 0] >= config.erasing_prob] = 0
        if config.colour_on == "a":
            fractions[:, 1] = 0
        return np.minimum(fractions, 1.0).astype(np.float32)
