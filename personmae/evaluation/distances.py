"""Distances of features: the definition in float64, and float32 matrix products with a proven bound on what they leave open.

Definition (personmae_kernels.match_places): sums of squared differences in float64, taken in the same order for each pair, so that equal features
are at exactly equal distances wherever they stand. cosine: half the squared distance of the unit vectors, which is 1 - cos, in [0, 2]; a zero vector
has no direction, and distance 1 from everything. euclidean: the root of the sum.

Bound. Let u = 2^-24, and a row x (a feature, for cosine its unit vector) be held as x' = float32(s (x - c)), c the mean of the gallery and s a power
of two: distances stay as they are but for s^2, while the norms r = |x'| get as small as they can. With D dimensions, k = 2u (1 + 2^-10) and
g = D u / (1 - D u), the bound of a float32 product in any order (Higham, "Accuracy and stability of numerical algorithms", 2nd ed., section 3.1),

    rounding to x'        moves the squared distance by at most k (r_q + r_g)^2 = k r_q^2 + k r_g^2 + 2 k r_q r_g
    the product p         is off by at most g r_q r_g
    so |x_q - x_g|^2 s^2  lies within  r_q^2 + r_g^2 - 2 p  +-  (k r_q^2 + k r_g^2 + 2 (g + k) r_q r_g + tiny)

where `tiny` covers what underflows. What float64 rounds, the sum of the definition included, is within a relative (D + 16) 2^-52 and the 2^-10 above.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from personmae.evaluation.memory import require_memory
from personmae_kernels import match_places
from personmae_kernels.match_places import Vectors

Metric = Literal["cosine", "euclidean"]
FloatArray = npt.NDArray[np.float64]
Features = npt.ArrayLike | Tensor

ROUNDING = 2.0**-24
# Beyond it squares leave float64's range.
LARGEST_NORM = 1e150
# Rows that are turned into float32 at once.
ROWS = 2048


@dataclass(frozen=True)
class Held:
    """Rows as the products take them."""

    values: Tensor  # float32 [N, D]
    square: Tensor  # float64 [N] their squared norms
    norm: Tensor  # float64 [N]; infinite for a zero vector under cosine: its distances are no differences of vectors, so nothing is known


@dataclass(frozen=True)
class Space:
    """Query and gallery features [Q, D] and [G, D] on one device, and how they are compared."""

    query: Vectors
    gallery: Vectors
    cosine: bool
    centre: Tensor  # float64 [D]
    factor: float  # a power of two

    @property
    def device(self) -> torch.device:
        """Where the features are."""
        return self.query.features.device

    def pair_distances(self, rows: Tensor, columns: Tensor) -> Tensor:  # int64 [P], [P] -> float64 [P]
        """Distances of pairs by the definition."""
        return match_places.pair_distances(self.query, self.gallery, rows, columns, cosine=self.cosine)

    def hold(self, vectors: Vectors) -> Held:
        """Rows, shifted and rounded."""
        values = torch.empty(vectors.features.shape, dtype=torch.float32, device=self.device)
        square = torch.empty(len(values), dtype=torch.float64, device=self.device)
        for start in range(0, len(values), ROWS):
            part = slice(start, start + ROWS)
            exact = vectors.features[part].double()
            exact = exact * vectors.scale[part, None] if self.cosine else exact
            values[part] = (exact - self.centre).mul_(self.factor)
            square[part] = torch.linalg.vector_norm(values[part], dim=1, dtype=torch.float64).square_()
        norm = square.sqrt()
        if self.cosine:
            unknown = vectors.scale == 0
            values[unknown], square[unknown], norm[unknown] = 0, 0, math.inf
        return Held(values, square, norm)

    def gallery_bounds(self, held: Held) -> Tensor:  # -> float64 [3, G]
        """low, high and norm of match_places."""
        return torch.stack([held.square * (1 - self._rounded), held.square * (1 + self._rounded), held.norm])

    def slack(self, held: Held) -> Tensor:  # -> float64 [Q]
        """The slack of match_places for these queries."""
        share = held.values.shape[1] * ROUNDING
        product = share / (1 - share) if share < 0.5 else math.inf
        # Not zero: an infinite norm of the gallery must stay infinite.
        return (held.norm * (2 * (product + self._rounded) * (1 + 2**-20))).clamp_(min=1e-300)

    def limits(self, distance: Tensor, square: Tensor) -> Tensor:  # float64 [M], [M] -> [2, M]
        """For `distance`: below what upper bound of match_places a pair is surely nearer, and above what lower bound it is surely farther.

        square: squared norm of the query (as held) that each distance belongs to.
        """
        squared = 2 * distance if self.cosine else (distance * self.factor).square()
        low, high = self._query_bounds(square)
        return torch.stack([squared * (1 - self._margin) - high, squared * (1 + self._margin) - low])

    def surely_farther(self, upper: Tensor, square: Tensor) -> Tensor:  # float64 [Q], [Q] -> [Q]
        """Above what lower bound of match_places a pair is surely farther than one that has this upper bound."""
        low, high = self._query_bounds(square)
        return (upper + high) * (1 + self._margin) - low

    def _query_bounds(self, square: Tensor) -> tuple[Tensor, Tensor]:
        """What the bounds of match_places leave out."""
        tiny = len(self.centre) * (2.0**-100 + 2.0**-1074 * self.factor**2)
        return square * (1 - self._rounded) - tiny, square * (1 + self._rounded) + tiny

    @property
    def _rounded(self) -> float:
        return 2 * ROUNDING * (1 + 2**-10)

    @property
    def _margin(self) -> float:
        # Thrice what float64 rounds: at the pair, at the one it is compared with, and here.
        return 3 * (len(self.centre) + 16) * 2.0**-52


def open_space(query_features: Features, gallery_features: Features, metric: Metric = "cosine") -> Space:
    """Checked features, ready to be compared.

    query_features [Q, D], gallery_features [G, D]: numpy or torch, of any real dtype, converted exactly; computed on the device they are on.

    Raises ValueError for another metric, other shapes, no features, two devices, values that are not finite or too large to be squared (naming the
    row); UserError if the memory for a conversion is not there.
    """
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f"metric is {metric!r}; allowed: cosine, euclidean")
    query, gallery = _tensor("query", query_features), _tensor("gallery", gallery_features)
    if query.shape[1] != gallery.shape[1]:
        raise ValueError(f"query features have {query.shape[1]} dimensions, gallery features {gallery.shape[1]}")
    if query.device != gallery.device:
        raise ValueError(f"query features are on {query.device}, gallery features on {gallery.device}")
    if query.dtype != gallery.dtype:
        query, gallery = _converted("query", query, torch.float64), _converted("gallery", gallery, torch.float64)
    norms = [_norms("query", query), _norms("gallery", gallery)]
    if metric == "cosine":
        scales = [torch.where(norm == 0, 0.0, 1 / norm) for norm in norms]
        factor = 1.0
    else:
        scales = [torch.ones_like(norm) for norm in norms]
        # Norms of at most about 1, so that nothing overflows in float32; the limit keeps the factor's own square in range.
        largest = max(float(norm.max()) for norm in norms)
        factor = 2.0 ** min(500, -math.frexp(largest)[1] - 1) if largest > 0 else 1.0
    gallery_vectors = Vectors(gallery, scales[1])
    return Space(Vectors(query, scales[0]), gallery_vectors, metric == "cosine", _mean(gallery_vectors), factor)


def distances(query: Features, gallery: Features, metric: Metric = "cosine") -> FloatArray:
    """All distances [Q, G], float64, by the definition. Arguments and errors: see `open_space`."""
    space = open_space(query, gallery, metric)
    num_queries, num_gallery = len(space.query.features), len(space.gallery.features)
    require_memory(8 * num_queries * num_gallery, f"the matrix of {num_queries:,} x {num_gallery:,} distances")
    result = np.empty((num_queries, num_gallery))
    columns = torch.arange(num_gallery, device=space.device)
    for row in range(num_queries):
        result[row] = space.pair_distances(torch.full_like(columns, row), columns).cpu()
    return result


def product_distances(
    query: Features, gallery: Features, metric: Metric, num_pairs: int = 4_000_000
) -> Iterator[tuple[slice, npt.NDArray[np.floating]]]:
    """(rows, distances float32 [rows, G]) of a few queries at a time, from float32 products: off by about 1e-6 of the largest at most, where a
    matrix of exact ones would take a hundred times as long. Arguments and errors: see `open_space`. num_pairs: held at once."""
    space = open_space(query, gallery, metric)
    others = space.hold(space.gallery)
    at_once = max(1, num_pairs // len(others.values))
    for start in range(0, len(space.query.features), at_once):
        rows = slice(start, min(start + at_once, len(space.query.features)))
        own = space.hold(space.query.rows(rows))
        with exact_products():
            squared = (own.values @ others.values.T).mul_(-2)
        squared.add_(own.square.float()[:, None]).add_(others.square.float()).clamp_(min=0)
        if space.cosine:
            distance = squared.mul_(0.5)
            distance[own.norm.isinf()] = 1
            distance[:, others.norm.isinf()] = 1
        else:
            distance = squared.sqrt_().mul_(1 / space.factor)
        yield rows, distance.cpu().numpy()


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Matrix products of float32 are taken in float32 inside, whatever the process allows: TF32, bfloat16 and autocast would break the bounds."""
    backends: Any = torch.backends
    modes = [backends.cuda.matmul, backends.mkldnn.matmul]
    before = [mode.fp32_precision for mode in modes]
    try:
        for mode in modes:
            mode.fp32_precision = "ieee"
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        for mode, precision in zip(modes, before, strict=True):
            mode.fp32_precision = precision


def as_tensor(what: str, values: npt.ArrayLike | Tensor) -> Tensor:
    """Real numbers as a tensor, without a copy where torch can have them as they are. Raises ValueError for other types."""
    if isinstance(values, Tensor):
        tensor = values.detach()
        if tensor.is_complex() or tensor.layout != torch.strided:
            raise ValueError(f"{what} are of type {tensor.dtype}, {tensor.layout}; real numbers in a dense tensor are wanted")
        return tensor
    array = np.asarray(values)
    if array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
        raise ValueError(f"{what} are of type {array.dtype}; real numbers of at most 64 bits are wanted")
    if not array.dtype.isnative or min(array.strides, default=0) < 0:
        require_memory(array.nbytes, f"a copy of the {what} {array.shape}")
        array = array.astype(array.dtype.newbyteorder("="), order="C")
    with warnings.catch_warnings():
        # It is not written to.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)


def _tensor(part: str, features: Features) -> Tensor:
    """The features as float32 or float64 [N, D], without a copy where they are."""
    tensor = as_tensor(f"{part} features", features)
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise ValueError(f"{part} features have shape {tuple(tensor.shape)}; [N, D] with at least one image is wanted")
    return _converted(part, tensor, torch.float32 if tensor.is_floating_point() and tensor.dtype != torch.float64 else torch.float64)


def _converted(part: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous, of that dtype."""
    if (tensor.dtype != dtype or not tensor.is_contiguous()) and not tensor.is_cuda:
        require_memory(tensor.numel() * dtype.itemsize, f"the {part} features {tuple(tensor.shape)} as {dtype}".replace("torch.", ""))
    return tensor.to(dtype).contiguous()


def _norms(part: str, features: Tensor) -> Tensor:  # [N, D] -> float64 [N]
    """Norms, summed in the order of the distances. Raises ValueError for a row that is not finite or does not fit."""
    one, count = torch.ones(len(features), dtype=torch.float64, device=features.device), torch.arange(len(features), device=features.device)
    zero = Vectors(torch.zeros_like(features[:1]), one[:1])
    norm = match_places.pair_distances(Vectors(features, one), zero, count, torch.zeros_like(count), cosine=False)
    # A row that is not finite has a norm that is not.
    suspect = (~(norm <= LARGEST_NORM)).nonzero()[:, 0]
    bad = suspect[~features[suspect].isfinite().all(dim=1)]
    if len(bad):
        raise ValueError(f"{part} features: row {int(bad[0])} is not finite ({len(bad)} such rows of {len(features)})")
    if len(suspect):
        raise ValueError(f"{part} features: row {int(suspect[0])} is longer than {LARGEST_NORM:g}, its squares do not fit into float64")
    return norm


def _mean(vectors: Vectors) -> Tensor:  # -> float64 [D]
    total = torch.zeros(vectors.features.shape[1], dtype=torch.float64, device=vectors.features.device)
    for start in range(0, len(vectors.features), ROWS):
        rows = slice(start, start + ROWS)
        total += vectors.scale[rows] @ vectors.features[rows].double()
    return total / len(vectors.features)
