"""Where the cells of region B lie in A, by painting A's cells into the image and cropping B from it."""

import numpy as np
import pytest
import torch

from personmae.models.regions import HIDDEN, OUTSIDE, SEEN, cell_origins


@pytest.mark.parametrize("grid", [(4, 2), (3, 5)])
def test_origins_of_cells_read_off_a_painted_image(grid):
    """Boxes whose sides are multiples of the grid, so that a cell's centre falls on one painted pixel."""
    rows, columns = grid
    generator = np.random.default_rng(3)
    for _ in range(200):
        cell_a, cell_b = generator.integers(1, 4, 2) * 2 + 1, generator.integers(1, 4, 2) * 2 + 1  # odd cell sizes: the centre is a pixel
        y, x = generator.integers(0, 12, 2), generator.integers(0, 12, 2)
        boxes = [[y[0], x[0], y[0] + rows * cell_a[0], x[0] + columns * cell_a[1]], [y[1], x[1], y[1] + rows * cell_b[0], x[1] + columns * cell_b[1]]]
        flips = generator.random(2) < 0.5
        mask = generator.random(rows * columns) < 0.5
        painted = np.full((60, 60), OUTSIDE)
        cells = np.where(mask, HIDDEN, SEEN).reshape(grid)
        cells = cells[:, ::-1] if flips[0] else cells
        painted[boxes[0][0] : boxes[0][2], boxes[0][1] : boxes[0][3]] = cells.repeat(cell_a[0], 0).repeat(cell_a[1], 1)
        crop = painted[boxes[1][0] : boxes[1][2], boxes[1][1] : boxes[1][3]]
        crop = crop[:, ::-1] if flips[1] else crop
        centres = crop[cell_b[0] // 2 :: cell_b[0], cell_b[1] // 2 :: cell_b[1]]
        found = cell_origins(torch.tensor(np.array([boxes])), torch.tensor(flips[None]), torch.tensor(mask[None]), grid)
        assert found.view(grid).tolist() == centres.tolist()


def test_the_same_region_is_seen_and_hidden_by_the_mask():
    boxes = torch.tensor([[[3, 5, 131, 69], [3, 5, 131, 69]]], dtype=torch.int32)
    mask = torch.rand(1, 128, generator=torch.Generator().manual_seed(0)) < 0.5
    for flip in (False, True):
        origins = cell_origins(boxes, torch.tensor([[flip, flip]]), mask, (16, 8))
        assert torch.equal(origins == HIDDEN, mask)
        assert not (origins == OUTSIDE).any()
