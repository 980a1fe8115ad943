"""Masks as the model uses them: exact counts of each kind on each grid, visible patches in order, and what the presets keep."""

import numpy as np
import pytest
import torch

from personmae.configs import UserError
from personmae.models.masking import MaskingConfig, draw_masks, visible_count
from personmae_kernels.block_masks import block_masks
from personmae_kernels.sample_random import Stream, sample_seeds

KINDS = ("block", "random", "block+random", "band")
GRIDS = ((16, 8), (24, 8), (12, 4), (12, 6), (8, 4), (7, 3))


def seeds_of(num: int) -> np.ndarray:
    return sample_seeds(0, 0, np.arange(num), Stream.MASK)


def test_what_the_presets_keep():
    kept = {grid: visible_count(MaskingConfig(), grid) for grid in GRIDS}
    assert kept == {(16, 8): 63, (24, 8): 95, (12, 4): 23, (12, 6): 36, (8, 4): 15, (7, 3): 11}
    assert visible_count(MaskingConfig(ratio=0.75), (16, 8)) == 31
    assert visible_count(MaskingConfig(ratio=0.0), (16, 8)) == 128
    assert visible_count(MaskingConfig(ratio=0.999), (4, 2)) == 1
    assert visible_count(MaskingConfig(ratio=0.75, num_visible=50), (16, 8)) == 50


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", GRIDS)
def test_counts_are_exact_and_visible_is_the_complement_in_order(kind, grid):
    num_cells = grid[0] * grid[1]
    for num_visible in (None, 1, num_cells // 3, num_cells - 1, num_cells):
        config = MaskingConfig(kind=kind, num_visible=num_visible)
        masks = draw_masks(config, grid, seeds_of(300))
        count = visible_count(config, grid)
        assert masks.mask.shape == (300, num_cells)
        assert masks.mask.dtype == torch.bool
        assert masks.visible.shape == (300, count)
        assert masks.visible.dtype == torch.int32
        assert (masks.mask.sum(1) == num_cells - count).all()
        assert (masks.visible.diff(dim=1) > 0).all()
        assert not masks.mask.gather(1, masks.visible.long()).any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_depends_on_its_own_seed_alone(kind):
    config, seeds = MaskingConfig(kind=kind), seeds_of(64)
    whole = draw_masks(config, (16, 8), seeds)
    parts = [draw_masks(config, (16, 8), part) for part in (seeds[:5], seeds[5:])]
    assert torch.equal(whole.mask, torch.cat([part.mask for part in parts]))
    assert torch.equal(whole.visible, torch.cat([part.visible for part in parts]))
    assert len(torch.unique(whole.mask, dim=0)) > (20 if kind == "band" else 60)


def test_empty_batch():
    for kind in KINDS:
        masks = draw_masks(MaskingConfig(kind=kind), (16, 8), seeds_of(0))
        assert masks.mask.shape == (0, 128)
        assert masks.visible.shape == (0, 63)


def test_random_masks_hide_each_patch_and_each_pair_equally_often():
    hidden = draw_masks(MaskingConfig(kind="random", num_visible=6), (4, 3), seeds_of(20_000)).mask.double()
    pairs = hidden.T @ hidden / len(hidden)
    assert (pairs.diagonal() - 0.5).abs().max() < 0.015
    off = pairs[~torch.eye(12, dtype=torch.bool)]
    assert (off - 6 * 5 / (12 * 11)).abs().max() < 0.015


def test_block_and_random_masks_hide_the_wanted_share_singly():
    # 65 patches: 65 * 27 / 147 = 11.9 singly, on top of the blocks of the same seed with 53.
    masks = draw_masks(MaskingConfig(kind="block+random"), (16, 8), seeds_of(500)).mask.numpy()
    blocks = block_masks(seeds_of(500), (16, 8), 63 + 12)
    assert (masks & blocks == blocks).all()
    assert ((masks & ~blocks).sum(1) == 12).all()
    only_single = MaskingConfig(kind="block+random", single_ratio=1.0)
    only_blocks = MaskingConfig(kind="block+random", single_ratio=0.0)
    seeds = seeds_of(50)
    assert torch.equal(draw_masks(only_single, (16, 8), seeds).mask, draw_masks(MaskingConfig(kind="random"), (16, 8), seeds).mask)
    assert torch.equal(draw_masks(only_blocks, (16, 8), seeds).mask, draw_masks(MaskingConfig(), (16, 8), seeds).mask)


@pytest.mark.parametrize(("num_visible", "num_full", "num_rest"), [(64, 8, 0), (63, 8, 1), (61, 8, 3), (121, 0, 7)])
def test_a_band_is_full_rows_and_one_row_filled_from_a_side(num_visible, num_full, num_rest):
    masks = draw_masks(MaskingConfig(kind="band", num_visible=num_visible), (16, 8), seeds_of(400)).mask.reshape(-1, 16, 8)
    tops, rest_above, rest_left = set(), 0, 0
    for mask in masks:
        in_row = mask.sum(1)
        rows = in_row.nonzero().flatten().tolist()
        assert rows == list(range(rows[0], rows[-1] + 1)), "the strip has a gap"
        assert sorted(in_row[rows].tolist()) == sorted([8] * num_full + [num_rest] * (num_rest > 0))
        tops.add(rows[0])
        if num_rest:
            row = rows[0] if in_row[rows[0]] == num_rest else rows[-1]
            cells = mask[row].nonzero().flatten().tolist()
            assert cells in (list(range(num_rest)), list(range(8 - num_rest, 8)))
            rest_above += row == rows[0]
            rest_left += cells[0] == 0
    assert tops == set(range(16 - num_full - (num_rest > 0) + 1))
    if num_rest and num_full:
        assert 150 < rest_above < 250
        assert 150 < rest_left < 250


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"ratio": 1.0}, "ratio"), ({"ratio": -0.1}, "ratio"), ({"num_visible": 0}, "num_visible"), ({"single_ratio": 1.5}, "single_ratio")],
)
def test_wrong_settings_are_named(settings, name):
    with pytest.raises(UserError, match=f"masking.{name}"):
        MaskingConfig(**settings)


def test_more_visible_patches_than_the_grid_has():
    with pytest.raises(UserError, match="16x8 has 128"):
        draw_masks(MaskingConfig(num_visible=129), (16, 8), seeds_of(2))
