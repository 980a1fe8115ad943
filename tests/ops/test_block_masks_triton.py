"""block_masks_of: the masks of block_masks to the bit, in every form, on the device of the seeds; and which form runs when."""

import numpy as np
import pytest
import torch
from closeness import DEVICE

from personmae_kernels import compiled, launching
from personmae_kernels.block_masks import _block_masks, block_masks, block_masks_of, block_masks_reference
from personmae_kernels.sample_random import Stream, sample_seeds

GRIDS = {(16, 8): 63, (24, 8): 95, (12, 4): 23, (12, 6): 36}

needs_compiled = pytest.mark.skipif(not compiled.available(), reason=compiled.why_missing())


def seeds_of(num, epoch=0):
    return sample_seeds(0, epoch, np.arange(num), Stream.MASK)


def tensor_of(seeds):
    return torch.from_numpy(seeds.view(np.int64)).to(DEVICE)


def assert_equal_to_numpy(seeds, grid, num_visible):
    masks = block_masks_of(tensor_of(seeds), grid, num_visible)
    assert masks.dtype == torch.bool
    assert masks.device.type == DEVICE
    assert np.array_equal(masks.cpu().numpy(), block_masks_reference(seeds, grid, num_visible))


@pytest.mark.parametrize("grid", GRIDS)
def test_equal_to_the_bit(triton_form, grid):
    assert_equal_to_numpy(seeds_of(10_000), grid, GRIDS[grid])


@needs_compiled
@pytest.mark.parametrize("grid", GRIDS)
def test_the_compiled_form_is_equal_to_the_bit(grid):
    launching.use_operators("compiled")
    try:
        masks = block_masks_of(tensor_of(seeds_of(10_000)).cpu(), grid, GRIDS[grid])
    finally:
        launching.use_operators(None)
    assert np.array_equal(masks.numpy(), block_masks_reference(seeds_of(10_000), grid, GRIDS[grid]))


@pytest.mark.parametrize("grid", [(16, 8), (8, 4), (1, 1), (1, 40), (5, 1), (7, 3), (63, 17)])
def test_odd_grids_and_extreme_counts(form, grid):
    num_cells = grid[0] * grid[1]
    for num_visible in sorted({0, 1, num_cells // 2, num_cells}):
        assert_equal_to_numpy(seeds_of(40, epoch=num_visible), grid, num_visible)


def test_extreme_seeds(form):
    """The words are unsigned: those whose highest bit is set are neither negative nor shifted as such."""
    seeds = np.array([0, 1, 2**63 - 1, 2**63, 2**64 - 1], dtype=np.uint64)
    for grid in [(16, 8), (7, 3)]:
        assert_equal_to_numpy(seeds, grid, grid[0] * grid[1] // 2)


def test_many_single_cells(triton_form):
    """On a single row of cells blocks are short, so that in many samples the tries leave cells over: up to all that are still free."""
    seeds = seeds_of(500)
    for num_visible in (0, 2):
        assert_equal_to_numpy(seeds, (1, 40), num_visible)


def test_a_mask_depends_on_its_own_seed_alone(form):
    seeds = tensor_of(seeds_of(200))
    masks = block_masks_of(seeds, (12, 6), 36)
    assert torch.equal(block_masks_of(seeds[::3], (12, 6), 36), masks[::3])
    assert torch.equal(block_masks_of(seeds[17:18], (12, 6), 36), masks[17:18])


def test_an_empty_batch(form):
    masks = block_masks_of(tensor_of(seeds_of(0)), (16, 8), 63)
    assert masks.shape == (0, 128)
    assert masks.dtype == torch.bool


@pytest.mark.parametrize(
    ("seeds", "grid", "num_visible", "error", "words"),
    [
        (torch.zeros(3, dtype=torch.int32), (16, 8), 63, TypeError, "seeds: int64 is needed, got int32"),
        (torch.zeros(3), (16, 8), 63, TypeError, "seeds: int64 is needed, got float32"),
        (np.zeros(3, dtype=np.uint64), (16, 8), 63, TypeError, r"seeds: a tensor \[B\] is needed, got ndarray"),
        (torch.zeros(2, 2, dtype=torch.int64), (16, 8), 63, ValueError, r"seeds: \[B\] is needed"),
        (torch.zeros((), dtype=torch.int64), (16, 8), 63, ValueError, r"seeds: \[B\] is needed"),
        (torch.zeros(3, dtype=torch.int64), (16, 8), 129, ValueError, "num_visible: 0 to 128"),
        (torch.zeros(3, dtype=torch.int64), (16, 8), -1, ValueError, "num_visible: 0 to 128"),
        (torch.zeros(3, dtype=torch.int64), (0, 8), 0, ValueError, "grid: "),
        (torch.zeros(3, dtype=torch.int64), (256, 256), 63, ValueError, "grid: "),
        (torch.zeros(3, dtype=torch.int64), (16, 8, 1), 63, ValueError, "grid: "),
    ],
)
def test_wrong_arguments_are_named(form, seeds, grid, num_visible, error, words):
    with pytest.raises(error, match=words):
        block_masks_of(seeds, grid, num_visible)


def test_opcheck(triton_form):
    torch.library.opcheck(_block_masks.registered, (tensor_of(seeds_of(9)), 12, 4, 23))


def test_it_compiles_into_one_graph(triton_form):
    seeds = tensor_of(seeds_of(9))
    assert torch.equal(torch.compile(block_masks_of, backend="aot_eager", fullgraph=True)(seeds, (12, 4), 23), block_masks_of(seeds, (12, 4), 23))


def test_the_kernel_is_launched(triton_form):
    with launching.recorded() as launches:
        block_masks_of(tensor_of(seeds_of(9)), (16, 8), 63)
    assert [launch.kernel.fn.__name__ for launch in launches] == ["block_masks_kernel"]


@pytest.mark.parametrize("interpreted", ["1", "0"])
def test_seeds_in_numpy_never_go_to_triton(triton_form, monkeypatch, interpreted):
    """A loader's workers draw their masks on the host, whatever is forced for the model on its GPU."""
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    with launching.recorded() as launches:
        masks = block_masks(seeds_of(9), (16, 8), 63)
    assert not launches
    assert np.array_equal(masks, block_masks_reference(seeds_of(9), (16, 8), 63))


@pytest.mark.parametrize("how", ["use_operators", "environment"])
def test_the_reference_can_be_forced(monkeypatch, how):
    def fail():
        raise AssertionError("the compiled operators were asked for")

    monkeypatch.setattr(compiled, "available", fail)
    if how == "environment":
        monkeypatch.setenv("PERSONMAE_OPERATORS", "reference")
    else:
        launching.use_operators("reference")
    try:
        assert block_masks(seeds_of(1), (16, 8), 63).sum() == 65
        assert block_masks_of(tensor_of(seeds_of(1)), (16, 8), 63).sum() == 65
    finally:
        launching.use_operators(None)


def test_compiled_operators_that_are_missing_are_named(monkeypatch):
    monkeypatch.setattr(compiled, "available", lambda cuda=False: False)
    monkeypatch.setattr(compiled, "why_missing", lambda cuda=False: "they are not built")
    monkeypatch.setenv("PERSONMAE_OPERATORS", "compiled")
    with pytest.raises(RuntimeError, match="they are not built"):
        block_masks(seeds_of(1), (16, 8), 63)
    monkeypatch.setenv("PERSONMAE_OPERATORS", "fastest")
    with pytest.raises(ValueError, match="fastest"):
        block_masks(seeds_of(1), (16, 8), 63)
