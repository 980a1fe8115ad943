"""One region: the box that is cut from an image and the change of its colours, drawn from 64-bit seeds. Pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from personmae.configs import UserError
from personmae_kernels.sample_random import draws, uniforms

Int32Array = npt.NDArray[np.int32]
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
class Boxes:
    """boxes: int32 [N, 4], (y0, x0, y1, x1). clamped: bool [N], no box of the drawn area fitted the image, so it got
    the largest that does."""

    boxes: Int32Array
    clamped: BoolArray


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
