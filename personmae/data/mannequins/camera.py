"""Cameras of a city: where they hang, how people pass, the light, and what lens, sensor and compression make of it."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from personmae.data.mannequins.dice import Dice, Domain
from personmae.data.mannequins.raycast import FloatArray
from personmae.data.mannequins.shapes import Eye
from personmae.data.mannequins.wardrobe import City


@dataclass(frozen=True)
class Light:
    """Directional light over a sky: albedo is multiplied by sky * (half to full, by the normal's height) + sun * lambert."""

    direction: tuple[float, float, float]  # towards the sun, in the world
    sun: tuple[float, float, float]
    sky: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Camera:
    """One camera. Distances in metres, angles in radians."""

    number: int  # from 1
    eye: Eye
    near_m: float  # people walk between near and far
    far_m: float
    side_m: float  # and at most this far from the middle
    axis: float  # heading of the street; people go either way
    axis_spread: float
    light: Light
    colours: FloatArray  # [3, 4] affine: camera RGB from scene RGB
    contrast: float
    px_per_unit: float  # native resolution: pixels per unit of the image plane z = 1
    blur_px: float  # sigma, native pixels
    noise: float  # sigma, of 1
    jpeg_quality: int
    bystander_prob: float
    indoors: bool


@dataclass(frozen=True)
class CityLight:
    """The range of conditions in a city's cameras."""

    elevation: tuple[float, float]  # of the sun, radians
    sun: tuple[float, float]
    sky: tuple[float, float]
    warmth: tuple[float, float]  # red gain over blue gain, as exp(+-)
    tint: float  # sigma of the green gain
    gain: tuple[float, float]
    saturation: tuple[float, float]
    haze: tuple[float, float]
    height_m: tuple[float, float]
    noise: tuple[float, float]
    quality: tuple[int, int]
    indoors_prob: float


LIGHTS: dict[City, CityLight] = {
    "rivermouth": CityLight(
        elevation=(0.75, 1.05), sun=(0.44, 0.54), sky=(0.72, 0.78), warmth=(-0.06, 0.06), tint=0.012, gain=(0.95, 1.07), saturation=(0.85, 1.0),
        haze=(0.0, 0.03), height_m=(2.3, 4.0), noise=(0.006, 0.02), quality=(65, 92), indoors_prob=0.15,
    ),
    "highfield": CityLight(
        elevation=(0.30, 0.60), sun=(0.28, 0.36), sky=(0.62, 0.68), warmth=(0.06, 0.20), tint=0.015, gain=(0.84, 0.96), saturation=(0.60, 0.75),
        haze=(0.03, 0.07), height_m=(3.2, 5.2), noise=(0.012, 0.03), quality=(50, 80), indoors_prob=0.3,
    ),
}  # fmt: skip


class _Spread:
    """Evenly spread draws: over the cameras of a city each quantity runs through its range, so that few cameras are as different as many."""

    _STEPS = (0.6180340, 0.7548777, 0.5698403, 0.8191725, 0.6710436)

    def __init__(self, seed: int, number: int) -> None:
        self._offsets, self._number, self._next = Dice(seed, Domain.CAMERA, 0), number, 0

    def uniform(self, low: float, high: float) -> float:
        """The camera's value of the next quantity, in [low, high)."""
        step = self._STEPS[self._next]
        self._next += 1
        return low + (high - low) * ((self._offsets.unit() + self._number * step) % 1.0)


@functools.lru_cache(maxsize=256)
def camera_of(seed: int, city: City, number: int) -> Camera:
    """Camera `number` (from 1) of the city: a pure function of its arguments."""
    dice, ranges = Dice(seed, Domain.CAMERA, number), LIGHTS[city]
    height = dice.uniform(*ranges.height_m)
    near = dice.uniform(4.0, 6.0)
    far = near + dice.uniform(2.5, 6.0)
    elevation, azimuth = dice.uniform(*ranges.elevation), dice.uniform(0.0, 2.0 * math.pi)
    direction = (math.cos(elevation) * math.sin(azimuth), math.sin(elevation), math.cos(elevation) * math.cos(azimuth))
    indoors = dice.chance(ranges.indoors_prob)
    spread = _Spread(seed, number)
    sun, sky = spread.uniform(*ranges.sun) * (0.6 if indoors else 1.0), spread.uniform(*ranges.sky) * (1.15 if indoors else 1.0)
    # Shade is bluer than sunlight.
    cool = 0.0 if indoors else dice.uniform(0.0, 0.08)
    return Camera(
        number=number,
        eye=Eye(height, math.atan2(height - 0.9, 0.5 * (near + far))),
        near_m=near,
        far_m=far,
        side_m=dice.uniform(1.2, 2.2),
        # Streets are spread over the half circle, so that cameras see people from different sides.
        axis=math.pi * ((number * 0.381966) % 1.0) + dice.normal(0.2),
        axis_spread=dice.uniform(0.15, 0.5),
        light=Light(direction, (sun, sun * (1.0 - 0.3 * cool), sun * (1.0 - cool)), (sky * (1.0 - cool), sky, sky * (1.0 + 0.6 * cool))),
        colours=_colours(dice, spread, ranges),
        contrast=dice.uniform(0.0, 0.15),
        px_per_unit=math.exp(dice.uniform(math.log(550.0), math.log(1400.0))),
        blur_px=dice.uniform(0.35, 0.85),
        noise=dice.uniform(*ranges.noise),
        jpeg_quality=ranges.quality[0] + dice.below(ranges.quality[1] - ranges.quality[0] + 1),
        bystander_prob=dice.uniform(0.08, 0.35),
        indoors=indoors,
    )


def _colours(dice: Dice, spread: _Spread, ranges: CityLight) -> FloatArray:
    """White balance, gain, saturation and haze as one affine map [3, 4]."""
    warmth, green = spread.uniform(*ranges.warmth), math.exp(dice.normal(ranges.tint))
    gain, saturation, haze = spread.uniform(*ranges.gain), spread.uniform(*ranges.saturation), dice.uniform(*ranges.haze)
    luma = np.array([0.299, 0.587, 0.114])
    mixing = saturation * np.eye(3) + (1.0 - saturation) * np.tile(luma, (3, 1))
    gains = gain * np.array([math.exp(0.5 * warmth), green, math.exp(-0.5 * warmth)])
    matrix = np.empty((3, 4))
    matrix[:, :3] = (1.0 - haze) * gains[:, None] * mixing
    matrix[:, 3] = haze * np.array([0.85, 0.88, 0.92])
    return matrix
