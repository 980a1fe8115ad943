"""k-reciprocal re-ranking: distances of queries to a gallery that take the neighbours of both into account, tile by tile.

The final distance is (1 - weight) * Jaccard distance + weight * original distance, over the images of query and gallery together. `reciprocal` has
the Jaccard distance and its two definitions. The original distance is, in `classic`, the squared Euclidean one divided by the largest of the query's
row, gallery and queries, squared once more with `resquare`; in `fast-reid` the metric's own: 1 - cos, or the squared Euclidean distance.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from personmae.evaluation.distances import exact_products
from personmae.evaluation.memory import require_memory
from personmae.evaluation.neighbours import Backend, Features, Found, NeighbourMetric, Points, Progress, as_points
from personmae.evaluation.reciprocal import Definition, Reciprocal, reciprocal_vectors, relative
from personmae_kernels.jaccard import ONE, Rows, by_column, min_sums

Tile = tuple[slice, npt.NDArray[np.float32]]
# Distances in a tile, by default.
TILE_PAIRS = {"cpu": 1 << 24, "cuda": 1 << 28}


def reranked_distances(
    query_features: Features,
    gallery_features: Features,
    *,
    definition: Definition = "classic",
    k1: int = 20,
    k2: int = 6,
    weight: float = 0.3,
    metric: NeighbourMetric = "cosine",
    resquare: bool = False,
    backend: Backend = "auto",
    rows_at_once: int | None = None,
    progress: Progress | None = None,
) -> Iterator[Tile]:
    """Yields (queries, float32 [rows, G]): the final distances of a slice of the queries [Q, D] to the gallery [G, D], until all had their turn.

    metric: "cosine" for features at unit length, which TransReID's and fast-reid's scores are of; "sqeuclidean" for features as they are, as
    torchreid has them. weight: of the original distance, the paper's lambda. rows_at_once: queries in a tile, by default about 64 MiB. progress: of
    the neighbour search, called with (images done, Q + G). The memory is that of the features, a copy of them, and a few tiles.

    Arguments are checked, and neighbours found, before the first tile. Raises ValueError for features that are not finite (naming the row), of other
    shapes and for other parameters; UserError for what does not fit into memory.
    """
    reciprocal = Reciprocal(definition, k1, k2, resquare)
    if not 0 <= weight <= 1:
        raise ValueError(f"weight is {weight}; it must lie in [0, 1]")
    if rows_at_once is not None and rows_at_once < 1:
        raise ValueError(f"rows_at_once is {rows_at_once}; at least 1 is wanted")
    points, num_query = _joined_points(query_features, gallery_features, metric)
    num_gallery, device = len(points.rows) - num_query, points.rows.device
    rows = rows_at_once or max(1, TILE_PAIRS.get(device.type, TILE_PAIRS["cpu"]) // num_gallery)
    require_memory(24.0 * min(rows, num_query) * num_gallery, f"a tile of {rows:,} queries and {num_gallery:,} gallery images", device)
    found = reciprocal.search(points, backend, progress)
    vectors = reciprocal_vectors(points, found, reciprocal)
    return _tiles(points, num_query, found, vectors, reciprocal, weight, rows)


def _joined_points(query_features: Features, gallery_features: Features, metric: NeighbourMetric) -> tuple[Points, int]:
    """Queries and then the gallery as one set, and the number of queries."""
    query = as_points("query features", query_features, metric)
    gallery = as_points("gallery features", gallery_features, metric, query.rows.device)
    if query.rows.shape[1] != gallery.rows.shape[1]:
        raise ValueError(f"query features have {query.rows.shape[1]} dimensions, gallery features {gallery.rows.shape[1]}")
    together = Points(torch.cat([query.rows, gallery.rows]), torch.cat([query.squares, gallery.squares]), metric)
    return together, len(query.rows)


def _tiles(points: Points, num_query: int, found: Found, vectors: Rows, reciprocal: Reciprocal, weight: float, rows: int) -> Iterator[Tile]:
    num_gallery = len(points.rows) - num_query
    turned = by_column(vectors, len(points.rows), first_row=num_query)
    error = points.error(points)
    for start in range(0, num_query, rows):
        queries = slice(start, min(num_query, start + rows))
        with torch.no_grad():
            sums = min_sums(vectors, turned, num_gallery, queries.start, queries.stop)
            final = _jaccard_in_place(sums).mul_(1 - weight)
            original = _original(points, queries, num_query)
            if reciprocal.definition == "classic":
                original = relative(original, found.farthest[queries, None], error[queries, None], reciprocal.resquare)
            final.add_(original, alpha=weight)
        yield queries, final.cpu().numpy()


def _jaccard_in_place(sums: Tensor) -> Tensor:
    """`jaccard_of` in float32 throughout, for whole tiles. sums: int32 [R, G] -> float32 [R, G]."""
    share = sums.float().div_(ONE)
    return share.div_(2 - share).neg_().add_(1).clamp_(min=0)


def _original(points: Points, queries: slice, num_query: int) -> Tensor:  # -> float32 [R, G]
    gallery = points.rows[num_query:]
    with exact_products():
        products = points.rows[queries] @ gallery.T
    if points.metric == "cosine":
        return products.neg_().add_(1).clamp_(min=0)
    return products.mul_(-2).add_(points.squares[num_query:]).add_(points.squares[queries, None]).clamp_(min=0)
