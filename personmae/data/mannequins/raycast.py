"""Analytic ray casting of tapered capsules, ellipsoids and boxes, vectorised over pixels.

Camera frame: x right, y down, z forward, the eye at the origin. The ray of a pixel is t * (u, v, 1), so t is the depth. Each primitive has an affine
local frame, local = to_local @ point + offset, in which it is one of

    tapered capsule   the convex hull of a ball of radius r0 at the origin and a ball of radius r1 at (0, length, 0);
                      an open end has no ball: the lateral surface stops at its tangent circle (skirts, hems, sleeves)
    ellipsoid         a tapered capsule of length 0
    box               the cube [-1, 1]^3

A capsule is the union of two balls and the piece of the cone tangent to both, so its first hit is the nearest of the three pieces' first hits, and
each piece is one quadric: (u,v,1) G (u,v,1)' t^2 + 2 g.(u,v,1) t + c = 0. G and g are made for all pieces at once; a piece is then cast only in the
exact bounding box of its projection, where the quadratic form is a sum of a row, a column and one product.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Window:
    """A rectangle of the image plane z = 1, cut into rows x columns pixels."""

    left: float
    top: float
    width: float
    height: float
    rows: int
    columns: int

    def us(self) -> FloatArray:  # [columns], pixel centres
        return self.left + (np.arange(self.columns, dtype=np.float64) + 0.5) * (self.width / self.columns)

    def vs(self) -> FloatArray:  # [rows], pixel centres
        return self.top + (np.arange(self.rows, dtype=np.float64) + 0.5) * (self.height / self.rows)


@dataclass(frozen=True)
class Primitives:
    """N primitives in the camera frame; see the module's docstring for the local frames."""

    is_box: BoolArray  # [N]
    to_local: FloatArray  # [N, 3, 3]
    offset: FloatArray  # [N, 3]
    length: FloatArray  # [N]
    radii: FloatArray  # [N, 2]
    closed: BoolArray  # [N, 2], True = this end has its ball


@dataclass(frozen=True)
class Hits:
    """What each pixel sees first."""

    depth: FloatArray  # [rows, columns], inf = nothing
    index: IntArray  # [rows, columns], number of the primitive, -1 = nothing


@dataclass(frozen=True)
class _Quadrics:
    owner: IntArray  # [M], number of the primitive
    form: FloatArray  # [M, 3, 3]
    linear: FloatArray  # [M, 3]
    constant: FloatArray  # [M]
    axis: FloatArray  # [M, 4], local y of a hit = axis[3] + t * axis[:3].(u, v, 1)
    limits: FloatArray  # [M, 2], range of local y in which a hit counts
    bounds: FloatArray  # [M, 4] = u_min, u_max, v_min, v_max


def cast(primitives: Primitives, window: Window, *, cull: bool = True) -> Hits:
    """Depth and number of the first primitive along the ray of each pixel.

    cull=False casts every primitive on the whole window: the same result, slower. All arrays are float64.
    """
    us, vs = window.us(), window.vs()
    depth = np.full((window.rows, window.columns), np.inf)
    index = np.full((window.rows, window.columns), -1, dtype=np.int64)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        quadrics = _quadrics_of(primitives)
        boxes = _pixel_boxes(quadrics.bounds, window, cull)
        _cast_quadrics(quadrics, boxes, us, vs, depth, index)
        cubes = np.flatnonzero(primitives.is_box)
        if cubes.size:
            boxes = _pixel_boxes(_box_bounds(primitives, cubes), window, cull)
            _cast_cubes(primitives, cubes, boxes, us, vs, depth, index)
    return Hits(depth, index)


def projected_bounds(primitives: Primitives) -> tuple[float, float, float, float]:
    """The rectangle (u_min, u_max, v_min, v_max) of the image plane that holds the projection of all primitives (all before the eye)."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        bounds = _quadrics_of(primitives).bounds
        cubes = np.flatnonzero(primitives.is_box)
        if cubes.size:
            bounds = np.concatenate([bounds, _box_bounds(primitives, cubes)])
    return float(bounds[:, 0].min()), float(bounds[:, 1].max()), float(bounds[:, 2].min()), float(bounds[:, 3].max())


def _pixel_boxes(bounds: FloatArray, window: Window, cull: bool) -> list[list[int]]:
    """[M, 4] bounds -> row and column ranges [row0, row1, column0, column1) of the pixels whose centres lie inside."""
    if not cull:
        return [[0, window.rows, 0, window.columns]] * len(bounds)
    columns = (bounds[:, :2] - window.left) * (window.columns / window.width)
    rows = (bounds[:, 2:] - window.top) * (window.rows / window.height)
    # A thousandth of a pixel to spare: rounding must not drop a pixel that the brute-force cast would hit.
    first = np.ceil(np.stack([rows[:, 0], columns[:, 0]], 1) - 0.501)
    last = np.floor(np.stack([rows[:, 1], columns[:, 1]], 1) - 0.499) + 1
    limit = np.array([window.rows, window.columns])
    first, last = np.clip(first, 0, limit), np.clip(last, 0, limit)
    return np.stack([first[:, 0], last[:, 0], first[:, 1], last[:, 1]], 1).astype(np.int64).tolist()


def _quadrics_of(primitives: Primitives) -> _Quadrics:
    round_ones = np.flatnonzero(~primitives.is_box)
    a, o = primitives.to_local[round_ones], primitives.offset[round_ones]
    length, radii, closed = primitives.length[round_ones], primitives.radii[round_ones], primitives.closed[round_ones]
    a_transposed = np.swapaxes(a, 1, 2)
    gram = a_transposed @ a
    inverse = np.linalg.inv(a)
    spread = inverse @ np.swapaxes(inverse, 1, 2)
    unlimited = np.broadcast_to(np.array([-np.inf, np.inf]), (len(a), 2))
    axis = np.concatenate([a[:, 1], o[:, 1:2]], 1)
    pieces: list[tuple[npt.NDArray[np.intp], FloatArray, FloatArray, FloatArray, FloatArray, FloatArray]] = []
    bounds = []
    for end in (0, 1):
        o_end = o.copy()
        o_end[:, 1] -= length * end
        linear = np.einsum("nij,ni->nj", a, o_end)
        constant = np.einsum("ni,ni->n", o_end, o_end) - radii[:, end] ** 2
        centre = -np.einsum("nij,nj->ni", inverse, o_end)
        bounds.append(_ball_bounds(centre, spread * (radii[:, end] ** 2)[:, None, None]))
        keep = np.flatnonzero(closed[:, end] & ((length > 0) | (end == 0)))
        pieces.append((keep, gram, linear, constant, unlimited, bounds[end]))

    sine = np.where(length > 0, (radii[:, 0] - radii[:, 1]) / np.where(length > 0, length, 1.0), 1.0)
    keep = np.flatnonzero(np.abs(sine) < 1.0)
    cosine = np.sqrt(np.maximum(1.0 - sine**2, 1e-12))
    tangent, edge = sine / cosine, radii[:, 0] / cosine
    metric = np.stack([np.ones_like(tangent), -(tangent**2), np.ones_like(tangent)], 1)
    form = a_transposed @ (metric[:, :, None] * a)
    rest = edge - tangent * o[:, 1]
    linear = np.einsum("nij,ni->nj", a, np.stack([o[:, 0], tangent * rest, o[:, 2]], 1))
    constant = o[:, 0] ** 2 + o[:, 2] ** 2 - rest**2
    limits = np.stack([radii[:, 0] * sine, length + radii[:, 1] * sine], 1)
    low, high = np.minimum(bounds[0], bounds[1]), np.maximum(bounds[0], bounds[1])
    hull = np.stack([low[:, 0], high[:, 1], low[:, 2], high[:, 3]], 1)
    pieces.append((keep, form, linear, constant, limits, hull))
    return _Quadrics(
        owner=np.concatenate([round_ones[kept] for kept, *_ in pieces]),
        form=np.concatenate([piece[1][piece[0]] for piece in pieces]),
        linear=np.concatenate([piece[2][piece[0]] for piece in pieces]),
        constant=np.concatenate([piece[3][piece[0]] for piece in pieces]),
        axis=np.concatenate([axis[piece[0]] for piece in pieces]),
        limits=np.concatenate([piece[4][piece[0]] for piece in pieces]),
        bounds=np.concatenate([piece[5][piece[0]] for piece in pieces]),
    )


def _ball_bounds(centre: FloatArray, spread: FloatArray) -> FloatArray:
    """Bounds [N, 4] of projected ellipsoids centre + E ball with spread = E E', from the dual conic spread - centre centre'.

    An ellipsoid that reaches behind the eye may be seen anywhere.
    """
    dual = spread - centre[:, :, None] * centre[:, None, :]
    corner = dual[:, 2, 2]
    bounds = np.empty((len(centre), 4))
    for k in (0, 1):
        root = np.sqrt(np.maximum(dual[:, k, 2] ** 2 - corner * dual[:, k, k], 0.0))
        bounds[:, 2 * k] = (dual[:, k, 2] + root) / corner
        bounds[:, 2 * k + 1] = (dual[:, k, 2] - root) / corner
    in_front = (centre[:, 2] > 0) & (corner < 0)
    return np.where(in_front[:, None], bounds, np.array([-np.inf, np.inf, -np.inf, np.inf]))


def _box_bounds(primitives: Primitives, cubes: npt.NDArray[np.intp]) -> FloatArray:
    """Bounds [K, 4] of projected boxes, from their corners."""
    corners = np.array([(x, y, z) for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)])
    local = corners[None] - primitives.offset[cubes][:, None]
    points = np.einsum("nij,nkj->nki", np.linalg.inv(primitives.to_local[cubes]), local)
    in_front = (points[:, :, 2] > 1e-9).all(1)
    u, v = points[:, :, 0] / points[:, :, 2], points[:, :, 1] / points[:, :, 2]
    bounds = np.stack([u.min(1), u.max(1), v.min(1), v.max(1)], 1)
    return np.where(in_front[:, None], bounds, np.array([-np.inf, np.inf, -np.inf, np.inf]))


def _cast_quadrics(quadrics: _Quadrics, boxes: list[list[int]], us: FloatArray, vs: FloatArray, depth: FloatArray, index: IntArray) -> None:
    squares_u, squares_v = us * us, vs * vs
    owners, forms, linears = quadrics.owner.tolist(), quadrics.form.tolist(), quadrics.linear.tolist()
    constants, axes, limits = quadrics.constant.tolist(), quadrics.axis.tolist(), quadrics.limits.tolist()
    for owner, form, g, c, axis, (low, high), (row0, row1, column0, column1) in zip(
        owners, forms, linears, constants, axes, limits, boxes, strict=True
    ):
        if row0 >= row1 or column0 >= column1:
            continue
        u, v = us[column0:column1], vs[row0:row1, None]
        a = form[0][0] * squares_u[column0:column1] + (2.0 * form[0][2]) * u
        a = a + (form[1][1] * squares_v[row0:row1, None] + (2.0 * form[1][2]) * v + form[2][2])
        a += (2.0 * form[0][1] * v) * u
        minus_b = (-g[0]) * u - (g[1] * v + g[2])
        discriminant = minus_b * minus_b
        discriminant -= c * a
        # Outside the surface the square root is NaN, and no comparison below holds. For a cone seen within its own opening angle a < 0, and this
        # root is still the one at which the ray enters the piece.
        t = (minus_b - np.sqrt(discriminant)) / a
        seen = depth[row0:row1, column0:column1]
        closer = (t < seen) & (t > 0.0)
        if low > -np.inf:
            y = t * (axis[0] * u + (axis[1] * v + axis[2])) + axis[3]
            closer &= (y >= low) & (y <= high)
        np.copyto(seen, t, where=closer)
        np.copyto(index[row0:row1, column0:column1], owner, where=closer)


def _cast_cubes(
    primitives: Primitives,
    cubes: npt.NDArray[np.intp],
    boxes: list[list[int]],
    us: FloatArray,
    vs: FloatArray,
    depth: FloatArray,
    index: IntArray,
) -> None:
    for owner, (row0, row1, column0, column1) in zip(cubes.tolist(), boxes, strict=True):
        if row0 >= row1 or column0 >= column1:
            continue
        u, v = us[column0:column1], vs[row0:row1, None]
        near = np.full((row1 - row0, column1 - column0), 0.0)
        far = np.full_like(near, np.inf)
        for axis in range(3):
            a, o = primitives.to_local[owner, axis].tolist(), float(primitives.offset[owner, axis])
            inverse = 1.0 / (a[0] * u + (a[1] * v + a[2]))
            one, other = (-1.0 - o) * inverse, (1.0 - o) * inverse
            np.maximum(near, np.minimum(one, other), out=near)
            np.minimum(far, np.maximum(one, other), out=far)
        seen = depth[row0:row1, column0:column1]
        closer = (near < far) & (near < seen) & (near > 0.0)
        np.copyto(seen, near, where=closer)
        np.copyto(index[row0:row1, column0:column1], owner, where=closer)
