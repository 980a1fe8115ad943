"""What a neighbour search needs beside matrix products: the highest scores of each row, tile by tile, and distances of single pairs.

    select_nearest_   best [R, K] <- the K highest of best and scores [R, C], with their columns; lowest [R] <- the smallest score seen
    pair_distances    |left[rows] - right[columns]|^2, summed in float64 and rounded once to float32

The sum of a pair is taken in an order that depends on the number of dimensions alone. So equal vectors are at exactly equal distances from everything
and at 0 from one another, which a matrix product does not give; C++ and plain torch add in different orders, which the rounding to float32 hides but
for one pair in some hundred million. On a CPU both are C++ where that is built; on CUDA plain torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from personmae_kernels import launching
from personmae_kernels.checks import axis_sizes, check_dtype

# Bounds what plain torch holds at once: float64 differences of this many values.
PLAIN_VALUES = {"cpu": 1 << 22, "cuda": 1 << 27}


def is_compiled(tensor: Tensor) -> bool:
    """Whether the operators of this file and of jaccard.py run in C++ for this tensor."""
    return launching.form_for(tensor, has_compiled=not tensor.is_cuda, has_triton=False) == "compiled"


def select_nearest_(scores: Tensor, first_column: int, best: Tensor, indices: Tensor, lowest: Tensor) -> None:
    """Takes a tile of scores into the K highest of each row, in place.

    scores: float32 [R, C], of the columns first_column onwards. best: float32 [R, K], indices: int32 [R, K], -inf and -1 before the first tile; their
    order in a row is not defined, nor which of equal scores stay. lowest: float32 [R], +inf before the first tile. Raises TypeError or ValueError,
    naming the argument, for what does not fit.
    """
    axis_sizes(scores=(scores, "R C"), best=(best, "R K"), indices=(indices, "R K"), lowest=(lowest, "R"))
    check_dtype(torch.float32, scores=scores, best=best, lowest=lowest)
    check_dtype(torch.int32, indices=indices)
    if is_compiled(scores):
        torch.ops.personmae.select_nearest_(scores.contiguous(), first_column, best, indices, lowest)
        return
    kept = min(best.shape[1], scores.shape[1])
    highest, columns = scores.topk(kept, dim=1, sorted=False)
    both, where = torch.cat([best, highest], dim=1).topk(best.shape[1], dim=1, sorted=False)
    indices.copy_(torch.cat([indices, columns.int() + first_column], dim=1).gather(1, where))
    best.copy_(both)
    torch.minimum(lowest, scores.amin(dim=1), out=lowest)


def pair_distances(left: Tensor, right: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Squared Euclidean distances of single pairs. left: float32 [N, D], right: float32 [M, D], rows, columns: int32 [P] -> float32 [P].

    Raises TypeError or ValueError, naming the argument, for what does not fit; on a CPU RuntimeError or IndexError for a row or column out of range.
    """
    D = axis_sizes(left=(left, "N D"), right=(right, "M D"), rows=(rows, "P"), columns=(columns, "P"))["D"]
    check_dtype(torch.float32, left=left, right=right)
    check_dtype(torch.int32, rows=rows, columns=columns)
    if is_compiled(left):
        return torch.ops.personmae.pair_distances(left.contiguous(), right.contiguous(), rows.contiguous(), columns.contiguous())
    distances = left.new_empty(len(rows))
    step = max(1, PLAIN_VALUES.get(left.device.type, PLAIN_VALUES["cpu"]) // max(1, D))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        difference = left[rows[part]].double() - right[columns[part]].double()
        distances[part] = difference.square().sum(dim=1)
    return distances
