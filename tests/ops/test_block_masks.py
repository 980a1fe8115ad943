"""Block-wise masks: exact counts, equal to a plain rendering of the algorithm and to the compiled one, and shaped as BEiT's."""

import hashlib
import math
import random

import numpy as np
import pytest
import torch

from personmae_kernels import compiled
from personmae_kernels.block_masks import (
    NUM_TRIES,
    block_masks,
    block_masks_reference,
    block_table,
    hide_single_cells,
)
from personmae_kernels.sample_random import GOLDEN, Stream, sample_seeds

GRIDS = {(16, 8): 63, (24, 8): 95, (12, 4): 23, (12, 6): 36, (8, 4): 15}
WORD = 1 << 64

needs_compiled = pytest.mark.skipif(not compiled.available(), reason=compiled.why_missing())


def seeds_of(num: int, epoch: int = 0) -> np.ndarray:
    return sample_seeds(0, epoch, np.arange(num), Stream.MASK)


def plain_word(seed: int, k: int) -> int:
    z = (seed + (k + 1) * GOLDEN) % WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % WORD
    return z ^ (z >> 31)


def plain_mask(seed: int, grid: tuple[int, int], num_visible: int) -> list[bool]:
    """One mask with sets and plain integers, from the text at the head of block_masks.py; the table is rebuilt from its text too."""
    rows, columns = grid
    num_cells = rows * columns
    sides = ((h, w) for h in range(1, rows + 1) for w in range(1, columns + 1) if 3 * w <= 10 * h and 3 * h <= 10 * w)
    shapes = sorted((h * w, h, w) for h, w in sides)
    wanted = max(1, min(12, 3 * num_cells // 32))
    smallest = max(area for area, _, _ in shapes if area <= wanted)
    hidden: set[int] = set()
    left = num_cells - num_visible
    for t in range(NUM_TRIES):
        if left == 0:
            break
        fitting = [shape for shape in shapes if min(left, smallest) <= shape[0] <= max(left, smallest)]
        choose = [plain_word(seed, 3 * t + k) >> 32 for k in range(3)]
        _, h, w = fitting[choose[0] * len(fitting) >> 32]
        y, x = choose[1] * (rows - h + 1) >> 32, choose[2] * (columns - w + 1) >> 32
        new = {r * columns + c for r in range(y, y + h) for c in range(x, x + w)} - hidden
        if 0 < len(new) <= left:
            hidden |= new
            left -= len(new)
    keys = {cell: (plain_word(seed, 3 * NUM_TRIES + cell) >> 16 << 16) + cell for cell in range(num_cells) if cell not in hidden}
    hidden |= set(sorted(keys, key=keys.__getitem__)[:left])
    return [cell in hidden for cell in range(num_cells)]


@pytest.mark.parametrize("function", [block_masks, block_masks_reference])
@pytest.mark.parametrize("grid", GRIDS)
def test_counts_are_exact(function, grid):
    num_cells = grid[0] * grid[1]
    for num_visible in (GRIDS[grid], num_cells // 4, 1, num_cells, num_cells - 1, 0):
        masks = function(seeds_of(2000), grid, num_visible)
        assert masks.shape == (2000, num_cells)
        assert masks.dtype == np.bool_
        assert (masks.sum(1) == num_cells - num_visible).all()


@pytest.mark.parametrize("grid", [*GRIDS, (1, 1), (1, 40), (5, 1), (7, 3), (14, 14)])
def test_equal_to_the_plain_rendering(grid):
    num_cells = grid[0] * grid[1]
    for num_visible in sorted({GRIDS.get(grid, num_cells // 2), 1, num_cells - 1, num_cells, num_cells // 4}):
        seeds = seeds_of(40, epoch=num_visible)
        masks = block_masks_reference(seeds, grid, num_visible)
        assert masks.tolist() == [plain_mask(seed, grid, num_visible) for seed in seeds.tolist()]


@needs_compiled
@pytest.mark.parametrize("grid", GRIDS)
def test_compiled_is_equal_to_the_bit(grid):
    num_cells = grid[0] * grid[1]
    seeds = seeds_of(10_000)
    for num_visible in (GRIDS[grid], num_cells // 4, 1, 0, num_cells):
        assert np.array_equal(block_masks(seeds, grid, num_visible), block_masks_reference(seeds, grid, num_visible))


@needs_compiled
def test_compiled_on_odd_grids_and_extreme_seeds():
    seeds = np.array([0, 1, 2**63 - 1, 2**63, 2**64 - 1], dtype=np.uint64)
    for grid in [(1, 1), (1, 40), (5, 1), (7, 3), (14, 14), (63, 17)]:
        for num_visible in {0, 1, grid[0] * grid[1] // 2, grid[0] * grid[1]}:
            assert np.array_equal(block_masks(seeds, grid, num_visible), block_masks_reference(seeds, grid, num_visible))


@needs_compiled
def test_compiled_does_not_depend_on_the_number_of_threads():
    threads = torch.get_num_threads()
    try:
        results = []
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            results.append(block_masks(seeds_of(1000), (16, 8), 63))
    finally:
        torch.set_num_threads(threads)
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])


@needs_compiled
def test_the_compiled_operator_refuses_what_does_not_fit():
    table = block_table((16, 8))
    arguments = {
        "seeds": torch.zeros(3, dtype=torch.int64),
        "shapes": torch.from_numpy(table.shapes),
        "ranges": torch.from_numpy(table.ranges),
        "rows": 16,
        "columns": 8,
        "num_visible": 63,
        "num_tries": NUM_TRIES,
    }
    wrong = {
        "seeds": torch.zeros(3),
        "shapes": torch.from_numpy(table.shapes).long(),
        "ranges": torch.from_numpy(table.ranges)[:-1],
        "rows": 0,
        "num_visible": 129,
        "num_tries": -1,
    }
    torch.ops.personmae.block_masks(**arguments)
    for name, value in wrong.items():
        with pytest.raises(RuntimeError, match=name):
            torch.ops.personmae.block_masks(**{**arguments, name: value})


def test_the_environment_can_force_the_reference(monkeypatch):
    def fail() -> bool:
        raise AssertionError("the compiled operators were asked for")

    monkeypatch.setattr(compiled, "available", fail)
    with pytest.raises(AssertionError):
        block_masks(seeds_of(1), (16, 8), 63)
    monkeypatch.setenv("PERSONMAE_OPERATORS", "reference")
    assert block_masks(seeds_of(1), (16, 8), 63).sum() == 65


def test_the_masks_of_a_seed_never_change():
    """Masks are part of a run's identity: a run that is resumed under a later version must go on with the same ones."""
    digest = hashlib.sha256()
    for grid, num_visible in GRIDS.items():
        digest.update(np.packbits(block_masks_reference(seeds_of(1000), grid, num_visible)).tobytes())
    assert digest.hexdigest() == "357f80e0dcedeac87e909bcce92897498794f59da7562f72b5d3f01df86a1515"


@pytest.mark.parametrize("function", [block_masks, block_masks_reference])
def test_a_mask_depends_on_its_own_seed_alone(function):
    seeds = seeds_of(200)
    masks = function(seeds, (12, 6), 36)
    assert np.array_equal(function(seeds[::3], (12, 6), 36), masks[::3])
    assert np.array_equal(function(seeds[17:18], (12, 6), 36), masks[17:18])
    assert len(np.unique(np.packbits(masks, axis=1), axis=0)) > 195


@pytest.mark.parametrize("function", [block_masks, block_masks_reference])
def test_empty_batch(function):
    assert function(np.zeros(0, dtype=np.uint64), (16, 8), 63).shape == (0, 128)


def beit_mask(draw: random.Random, grid: tuple[int, int], num_hidden: int, smallest: int) -> np.ndarray:
    """BEiT's generator in floating point, as published, but for blocks of the full width or height, which it forbids; may hide too few."""
    rows, columns = grid
    mask = np.zeros(grid, dtype=np.bool_)
    while mask.sum() < num_hidden:
        budget = num_hidden - int(mask.sum())
        for _ in range(10):
            area = draw.uniform(smallest, budget)
            aspect = math.exp(draw.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < h <= rows and 0 < w <= columns):
                continue
            y, x = draw.randint(0, rows - h), draw.randint(0, columns - w)
            if 0 < h * w - mask[y : y + h, x : x + w].sum() <= budget:
                mask[y : y + h, x : x + w] = True
                break
        else:
            break
    return mask


def num_borders(masks: np.ndarray) -> float:
    """Mean number of neighbouring pairs, one hidden and one visible. masks: bool [B, rows, columns]."""
    return float((masks[:, 1:] != masks[:, :-1]).sum(axis=(1, 2)).mean() + (masks[:, :, 1:] != masks[:, :, :-1]).sum(axis=(1, 2)).mean())


@pytest.mark.parametrize("grid", [(16, 8), (24, 8)])
def test_distributed_as_the_masks_of_beit(grid):
    num_cells = grid[0] * grid[1]
    num_hidden = num_cells - GRIDS[grid]
    draw = random.Random(1)
    theirs = np.stack([beit_mask(draw, grid, num_hidden, 12) for _ in range(1500)])
    ours = block_masks_reference(seeds_of(4000), grid, GRIDS[grid]).reshape(-1, *grid)
    assert np.abs(theirs.mean(0) - ours.mean(0)).max() < 0.05
    assert num_borders(ours) == pytest.approx(num_borders(theirs), rel=0.1)


def test_masks_are_blocks_and_not_specks():
    blocks = block_masks_reference(seeds_of(1000), (16, 8), 63)
    specks = hide_single_cells(np.zeros_like(blocks), seeds_of(1000), 63)
    assert num_borders(blocks.reshape(-1, 16, 8)) < 0.5 * num_borders(specks.reshape(-1, 16, 8))


def test_table_holds_each_admissible_shape_once_and_no_other():
    for grid in [*GRIDS, (1, 40), (1, 1)]:
        table = block_table(grid)
        shapes = [tuple(shape) for shape in table.shapes.tolist()]
        areas = [h * w for h, w in shapes]
        assert len(set(shapes)) == len(shapes)
        assert areas == sorted(areas)
        assert all(h <= grid[0] and w <= grid[1] and 0.3 - 1e-9 <= h / w <= 1 / 0.3 + 1e-9 for h, w in shapes)
        assert (table.ranges[:, 0] < table.ranges[:, 1])[1:].all(), "a number of patches to hide without a block to draw"
    assert min(h * w for h, w in block_table((16, 8)).shapes[slice(*block_table((16, 8)).ranges[65])]) == 12


def test_single_cells_are_uniform_and_leave_hidden_ones_alone():
    hidden = np.zeros((5000, 12), dtype=np.bool_)
    hidden[:, 2:5] = True
    masks = hide_single_cells(hidden, seeds_of(5000), 6)
    assert masks[:, 2:5].all()
    assert (masks.sum(1) == 6).all()
    others = np.delete(masks, [2, 3, 4], axis=1).mean(0)
    assert np.abs(others - 3 / 9).max() < 0.03
    assert not hidden[:, 5:].any(), "the argument was written to"
    with pytest.raises(ValueError, match="num_visible"):
        hide_single_cells(hidden, seeds_of(5000), 10)


@pytest.mark.parametrize("function", [block_masks, block_masks_reference])
@pytest.mark.parametrize(
    ("seeds", "grid", "num_visible", "error", "name"),
    [
        (np.zeros(3, dtype=np.int64), (16, 8), 63, TypeError, "seeds"),
        ([1, 2], (16, 8), 63, TypeError, "seeds"),
        (np.zeros((2, 2), dtype=np.uint64), (16, 8), 63, ValueError, "seeds"),
        (np.zeros(3, dtype=np.uint64), (16, 8), 129, ValueError, "num_visible"),
        (np.zeros(3, dtype=np.uint64), (16, 8), -1, ValueError, "num_visible"),
        (np.zeros(3, dtype=np.uint64), (0, 8), 0, ValueError, "grid"),
        (np.zeros(3, dtype=np.uint64), (256, 256), 63, ValueError, "grid"),
        (np.zeros(3, dtype=np.uint64), (16, 8, 1), 63, ValueError, "grid"),
    ],
)
def test_wrong_arguments_are_named(function, seeds, grid, num_visible, error, name):
    with pytest.raises(error, match=name):
        function(seeds, grid, num_visible)
