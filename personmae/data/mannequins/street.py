"""Streets: the backdrop that a camera always sees, and the furniture that stands before a person."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from personmae.data.mannequins.camera import Camera, camera_of
from personmae.data.mannequins.dice import Dice, Domain
from personmae.data.mannequins.paints import banded, facade, grained, leaves, pavement, plain
from personmae.data.mannequins.raycast import Window, cast
from personmae.data.mannequins.shading import shade
from personmae.data.mannequins.shapes import Paint, Shapes
from personmae.data.mannequins.wardrobe import City, Colour

_WALLS: tuple[Colour, ...] = ((0.72, 0.66, 0.58), (0.55, 0.38, 0.30), (0.62, 0.62, 0.63), (0.82, 0.79, 0.72), (0.45, 0.46, 0.50), (0.66, 0.52, 0.40))
_CARS: tuple[Colour, ...] = ((0.75, 0.76, 0.78), (0.12, 0.12, 0.13), (0.45, 0.46, 0.48), (0.55, 0.12, 0.12), (0.15, 0.22, 0.42), (0.88, 0.88, 0.86))
_SIGNS: tuple[Colour, ...] = ((0.75, 0.15, 0.15), (0.15, 0.35, 0.65), (0.85, 0.75, 0.25), (0.15, 0.45, 0.28), (0.88, 0.88, 0.86), (0.25, 0.25, 0.27))
_LEAVES: tuple[Colour, ...] = ((0.28, 0.42, 0.17), (0.20, 0.34, 0.16), (0.38, 0.42, 0.18), (0.42, 0.33, 0.15))
_PX_PER_UNIT = 560.0
_HALF_WIDTH, _HALF_HEIGHT = 0.75, 0.60


@dataclass(frozen=True)
class Backdrop:
    """What a camera sees with nobody about, before its own colours: float32 [rows, columns, 3] on a window of the image plane."""

    pixels: npt.NDArray[np.float32]
    window: Window


def backdrop_of(seed: int, city: City, camera: Camera) -> Backdrop:
    """The camera's fixed scene: ground, buildings or a hall, cars, trees, posts. A pure function of its arguments."""
    dice = Dice(seed, Domain.SCENE, camera.number)
    window = Window(
        -_HALF_WIDTH, -_HALF_HEIGHT, 2 * _HALF_WIDTH, 2 * _HALF_HEIGHT, round(2 * _HALF_HEIGHT * _PX_PER_UNIT), round(2 * _HALF_WIDTH * _PX_PER_UNIT)
    )
    rotation, height = camera.eye.rotation(), camera.eye.height_m
    us, vs = np.meshgrid(window.us(), window.vs())
    fall = -(rotation[1, 1] * vs + rotation[2, 1])
    pixels = np.empty((window.rows, window.columns, 3))
    sky = np.array(camera.light.sky) * 1.3
    pixels[:] = sky * np.array(dice.pick(((1.0, 1.0, 1.0), (0.75, 0.88, 1.05), (0.6, 0.8, 1.1))))

    ground = _ground_paint(dice, camera)
    seen = fall > 0.02
    t = height / fall[seen]
    points = np.stack([t * us[seen], np.zeros_like(t), t * (rotation[1, 2] * vs[seen] + rotation[2, 2])], 1)
    lit = np.array(camera.light.sky) + 0.8 * np.array(camera.light.sun) * max(0.0, camera.light.direction[1])
    pixels[seen] = ground(points) * lit

    shapes = Shapes()
    _add_surroundings(shapes, dice, camera)
    solids = shapes.solids(camera.eye)
    shaded = shade(solids, cast(solids.primitives, window), window, camera.eye, camera.light, 0.0)
    pixels[shaded.rows, shaded.columns] = shaded.colours
    return Backdrop(pixels.astype(np.float32), window)


@functools.lru_cache(maxsize=64)
def cached_backdrop(seed: int, city: City, camera: int) -> Backdrop:
    """`backdrop_of` by camera number, kept by the process."""
    return backdrop_of(seed, city, camera_of(seed, city, camera))


def _ground_paint(dice: Dice, camera: Camera) -> Paint:
    kinds = ("tiles", "bricks") if camera.indoors else ("tiles", "bricks", "asphalt", "lane")
    kind = dice.pick(kinds, (3, 1) if camera.indoors else (3, 2, 2, 2))
    tone = dice.uniform(0.46, 0.54)
    colour = (tone * dice.uniform(1.01, 1.05), tone, tone * dice.uniform(0.94, 0.99))
    return pavement(kind, colour, dice.uniform(0.25, 0.8), dice.uniform(0.0, math.pi / 2))


def _add_surroundings(shapes: Shapes, dice: Dice, camera: Camera) -> None:
    """Everything stands behind the strip where people walk."""
    back = camera.far_m + (dice.uniform(2.0, 5.0) if camera.indoors else dice.uniform(5.0, 12.0))
    turn = dice.normal(0.15)
    x = -0.9 * back - 6.0
    while x < 0.9 * back + 6.0:
        wide, tall = dice.uniform(2.5, 5.0), dice.uniform(5.0, 12.0)
        shapes.begin_group((x + wide, back + 3.0 + dice.uniform(0.0, 1.5) - turn * (x + wide)), turn)
        wall = shapes.add_paint(
            facade(
                dice.pick(_WALLS),
                dice.pick(((0.2, 0.24, 0.28), (0.35, 0.40, 0.45), (0.62, 0.58, 0.45))),
                dice.uniform(1.2, 3.0),
                dice.uniform(2.6, 3.6),
                dice.pick(_SIGNS),
            )
        )
        shapes.box((0.0, tall, 0.0), (wide, tall, 3.0), wall, texture_start=None)
        x += 2 * wide + (0.0 if dice.chance(0.7) else dice.uniform(0.5, 3.0))
    num_things = 5 + dice.below(6)
    for _ in range(num_things):
        z = camera.far_m + dice.uniform(0.8, 1.0 + max(0.5, back - camera.far_m - 2.0))
        place = (dice.uniform(-0.7, 0.7) * z, z)
        kind = dice.pick(("bench", "bin", "sign", "pole") if camera.indoors else ("car", "tree", "bush", "pole", "sign", "bin", "bench"))
        add_thing(shapes, dice, kind, place, dice.uniform(0.0, 2.0 * math.pi))


def add_thing(shapes: Shapes, dice: Dice, kind: str, place: tuple[float, float], heading: float) -> None:
    """A piece of street furniture of ordinary size."""
    shapes.begin_group(place, heading)
    metal = shapes.add_paint(plain((0.3, 0.31, 0.33)))
    if kind == "car":
        _add_car(shapes, dice)
    elif kind == "tree":
        bark, leaf = shapes.add_paint(grained((0.32, 0.25, 0.19), 0.06, 0.6)), shapes.add_paint(leaves(dice.pick(_LEAVES)))
        shapes.capsule((0.0, 0.0, 0.0), (0.0, 2.6, 0.0), 0.16, 0.11, bark)
        for _ in range(4):
            shapes.ellipsoid((dice.normal(0.5), 3.2 + dice.normal(0.4), dice.normal(0.5)), (0.9, 0.8, 0.9), leaf, folds=0.1)
    elif kind == "bush":
        leaf = shapes.add_paint(leaves(dice.pick(_LEAVES)))
        for _ in range(3):
            radius = dice.uniform(0.35, 0.6)
            shapes.ellipsoid((dice.normal(0.4), 0.7 * radius, dice.normal(0.3)), (radius, radius, radius), leaf, folds=0.1)
    elif kind == "pole":
        shapes.capsule((0.0, 0.0, 0.0), (0.0, 4.5, 0.0), 0.07, 0.05, metal)
    elif kind == "sign":
        board = shapes.add_paint(banded(dice.pick(_SIGNS), dice.pick(_SIGNS), dice.uniform(0.25, 0.8)))
        shapes.capsule((0.0, 0.0, 0.0), (0.0, 2.2, 0.0), 0.035, 0.035, metal)
        shapes.box((0.0, 1.9, 0.05), (dice.uniform(0.25, 0.5), dice.uniform(0.3, 0.6), 0.02), board)
    elif kind == "bin":
        body = shapes.add_paint(plain(dice.pick(_SIGNS)))
        shapes.capsule((0.0, 0.25, 0.0), (0.0, 0.75, 0.0), 0.24, 0.27, body)
    else:
        wood = shapes.add_paint(banded((0.42, 0.29, 0.18), (0.34, 0.23, 0.14), 0.09))
        shapes.box((0.0, 0.45, 0.0), (0.8, 0.04, 0.22), wood)
        shapes.box((0.0, 0.75, -0.22), (0.8, 0.2, 0.03), wood)
        shapes.box((-0.6, 0.22, 0.0), (0.04, 0.22, 0.2), metal)
        shapes.box((0.6, 0.22, 0.0), (0.04, 0.22, 0.2), metal)


def _add_car(shapes: Shapes, dice: Dice) -> None:
    """A parked car along the group's x."""
    body, glass = shapes.add_paint(plain(dice.pick(_CARS))), shapes.add_paint(plain((0.16, 0.18, 0.2)))
    tyre, lamp = shapes.add_paint(plain((0.07, 0.07, 0.07))), shapes.add_paint(plain((0.85, 0.82, 0.7)))
    shapes.capsule((-1.75, 0.62, 0.0), (1.75, 0.62, 0.0), 0.36, 0.34, body, forward=(0.0, 0.0, 1.0), depth=2.3)
    shapes.capsule((-0.95, 1.02, 0.0), (0.7, 1.02, 0.0), 0.40, 0.38, glass, forward=(0.0, 0.0, 1.0), depth=1.75)
    shapes.capsule((-0.8, 1.34, 0.0), (0.5, 1.34, 0.0), 0.11, 0.11, body, forward=(0.0, 0.0, 1.0), depth=4.6)
    for x in (-1.25, 1.25):
        for side in (-0.78, 0.78):
            shapes.capsule((x, 0.31, side - 0.06), (x, 0.31, side + 0.06), 0.30, 0.30, tyre, forward=(0.0, 1.0, 0.0))
    for x in (-2.02, 2.02):
        shapes.ellipsoid((x, 0.68, 0.5), (0.09, 0.08, 0.14), lamp)
        shapes.ellipsoid((x, 0.68, -0.5), (0.09, 0.08, 0.14), lamp)


def add_occluder(shapes: Shapes, dice: Dice, camera: Camera, place: tuple[float, float], height_m: float, *, strong: bool) -> None:
    """Furniture between the camera and a person of height_m at place = (x, z): a strong one hides about a quarter to two thirds of them."""
    kinds = ("car", "bush", "barrier", "cabinet", "railing", "trunk", "board")
    kind = dice.pick(kinds, (3, 2, 2, 2, 0, 2, 1.5) if strong else (0.5, 1, 0.5, 1, 2, 1, 0.7))
    ahead = dice.uniform(0.7, 1.1) + (0.5 if kind == "car" else 0.0)
    z = place[1] - ahead
    # On the line of sight to the person, so that it covers them whatever the camera's height.
    middle = place[0] * z / place[1]
    eye = camera.eye.height_m
    cut = (dice.uniform(0.33, 0.62) if strong else dice.uniform(0.12, 0.28)) * height_m
    top = max(0.35, eye + (cut - eye) * z / place[1])
    side = dice.sign()
    group_x = middle + side * dice.uniform(0.0, 0.12 if strong else 0.25)
    shapes.begin_group((group_x, z), 0.0)
    metal = shapes.add_paint(plain((0.32, 0.33, 0.35)))
    if kind == "car":
        shapes.begin_group((group_x + dice.uniform(-0.9, 0.9), z - 0.2), dice.normal(0.15))
        _add_car(shapes, dice)
    elif kind == "bush":
        leaf = shapes.add_paint(leaves(dice.pick(_LEAVES)))
        for k in range(5):
            radius = dice.uniform(0.45, 0.7) * top
            shapes.ellipsoid(
                ((k - 2) * 0.22 + dice.normal(0.06), top - radius + dice.normal(0.05), dice.normal(0.1)), (0.3, radius, 0.3), leaf, folds=0.1
            )
    elif kind == "barrier":
        stuff = banded(dice.pick(_SIGNS), (0.88, 0.88, 0.86), 0.35, 1.0) if dice.chance(0.5) else grained(dice.pick(_WALLS), 0.08, 0.4)
        shapes.box((0.0, 0.5 * top, 0.0), (1.6, 0.5 * top, 0.08), shapes.add_paint(stuff))
    elif kind == "cabinet":
        shapes.box(
            (side * 0.1, 0.5 * top, 0.0),
            (dice.uniform(0.30, 0.48) if strong else dice.uniform(0.2, 0.4), 0.5 * top, 0.2),
            shapes.add_paint(grained(dice.pick(_SIGNS), 0.3, 0.2)),
        )
    elif kind == "railing":
        for k in range(9):
            shapes.capsule(((k - 4) * 0.16, 0.0, 0.0), ((k - 4) * 0.16, top, 0.0), 0.018, 0.018, metal)
        shapes.capsule((-1.2, top, 0.0), (1.2, top, 0.0), 0.035, 0.035, metal, forward=(0.0, 0.0, 1.0))
    elif kind == "trunk":
        bark = shapes.add_paint(grained(dice.pick(((0.32, 0.25, 0.19), (0.45, 0.45, 0.46), (0.55, 0.52, 0.48))), 0.06, 0.6))
        radius = dice.uniform(0.13, 0.19) if strong else dice.uniform(0.05, 0.08)
        x = -side * dice.uniform(0.0, 0.08)
        shapes.capsule((x, -0.2, 0.0), (x, 4.0, 0.0), radius, 0.9 * radius, bark)
    else:
        board = shapes.add_paint(banded(dice.pick(_SIGNS), dice.pick(_SIGNS), dice.uniform(0.15, 0.6), dice.pick((0.0, 1.0))))
        low = top - dice.uniform(0.6, 0.8)
        shapes.capsule((side * 0.1, 0.0, 0.0), (side * 0.1, top, 0.0), 0.03, 0.03, metal)
        shapes.box((side * 0.1, 0.5 * (top + low), -0.04), (dice.uniform(0.32, 0.45), 0.5 * (top - low), 0.02), board)
