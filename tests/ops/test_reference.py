"""The reference operators against loops in float64 numpy: values and gradients."""

import numpy as np
import pytest
import torch

from personmae_kernels import cell_coordinates, patch_loss, region_codes

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def random_images(B, H, W, seed=0):
    return torch.randint(0, 256, (B, H, W, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def rows_by_loop(images, patch):  # -> float64 [B, L, P]
    values = (images.numpy().astype(np.float64) / 255 - np.array(MEAN)) / np.array(STD)
    B, H, W, _ = values.shape
    rows = []
    for b in range(B):
        for top in range(0, H, patch):
            for left in range(0, W, patch):
                rows.append(values[b, top : top + patch, left : left + patch].transpose(2, 0, 1).ravel())
    return np.stack(rows).reshape(B, -1, 3 * patch * patch)


def random_boxes(B, seed=0):
    g = np.random.default_rng(seed)
    y0, x0 = g.integers(0, 60, (B, 2)), g.integers(0, 30, (B, 2))
    boxes = np.stack([y0, x0, y0 + g.integers(20, 90, (B, 2)), x0 + g.integers(10, 60, (B, 2))], axis=-1)
    return torch.tensor(boxes, dtype=torch.int32), torch.tensor(g.random((B, 2)) < 0.5)


def coordinates_by_image(box_a, box_b, flips, grid):
    """Follow each centre of B to its place in the image, and from there to A: the definition, one cell at a time."""
    rows, columns = grid
    y = np.zeros(rows)
    x = np.zeros(columns)
    for r in range(rows):
        image_y = box_b[0] + (r + 0.5) * (box_b[2] - box_b[0]) / rows
        y[r] = (image_y - box_a[0]) * rows / (box_a[2] - box_a[0]) - 0.5
    for c in range(columns):
        seen = columns - c - 0.5 if flips[1] else c + 0.5  # the cell's place counted from the left of the unflipped image
        image_x = box_b[1] + seen * (box_b[3] - box_b[1]) / columns
        place = (image_x - box_a[1]) * columns / (box_a[3] - box_a[1])
        x[c] = (columns - place if flips[0] else place) - 0.5
    return y, x


@pytest.mark.parametrize("grid", [(16, 8), (24, 8), (12, 4), (5, 7)])
def test_cell_coordinates_follow_the_image(grid):
    boxes, flips = random_boxes(200)
    y, x = cell_coordinates(boxes, flips, grid)
    for b in range(len(boxes)):
        ys, xs = coordinates_by_image(*boxes[b].double().numpy(), flips[b].numpy(), grid)
        assert np.allclose(y[b].numpy(), ys, atol=1e-3)
        assert np.allclose(x[b].numpy(), xs, atol=1e-3)


def test_cell_coordinates_agree_with_siamese_image_modelings_formula():
    """The published form, in which crops are given in each view's own flipped frame of an image of width 200."""
    boxes, flips = random_boxes(300, seed=5)
    rows, columns, image_width = 16, 8, 200
    y, x = cell_coordinates(boxes, flips, (rows, columns))
    for b in range(300):
        (i1, j1, y1, x1), (i2, j2, y2, x2) = boxes[b].double().numpy()
        h1, w1, h2, w2 = y1 - i1, x1 - j1, y2 - i2, x2 - j2
        j1 = image_width - x1 if flips[b, 0] else j1
        j2 = image_width - x2 if flips[b, 1] else j2
        c = np.arange(columns)
        if flips[b, 0] != flips[b, 1]:
            expected = -(c + 0.5) * (w2 / w1) + (image_width - j1 - j2) / w1 * columns - 0.5
        else:
            expected = (c + 0.5) * w2 / w1 + (j2 - j1) / w1 * columns - 0.5
        assert np.allclose(x[b].numpy(), expected, atol=1e-3)
        assert np.allclose(y[b].numpy(), (np.arange(rows) + 0.5) * h2 / h1 + (i2 - i1) / h1 * rows - 0.5, atol=1e-3)


def test_the_same_region_has_the_grids_own_coordinates():
    boxes, flips = random_boxes(20)
    boxes[:, 1], flips[:, 1] = boxes[:, 0], flips[:, 0]
    y, x = cell_coordinates(boxes, flips, (16, 8))
    assert torch.allclose(y, torch.arange(16.0).expand(20, -1), atol=1e-4)
    assert torch.allclose(x, torch.arange(8.0).expand(20, -1), atol=1e-4)
    assert torch.equal(region_codes(boxes, flips, (16, 8), 32).scale[:, :8], torch.zeros(20, 8))


def patch_targets_by_loop(images, patch, per_channel):
    rows = rows_by_loop(images, patch)
    B, L, _P = rows.shape
    out = np.zeros_like(rows)
    for b in range(B):
        for cell in range(L):
            groups = rows[b, cell].reshape(3, -1) if per_channel else rows[b, cell][None]
            out[b, cell] = np.concatenate([(g - g.mean()) / np.sqrt(g.var(ddof=0 if per_channel else 1) + 1e-6) for g in groups])
    return out


@pytest.mark.parametrize("per_channel", [False, True])
def test_patch_loss_and_its_gradient(per_channel):
    torch.manual_seed(0)
    images = random_images(3, 32, 16)
    images[0, :8, :8] = 77  # a flat patch: its target by channel is zero, not NaN
    target = patch_targets_by_loop(images, 8, per_channel)
    predicted = torch.randn(3, 8, 192, requires_grad=True)
    weights = torch.rand(3, 8) * (torch.rand(3, 8) < 0.7)
    losses = patch_loss(predicted, images, weights, 8, MEAN, STD, per_channel)
    difference = predicted.detach().numpy().astype(np.float64) - target
    per_cell = (difference**2).mean(-1)
    assert np.allclose(losses.per_cell.numpy(), per_cell, rtol=1e-4, atol=1e-4)
    assert losses.total.item() == pytest.approx((per_cell * weights.numpy()).sum(), rel=1e-5)
    losses.total.backward()
    assert np.allclose(predicted.grad.numpy(), 2 * difference * weights.numpy()[..., None] / 192, atol=1e-5)
    if per_channel:
        assert losses.per_cell[0, 0].item() == pytest.approx(predicted[0, 0].detach().square().mean().item(), rel=1e-3)
