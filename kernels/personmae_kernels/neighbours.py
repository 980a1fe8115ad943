"""What a neighbour search needs beside matrix products: the highest scores of each row, tile by tile, and distances of single pairs.

    select_nearest_     best [R, K] <- the K highest of best and scores [R, C], with their columns; lowest [R] <- the smallest score seen
    squared_distances   |left[rows] - right[columns]|^2, summed in float64 and rounded once to float32

The sum of a pair is that of match_places, in an order that depends on the number of dimensions alone. So equal vectors are at exactly equal distances
from everything and at 0 from one another, which a matrix product does not give. On a CPU both are C++ where that is built; on CUDA plain torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from personmae_kernels.checks import axis_sizes, check_dtype
from personmae_kernels.launching import runs_compiled
from personmae_kernels.match_places import Vectors, pair_distances


def select_nearest_(scores: Tensor, first_column: int, best: Tensor, indices: Tensor, lowest: Tensor) -> None:
    """Takes a tile of scores into the K highest of each row, in place.

    scores: float32 [R, C], of the columns first_column onwards. best: float32 [R, K], indices: int32 [R, K], -inf and -1 before the first tile; their
    order in a row is not defined, nor which of equal scores stay. lowest: float32 [R], +inf before the first tile. Raises TypeError or ValueError,
    naming the argument, for what does not fit.
    """
    axis_sizes(scores=(scores, "R C"), best=(best, "R K"), indices=(indices, "R K"), lowest=(lowest, "R"))
    check_dtype(torch.float32, scores=scores, best=best, lowest=lowest)
    check_dtype(torch.int32, indices=indices)
    if runs_compiled(scores):
        torch.ops.personmae.select_nearest_(scores.contiguous(), first_column, best, indices, lowest)
        return
    kept = min(best.shape[1], scores.shape[1])
    highest, columns = scores.topk(kept, dim=1, sorted=False)
    both, where = torch.cat([best, highest], dim=1).topk(best.shape[1], dim=1, sorted=False)
    indices.copy_(torch.cat([indices, columns.int() + first_column], dim=1).gather(1, where))
    best.copy_(both)
    torch.minimum(lowest, scores.amin(dim=1), out=lowest)


def squared_distances(left: Tensor, right: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Squared Euclidean distances of single pairs. left: float32 [N, D], right: float32 [M, D], rows, columns: int32 [P] -> float32 [P].

    Raises TypeError or ValueError, naming the argument, for what does not fit; RuntimeError or IndexError for a row or column out of range.
    """
    check_dtype(torch.float32, left=left, right=right)
    check_dtype(torch.int32, rows=rows, columns=columns)
    one, other = (Vectors(features, features.new_ones(len(features), dtype=torch.float64)) for features in (left, right))
    # With scales of 1 the cosine form is half the sum of squares; halved and doubled it stays the same to the bit.
    return (2 * pair_distances(one, other, rows.long(), columns.long(), cosine=True)).float()
