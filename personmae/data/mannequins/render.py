"""One picture: people before a camera's backdrop, framed as by a detector, through the camera's lens, sensor and size."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from personmae.data.mannequins.camera import Camera, camera_of
from personmae.data.mannequins.dice import Dice, Domain
from personmae.data.mannequins.figure import add_figure
from personmae.data.mannequins.pictures import BYSTANDERS, MannequinsConfig, Picture
from personmae.data.mannequins.raycast import Window, cast, projected_bounds
from personmae.data.mannequins.shading import shade
from personmae.data.mannequins.shapes import Shapes
from personmae.data.mannequins.skeleton import draw_pose
from personmae.data.mannequins.street import add_occluder, cached_backdrop
from personmae.data.mannequins.wardrobe import person_of
from personmae_kernels.sample_random import Stream, draws, sample_seeds, uniforms

Float32Array = npt.NDArray[np.float32]
Uint8Array = npt.NDArray[np.uint8]

_FRAMES_PER_SECOND = 25.0
_GRAIN = 512
# Rays per output pixel and axis: enough to smooth edges in small pictures; large ones are as soft as their cameras anyway.
_MIN_ROWS = 192


@dataclass(frozen=True)
class Track:
    """A person's passage before a camera."""

    start: tuple[float, float]
    heading: float
    speed: float
    gain: float
    warmth: float
    walk_number: int


def picture_pixels(config: MannequinsConfig, picture: Picture, *, cull: bool = True) -> Uint8Array:
    """The picture before JPEG: uint8 [H, W, 3] RGB, a pure function of its arguments."""
    seed = config.draw_seed
    camera = camera_of(seed, config.city, picture.camera)
    dice = Dice(seed, Domain.IMAGE, picture.number)
    track = _track_of(seed, camera, picture.person)
    shapes, window, feet = _compose(config, camera, picture, track, dice)
    scene = _backdrop_pixels(config, camera, window)
    if feet:
        _cast_shadows(scene, window, camera, feet)
    solids = shapes.solids(camera.eye)
    hits = cast(solids.primitives, window, cull=cull)
    if (hits.index >= 0).any():
        shaded = shade(solids, hits, window, camera.eye, camera.light, dice.uniform(0.0, 6.28))
        scene[shaded.rows, shaded.columns] = shaded.colours
    return _develop(scene, window, camera, track, dice, config.size_px)


def _track_of(seed: int, camera: Camera, person: int) -> Track:
    number = person * 100 + camera.number
    dice = Dice(seed, Domain.TRACK, number)
    heading = camera.axis + (math.pi if dice.chance(0.5) else 0.0) + dice.normal(camera.axis_spread)
    return Track(
        start=(dice.uniform(-camera.side_m, camera.side_m), dice.uniform(camera.near_m, camera.far_m)),
        heading=heading,
        speed=dice.uniform(0.9, 1.5),
        gain=math.exp(dice.normal(0.07)),
        warmth=dice.normal(0.025),
        walk_number=number,
    )


def _compose(
    config: MannequinsConfig, camera: Camera, picture: Picture, track: Track, dice: Dice
) -> tuple[Shapes, Window, list[tuple[float, float]]]:
    """The scene of a picture, its window, and where people stand."""
    seed = config.draw_seed
    seconds = picture.moment / _FRAMES_PER_SECOND
    x = track.start[0] + seconds * track.speed * math.sin(track.heading)
    z = min(camera.far_m, max(camera.near_m, track.start[1] + seconds * track.speed * math.cos(track.heading)))
    person = person_of(seed, picture.person, config.city)
    shapes = Shapes()
    # Headings are as seen from the camera: a person at the side of the picture is turned with the line of sight.
    heading = track.heading + math.atan2(x, z) + dice.normal(0.06)
    pose = draw_pose(person, Dice(seed, Domain.TRACK, track.walk_number + 50 * 1_000_000_000), seconds)
    add_figure(shapes, person, pose, (x, z), heading)
    bounds = projected_bounds(shapes.solids(camera.eye).primitives)
    window = _framed(config, picture, bounds, dice)
    if picture.kind != "person" and dice.chance(0.45):
        # A false alarm: nobody there.
        return Shapes(), window, []
    feet = [(x, z)]
    # Draws of their own: the same picture with and without an occluder differs in nothing else.
    others = Dice(seed, Domain.OTHERS, picture.number)
    if others.chance(camera.bystander_prob):
        place = (x + others.sign() * others.uniform(0.3, 0.9), z + others.uniform(0.4, 3.0))
        _add_bystander(shapes, config, place, others)
        feet.append(place)
    if picture.occlusion == "strong" and others.chance(0.25):
        place = (x * (z - 0.6) / z + others.sign() * others.uniform(0.12, 0.25), z - 0.6)
        _add_bystander(shapes, config, place, others)
        feet.append(place)
    elif picture.occlusion != "none":
        add_occluder(shapes, others, camera, (x, z), person.height_m, strong=picture.occlusion == "strong")
    return shapes, window, feet


def _add_bystander(shapes: Shapes, config: MannequinsConfig, place: tuple[float, float], dice: Dice) -> None:
    number = BYSTANDERS + dice.below(1_000_000)
    other = person_of(config.draw_seed, number, config.city)
    pose = draw_pose(other, Dice(config.draw_seed, Domain.TRACK, number), dice.uniform(0.0, 2.0))
    add_figure(shapes, other, pose, place, dice.uniform(0.0, 2.0 * math.pi))


def _framed(config: MannequinsConfig, picture: Picture, bounds: tuple[float, float, float, float], dice: Dice) -> Window:
    """The detector's box: about the person, off by some per cent, sometimes by much; junk is mostly off."""
    rows = max(config.size_px[0], _MIN_ROWS)
    columns = round(config.size_px[1] * rows / config.size_px[0])
    left, right, top, bottom = bounds
    poor = picture.kind != "person" or dice.chance(0.05)
    off = 0.16 if picture.kind != "person" else 0.09 if poor else 0.025
    height = (bottom - top) * 1.04 * math.exp(dice.normal(2.0 * off if poor else 0.045))
    width = max(0.94 * height * config.size_px[1] / config.size_px[0], 0.92 * (right - left)) * math.exp(dice.normal(0.05))
    u = 0.5 * (left + right) + dice.normal(1.6 * off) * width
    v = 0.5 * (top + bottom) + dice.normal(off) * height
    return Window(u - 0.5 * width, v - 0.5 * height, width, height, rows, columns)


def _backdrop_pixels(config: MannequinsConfig, camera: Camera, window: Window) -> Float32Array:
    backdrop = cached_backdrop(config.draw_seed, config.city, camera.number)
    source = backdrop.window
    x_scale = window.width / window.columns * source.columns / source.width
    y_scale = window.height / window.rows * source.rows / source.height
    x0 = (window.left - source.left) * source.columns / source.width + 0.5 * x_scale - 0.5
    y0 = (window.top - source.top) * source.rows / source.height + 0.5 * y_scale - 0.5
    to_source = np.array([[x_scale, 0.0, x0], [0.0, y_scale, y0]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return np.asarray(
        cv2.warpAffine(backdrop.pixels, to_source, (window.columns, window.rows), flags=flags, borderMode=cv2.BORDER_REPLICATE), np.float32
    )


def _cast_shadows(scene: Float32Array, window: Window, camera: Camera, feet: list[tuple[float, float]]) -> None:
    """Darken the ground under people, and away from the sun."""
    rotation = camera.eye.rotation()
    us, vs = window.us(), window.vs()
    fall = -(rotation[1, 1] * vs + rotation[2, 1])
    first = int(np.searchsorted(fall > 0.05, True))
    rows = slice(max(first, int(0.55 * window.rows)), window.rows)
    if rows.start >= rows.stop:
        return
    t = camera.eye.height_m / fall[rows]
    z = (t * (rotation[1, 2] * vs[rows] + rotation[2, 2]))[:, None]
    x = t[:, None] * us[None, :]
    sun = np.array(camera.light.direction)
    strength = 0.55 * camera.light.sun[1] / (camera.light.sun[1] + camera.light.sky[1])
    along = np.array([-sun[0], -sun[2]]) / math.hypot(sun[0], sun[2])
    length = min(2.5, 0.9 * math.hypot(sun[0], sun[2]) / max(sun[1], 0.2))
    keep = np.ones(x.shape)
    for foot_x, foot_z in feet:
        dx, dz = x - foot_x, z - foot_z
        keep *= 1.0 - 0.4 * np.exp(-(dx * dx + dz * dz) / 0.07)
        forward, aside = dx * along[0] + dz * along[1] - length, dz * along[0] - dx * along[1]
        keep *= 1.0 - strength * np.exp(-((forward * forward / (length * length) + aside * aside / 0.05) ** 2))
    scene[rows] *= keep[:, :, None].astype(np.float32)


def _develop(scene: Float32Array, window: Window, camera: Camera, track: Track, dice: Dice, size_px: tuple[int, int]) -> Uint8Array:
    """Native resolution, lens blur, colours, noise, then the size of the data set."""
    native_rows = max(44.0, window.height * camera.px_per_unit * math.exp(dice.normal(0.1)))
    scale = native_rows / window.rows
    if scale < 1.0:
        native = (max(16, round(window.columns * scale)), round(native_rows))
        scene = np.asarray(cv2.resize(scene, native, interpolation=cv2.INTER_AREA), np.float32)
        scale = 1.0
    sigma = camera.blur_px / scale * math.exp(dice.normal(0.25))
    if sigma > 0.3:
        scene = np.asarray(cv2.GaussianBlur(scene, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE), np.float32)
    colours = camera.colours.copy()
    gains = track.gain * np.exp(np.array([track.warmth, 0.0, -track.warmth]))
    colours[:, :3] *= gains[:, None]
    scene = np.asarray(cv2.transform(scene, colours.astype(np.float32)), np.float32)
    np.clip(scene, 0.0, 1.0, out=scene)
    # An S curve, or its opposite, around middle grey.
    scene += np.float32(camera.contrast) * scene * (1.0 - scene) * (2.0 * scene - 1.0)
    top, left = (
        dice.below(_GRAIN - scene.shape[0] if scene.shape[0] < _GRAIN else 1),
        dice.below(_GRAIN - scene.shape[1] if scene.shape[1] < _GRAIN else 1),
    )
    grain = grain_tile()
    rows, columns = min(scene.shape[0], _GRAIN), min(scene.shape[1], _GRAIN)
    scene[:rows, :columns] += np.float32(camera.noise) * grain[top : top + rows, left : left + columns]
    pixels = np.clip(scene * 255.0 + 0.5, 0.0, 255.0).astype(np.uint8)
    if pixels.shape[:2] != size_px:
        shrinking = pixels.shape[0] > size_px[0]
        pixels = np.asarray(cv2.resize(pixels, (size_px[1], size_px[0]), interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR), np.uint8)
    return pixels


@functools.cache
def grain_tile() -> Float32Array:
    """Sensor noise of standard deviation 1, about normal: float32 [512, 512, 3], the same everywhere. Read-only."""
    seeds = sample_seeds(1, int(Domain.NOISE), np.arange(_GRAIN), Stream.MANNEQUIN)
    units = uniforms(draws(seeds, _GRAIN * 3 * 3)).reshape(_GRAIN, _GRAIN, 3, 3)
    tile = ((units.sum(3) - 1.5) * 2.0).astype(np.float32)
    tile.setflags(write=False)
    return tile
