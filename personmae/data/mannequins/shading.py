"""From hits to colours: paints, light and creases, on the pixels that show something."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from personmae.data.mannequins.camera import Light
from personmae.data.mannequins.raycast import FloatArray, Hits, IntArray, Window
from personmae.data.mannequins.shapes import Eye, Solids


@dataclass(frozen=True)
class Shaded:
    """Colours of the pixels that show something."""

    rows: npt.NDArray[np.intp]  # [n]
    columns: npt.NDArray[np.intp]  # [n]
    colours: FloatArray  # [n, 3]
    group: IntArray  # [n]


def shade(solids: Solids, hits: Hits, window: Window, eye: Eye, light: Light, crease_phase: float) -> Shaded:
    """Scene-referred colours [0, ...) of all pixels with a hit; crease_phase shifts the creases of cloth."""
    rows, columns = np.nonzero(hits.index >= 0)
    index = hits.index[rows, columns]
    # Sorted by paint, each paint is called once on a contiguous slice.
    order = np.argsort(solids.paint[index], kind="stable")
    rows, columns, index = rows[order], columns[order], index[order]
    t = hits.depth[rows, columns]
    x, y = t * window.us()[columns], t * window.vs()[rows]

    texture = _affine(solids.to_texture, solids.texture_offset, index, x, y, t)
    albedo = np.empty((len(index), 3))
    paint = solids.paint[index]
    starts = np.flatnonzero(np.diff(paint, prepend=-1))
    for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(index)], strict=True):
        albedo[start:end] = solids.paints[paint[start]](texture[start:end])

    normal = _normals(solids, index, x, y, t)
    to_world = eye.rotation().T
    height = normal @ to_world[1]
    sun = normal @ (to_world.T @ np.array(light.direction))
    lambert = np.maximum(0.0, (sun + 0.25) * 0.8)
    creases = 1.0 + solids.folds[index] * (
        np.sin(31.0 * texture[:, 1] + 9.0 * texture[:, 0] + crease_phase) + np.sin(17.0 * texture[:, 0] - 21.0 * texture[:, 2] + 2.0 * crease_phase)
    )
    brightness = (0.7 + 0.3 * height)[:, None] * np.array(light.sky) + lambert[:, None] * np.array(light.sun)
    return Shaded(rows, columns, albedo * brightness * creases[:, None], solids.group[index])


def _affine(matrices: FloatArray, offsets: FloatArray, index: IntArray, x: FloatArray, y: FloatArray, z: FloatArray) -> FloatArray:
    """matrices[index] @ (x, y, z) + offsets[index], [n, 3]."""
    out = np.empty((len(index), 3))
    for k in range(3):
        row = matrices[:, k][index]
        out[:, k] = row[:, 0] * x + row[:, 1] * y + row[:, 2] * z + offsets[:, k][index]
    return out


def _normals(solids: Solids, index: IntArray, x: FloatArray, y: FloatArray, z: FloatArray) -> FloatArray:
    """Unit normals [n, 3] in the camera's frame.

    On a tapered capsule the normal points away from the centre of the ball that touches the surface there: on the axis, shifted by the taper and kept
    between the two ends.
    """
    primitives = solids.primitives
    local = _affine(primitives.to_local, primitives.offset, index, x, y, z)
    length = primitives.length
    sine = np.clip((primitives.radii[:, 0] - primitives.radii[:, 1]) / np.where(length > 0, length, 1.0), -0.99, 0.99)
    taper = np.where(length > 0, sine / np.sqrt(1.0 - sine * sine), 0.0)
    around = np.sqrt(local[:, 0] ** 2 + local[:, 2] ** 2)
    local[:, 1] -= np.clip(local[:, 1] - taper[index] * around, 0.0, length[index])
    boxes = np.flatnonzero(primitives.is_box[index])
    if boxes.size:
        # The face is the one whose coordinate is largest. The centre above was cut to y = 0, the box's own, as its length is 0.
        flat = local[boxes]
        face = np.abs(flat).argmax(1)
        sides = np.zeros_like(flat)
        sides[np.arange(len(flat)), face] = np.sign(flat[np.arange(len(flat)), face])
        local[boxes] = sides
    normal = np.empty_like(local)
    for k in range(3):
        column = primitives.to_local[:, :, k][index]
        normal[:, k] = column[:, 0] * local[:, 0] + column[:, 1] * local[:, 1] + column[:, 2] * local[:, 2]
    return normal / np.sqrt((normal**2).sum(1, keepdims=True))
