"""The reference operators against loops in float64 numpy: values and gradients."""

import numpy as np
import pytest
import torch

from personmae_kernels import assemble_tokens, cell_coordinates, feature_loss, gather_visible, patch_loss, patch_rows, region_codes, region_queries

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


@pytest.mark.parametrize(("H", "W", "patch"), [(32, 16, 8), (48, 80, 16), (6, 9, 3)])
def test_patch_rows(H, W, patch):
    images = random_images(3, H, W)
    expected = rows_by_loop(images, patch)
    assert np.allclose(patch_rows(images, None, patch, MEAN, STD).numpy(), expected, atol=1e-5)
    L = expected.shape[1]
    visible = torch.stack([torch.randperm(L)[: L // 2].sort().values for _ in range(3)]).int()
    wanted = np.stack([expected[b, visible[b].numpy()] for b in range(3)])
    assert np.allclose(patch_rows(images, visible, patch, MEAN, STD).numpy(), wanted, atol=1e-5)
    # Non-contiguous input: the same image stored transposed.
    stored = images.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(patch_rows(stored, visible, patch, MEAN, STD), patch_rows(images, visible, patch, MEAN, STD))


def test_patch_rows_is_the_convolution_of_the_patch_embedding():
    images = random_images(2, 32, 16)
    conv = torch.nn.Conv2d(3, 24, 8, 8)
    pixels = (images.permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    expected = conv(pixels).flatten(2).transpose(1, 2)
    rows = patch_rows(images, None, 8, MEAN, STD)
    assert torch.allclose(rows @ conv.weight.flatten(1).T + conv.bias, expected, atol=1e-4)


def test_gather_and_assemble_with_gradients():
    torch.manual_seed(0)
    B, L, V, D = 3, 7, 4, 5
    visible = torch.stack([torch.randperm(L)[:V].sort().values for _ in range(B)]).int()
    tokens = torch.randn(B, L, D, dtype=torch.float64, requires_grad=True)
    gathered = gather_visible(tokens, visible)
    for b in range(B):
        for v in range(V):
            assert torch.equal(gathered[b, v], tokens[b, visible[b, v]])
    kept = torch.randn(B, 1 + V, D, dtype=torch.float64, requires_grad=True)
    fill = torch.randn(D, dtype=torch.float64, requires_grad=True)
    positions = torch.randn(L, D, dtype=torch.float64)
    grid = assemble_tokens(kept, visible, fill, positions)
    assert torch.equal(grid[:, 0], kept[:, 0])
    for b in range(B):
        places = visible[b].tolist()
        for cell in range(L):
            source = kept[b, 1 + places.index(cell)] if cell in places else fill
            assert torch.equal(grid[b, 1 + cell], source + positions[cell])
    assert torch.autograd.gradcheck(lambda t: gather_visible(t, visible), tokens)
    assert torch.autograd.gradcheck(lambda t, f: assemble_tokens(t, visible, f, positions), (kept, fill))


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


@pytest.mark.parametrize(("grid", "D"), [((16, 8), 32), ((5, 3), 8)])
def test_region_queries_are_the_linear_map_of_the_whole_code(grid, D):
    torch.manual_seed(0)
    boxes, flips = random_boxes(6, seed=2)
    linear = torch.nn.Linear(2 * D, D)
    mask_token = torch.randn(D, requires_grad=True)
    out = region_queries(boxes, flips, grid, mask_token, linear.weight, linear.bias)
    frequencies = 1 / 10000 ** (np.arange(D // 4) / (D // 4))

    def code(value):
        return np.concatenate([np.sin(value * frequencies), np.cos(value * frequencies)])

    whole = []
    for b in range(6):
        box_a, box_b = boxes[b].double().numpy()
        ys, xs = coordinates_by_image(box_a, box_b, flips[b].numpy(), grid)
        heights = 10 * np.log((box_b[2] - box_b[0]) / (box_a[2] - box_a[0]))
        widths = 10 * np.log((box_b[3] - box_b[1]) / (box_a[3] - box_a[1]))
        whole.append([np.concatenate([code(y), code(x), code(heights), code(widths)]) for y in ys for x in xs])
    expected = linear(torch.tensor(np.array(whole), dtype=torch.float32)) + mask_token
    assert torch.allclose(out, expected, atol=2e-3)
    upstream = torch.randn_like(out)
    ours = torch.autograd.grad((out * upstream).sum(), [linear.weight, linear.bias, mask_token])
    theirs = torch.autograd.grad((expected * upstream).sum(), [linear.weight, linear.bias, mask_token])
    for name, a, b in zip(("weight", "bias", "mask_token"), ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=2e-2, rtol=1e-3), name


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


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("kind", ["mse", "smooth-l1", "cosine"])
def test_feature_loss_and_its_gradient(kind, normalise):
    torch.manual_seed(1)
    predicted = torch.randn(2, 5, 24, requires_grad=True)
    target = 3 * torch.randn(2, 5, 24) + 1
    weights = torch.rand(2, 5)
    losses = feature_loss(predicted, target, weights, kind, normalise)
    p, t, w = (x.detach().double() for x in (predicted, target, weights))
    p.requires_grad_()

    def standard(x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    a, b = standard(p) if normalise else p, standard(t)
    e = a - b
    if kind == "mse":
        per_cell = (e**2).mean(-1)
    elif kind == "smooth-l1":
        per_cell = torch.where(e.abs() < 1, e**2 / 2, e.abs() - 0.5).mean(-1)
    else:
        per_cell = 1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    assert torch.allclose(losses.per_cell.double(), per_cell.detach(), atol=1e-5)
    (per_cell * w).sum().backward()
    losses.total.backward()
    assert losses.total.item() == pytest.approx((per_cell.detach() * w).sum().item(), rel=1e-5)
    assert torch.allclose(predicted.grad.double(), p.grad, atol=1e-6)


def test_an_unknown_feature_loss_is_named():
    with pytest.raises(ValueError, match="'l3'"):
        feature_loss(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4), torch.ones(1, 1), "l3")
