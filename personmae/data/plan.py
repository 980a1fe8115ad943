"""The plan of a run: which samples a step sees, their crop boxes, flips and colour. Pure functions of (seed, epoch,
sample number).

Loaders only execute it. The same batches therefore come out of one process or eight, of either loader, and of a run
that was stopped and resumed. Boxes are drawn in float64 and rounded to int32 once, here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from personmae.configs import UserError
from personmae_kernels.sample_random import GOLDEN, Stream, draws, integers_below, permutation, sample_seeds, uniforms

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

# A box never gets smaller than this along an axis, unless the image itself is.
MIN_BOX_PX = 4
# Tries at a box that lies within the image, before its area gives way.
_MAX_BOX_TRIES = 48
_TRIES_AT_ONCE = 8
# Draws set aside for one box: area, aspect, y and x at each try.
BOX_DRAWS = 4 * _MAX_BOX_TRIES
# Luma weights of Rec. 601, as in torchvision and PIL.
_LUMA = np.array([0.299, 0.587, 0.114])
_MID_GREY = 127.5


@dataclass(frozen=True, kw_only=True)
class RegionConfig:
    """How the two regions of an image are drawn.

    crop_scale: (least, most) area of a region as a fraction of the image's, uniform. crop_aspect: (least, most) width /
    height, log-uniform; the default is the range of MALE and HAP, 0.5 * [3/4, 4/3] (torchvision's 3/4 to 4/3 does not
    fit a person crop, and makes both regions one). flip_prob: mirrored left to right; one draw for both regions, or one
    each with `independent_flips`.

    brightness, contrast, saturation: factors in 1 +- this value (contrast about mid-grey); hue: rotation by up to +-
    this fraction of the circle; colour_jitter_prob: share of images that get the four; grey_prob: share turned grey.
    One draw for both regions of an image, since the target's colours are to be predicted from the other region.
    blur_prob, blur_sigma: share of regions blurred, and (least, most) sigma in output pixels. erasing_prob,
    erasing_scale: share of regions with an erased box, and its (least, most) area fraction. Drawn for each region.
    colour_on: "both" regions, or only the input region "a", get colour, grey, blur and erasing.
    """

    crop_scale: tuple[float, float] = (0.4, 1.0)
    crop_aspect: tuple[float, float] = (0.375, 0.667)
    flip_prob: float = 0.5
    independent_flips: bool = False
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    colour_jitter_prob: float = 0.8
    grey_prob: float = 0.0
    blur_prob: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    erasing_prob: float = 0.0
    erasing_scale: tuple[float, float] = (0.02, 0.2)
    colour_on: Literal["both", "a"] = "both"

    def __post_init__(self) -> None:
        for name, most in (("crop_scale", 1.0), ("crop_aspect", 100.0), ("blur_sigma", 100.0), ("erasing_scale", 1.0)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= most:
                raise UserError(f"{name} is {(low, high)}; it must be (least, most) with 0 < least <= most <= {most:g}")
        for name, most in (
            ("flip_prob", 1.0),
            ("colour_jitter_prob", 1.0),
            ("grey_prob", 1.0),
            ("blur_prob", 1.0),
            ("erasing_prob", 1.0),
            ("brightness", 1.0),
            ("contrast", 1.0),
            ("saturation", 1.0),
            ("hue", 0.5),
        ):
            value = getattr(self, name)
            if not 0 <= value <= most:
                raise UserError(f"{name} is {value}; it must lie between 0 and {most:g}")
        if self.colour_on not in ("both", "a"):
            raise UserError(f'colour_on is {self.colour_on!r}; it must be "both" or "a"')

    @property
    def has_colour(self) -> bool:
        jitter = self.colour_jitter_prob > 0 and max(self.brightness, self.contrast, self.saturation, self.hue) > 0
        return jitter or self.grey_prob > 0


@dataclass(frozen=True)
class BatchPlan:
    """What to do with some samples of one epoch. Regions are numbered 0 = A (input) and 1 = B (target).

    epoch: the epoch they are drawn in. samples: int64 [B]. copies: int64 [B], which of its pairs of regions this is, from
    0 (0 throughout unless samples are repeated); the copies of a sample stand side by side. boxes: int32 [B, 2, 4], (y0, x0, y1, x1) pixels of the
    unflipped stored image. flips: bool [B, 2]. The rest is None when the option is off: colour: float32 [B, 2, 3, 4],
    output level = matrix @ (R, G, B, 1) with levels 0 to 255. blur_sigma: float32 [B, 2], output pixels, 0 = no blur.
    erase_fractions: float32 [B, 2, 4], (y0, x0, y1, x1) as fractions of the region, all 0 = nothing erased; see
    `erase_boxes`.
    """

    epoch: int
    samples: Int64Array
    copies: Int64Array
    boxes: Int32Array
    flips: BoolArray
    colour: Float32Array | None = None
    blur_sigma: Float32Array | None = None
    erase_fractions: Float32Array | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def erase_boxes(self, size: tuple[int, int]) -> Int32Array | None:
        """The erased boxes in pixels of regions of (height, width): int32 [B, 2, 4], (y0, x0, y1, x1)."""
        if self.erase_fractions is None:
            return None
        height, width = size
        return np.rint(self.erase_fractions * np.array([height, width, height, width], dtype=np.float32)).astype(np.int32)

    def with_rows(self, rows: Int64Array, other: BatchPlan) -> BatchPlan:
        """This plan with the samples at positions `rows` (int64 [R]) replaced by those of `other` (R samples of the
        same epoch)."""

        def merged(ours: npt.NDArray, theirs: npt.NDArray) -> npt.NDArray:
            result = ours.copy()
            result[rows] = theirs
            return result

        def merged_option(ours: Float32Array | None, theirs: Float32Array | None) -> Float32Array | None:
            return None if ours is None or theirs is None else merged(ours, theirs)

        return replace(
            self,
            samples=merged(self.samples, other.samples),
            copies=merged(self.copies, other.copies),
            boxes=merged(self.boxes, other.boxes),
            flips=merged(self.flips, other.flips),
            colour=merged_option(self.colour, other.colour),
            blur_sigma=merged_option(self.blur_sigma, other.blur_sigma),
            erase_fractions=merged_option(self.erase_fractions, other.erase_fractions),
        )


@dataclass(frozen=True)
class Boxes:
    """boxes: int32 [N, 4], (y0, x0, y1, x1). clamped: bool [N], no box of the drawn area fitted the image, so it got
    the largest that does."""

    boxes: Int32Array
    clamped: BoolArray


class Plan:
    """Order, boxes, flips and colour for a set of images.

    heights, widths: integer arrays [N], pixels of the stored images, N >= 1. batch_size: pairs of regions in a step of
    the whole run (all processes, all accumulation parts). seed: of the run. regions: how regions are drawn. repeats: R,
    pairs drawn of each image in a step (repeated sampling: Hoffer et al., "Augment your batch", CVPR 2020), each with
    boxes, flips and colour of its own.

    Steps count from 0 through all epochs; a step shows batch_size / R images R times each, side by side, and an epoch has
    N // (batch_size / R) steps; the few samples left over sit out (other ones each epoch). Raises UserError if batch_size
    is larger than N * R or no multiple of R.
    """

    def __init__(
        self, heights: npt.ArrayLike, widths: npt.ArrayLike, batch_size: int, seed: int, regions: RegionConfig, *, repeats: int = 1
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
        seed = sample_seeds(self.seed, epoch, [sample], Stream.REPLACEMENT)
        distance = integers_below(draws(seed, 1, first=attempt - 1), others)
        return (sample + 1 + int(distance[0, 0])) % self.num_samples

    def _epoch_order(self, epoch: int) -> Int64Array:
        cached = self._order
        if cached is None or cached[0] != epoch:
            # One assignment of a pair, so that a second thread sees the old order or the new one.
            cached = (epoch, permutation(self.seed, epoch, self.num_samples))
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


def draw_boxes(heights: npt.ArrayLike, widths: npt.ArrayLike, seeds: npt.NDArray[np.uint64], regions: RegionConfig) -> Boxes:
    """One box inside each image.

    Area fraction uniform in `crop_scale` and width / height log-uniform in `crop_aspect`, drawn again until the box
    fits (torchvision's RandomResizedCrop does the same). Where none fits, as in landscape pictures, the area gives way,
    never the aspect: the box is the largest of the drawn aspect that fits, at a random place. torchvision would take
    one fixed central crop, the same for both regions.

    heights, widths: integers [N], pixels. seeds: uint64 [N], each good for BOX_DRAWS draws. Returns Boxes of N.
    """
    heights, widths = np.asarray(heights, dtype=np.float64), np.asarray(widths, dtype=np.float64)
    least_scale, most_scale = regions.crop_scale
    least_aspect, most_aspect = regions.crop_aspect
    shape = widths / heights
    # The aspect nearest to the image's own allows the largest box; if even that is too small, no try can succeed.
    nearest = np.clip(shape, least_aspect, most_aspect)
    possible = np.minimum(nearest / shape, shape / nearest) >= least_scale
    box_heights, box_widths = np.empty_like(heights), np.empty_like(widths)
    places = np.empty((len(heights), 2))
    clamped = np.ones(len(heights), dtype=bool)
    left = np.arange(len(heights))
    for first in range(0, _MAX_BOX_TRIES, _TRIES_AT_ONCE):
        values = uniforms(draws(seeds[left], 4 * _TRIES_AT_ONCE, first=4 * first)).reshape(len(left), _TRIES_AT_ONCE, 4)
        area = (least_scale + values[..., 0] * (most_scale - least_scale)) * (heights * widths)[left, None]
        aspect = np.exp(math.log(least_aspect) + values[..., 1] * (math.log(most_aspect) - math.log(least_aspect)))
        drawn_heights, drawn_widths = np.sqrt(area / aspect), np.sqrt(area * aspect)
        fits = (drawn_heights <= heights[left, None]) & (drawn_widths <= widths[left, None])
        # The first try that fits; or, should all fail, the very first, shrunk with its aspect until it fits.
        rows, tries = np.arange(len(left)), fits.argmax(axis=1)
        found = fits[rows, tries]
        settled = found if first else np.ones_like(found)
        rows, tries, settling = rows[settled], tries[settled], left[settled]
        chosen_heights, chosen_widths = drawn_heights[rows, tries], drawn_widths[rows, tries]
        shrink = np.minimum(1.0, np.minimum(heights[settling] / chosen_heights, widths[settling] / chosen_widths))
        box_heights[settling], box_widths[settling] = chosen_heights * shrink, chosen_widths * shrink
        places[settling] = values[rows, tries, 2:]
        clamped[left[found]] = False
        left = left[~found & possible[left]]
        if len(left) == 0:
            break
    box_heights = np.clip(np.rint(box_heights), np.minimum(MIN_BOX_PX, heights), heights)
    box_widths = np.clip(np.rint(box_widths), np.minimum(MIN_BOX_PX, widths), widths)
    tops = np.floor(places[:, 0] * (heights - box_heights + 1))
    lefts = np.floor(places[:, 1] * (widths - box_widths + 1))
    corners = np.stack([tops, lefts, tops + box_heights, lefts + box_widths], axis=1)
    return Boxes(boxes=corners.astype(np.int32), clamped=clamped)


def colour_matrices(config: RegionConfig, values: Float64Array) -> Float32Array:  # [N, 6] -> [N, 3, 4]
    """Brightness, contrast about mid-grey, saturation, hue rotation and grey as one affine map of RGB levels 0 to 255,
    applied in this order.

    values: uniforms [N, 6]: whether to jitter, the four strengths, whether grey. Hue turns the I-Q plane of YIQ, which
    keeps the luma.
    """
    jittered = values[:, 0] < config.colour_jitter_prob
    offsets = np.where(jittered[:, None], 2 * values[:, 1:5] - 1, 0.0)
    brightness, contrast = 1 + offsets[:, 0] * config.brightness, 1 + offsets[:, 1] * config.contrast
    saturation, angle = 1 + offsets[:, 2] * config.saturation, 2 * np.pi * offsets[:, 3] * config.hue

    to_grey = np.tile(_LUMA, (3, 1))
    to_yiq = np.array([_LUMA, [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    turn = np.zeros((len(values), 3, 3))
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = np.cos(angle)
    turn[:, 1, 2], turn[:, 2, 1] = -np.sin(angle), np.sin(angle)
    hue = np.linalg.inv(to_yiq) @ turn @ to_yiq
    saturate = saturation[:, None, None] * np.eye(3) + (1 - saturation)[:, None, None] * to_grey
    linear = hue @ saturate
    linear = np.where((values[:, 5] < config.grey_prob)[:, None, None], to_grey @ linear, linear)
    scale = (brightness * contrast)[:, None, None]
    # The linear part keeps greys, so the offset of the contrast passes through it unchanged.
    offset = np.broadcast_to(((1 - contrast) * _MID_GREY)[:, None, None], (len(values), 3, 1))
    return np.concatenate([linear * scale, offset], axis=2).astype(np.float32)
