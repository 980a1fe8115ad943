"""Masks of region A: which of its patches the encoder does not see. Exact counts, and a pure function of one seed per sample.

    block          occluders: blocks of BEiT's generator (personmae_kernels.block_masks), the default
    random         each set of patches equally likely (MAE)
    block+random   blocks, then single patches (BootMAE: 120 of its 147 hidden patches in blocks, 27 single)
    band           one horizontal strip over the whole width, its last row filled from one side: a synthetic occluder such as a car or a table
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from personmae.configs import UserError
from personmae_kernels.block_masks import BoolArray, block_masks, hide_single_cells
from personmae_kernels.sample_random import UInt64Array, draws, integers_below

MaskKind = Literal["block", "random", "block+random", "band"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    """Kind and size of the masks."""

    kind: MaskKind = "block"
    ratio: float = 0.5  # share of the patches that is hidden (HAP's ratio for persons)
    num_visible: int | None = None  # patches left visible; by default from the ratio, see visible_count
    single_ratio: float = 27 / 147  # block+random only: share of the hidden patches that are hidden singly (BootMAE)

    def __post_init__(self) -> None:
        if not 0.0 <= self.ratio < 1.0:
            raise UserError(f"masking.ratio is {self.ratio}; it is the hidden share, from 0 to below 1")
        if not 0.0 <= self.single_ratio <= 1.0:
            raise UserError(f"masking.single_ratio is {self.single_ratio}; it is a share, from 0 to 1")
        if self.num_visible is not None and self.num_visible < 1:
            raise UserError(f"masking.num_visible is {self.num_visible}; the encoder needs at least 1 patch")


@dataclasses.dataclass(frozen=True)
class Masks:
    """Masks of a batch, on the CPU."""

    mask: Tensor  # [B, L] bool, True = hidden
    visible: Tensor  # [B, V] int32, the numbers of the visible patches, ascending


def visible_count(config: MaskingConfig, grid: tuple[int, int]) -> int:
    """Patches left visible on a grid (rows, columns).

    From the ratio it is the nearest whole number of patches, less one where that number is a multiple of 8: the class token then
    completes the multiple, which suits the hardware. So ratio 0.5 leaves 63 of 128, 95 of 192, 23 of 48 and 36 of 72. Raises
    UserError for more patches than the grid has.
    """
    num_cells = grid[0] * grid[1]
    if config.num_visible is not None:
        if config.num_visible > num_cells:
            raise UserError(f"masking.num_visible is {config.num_visible}; a grid of {grid[0]}x{grid[1]} has {num_cells} patches")
        return config.num_visible
    if config.ratio == 0.0:
        return num_cells
    num_tokens = max(1, int((1.0 - config.ratio) * num_cells + 0.5))
    return num_tokens - 1 if num_tokens % 8 == 0 else num_tokens


def draw_masks(config: MaskingConfig, grid: tuple[int, int], seeds: UInt64Array) -> Masks:
    """The masks of a batch.

    grid: (rows, columns) of patches. seeds: uint64 [B], one for each sample, of stream Stream.MASK. Returns Masks on the CPU.
    Raises UserError for more visible patches than the grid has.
    """
    num_cells, num_visible = grid[0] * grid[1], visible_count(config, grid)
    if config.kind == "block":
        hidden = block_masks(seeds, grid, num_visible)
    elif config.kind == "random":
        hidden = hide_single_cells(np.zeros((len(seeds), num_cells), dtype=np.bool_), seeds, num_visible)
    elif config.kind == "block+random":
        num_single = int(config.single_ratio * (num_cells - num_visible) + 0.5)
        hidden = hide_single_cells(block_masks(seeds, grid, num_visible + num_single), seeds, num_visible)
    else:
        hidden = _band_masks(seeds, grid, num_cells - num_visible)
    visible = np.nonzero(~hidden)[1].reshape(len(seeds), num_visible).astype(np.int32)
    return Masks(torch.from_numpy(hidden), torch.from_numpy(visible))


def _band_masks(seeds: UInt64Array, grid: tuple[int, int], num_hidden: int) -> BoolArray:  # [B] -> [B, L]
    """A strip from a random row on, its incomplete row at a random one of the strip's four corners."""
    rows, columns = grid
    words = draws(seeds, 3)
    top = integers_below(words[:, 0], rows - (num_hidden + columns - 1) // columns + 1)
    cell = np.arange(rows * columns)[None, :] - columns * top[:, None]
    strip = ((cell >= 0) & (cell < num_hidden)).reshape(len(seeds), rows, columns)
    upside_down, mirrored = integers_below(words[:, 1:], 2).astype(np.bool_).T
    strip[upside_down] = strip[upside_down][:, ::-1, :]
    strip[mirrored] = strip[mirrored][:, :, ::-1]
    return strip.reshape(len(seeds), rows * columns)
