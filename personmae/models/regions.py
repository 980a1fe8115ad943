"""Where a cell of region B lies as seen from the masked region A: seen, hidden, or outside it."""

from __future__ import annotations

import torch
from torch import Tensor

from personmae_kernels import cell_coordinates

SEEN, HIDDEN, OUTSIDE = 0, 1, 2
ORIGINS = ("seen", "hidden", "outside")


def cell_origins(boxes: Tensor, flips: Tensor, mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """The origin of each cell of region B, by the cell of A in which its centre lies.

    boxes: int [B, 2, 4] (y0, x0, y1, x1) of A and B. flips: bool [B, 2]. mask: bool [B, L] of A, True = hidden. Returns int64 [B, L] of SEEN,
    HIDDEN, OUTSIDE. Used to split the losses (a model that only copies is good on seen cells alone) and to choose what is predicted.
    """
    rows, columns = grid
    y, x = cell_coordinates(boxes, flips, grid)
    # Centres on an exact cell border round up, as box edges belong to the cell that starts there.
    row, column = torch.floor(y + 0.5).long(), torch.floor(x + 0.5).long()
    inside = ((row >= 0) & (row < rows))[:, :, None] & ((column >= 0) & (column < columns))[:, None, :]
    cell = row.clamp(0, rows - 1)[:, :, None] * columns + column.clamp(0, columns - 1)[:, None, :]
    hidden = mask.gather(1, cell.flatten(1))
    return torch.where(inside.flatten(1), torch.where(hidden, HIDDEN, SEEN), OUTSIDE)
