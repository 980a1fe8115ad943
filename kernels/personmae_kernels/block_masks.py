"""Block-wise masks with an exact number of hidden patches, one per sample, as occluders would make them.

The generator is BEiT's (Bao et al., "BEiT: BERT Pre-Training of Image Transformers", ICLR 2022, algorithm 1), in integers only, so that
numpy, C++ and Triton agree to the bit on every machine. For one sample with 64-bit seed s, on a grid of Hg rows and Wg columns, K patches
to hide (K = Hg * Wg - num_visible) and word(k) = draw number k of s (see sample_random):

    hidden = {}                                      left = K
    for t in 0 .. NUM_TRIES - 1, while left > 0:
        first, end = the range of block shapes for `left` in the table of the grid
        h, w = shapes[first + below(word(3 t), end - first)]
        y, x = below(word(3 t + 1), Hg - h + 1), below(word(3 t + 2), Wg - w + 1)
        new  = the cells of rows y .. y + h - 1, columns x .. x + w - 1 that are not yet hidden
        if 0 < |new| <= left:   hide them            left -= |new|
    hide the `left` cells with the smallest keys of those not yet hidden,
        key(cell) = word(3 NUM_TRIES + cell), its lowest 16 bits replaced by cell = row * Wg + column

with below(word, n) = (upper 32 bits of word * n) >> 32.

The table. BEiT draws the area a uniformly and the aspect h/w log-uniformly within 0.3 to 1/0.3; since da dlog(h/w) = 2 dh dw, that is a
uniform draw of the shape (h, w) itself. So the shapes with h <= Hg, w <= Wg and 3 w <= 10 h, 3 h <= 10 w stand sorted by (area, h), and
a draw is uniform over those whose area lies between min(left, m) and max(left, m). The smallest block m is 12 patches of a 16x8 grid,
in proportion on smaller ones (3 L / 32), no more on larger ones, rounded down to the area of a shape of the table. A block that exceeds
what is left is taken where it overlaps earlier ones enough; what the tries leave over is made up by single cells.

In Triton one program takes ROWS samples and holds their cells on chip. The `left` smallest keys are those below a bound, which is built bit by bit
from the highest on, by counting, until exactly `left` keys lie below it: keys are distinct, so that ends. Bytes a sample: its seed and its mask.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from personmae_kernels import interpreter, launching
from personmae_kernels.checks import axis_sizes, check_dtype
from personmae_kernels.operators import operator
from personmae_kernels.sample_random import GOLDEN, UInt64Array, draws, integers_below

NUM_TRIES = 32
MAX_CELLS = 1 << 16
BoolArray = npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class BlockTable:
    """The block shapes of a grid: shapes int32 [S, 2] = (h, w); ranges int32 [L + 1, 2] = (first, end) of the shapes for each number left."""

    shapes: npt.NDArray[np.int32]
    ranges: npt.NDArray[np.int32]


@functools.cache
def block_table(grid: tuple[int, int]) -> BlockTable:
    """The table of a grid (rows, columns), in integer arithmetic; see the head of the file."""
    rows, columns = grid
    cells = rows * columns
    sides = [(h, w) for h in range(1, rows + 1) for w in range(1, columns + 1) if 3 * w <= 10 * h and 3 * h <= 10 * w]
    shapes = np.array(sorted(sides, key=lambda side: (side[0] * side[1], side[0])), dtype=np.int32)
    areas = shapes[:, 0] * shapes[:, 1]
    smallest = int(areas[areas <= max(1, min(12, 3 * cells // 32))].max())
    left = np.arange(cells + 1)
    first = np.searchsorted(areas, np.minimum(left, smallest), side="left")
    end = np.searchsorted(areas, np.maximum(left, smallest), side="right")
    return BlockTable(shapes, np.stack([first, end], axis=1).astype(np.int32))


@functools.cache
def table_on(grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """The table of a grid on a device, copied there once: shapes int32 [S, 2], ranges int32 [L + 1, 2]."""
    table = block_table(grid)
    return torch.from_numpy(table.shapes).to(device), torch.from_numpy(table.ranges).to(device)


_GOLDEN = tl.constexpr(GOLDEN)


@triton.jit
def word_of(seeds, k):  # type: ignore[no-untyped-def]  # uint64, integer -> uint64, shapes as they broadcast
    """Draw number k of each seed: sample_random.draws."""
    z = seeds + (k + 1).to(tl.uint64) * _GOLDEN
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def block_masks_kernel(  # type: ignore[no-untyped-def]
    seeds_ptr,  # int64 [B], the bits of uint64 words
    shapes_ptr,  # int32 [S, 2]
    ranges_ptr,  # int32 [L + 1, 2]
    masks_ptr,  # uint8 [B, L], out
    B,
    num_rows,
    num_columns,
    num_hidden,
    TRIES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * ROWS
    samples = tl.arange(0, ROWS)
    in_batch = samples < B - first
    cells = tl.arange(0, BLOCK_L)[None, :]
    L = num_rows * num_columns
    row, column = cells // num_columns, cells % num_columns
    seeds = tl.load(seeds_ptr + first + samples, mask=in_batch, other=0).to(tl.uint64, bitcast=True)
    left = tl.where(in_batch, num_hidden, 0)
    hidden = tl.zeros([ROWS, BLOCK_L], tl.int1)

    # A sample with nothing left draws on with the others of its program, but no block fits into nothing; ranges has an entry for it.
    t = 0
    while (t < TRIES) & (tl.max(left, 0) > 0):
        k = tl.full([ROWS], 3, tl.int32) * t
        # Integers below n, by sample_random.integers_below: the upper half of a word times n, above bit 32.
        shape_word, y_word, x_word = word_of(seeds, k) >> 32, word_of(seeds, k + 1) >> 32, word_of(seeds, k + 2) >> 32
        lowest, end = tl.load(ranges_ptr + 2 * left), tl.load(ranges_ptr + 2 * left + 1)
        shape = shapes_ptr + 2 * (lowest + (shape_word * (end - lowest).to(tl.uint64) >> 32).to(tl.int32))
        height, width = tl.load(shape), tl.load(shape + 1)
        y = (y_word * (num_rows - height + 1).to(tl.uint64) >> 32).to(tl.int32)
        x = (x_word * (num_columns - width + 1).to(tl.uint64) >> 32).to(tl.int32)
        in_rows = (row >= y[:, None]) & (row < (y + height)[:, None])
        new = in_rows & (column >= x[:, None]) & (column < (x + width)[:, None]) & (hidden == 0)
        num_new = tl.sum(new.to(tl.int32), 1)
        taken = (num_new > 0) & (num_new <= left)
        hidden = hidden | (new & taken[:, None])
        left -= tl.where(taken, num_new, 0)
        t += 1

    if tl.max(left, 0) > 0:
        free = (hidden == 0) & (cells < L)
        keys = (word_of(seeds[:, None], 3 * TRIES + cells) & 0xFFFFFFFFFFFF0000) | cells.to(tl.uint64)
        bound = tl.zeros([ROWS], tl.uint64)
        num_below = tl.zeros([ROWS], tl.int32)
        bit = tl.full([ROWS], 1 << 63, tl.uint64)
        while tl.max(left - num_below, 0) > 0:
            higher = bound | bit
            num = tl.sum((free & (keys < higher[:, None])).to(tl.int32), 1)
            bound = tl.where(num <= left, higher, bound)
            num_below = tl.where(num <= left, num, num_below)
            bit = bit >> 1
        hidden = hidden | (free & (keys < bound[:, None]))
    tl.store(masks_ptr + first * L + samples[:, None] * L + cells, hidden.to(tl.uint8), mask=in_batch[:, None] & (cells < L))


@operator("personmae_triton::block_masks")
def _block_masks(seeds: Tensor, num_rows: int, num_columns: int, num_visible: int) -> Tensor:
    """Returns bool [B, L]."""
    L = num_rows * num_columns
    masks = torch.empty(len(seeds), L, device=seeds.device, dtype=torch.bool)
    block = launching.next_power_of_2(L)
    # A sample to a program: they end after different numbers of tries. In the interpreter operations cost more than their elements.
    rows = max(1, min(launching.next_power_of_2(len(seeds)), (1 << 18) // block)) if interpreter.wanted() else 1
    launching.launch(
        block_masks_kernel,
        (launching.ceil_div(len(seeds), rows),),
        seeds.contiguous(),
        *table_on((num_rows, num_columns), seeds.device),
        masks.view(torch.uint8),
        len(seeds),
        num_rows,
        num_columns,
        L - num_visible,
        num_warps=min(16, max(1, block // 512)),
        TRIES=NUM_TRIES,
        ROWS=rows,
        BLOCK_L=block,
    )
    return masks


@_block_masks.register_fake
def _(seeds: Tensor, num_rows: int, num_columns: int, num_visible: int) -> Tensor:
    return seeds.new_empty((len(seeds), num_rows * num_columns), dtype=torch.bool)


def block_masks_of(seeds: Tensor, grid: tuple[int, int], num_visible: int) -> Tensor:
    """Block-wise masks of a batch, on the device of its seeds: Triton on CUDA, else as `block_masks`; the bits are the same.

    seeds: int64 [B], the bits of uint64 words (numpy's view(np.int64)). grid, num_visible: as in block_masks. Returns bool [B, L]. Raises TypeError
    or ValueError, naming the argument, for other shapes or dtypes and for a grid or count that is out of range.
    """
    axis_sizes(seeds=(seeds, "B"))
    check_dtype(torch.int64, seeds=seeds)
    check_counts(grid, num_visible)
    if launching.form_for(seeds, has_compiled=not seeds.is_cuda) == "triton":
        return _block_masks(seeds, int(grid[0]), int(grid[1]), int(num_visible))
    return torch.from_numpy(block_masks(seeds.cpu().numpy().view(np.uint64), grid, num_visible)).to(seeds.device)


def block_masks(seeds: UInt64Array, grid: tuple[int, int], num_visible: int) -> BoolArray:
    """Block-wise masks of a batch. Computed in C++ where that is built, else in numpy: the bits are the same.

    seeds: uint64 [B], one for each sample. grid: (rows, columns) of patches. num_visible: patches left visible, 0 to rows * columns.
    Returns bool [B, L], L = rows * columns in row-major order, True = hidden, exactly L - num_visible in each row.
    Raises TypeError for seeds that are not uint64, ValueError for a shape, grid or count that is out of range.
    """
    check_arguments(seeds, grid, num_visible)
    words = torch.from_numpy(np.ascontiguousarray(seeds).view(np.int64))
    # A loader's masks are made on the host, also where Triton is asked for.
    if launching.form_for(words, has_compiled=True, has_triton=False) == "reference":
        return block_masks_reference(seeds, grid, num_visible)
    rows, columns = int(grid[0]), int(grid[1])
    masks = torch.ops.personmae.block_masks(words, *table_on((rows, columns), words.device), rows, columns, int(num_visible), NUM_TRIES)
    return masks.numpy()


def block_masks_reference(seeds: UInt64Array, grid: tuple[int, int], num_visible: int) -> BoolArray:
    """The specification of block_masks, in numpy; same arguments, result and errors."""
    check_arguments(seeds, grid, num_visible)
    rows, columns = int(grid[0]), int(grid[1])
    table = block_table((rows, columns))
    hidden = np.zeros((len(seeds), rows, columns), dtype=np.bool_)
    left = np.full(len(seeds), rows * columns - num_visible, dtype=np.int64)
    words = draws(seeds, 3 * NUM_TRIES).reshape(len(seeds), NUM_TRIES, 3)
    row, column = np.arange(rows)[None, :], np.arange(columns)[None, :]
    for t in range(NUM_TRIES):
        (active,) = np.nonzero(left)
        if len(active) == 0:
            break
        shape_word, y_word, x_word = words[active, t].T
        first, end = table.ranges[left[active]].T.astype(np.int64)
        height, width = table.shapes[first + integers_below(shape_word, end - first)].T.astype(np.int64)
        y = integers_below(y_word, rows - height + 1)[:, None]
        x = integers_below(x_word, columns - width + 1)[:, None]
        in_rows = (row >= y) & (row < y + height[:, None])
        in_columns = (column >= x) & (column < x + width[:, None])
        block = in_rows[:, :, None] & in_columns[:, None, :] & ~hidden[active]
        num_new = np.count_nonzero(block, axis=(1, 2))
        taken = (num_new > 0) & (num_new <= left[active])
        hidden[active[taken]] |= block[taken]
        left[active[taken]] -= num_new[taken]
    return hide_single_cells(hidden.reshape(len(seeds), rows * columns), seeds, num_visible)


def hide_single_cells(masks: BoolArray, seeds: UInt64Array, num_visible: int) -> BoolArray:
    """Hides more patches, drawn singly, until `num_visible` are left: the last step of block_masks; from an empty mask, a random mask.

    masks: bool [B, L], True = hidden, at most L - num_visible in a row. seeds: uint64 [B]. Returns bool [B, L].
    """
    num_cells = masks.shape[1]
    left = num_cells - num_visible - np.count_nonzero(masks, axis=1)
    if (left < 0).any():
        raise ValueError(f"masks: a row hides {num_cells - num_visible - left.min()} of {num_cells}, more than num_visible={num_visible} allows")
    (short,) = np.nonzero(left)
    if len(short) == 0:
        return masks
    words = draws(np.asarray(seeds)[short], num_cells, first=3 * NUM_TRIES)
    cells = np.arange(num_cells, dtype=np.uint64)
    keys = (words & ~np.uint64(MAX_CELLS - 1)) | cells
    keys[masks[short]] = np.iinfo(np.uint64).max
    order = np.argsort(keys, axis=1)
    extra = np.zeros((len(short), num_cells), dtype=np.bool_)
    np.put_along_axis(extra, order, np.arange(num_cells)[None, :] < left[short, None], axis=1)
    result = masks.copy()
    result[short] |= extra
    return result


def check_arguments(seeds: UInt64Array, grid: tuple[int, int], num_visible: int) -> None:
    """Raises TypeError or ValueError, naming the argument, for what block_masks does not take."""
    if not isinstance(seeds, np.ndarray) or seeds.dtype != np.uint64:
        raise TypeError(f"seeds: a numpy array of uint64 is needed, got {getattr(seeds, 'dtype', type(seeds).__name__)}")
    if seeds.ndim != 1:
        raise ValueError(f"seeds: one dimension [B] is needed, got shape {list(seeds.shape)}")
    check_counts(grid, num_visible)


def check_counts(grid: tuple[int, int], num_visible: int) -> None:
    """Raises ValueError, naming the argument, for a grid or a number of visible patches that is out of range."""
    if len(grid) != 2 or min(grid) < 1 or grid[0] * grid[1] >= MAX_CELLS:
        raise ValueError(f"grid: (rows, columns), each at least 1 and fewer than {MAX_CELLS} patches in all, got {tuple(grid)}")
    if not 0 <= num_visible <= grid[0] * grid[1]:
        raise ValueError(f"num_visible: 0 to {grid[0] * grid[1]} on a grid of {grid[0]}x{grid[1]}, got {num_visible}")
