"""Where the images of a gallery stand among the matches of each query: ranks by counting, without a sort and without a full matrix.

The distance of a pair is a sum of squares in float64 in one fixed order, so that equal features are equally far wherever they stand:

    x_i = query_i * query_scale - gallery_i * gallery_scale            each product and each difference rounded to float64
    lane_l = x_l^2 + x_(l+32)^2 + x_(l+64)^2 + ...                     32 lanes, each added up in this order
    sum = the lanes folded in halves: l + (l + 16), l + (l + 8), ...
    distance = sqrt(sum);   cosine: sum / 2, with scale 1 / norm; 1 where either scale is 0, a vector without direction

The matches of a query stand in the order (distance, index). A gallery image at distance d adds to the counts of all of them at once:

    closer       + 1 for the matches at a larger distance
    tied_before  + 1 for those at exactly d with a larger index
    tied_after   + 1 for those at exactly d with a smaller index

Each of these is a run of matches, so only its two ends are noted: `steps` int64 [3, M + Q] holds for each of the three counts and for each query the
K + 1 differences from match to match, those of query q from offsets[q] + q on. `counts_of_steps` adds them up.

Most pairs need no distance: place_products_ takes tiles of a float32 matrix product p, which says for sure, by a bound on its error, that

    low_g - slack_q norm_g - 2 p  <=  |query - gallery|^2 - constant_q  <=  high_g + slack_q norm_g - 2 p

and `match_bounds` holds for each match the values below which this is surely nearer, and above which it is surely farther. An image that lies within
the bounds of a match is placed by its distance. The caller answers for the bounds (personmae/evaluation/distances.py derives them): with valid ones
the counts are those of the distances, to the last tie, whatever the tiles. C++ on a CPU, else plain PyTorch; all forms equal to the bit.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from personmae_kernels import match_places_reference
from personmae_kernels.checks import axis_sizes, check_dtype
from personmae_kernels.launching import runs_compiled
from personmae_kernels.match_places_reference import bounds_of_products

__all__ = [
    "Bounds",
    "Counts",
    "Matches",
    "Vectors",
    "bounds_of_products",
    "counts_of_steps",
    "new_steps",
    "pair_distances",
    "place_distances_",
    "place_products_",
]
EITHER = (torch.float32, torch.float64)


class Vectors(NamedTuple):
    """Features as they came, and the factor of each row that the definition multiplies them by."""

    features: Tensor  # float32 or float64 [N, D]
    scale: Tensor  # float64 [N]

    def rows(self, rows: slice) -> Vectors:
        """Some of them."""
        return Vectors(self.features[rows], self.scale[rows])


class Matches(NamedTuple):
    """The matches of each query, those of query q in offsets[q]:offsets[q + 1], by (distance, index)."""

    offsets: Tensor  # int64 [Q + 1]
    match: Tensor  # int64 [M] gallery index
    distance: Tensor  # float64 [M]


class Bounds(NamedTuple):
    """What a product leaves open, see the head of the file. All float64."""

    matches: Tensor  # [2, M]: surely nearer below, surely farther above; both ascending within a query
    slack: Tensor  # [Q]
    gallery: Tensor  # [3, G]: low, high, norm


Record = TypeVar("Record", Vectors, Matches, Bounds)


class Counts(NamedTuple):
    """Of each match, over the images placed: int64 [M] each. A match itself is in none of its own."""

    closer: Tensor
    tied_before: Tensor
    tied_after: Tensor


def pair_distances(query: Vectors, gallery: Vectors, rows: Tensor, columns: Tensor, *, cosine: bool) -> Tensor:
    """Distances of the pairs (rows[i], columns[i]), float64 [P].

    query [Q, D] and gallery [G, D], of one dtype; rows, columns: int64 [P]. Raises TypeError or ValueError, naming the argument, for other shapes or
    dtypes, and IndexError or RuntimeError for a number that is out of range.
    """
    check_vectors(query, gallery)
    axis_sizes(query=(query.features, "Q D"), rows=(rows, "P"), columns=(columns, "P"))
    check_dtype(torch.int64, rows=rows, columns=columns)
    if runs_compiled(query.features):
        pairs = (rows.contiguous(), columns.contiguous())
        return torch.ops.personmae.pair_distances(*contiguous(query), *contiguous(gallery), *pairs, cosine)
    return match_places_reference.pair_distances(*query, *gallery, rows, columns, cosine)


def new_steps(matches: Matches) -> Tensor:  # -> int64 [3, M + Q]
    """Steps of no image yet."""
    return matches.match.new_zeros(3, len(matches.match) + len(matches.offsets) - 1)


def place_distances_(steps: Tensor, matches: Matches, distances: Tensor, first: int = 0) -> None:
    """Adds gallery images, number `first` and those after it, at the distances [Q, G] (float32 or float64, none NaN) to the steps.

    Raises TypeError or ValueError, naming the argument, for other shapes or dtypes.
    """
    check_matches(steps, matches, distances, "distances")
    check_dtype(EITHER, distances=distances)
    if runs_compiled(distances):
        torch.ops.personmae.place_distances_(steps, *contiguous(matches), distances.contiguous(), first)
    else:
        match_places_reference.place_distances_(steps, *matches, distances, first)


def place_products_(
    steps: Tensor, matches: Matches, products: Tensor, bounds: Bounds, query: Vectors, gallery: Vectors, *, cosine: bool, first: int = 0
) -> None:
    """Adds gallery images, number `first` and those after it, by their products float32 [Q, G] with the queries to the steps.

    query [Q, D], gallery [G, D]: for the pairs that the products leave open. Raises TypeError or ValueError, naming the argument, for other shapes or
    dtypes.
    """
    check_vectors(query, gallery)
    check_matches(steps, matches, products, "products")
    check_dtype(torch.float32, products=products)
    named = {"products": (products, "Q G"), "query": (query.features, "Q D"), "gallery": (gallery.features, "G D"), "match": (matches.match, "M")}
    axis_sizes(**named, match_bounds=(bounds.matches, "2 M"), slack=(bounds.slack, "Q"), gallery_bounds=(bounds.gallery, "3 G"))
    check_dtype(torch.float64, match_bounds=bounds.matches, slack=bounds.slack, gallery_bounds=bounds.gallery)
    operator = torch.ops.personmae.place_products_ if runs_compiled(products) else match_places_reference.place_products_
    matches, bounds, query, gallery = contiguous(matches), contiguous(bounds), contiguous(query), contiguous(gallery)
    operator(steps, *matches, bounds.matches, products.contiguous(), bounds.slack, bounds.gallery, *query, *gallery, cosine, first)


def counts_of_steps(steps: Tensor, offsets: Tensor) -> Counts:
    """The counts of each match from the steps [3, M + Q] of all images and the offsets [Q + 1] of the matches."""
    num_matches = offsets.diff()
    query = torch.repeat_interleave(torch.arange(len(num_matches), device=steps.device), num_matches)
    total = torch.cat([steps.new_zeros(3, 1), steps.cumsum(dim=1)], dim=1)
    place = torch.arange(len(query), device=steps.device) + query
    return Counts(*(total[:, place + 1] - total[:, (offsets[:-1] + torch.arange(len(num_matches), device=steps.device))[query]]))


def contiguous(record: Record) -> Record:
    """All tensors of a record as C++ takes them."""
    return type(record)(*(tensor.contiguous() for tensor in record))


def check_vectors(query: Vectors, gallery: Vectors) -> None:
    """Raises TypeError or ValueError, naming the argument, for features that do not belong together."""
    named = {"query": (query.features, "Q D"), "query_scale": (query.scale, "Q")}
    axis_sizes(**named, gallery=(gallery.features, "G D"), gallery_scale=(gallery.scale, "G"))
    check_dtype(EITHER, query=query.features)
    if gallery.features.dtype != query.features.dtype:
        wanted, given = (str(vectors.features.dtype).removeprefix("torch.") for vectors in (query, gallery))
        raise TypeError(f"gallery: {wanted}, as in query, is needed, got {given}")
    check_dtype(torch.float64, query_scale=query.scale, gallery_scale=gallery.scale)


def check_matches(steps: Tensor, matches: Matches, tile: Tensor, name: str) -> None:
    """Raises TypeError or ValueError, naming the argument, for matches that do not belong to a tile [Q, G]."""
    sizes = axis_sizes(**{name: (tile, "Q G")}, match=(matches.match, "M"), distance=(matches.distance, "M"))
    axis_sizes(offsets=(matches.offsets, str(sizes["Q"] + 1)), steps=(steps, f"3 {sizes['Q'] + sizes['M']}"))
    check_dtype(torch.int64, steps=steps, offsets=matches.offsets, match=matches.match)
    check_dtype(torch.float64, distance=matches.distance)
