"""A growing list of primitives in the world, each with its paint, and its conversion to the camera's frame.

World: x right, y up, z away from the camera's foot point, metres. A group is a thing (a person, a car) with a place and a heading; its
parts are given in its own frame: x right, y up, z forward, origin on the ground.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from personmae.data.mannequins.raycast import FloatArray, IntArray, Primitives

Vector = tuple[float, float, float]
# Texture coordinates in metres [n, 3] -> albedo in [0, 1], [n, 3].
Paint = Callable[[FloatArray], FloatArray]

_UP: Vector = (0.0, 1.0, 0.0)
_FORWARD: Vector = (0.0, 0.0, 1.0)


@dataclass(frozen=True)
class Eye:
    """Where the camera looks from: at height_m over the world's origin, tilted down by pitch (radians)."""

    height_m: float
    pitch: float

    def rotation(self) -> FloatArray:  # [3, 3], world -> camera
        s, c = math.sin(self.pitch), math.cos(self.pitch)
        return np.array([[1.0, 0.0, 0.0], [0.0, -c, -s], [0.0, -s, c]])


@dataclass(frozen=True)
class Solids:
    """Primitives in the camera's frame with all that shading needs. Texture coordinates = to_texture @ point + texture_offset, metres."""

    primitives: Primitives
    to_texture: FloatArray  # [N, 3, 3]
    texture_offset: FloatArray  # [N, 3]
    folds: FloatArray  # [N], strength of the creases in the shading
    paint: IntArray  # [N], number in `paints`
    group: IntArray  # [N]
    paints: list[Paint]


class Shapes:
    """Builder: begin a group, add its parts, ask for the solids."""

    def __init__(self) -> None:
        self._rows: list[tuple[float, ...]] = []
        self._groups: list[tuple[float, float, float]] = []
        self._paints: list[Paint] = []

    def begin_group(self, place: tuple[float, float], heading: float = 0.0) -> int:
        """Parts from here on stand at place = (x, z) and face `heading` radians from +z towards +x. Returns the group's number."""
        self._groups.append((place[0], place[1], heading))
        return len(self._groups) - 1

    def add_paint(self, paint: Paint) -> int:
        """The number by which parts refer to the paint."""
        self._paints.append(paint)
        return len(self._paints) - 1

    def capsule(
        self,
        start: Vector,
        end: Vector,
        radius0: float,
        radius1: float,
        paint: int,
        *,
        forward: Vector = _FORWARD,
        depth: float = 1.0,
        closed: tuple[bool, bool] = (True, True),
        folds: float = 0.0,
        texture_start: float | None = 0.0,
    ) -> None:
        """A tapered capsule. depth scales it along `forward` (made orthogonal to the axis).

        Texture coordinates are the capsule's own (y along the axis, beginning with texture_start), or the group's where texture_start is None.
        """
        axis = (end[0] - start[0], end[1] - start[1], end[2] - start[2])
        self._add(False, start, axis, forward, (1.0, 1.0, depth), -1.0, (radius0, radius1), closed, folds, texture_start, paint)

    def ellipsoid(
        self,
        centre: Vector,
        radii: Vector,
        paint: int,
        *,
        up: Vector = _UP,
        forward: Vector = _FORWARD,
        folds: float = 0.0,
        texture_start: float | None = 0.0,
    ) -> None:
        """An ellipsoid with half axes radii = (right, up, forward)."""
        self._add(False, centre, up, forward, radii, 0.0, (1.0, 1.0), (True, True), folds, texture_start, paint)

    def box(
        self,
        centre: Vector,
        half: Vector,
        paint: int,
        *,
        up: Vector = _UP,
        forward: Vector = _FORWARD,
        folds: float = 0.0,
        texture_start: float | None = 0.0,
    ) -> None:
        """A box with half sizes (right, up, forward)."""
        self._add(True, centre, up, forward, half, 0.0, (1.0, 1.0), (True, True), folds, texture_start, paint)

    def _add(
        self,
        is_box: bool,
        origin: Vector,
        axis: Vector,
        forward: Vector,
        scale: Vector,
        length: float,
        radii: tuple[float, float],
        closed: tuple[bool, bool],
        folds: float,
        texture_start: float | None,
        paint: int,
    ) -> None:
        own = 0.0 if texture_start is None else 1.0
        self._rows.append(
            (float(is_box), *origin, *axis, *forward, *scale, length, *radii, float(closed[0]), float(closed[1]), folds, own,
             texture_start or 0.0, float(paint), float(len(self._groups) - 1))
        )  # fmt: skip

    def solids(self, eye: Eye) -> Solids:
        """All parts so far, in the frame of a camera."""
        rows = np.array(self._rows, dtype=np.float64).reshape(-1, 23)
        groups = np.array(self._groups, dtype=np.float64).reshape(-1, 3)
        group = rows[:, 22].astype(np.int64)
        turn = _turns(groups[:, 2])[group]
        shift = np.stack([groups[:, 0], np.zeros(len(groups)), groups[:, 1]], 1)[group]
        size = np.sqrt((rows[:, 4:7] ** 2).sum(1))
        up = np.einsum("nij,nj->ni", turn, rows[:, 4:7] / size[:, None])
        forward = np.einsum("nij,nj->ni", turn, rows[:, 7:10])
        forward = forward - (forward * up).sum(1, keepdims=True) * up
        forward /= np.sqrt((forward**2).sum(1, keepdims=True))
        frame = np.stack([np.cross(up, forward), up, forward], 1)
        origin = np.einsum("nij,nj->ni", turn, rows[:, 1:4]) + shift

        to_world = eye.rotation().T
        position = np.array([0.0, eye.height_m, 0.0])
        own_frame, own_offset = frame @ to_world, np.einsum("nij,nj->ni", frame, position - origin)
        group_frame, group_offset = np.swapaxes(turn, 1, 2) @ to_world, np.einsum("nji,nj->ni", turn, position - shift)
        scale = rows[:, 10:13]
        own = rows[:, 19] > 0.5
        texture_offset = np.where(own[:, None], own_offset, group_offset)
        texture_offset[:, 1] += rows[:, 20]
        primitives = Primitives(
            is_box=rows[:, 0] > 0.5,
            to_local=own_frame / scale[:, :, None],
            offset=own_offset / scale,
            length=np.where(rows[:, 13] < 0.0, size, 0.0),
            radii=rows[:, 14:16],
            closed=rows[:, 16:18] > 0.5,
        )
        return Solids(
            primitives=primitives,
            to_texture=np.where(own[:, None, None], own_frame, group_frame),
            texture_offset=texture_offset,
            folds=rows[:, 18],
            paint=rows[:, 21].astype(np.int64),
            group=group,
            paints=list(self._paints),
        )


def _turns(headings: FloatArray) -> FloatArray:  # [G] -> [G, 3, 3], group -> world
    s, c = np.sin(headings), np.cos(headings)
    zero, one = np.zeros_like(s), np.ones_like(s)
    return np.stack([np.stack([c, zero, s], 1), np.stack([zero, one, zero], 1), np.stack([-s, zero, c], 1)], 1)
