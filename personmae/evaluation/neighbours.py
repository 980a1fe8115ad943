"""Nearest neighbours of features, exactly: the k smallest by (distance, index), found tile by tile in bounded memory.

Matrix products in float32 find k + MARGIN candidates of each row. Their distances are then taken pair by pair (squared_distances), which depends on
no tile, backend or place, and ties are broken by the smaller index. A row is settled when its worst candidate is farther than its k-th neighbour
by more than a product can err (`Points.error`, a bound and not an estimate); every other row, such as one with more than k equal neighbours, is
searched again with all images within that error. So duplicates, ties and any size of tile give the same neighbours. An image is its own neighbour at
distance 0; copies of it with a smaller index come first.

Backends of the first step: `torch`, whose tiles serve their rows and their columns where a set is searched in itself, and a flat index of `faiss`.
This is the only file that imports faiss.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from personmae.configs import UserError
from personmae.evaluation.distances import exact_products
from personmae.evaluation.memory import require_memory
from personmae_kernels.launching import runs_compiled
from personmae_kernels.neighbours import select_nearest_, squared_distances

NeighbourMetric = Literal["cosine", "sqeuclidean"]
Backend = Literal["auto", "faiss", "torch"]
Features = npt.ArrayLike | Tensor
Progress = Callable[[int, int], None]

MARGIN = 8
# Side of a tile of scores: 16 MiB on a CPU, which its caches and MKL both do well with, and 1 GiB on a GPU.
TILE_SIDE = {"cpu": 2048, "cuda": 16384}
FAISS_ROWS = 4096
FAISS_INSTALL = "pip install -c constraints.txt faiss-gpu"


class NeighbourChoice(NamedTuple):
    """Which backend searches, and the sentence that says why."""

    backend: str
    reason: str


@dataclass(frozen=True)
class Neighbours:
    """indices int32 [N, k], distances float32 [N, k], each row by (distance, index); choice: what searched, and why."""

    indices: npt.NDArray[np.int32]
    distances: npt.NDArray[np.float32]
    choice: NeighbourChoice


class Points(NamedTuple):
    """Checked features, float32 [N, D], of unit length where the metric is cosine."""

    rows: Tensor
    squares: Tensor  # float32 [N], squared norms
    metric: NeighbourMetric

    def distances(self, rows: Tensor, columns: Tensor, among: Points) -> Tensor:
        """Distances of single pairs, int32 [P] each -> float32 [P]. Cosine: half the squared distance, or 1 with a zero vector."""
        squared = squared_distances(self.rows, among.rows, rows, columns)
        if self.metric == "sqeuclidean":
            return squared
        nothing = (self.squares[rows] == 0) | (among.squares[columns] == 0)
        return torch.where(nothing, 1.0, squared / 2)

    def error(self, among: Points) -> Tensor:
        """float32 [N]: by how much a distance from a matrix product can miss that of `distances`, at most (Higham, "Accuracy and stability of
        numerical algorithms", 2002, section 3.1: D roundings of each product)."""
        roundings = (self.rows.shape[1] + 8) * 2.0**-24
        if self.metric == "cosine":
            return torch.full_like(self.squares, roundings)
        largest = among.squares.max()
        return 2 * roundings * (self.squares + largest)


class Found(NamedTuple):
    """What `search` found, on the device of the points."""

    indices: Tensor  # int32 [N, k]
    distances: Tensor  # float32 [N, k]
    farthest: Tensor  # float32 [N], the largest distance of a row, to the rounding of a matrix product; empty unless asked for
    choice: NeighbourChoice


def nearest_neighbours(
    features: Features,
    k: int,
    *,
    among: Features | None = None,
    metric: NeighbourMetric = "cosine",
    backend: Backend = "auto",
    progress: Progress | None = None,
) -> Neighbours:
    """The k nearest of each row of features [N, D] among the features [M, D], by default themselves; all M where k is larger.

    Any float dtype, numpy or torch; tensors on CUDA are searched there. metric: "cosine", 1 - cos, where a zero vector is at distance 1 from
    everything; or "sqeuclidean", the squared distance of the features as they are. Distances are those of the vectors in float32. progress: called
    with (rows done, N).

    Raises ValueError for features that are not finite (naming the row), of other shapes or too large to be squared, and for k < 1; UserError where
    faiss is asked for and missing, and for what does not fit into memory.
    """
    points = as_points("features", features, metric)
    others = None if among is None else as_points("among", among, metric, points.rows.device)
    found = search(points, k, among=others, backend=backend, progress=progress)
    return Neighbours(found.indices.cpu().numpy(), found.distances.cpu().numpy(), found.choice)


def as_points(name: str, features: Features, metric: NeighbourMetric, device: torch.device | None = None) -> Points:
    """Checked features [N, D], at least one; `name` is for messages."""
    if metric not in ("cosine", "sqeuclidean"):
        raise ValueError(f"metric is {metric!r}; allowed: cosine, sqeuclidean")
    array = features.detach() if isinstance(features, Tensor) else np.asarray(features)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{name} have shape {tuple(array.shape)}; [N, D] with at least one image is wanted")
    device = device or (array.device if isinstance(array, Tensor) else torch.device("cpu"))
    N, D = array.shape
    require_memory(4.0 * N * D, f"a float32 copy of {N:,} features of {D} dimensions", device)
    rows = torch.empty((N, D), dtype=torch.float32, device=device)
    squares = rows.new_empty(N)
    step = max(1, (1 << 22) // D)
    for start in range(0, N, step):
        part = slice(start, start + step)
        wide = array[part].to(device, torch.float64) if isinstance(array, Tensor) else torch.from_numpy(array[part].astype(np.float64)).to(device)
        bad = (~wide.isfinite().all(dim=1)).nonzero()
        if len(bad):
            raise ValueError(f"{name}: row {start + int(bad[0])} is not finite")
        if metric == "cosine":
            # The largest value first: squares of very small or very large ones would leave float64.
            largest = wide.abs().amax(dim=1, keepdim=True)
            wide = wide / torch.where(largest == 0, 1, largest)
            length = wide.norm(dim=1, keepdim=True)
            wide = wide / torch.where(length == 0, 1, length)
        rows[part] = wide
        squares[part] = rows[part].double().square().sum(dim=1)
    bad = (~(4 * squares).isfinite()).nonzero()
    if len(bad):
        raise ValueError(f"{name}: row {int(bad[0])} is too large to be squared in float32")
    return Points(rows, squares, metric)


def search(
    points: Points,
    k: int,
    *,
    among: Points | None = None,
    backend: Backend = "auto",
    farthest: bool = False,
    progress: Progress | None = None,
) -> Found:
    """`nearest_neighbours` of checked points, with the distance of the farthest of each row from the same products."""
    if k < 1:
        raise ValueError(f"k is {k}; at least 1 is wanted")
    others = points if among is None else among
    N, M, device = len(points.rows), len(others.rows), points.rows.device
    if points.rows.shape[1] != others.rows.shape[1]:
        raise ValueError(f"features have {points.rows.shape[1]} dimensions, those they are searched among {others.rows.shape[1]}")
    if max(N, M) >= 2**31:
        raise ValueError(f"{max(N, M):,} images are more than the 2,147,483,647 that an index counts")
    num_kept = min(k + MARGIN, M)
    side = TILE_SIDE.get(device.type, TILE_SIDE["cpu"])
    num_bytes = 16.0 * N * num_kept + 12.0 * min(N, side) * min(M, side) + 24.0 * (1 << 20)
    require_memory(num_bytes, f"the search for {k} neighbours of {N:,} images among {M:,}", device)
    choice = choose_backend(backend, device, among is None, farthest)
    with exact_products(), torch.no_grad():
        if choice.backend == "faiss":
            scores, indices = _faiss_candidates(points, others, num_kept, progress)
            extreme = _tiled_candidates(points, None if among is None else others, 1, None)[2] if farthest else scores.new_zeros(0)
        else:
            scores, indices, extreme = _tiled_candidates(points, among, num_kept, progress)
        base = 1.0 if points.metric == "cosine" else points.squares
        reach = base - scores.amin(dim=1)
        error = points.error(others)
        nearest, distances = _nearest_of(points, others, indices, min(k, M))
        if num_kept < M:
            # Both sides may err: the product that left an image out and the one that kept the worst.
            open_rows = (reach - error <= distances[:, -1] * (1 + 2.0**-22)).nonzero()[:, 0]
            _search_again(points, others, open_rows, nearest, distances, error)
    return Found(nearest, distances, (base - extreme).clamp(min=0) if farthest else extreme[:0], choice)


def choose_backend(backend: Backend, device: torch.device, itself: bool = True, farthest: bool = False) -> NeighbourChoice:
    """The backend of a search. itself: a set is searched in itself; farthest: the farthest distances are wanted too.

    Raises UserError with the cure where faiss is asked for and does not serve.
    """
    if backend not in ("auto", "faiss", "torch"):
        raise ValueError(f"backend is {backend!r}; allowed: auto, faiss, torch")
    if backend == "torch":
        return NeighbourChoice("torch", "asked for")
    problem = "faiss searches on the CPU here, and the features are on CUDA" if device.type == "cuda" else faiss_problem()
    if backend == "faiss":
        if problem:
            raise UserError(f"{problem}; use backend torch")
        return NeighbourChoice("faiss", "asked for")
    if problem:
        return NeighbourChoice("torch", problem)
    if farthest:
        return NeighbourChoice("torch", "its products give the farthest distances too, for which faiss would take a second pass")
    if itself and runs_compiled(torch.empty(0)):
        return NeighbourChoice("torch", "with the compiled operators, half of the products are enough for a set searched in itself")
    return NeighbourChoice("faiss", "a flat index of faiss, which is installed")


@functools.cache
def faiss_problem() -> str | None:
    """Why faiss does not serve, with the cure; None where it does."""
    if importlib.util.find_spec("faiss") is None:
        return f"faiss is not installed ({FAISS_INSTALL})"
    try:
        import faiss  # noqa: F401
    except (ImportError, OSError) as error:
        return f"faiss does not load: {error} ({FAISS_INSTALL})"
    return None


def _tiled_candidates(points: Points, among: Points | None, num_kept: int, progress: Progress | None) -> tuple[Tensor, Tensor, Tensor]:
    """(scores float32 [N, num_kept], indices int32 [N, num_kept], lowest score float32 [N]); a distance is 1 or |a|^2 less the score.

    Among themselves, the tiles on one side of the diagonal serve both their rows and, turned, their columns.
    """
    others = points if among is None else among
    N, M = len(points.rows), len(others.rows)
    side = TILE_SIDE.get(points.rows.device.type, TILE_SIDE["cpu"])
    best = points.rows.new_full((N, num_kept), -torch.inf)
    indices = torch.full((N, num_kept), -1, dtype=torch.int32, device=best.device)
    lowest = points.rows.new_full((N,), torch.inf)
    euclidean = points.metric == "sqeuclidean"
    for start in range(0, N, side):
        here = slice(start, start + side)
        for first in range(start if among is None else 0, M, side):
            there = slice(first, first + side)
            products = points.rows[here] @ others.rows[there].T
            scores = products * 2 - others.squares[there] if euclidean else products
            select_nearest_(scores, first, best[here], indices[here], lowest[here])
            if among is None and first > start:
                turned = products.T * 2 - points.squares[here] if euclidean else products.T.contiguous()
                select_nearest_(turned, start, best[there], indices[there], lowest[there])
        if progress is not None:
            progress(min(N, start + side), N)
    return best, indices, lowest


def _faiss_candidates(points: Points, others: Points, num_kept: int, progress: Progress | None) -> tuple[Tensor, Tensor]:
    """The first two of `_tiled_candidates`, by a flat index."""
    import faiss

    D = points.rows.shape[1]
    index = faiss.IndexFlatIP(D) if points.metric == "cosine" else faiss.IndexFlatL2(D)
    index.add(others.rows.numpy())
    found_scores, found_indices = [], []
    for start in range(0, len(points.rows), FAISS_ROWS):
        part = slice(start, start + FAISS_ROWS)
        scores, indices = index.search(points.rows[part].numpy(), num_kept)
        found_scores.append(torch.from_numpy(scores) if points.metric == "cosine" else points.squares[part, None] - torch.from_numpy(scores))
        found_indices.append(torch.from_numpy(indices.astype(np.int32)))
        if progress is not None:
            progress(min(start + FAISS_ROWS, len(points.rows)), len(points.rows))
    return torch.cat(found_scores), torch.cat(found_indices)


def _nearest_of(points: Points, others: Points, candidates: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest of each row's candidates int32 [N, K] by (distance, index): indices int32 [N, k], distances float32 [N, k]."""
    N, K = candidates.shape
    nearest, distances = candidates.new_empty(N, k), points.rows.new_empty(N, k)
    step = max(1, (1 << 20) // K)
    for start in range(0, N, step):
        part = slice(start, start + step)
        columns = candidates[part].flatten()
        rows = torch.arange(start, start + len(columns) // K, dtype=torch.int32, device=columns.device).repeat_interleave(K)
        keys = _keys(points.distances(rows, columns, others), columns).view(-1, K).sort(dim=1).values[:, :k]
        nearest[part], distances[part] = _unpacked(keys)
    return nearest, distances


def _search_again(points: Points, others: Points, open_rows: Tensor, nearest: Tensor, distances: Tensor, error: Tensor) -> None:
    """Rows whose candidates may not have been enough: all images that a product, with its error, cannot tell from the k-th neighbour. In place."""
    M, k = len(others.rows), nearest.shape[1]
    if points.metric == "cosine":
        # A zero vector is as far from everything: the first k, without as many distances as there are images.
        nothing = points.squares[open_rows] == 0
        nearest[open_rows[nothing]] = torch.arange(k, dtype=torch.int32, device=nearest.device)
        distances[open_rows[nothing]] = 1.0
        open_rows = open_rows[~nothing]
    step = max(1, TILE_SIDE.get(points.rows.device.type, TILE_SIDE["cpu"]) ** 2 // M)
    for start in range(0, len(open_rows), step):
        here = open_rows[start : start + step]
        products = points.rows[here] @ others.rows.T
        approximate = 1 - products if points.metric == "cosine" else points.squares[here, None] + others.squares - 2 * products
        bound = distances[here, -1] * (1 + 2.0**-22) + error[here]
        place, columns = (approximate <= bound[:, None]).nonzero(as_tuple=True)
        columns = columns.int()
        keys = _keys(points.distances(here[place].int(), columns, others), columns)
        # By row, and by key in a row: two stable sorts. The k first of each row are its neighbours.
        order = keys.argsort()
        order = order[place[order].argsort(stable=True)]
        lengths = torch.bincount(place, minlength=len(here))
        firsts = (lengths.cumsum(0) - lengths)[:, None] + torch.arange(k, device=order.device)
        nearest[here], distances[here] = _unpacked(keys[order[firsts]])


def _keys(distances: Tensor, columns: Tensor) -> Tensor:
    """int64 that sort by (distance, column): the bits of a float32 that is not negative rise with it."""
    return (distances.view(torch.int32).long() << 32) | columns.long()


def _unpacked(keys: Tensor) -> tuple[Tensor, Tensor]:
    return (keys & 0xFFFFFFFF).int(), (keys >> 32).int().view(torch.float32)
