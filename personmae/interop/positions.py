"""Positions of a foreign ViT on our grid: on which grid they were, whether they are learned or fixed, and how they come to another one."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from personmae.configs import UserError
from personmae.models.positions import PositionResizing, resized_positions, sin_cos_positions

Grid = tuple[int, int]  # rows, columns
Order = Literal["rows first", "columns first"]

FIXED_TOLERANCE = 1e-4
# Image sizes (pixels) and strides at which TransReID and its successors train with overlapping patches of 16 pixels.
OVERLAP_SIZES = ((256, 128), (384, 128))
OVERLAP_STRIDES = range(11, 16)
OVERLAP_PATCH = 16


class SourcePositions(NamedTuple):
    """Positions as a file has them."""

    table: Tensor  # [N, D] float32: of the prefix tokens that have one, then of the cells
    prefixes: tuple[int, ...]  # how many of the first may be those of prefix tokens, the likeliest first
    class_position: Tensor | None = None  # [D], where it is a tensor of its own


class FittedPositions(NamedTuple):
    """Positions for our encoder."""

    pos_embed: Tensor  # [1, 1 + L, D] float32, the class token's first
    source_grid: Grid
    order: Order | None  # of fixed sine-cosine positions; None for learned ones
    how: str | None  # what was done to them; None if nothing


def fit_positions(
    source: SourcePositions,
    wanted: Grid,
    *,
    known: Grid | None = None,
    given: Grid | None = None,
    resize: PositionResizing = "bilinear",
    step: float = 1.0,
    own_step: float = 1.0,
) -> FittedPositions:
    """The positions on the wanted grid: fixed ones computed anew, learned ones resized, as `torch.nn.functional.interpolate` does.

    known: the grid that the file tells. given: the grid that the user tells. Without either it is found: by the positions themselves where they are
    fixed, else by their number (square, 2:1, 3:1, those of overlapping patches, the wanted one). step, own_step: from patch to patch on the wanted
    grid and in the file, in patches (stride / patch). Raises UserError where that leaves none or several.
    """
    grid, num_prefix, order = _source_grid(source, wanted, known or given, own_step)
    cells = source.table[num_prefix:]
    class_position = source.class_position
    if class_position is None:
        class_position = source.table[0] if num_prefix else torch.zeros(source.table.shape[1])
    how = None
    if grid != wanted or (order and step != own_step):
        change = f"from {grid[0]}x{grid[1]} to {wanted[0]}x{wanted[1]} cells"
        if order:
            cells, how = sine_positions(wanted, cells.shape[1], order, step), f"fixed sines and cosines ({order}), computed anew {change}"
        else:
            cells, how = resized_positions(cells[None], grid, wanted, resize)[0], f"learned, resized {change} ({resize})"
    return FittedPositions(torch.cat([class_position[None], cells])[None], grid, order, how)


def sine_positions(grid: Grid, width: int, order: Order, step: float = 1.0) -> Tensor:  # -> [L, D] float32
    """Fixed positions, `step` patches from one to the next. The first half of the channels codes the row in ours, MoCo v3 and BootMAE, the column in
    MAE, MALE and HAP."""
    positions = sin_cos_positions(grid, width, step)
    if order == "rows first":
        return positions
    return torch.cat([positions[:, width // 2 :], positions[:, : width // 2]], dim=1)


def _source_grid(source: SourcePositions, wanted: Grid, told: Grid | None, step: float) -> tuple[Grid, int, Order | None]:
    """Grid, number of prefix positions, and order of the channels if the positions are fixed."""
    num = len(source.table)
    splits = {k: num - k for k in source.prefixes if num > k}
    for num_prefix, num_cells in splits.items():
        for grid in [told] if told else _factor_pairs(num_cells):
            if grid[0] * grid[1] == num_cells and (order := _fixed_order(source.table[num_prefix:], grid, step)):
                return grid, num_prefix, order
    if told:
        fitting = [k for k, num_cells in splits.items() if num_cells == told[0] * told[1]]
        if not fitting:
            raise UserError(f"there are {num} positions, which is no grid of {told[0]}x{told[1]} cells; give --foreign.grid ROWS COLUMNS that fits")
        return told, fitting[0], None
    found = [(grid, k) for k, num_cells in splits.items() for grid in _likely_grids(num_cells, wanted)]
    if len(found) == 1:
        return *found[0], None
    if not found:
        raise UserError(f"there are {num} positions, which fit no usual grid of cells; tell the grid with --foreign.grid ROWS COLUMNS")
    grids = ", ".join(f"{rows}x{columns}" for (rows, columns), _ in found)
    raise UserError(f"{num} positions may be of any of the grids {grids}; tell which one with --foreign.grid ROWS COLUMNS")


def _factor_pairs(number: int) -> list[Grid]:
    return [(rows, number // rows) for rows in range(1, number + 1) if number % rows == 0]


def _likely_grids(num_cells: int, wanted: Grid) -> list[Grid]:
    overlapping = {
        ((height - OVERLAP_PATCH) // stride + 1, (width - OVERLAP_PATCH) // stride + 1)
        for height, width in OVERLAP_SIZES
        for stride in OVERLAP_STRIDES
    }
    usual = {(rows, columns) for rows, columns in _factor_pairs(num_cells) if rows in (columns, 2 * columns, 3 * columns)}
    return sorted(grid for grid in usual | overlapping | {wanted} if grid[0] * grid[1] == num_cells)


def _fixed_order(cells: Tensor, grid: Grid, step: float) -> Order | None:
    """The order of the channels if the positions are sines and cosines of this grid, `step` patches apart."""
    width = cells.shape[1]
    if width % 4:
        return None
    orders: tuple[Order, ...] = ("rows first", "columns first")
    fits = (order for order in orders if (sine_positions(grid, width, order, step) - cells).abs().max() < FIXED_TOLERANCE)
    return next(fits, None)
