"""Position codes of a grid of patches: fixed sines and cosines, and learned codes brought to another grid."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from personmae.configs import UserError

PositionResizing = Literal["bilinear", "bicubic"]


def sin_cos_positions(grid: tuple[int, int], width: int, step: float = 1.0) -> Tensor:
    """Fixed 2-D positions: [rows * columns, width] float32; the first half of the channels codes the row, the second the column, each sines then
    cosines of the coordinate at width / 4 frequencies, base 10000.

    step: coordinate of the second row and column, in patches: 1 where patches lie side by side, stride / patch where they overlap.
    """
    if width % 4:
        raise UserError(f"width must be a multiple of 4 for sine-cosine positions, not {width}")
    rows, columns = grid
    frequencies = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    y = step * torch.arange(rows, dtype=torch.float64)[:, None] * frequencies
    x = step * torch.arange(columns, dtype=torch.float64)[:, None] * frequencies
    y = torch.cat([y.sin(), y.cos()], dim=1)[:, None].expand(rows, columns, -1)
    x = torch.cat([x.sin(), x.cos()], dim=1)[None].expand(rows, columns, -1)
    return torch.cat([y, x], dim=2).reshape(rows * columns, width).float()


def resized_positions(
    positions: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], kind: PositionResizing = "bilinear", antialias: bool = False
) -> Tensor:
    """Learned positions of one grid, interpolated to another: [1, prefix + old cells, D] -> [1, prefix + new cells, D], in the same dtype.

    old_grid, new_grid: (rows, columns). What stands before the cells (the class token's position, those of registers) stays as it is. kind and
    antialias: as in torch.nn.functional.interpolate; TransReID resizes with bilinear, timm with bicubic and antialias. The same grid gives the same
    values. Raises ValueError for fewer positions than the old grid has cells.
    """
    num_prefix = positions.shape[1] - old_grid[0] * old_grid[1]
    if num_prefix < 0 or len(positions) != 1:
        raise ValueError(f"positions must be [1, at least {old_grid[0] * old_grid[1]}, D] for a grid {old_grid}, not {tuple(positions.shape)}")
    if old_grid == new_grid:
        return positions
    prefix, cells = positions[:, :num_prefix], positions[0, num_prefix:]
    image = cells.float().T.reshape(1, -1, *old_grid)
    image = F.interpolate(image, size=new_grid, mode=kind, align_corners=False, antialias=antialias)
    return torch.cat([prefix, image.flatten(2).transpose(1, 2).to(positions.dtype)], dim=1)
