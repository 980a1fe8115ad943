"""Paints: texture coordinates in metres -> albedo. What is drawn on cloth, faces, walls and leaves."""

from __future__ import annotations

import functools
import math

import numpy as np

from personmae.data.mannequins.dice import Domain
from personmae.data.mannequins.raycast import BoolArray, FloatArray
from personmae.data.mannequins.shapes import Paint
from personmae.data.mannequins.wardrobe import Cloth, Colour
from personmae_kernels.sample_random import Stream, draws, sample_seeds, uniforms

_TILE = 256


@functools.cache
def noise_tile() -> FloatArray:
    """White noise in [0, 1), float64 [256, 256], the same everywhere. Read-only."""
    tile = uniforms(draws(sample_seeds(0, int(Domain.NOISE), np.arange(_TILE), Stream.MANNEQUIN), _TILE))
    tile.setflags(write=False)
    return tile


def speckle(x: FloatArray, y: FloatArray, cell_m: float) -> FloatArray:
    """Value noise in [0, 1) with bilinear interpolation between cells of cell_m. x, y: [n]. Returns [n]."""
    tile = noise_tile()
    gx, gy = x / cell_m, y / cell_m
    ix, iy = np.floor(gx), np.floor(gy)
    fx, fy = gx - ix, gy - iy
    x0, y0 = ix.astype(np.int64) % _TILE, iy.astype(np.int64) % _TILE
    x1, y1 = (x0 + 1) % _TILE, (y0 + 1) % _TILE
    low = tile[y0, x0] * (1 - fx) + tile[y0, x1] * fx
    high = tile[y1, x0] * (1 - fx) + tile[y1, x1] * fx
    return low * (1 - fy) + high * fy


def plain(colour: Colour) -> Paint:
    """One colour all over."""
    value = np.array(colour)
    return lambda q: np.broadcast_to(value, q.shape)


def cloth_colours(cloth: Cloth, along: FloatArray, around: FloatArray) -> FloatArray:
    """Albedo [n, 3] of cloth without its prints. along, around: metres [n], down the garment and about the limb."""
    second = _in_second(cloth, along, around)
    return np.where(second[:, None], np.array(cloth.second), np.array(cloth.colour))


def _in_second(cloth: Cloth, along: FloatArray, around: FloatArray) -> BoolArray:
    period = cloth.period_m
    if cloth.pattern == "stripes":
        return np.mod(along / period, 1.0) < cloth.duty
    if cloth.pattern == "bars":
        return np.mod(around / period, 1.0) < cloth.duty
    if cloth.pattern == "checks":
        return (np.mod(along / period, 1.0) < 0.5) == (np.mod(around / period, 1.0) < 0.5)
    if cloth.pattern == "dots":
        x, y = np.mod(around / period, 1.0) - 0.5, np.mod(along / period, 1.0) - 0.5
        return x * x + y * y < 0.4 * cloth.duty**2 + 0.03
    return np.zeros(along.shape, dtype=np.bool_)


def limb(
    cloth: Cloth, cover_m: float, skin: Colour, cuff: Colour | None = None, sock: tuple[float, Colour] | None = None, stripe: bool = False
) -> Paint:
    """A limb whose texture y runs from the body outward: cloth up to cover_m, then skin; sock = (from where on, colour); stripe on the outer side."""
    bare = np.array(skin)

    def paint(q: FloatArray) -> FloatArray:
        around = np.arctan2(q[:, 0], q[:, 2]) * 0.06
        albedo = np.where((q[:, 1] < cover_m)[:, None], cloth_colours(cloth, q[:, 1], around), bare)
        if sock is not None:
            albedo = np.where(((q[:, 1] > sock[0]) & (q[:, 1] >= cover_m))[:, None], np.array(sock[1]), albedo)
        if cuff is not None:
            albedo = np.where(((q[:, 1] > cover_m - 0.05) & (q[:, 1] < cover_m))[:, None], np.array(cuff), albedo)
        if stripe:
            albedo = np.where(((np.abs(q[:, 2]) < 0.02) & (q[:, 1] < cover_m))[:, None], np.array(cloth.second), albedo)
        return albedo

    return paint


def face(skin: Colour, beard: Colour | None, height_m: float) -> Paint:
    """A head in its own frame: eyes, brows and mouth in front, a beard below them."""
    size = height_m / 1.72
    dark, lips = np.array(skin) * 0.3, np.array(skin) * np.array([0.85, 0.6, 0.6])

    def paint(q: FloatArray) -> FloatArray:
        x, y, front = np.abs(q[:, 0]) / size, q[:, 1] / size, q[:, 2] > 0.02
        albedo = np.broadcast_to(np.array(skin), q.shape).copy()
        if beard is not None:
            albedo[front & (y < -0.035)] = np.array(beard)
        albedo[front & (x > 0.018) & (x < 0.044) & (y > 0.004) & (y < 0.026)] = dark
        albedo[front & (x < 0.026) & (y > -0.068) & (y < -0.054)] = lips
        return albedo

    return paint


def facade(wall: Colour, glass: Colour, pitch_m: float, storey_m: float, shop: Colour) -> Paint:
    """A wall with windows, and shop fronts with a sign over them on the ground floor. Texture y = 0 is the street."""

    def paint(q: FloatArray) -> FloatArray:
        across, y = q[:, 0] + q[:, 2], q[:, 1]
        grain = 0.85 + 0.3 * speckle(across, y, 0.35)
        albedo = np.array(wall) * grain[:, None]
        column, row = np.mod(across / pitch_m, 1.0), np.mod(y / storey_m, 1.0)
        albedo[(column > 0.25) & (column < 0.75) & (row > 0.3) & (row < 0.8) & (y > storey_m)] = np.array(glass)
        ground = y < storey_m * 0.8
        albedo[ground & (column > 0.08) & (column < 0.92) & (y > 0.3)] = np.array(glass) * 0.8
        albedo[ground & (column > 0.42) & (column < 0.58)] = np.array(wall) * 0.5
        albedo[(y > storey_m * 0.8) & (y < storey_m)] = np.array(shop)
        return albedo

    return paint


def leaves(colour: Colour) -> Paint:
    """Foliage: light and dark spots."""

    def paint(q: FloatArray) -> FloatArray:
        spots = 0.45 + 0.6 * speckle(q[:, 0] + 0.7 * q[:, 2], q[:, 1], 0.045) + 0.4 * speckle(q[:, 0], q[:, 1] + q[:, 2], 0.2)
        return np.clip(np.array(colour) * spots[:, None], 0.0, 1.0)

    return paint


def banded(colour: Colour, second: Colour, period_m: float, slant: float = 0.0) -> Paint:
    """Slanted bands: barriers, signs, awnings."""

    def paint(q: FloatArray) -> FloatArray:
        band = np.mod((q[:, 1] + slant * (q[:, 0] + q[:, 2])) / period_m, 1.0) < 0.5
        return np.where(band[:, None], np.array(colour), np.array(second))

    return paint


def grained(colour: Colour, cell_m: float, strength: float) -> Paint:
    """Concrete, bark, stone: one colour with value noise."""

    def paint(q: FloatArray) -> FloatArray:
        grain = 1.0 + strength * (speckle(q[:, 0] + q[:, 2], q[:, 1], cell_m) - 0.5)
        return np.clip(np.array(colour) * grain[:, None], 0.0, 1.0)

    return paint


def pavement(kind: str, colour: Colour, tile_m: float, angle: float) -> Paint:
    """The ground. Texture x, z: metres; kind: "tiles", "bricks", "asphalt" or "lane" (with painted lines)."""
    s, c = math.sin(angle), math.cos(angle)

    def paint(q: FloatArray) -> FloatArray:
        x, z = c * q[:, 0] + s * q[:, 2], c * q[:, 2] - s * q[:, 0]
        # Shade of trees and houses, wear, dirt.
        shade = np.clip(2.5 * (speckle(x, z, 1.3) + 0.5 * speckle(x, z, 0.45) - 0.75), -0.5, 0.5)
        grain = 0.85 + 0.45 * shade + 0.15 * speckle(x, z, 0.5) + 0.15 * speckle(x, z, 0.07)
        if kind in ("tiles", "bricks"):
            rows = np.floor(z / tile_m)
            across = x / tile_m * (0.5 if kind == "bricks" else 1.0) + 0.5 * np.mod(rows, 2.0) * (kind == "bricks")
            tone = noise_tile()[rows.astype(np.int64) % _TILE, np.floor(across).astype(np.int64) % _TILE]
            grain = grain * (0.85 + 0.3 * tone)
            joint = (np.mod(z / tile_m, 1.0) < 0.06) | (np.mod(across, 1.0) < 0.05)
            grain = np.where(joint, grain * 0.7, grain)
        # Strips of another stone: a camera's ground is no single tone.
        grain = np.where(np.mod(x / 2.7, 1.0) < 0.35, 0.72 * grain, grain)
        albedo = np.array(colour) * grain[:, None]
        if kind == "lane":
            albedo[(np.mod(x / 3.5, 1.0) < 0.045) & (np.mod(z / 4.0, 1.0) < 0.6)] = 0.8
        return np.clip(albedo, 0.0, 1.0)

    return paint
