"""The operators in plain PyTorch: the specification, the path on a CPU, and the oracle of the tests.

Axis letters: B batch, L patches of a region, V visible patches, D width, C channels, P values of a patch (C * patch * patch).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from personmae_kernels.checks import axis_sizes, check_dtype, wide

FeatureLossKind = Literal["mse", "smooth-l1", "cosine"]


class AddedNorm(NamedTuple):
    """What add_layer_norm returns."""

    stream: Tensor  # the residual stream with the branch added, in the stream's dtype
    normed: Tensor  # its LayerNorm, in the branch's dtype


class CellLosses(NamedTuple):
    """What a loss operator returns."""

    total: Tensor  # [] float32, sum over B and L of weights * per_cell; call backward() on this, unscaled
    per_cell: Tensor  # [B, L] float32, unweighted, without gradient


def check_patches(images: Tensor, patch_px: int, mean: Sequence[float], std: Sequence[float]) -> None:
    """Raises TypeError or ValueError, naming the argument, unless images are uint8 [B, H, W, C] that divide into patches of patch_px, with a mean and
    a positive std for each channel."""
    sizes = axis_sizes(images=(images, "B H W C"))
    check_dtype(torch.uint8, images=images)
    if patch_px < 1 or sizes["H"] % patch_px or sizes["W"] % patch_px:
        raise ValueError(f"patch_px: images of {sizes['H']}x{sizes['W']} pixels do not divide into patches of {patch_px}x{patch_px}")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != sizes["C"]:
            raise ValueError(f"{name}: one value for each of {sizes['C']} channels is needed, got {len(values)}")
    if min(std) <= 0:
        raise ValueError(f"std: positive values are needed, got {list(std)}")


def _cut_patches(values: Tensor, patch_px: int) -> Tensor:  # [B, H, W, C] -> [B, L, C * patch * patch], element order (c, y, x)
    B, H, W, C = values.shape
    cut = values.reshape(B, H // patch_px, patch_px, W // patch_px, patch_px, C)
    return cut.permute(0, 1, 3, 5, 2, 4).reshape(B, (H // patch_px) * (W // patch_px), C * patch_px * patch_px)


def patch_rows(
    images: Tensor, visible: Tensor | None, patch_px: int, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Normalised patches of the wanted tokens as rows, ready for one matrix product with the patch embedding.

    images: uint8 [B, H, W, C]. visible: int32 or int64 [B, V] patch numbers (row-major on the grid), or None for all L patches.
    mean, std: of each channel, on the scale [0, 1]. dtype: of the result. Returns [B, V, C * patch_px**2] = (image / 255 - mean) / std, in
    element order (c, y, x), which is that of `nn.Conv2d.weight.view(D, -1)`.
    """
    patches = _cut_patches(images, patch_px)
    if visible is not None:
        patches = gather_visible(patches, visible)
    scale, shift = channel_scale_and_shift(tuple(mean), tuple(std), patch_px, images.device)
    return torch.addcmul(shift, patches.float(), scale).to(dtype)


@functools.lru_cache(maxsize=32)
def channel_scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...], patch_px: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """[P] each, kept on the device: making them anew would wait for the copy at every call."""
    scale = torch.tensor([1.0 / (255.0 * s) for s in std]).repeat_interleave(patch_px * patch_px)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).repeat_interleave(patch_px * patch_px)
    return scale.to(device), shift.to(device)


def _flat_numbers(visible: Tensor, num_patches: int) -> Tensor:  # [B, V] -> int64 [B * V], row numbers in a tensor [B * num_patches, ...]
    # Looking at the numbers makes a GPU wait, and cannot be traced; elsewhere a number off the grid would silently take a row of the next image.
    if not visible.is_cuda and not torch.compiler.is_compiling() and visible.numel():
        least, most = (int(value) for value in torch.aminmax(visible))
        if least < 0 or most >= num_patches:
            raise IndexError(f"visible: patch number {least if least < 0 else most} is not in 0 to {num_patches - 1}")
    return (visible + torch.arange(len(visible), device=visible.device)[:, None] * num_patches).reshape(-1)


def gather_visible(tokens: Tensor, visible: Tensor, positions: Tensor | None = None) -> Tensor:
    """The visible tokens of each image, their positions added: tokens[b, visible[b, v]] + positions[visible[b, v]].

    tokens: [B, L, D]. visible: int32 or int64 [B, V], no patch twice in an image. positions: [L, D], without gradient, or None.
    Returns [B, V, D] in the dtype of tokens.
    """
    B, L, D = tokens.shape
    chosen = tokens.reshape(B * L, D).index_select(0, _flat_numbers(visible, L)).reshape(B, visible.shape[1], D)
    return chosen if positions is None else (chosen + F.embedding(visible, positions)).to(tokens.dtype)


def assemble_tokens(tokens: Tensor, visible: Tensor, mask_token: Tensor, positions: Tensor) -> Tensor:
    """The input of MAE's decoder (He et al., 2022): the class token, then the grid with the visible tokens in their places and the mask token
    elsewhere; positions are added to the grid.

    tokens: [B, 1 + V, D], class token first. visible: int32 or int64 [B, V], no patch twice in an image. mask_token: [D]. positions: [L, D],
    without gradient. Returns [B, 1 + L, D] in the dtype of tokens.
    """
    B, V, D = visible.shape[0], visible.shape[1], tokens.shape[2]
    L = positions.shape[0]
    grid = wide(mask_token).expand(B * L, D).index_copy(0, _flat_numbers(visible, L), wide(tokens[:, 1:]).reshape(B * V, D))
    return torch.cat([tokens[:, :1], (grid.reshape(B, L, D) + positions).to(tokens.dtype)], dim=1)


def join_tokens(tokens: Tensor, visible: Tensor, positions: Tensor, queries: Tensor) -> Tensor:
    """The input of a joint decoder (Tao et al., Siamese Image Modeling, 2023): the class token, the visible tokens with their positions added, the
    queries, in one sequence.

    tokens: [B, 1 + V, D], class token first. visible: int32 or int64 [B, V]. positions: [L, D], without gradient. queries: [B, Q, D]. Returns
    [B, 1 + V + Q, D] in the dtype of tokens.
    """
    placed = (tokens[:, 1:] + F.embedding(visible, positions)).to(tokens.dtype)
    return torch.cat([tokens[:, :1], placed, queries.to(tokens.dtype)], dim=1)


def _sin_cos(values: Tensor, num_channels: int) -> Tensor:  # [...] -> [..., num_channels], base 10000, first all sines
    half = num_channels // 2
    frequencies = torch.exp(torch.arange(half, device=values.device, dtype=values.dtype) * (-math.log(10000.0) / half))
    angles = values[..., None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def cell_coordinates(boxes: Tensor, flips: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Where the centres of region B's cells lie on region A's grid of tokens.

    boxes: int [B, 2, 4], (y0, x0, y1, x1) of A and B in pixels of the unflipped image. flips: bool [B, 2], which region is mirrored.
    grid: (rows, columns). Returns y [B, rows] and x [B, columns], float32:
        y = (centre_y - y0_A) / h_A * rows - 1/2,    x = (centre_x - x0_A) / w_A * columns - 1/2    (from the right edge where A is mirrored)
    so that B = A gives y = r and x = c.
    """
    rows, columns = grid
    (ya, xa, ya1, xa1), (yb, xb, yb1, xb1) = boxes[:, 0, :, None].float().unbind(1), boxes[:, 1, :, None].float().unbind(1)
    r = (torch.arange(rows, device=boxes.device, dtype=torch.float32) + 0.5) / rows
    c = (torch.arange(columns, device=boxes.device, dtype=torch.float32) + 0.5) / columns
    y = (yb + r * (yb1 - yb) - ya) / (ya1 - ya) * rows - 0.5
    centre = torch.where(flips[:, 1, None], xb1 - c * (xb1 - xb), xb + c * (xb1 - xb))
    offset = torch.where(flips[:, 0, None], xa1 - centre, centre - xa)
    return y, offset / (xa1 - xa) * columns - 0.5


class RegionCodes(NamedTuple):
    """Where region B lies as seen from region A, in three parts that add up after a linear map."""

    rows: Tensor  # [B, Hg, D / 2] float32, of the row coordinate y of each row of cells
    columns: Tensor  # [B, Wg, D / 2] float32, of the column coordinate x of each column of cells
    scale: Tensor  # [B, D] float32, of 10 ln(height ratio) and 10 ln(width ratio), B over A


def region_codes(boxes: Tensor, flips: Tensor, grid: tuple[int, int], width: int) -> RegionCodes:
    """Sine-cosine codes of region B's cells in the token coordinates of region A (Tao et al., Siamese Image Modeling, CVPR 2023, generalised to
    rectangular grids and to flips of either region).

    boxes: int [B, 2, 4], (y0, x0, y1, x1) of A and B in pixels of the unflipped image. flips: bool [B, 2], which region is mirrored.
    grid: (rows, columns). width: D, a multiple of 4. Each of the coordinates y, x of `cell_coordinates` and of 10 ln(h_B / h_A), 10 ln(w_B / w_A)
    gets D / 2 channels.
    """
    if width % 4:
        raise ValueError(f"width must be a multiple of 4, not {width}")
    y, x = cell_coordinates(boxes, flips, grid)
    (ya, xa, ya1, xa1), (yb, xb, yb1, xb1) = boxes[:, 0].float().unbind(1), boxes[:, 1].float().unbind(1)
    ratios = 10.0 * torch.stack([torch.log((yb1 - yb) / (ya1 - ya)), torch.log((xb1 - xb) / (xa1 - xa))], dim=1)
    return RegionCodes(_sin_cos(y, width // 2), _sin_cos(x, width // 2), _sin_cos(ratios, width // 2).flatten(1))


def region_queries(boxes: Tensor, flips: Tensor, grid: tuple[int, int], mask_token: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Decoder queries: the mask token plus the projected relative code of each cell of region B.

    boxes: int [B, 2, 4]. flips: bool [B, 2]. mask_token, bias: [D]. weight: [D, 2 D], over the concatenation (row, column, scale) of
    `region_codes`. Returns [B, L, D] in the dtype of the projections (autocast's where it is on), the sums taken in float32. The map is linear, so
    the few distinct rows, columns and scales are projected and added; the codes [B, L, 2 D] are never written.
    """
    width = mask_token.shape[-1]
    codes = RegionCodes(*(code.to(weight.dtype) for code in region_codes(boxes, flips, grid, width)))
    half = width // 2
    rows = F.linear(codes.rows, weight[:, :half])
    columns = F.linear(codes.columns, weight[:, half:width])
    scale = wide(F.linear(codes.scale, weight[:, width:], bias)) + mask_token
    queries = (wide(rows) + scale[:, None])[:, :, None] + wide(columns)[:, None]
    return queries.flatten(1, 2).to(rows.dtype)


def patch_targets(
    images: Tensor, patch_px: int, mean: Sequence[float], std: Sequence[float], per_channel: bool = False, eps: float = 1e-6
) -> Tensor:
    """Patches standardised by their own mean and variance: the target of `patch_loss`, for its tests and monitors.

    images: uint8 [B, H, W, C]. Returns float32 [B, L, P] = (t - mean(t)) / sqrt(var(t) + eps), with t = (image / 255 - mean) / std and the
    unbiased variance over all P values of a patch, or with `per_channel` over each channel's values, biased (Dong et al., BootMAE, 2022).
    """
    rows = patch_rows(images, None, patch_px, mean, std)
    target = rows.unflatten(-1, (images.shape[-1], -1)) if per_channel else rows
    variance, average = torch.var_mean(target, -1, unbiased=not per_channel, keepdim=True)
    return ((target - average) * torch.rsqrt(variance + eps)).reshape(rows.shape)


def patch_loss(
    predicted: Tensor,
    images: Tensor,
    weights: Tensor,
    patch_px: int,
    mean: Sequence[float],
    std: Sequence[float],
    per_channel: bool = False,
    eps: float = 1e-6,
) -> CellLosses:
    """Squared error against patches standardised by their own mean and variance (He et al., MAE, 2022).

    predicted: [B, L, P], element order (c, y, x). images: uint8 [B, H, W, C]. weights: float32 [B, L]; whatever scales the loss
    (1 / number of cells, accumulation, ramp) goes in here. The target is that of `patch_targets`.
    """
    target = patch_targets(images, patch_px, mean, std, per_channel, eps)
    per_cell = (wide(predicted) - target).square().mean(-1)
    return CellLosses((per_cell * weights).sum(), per_cell.detach())


def feature_loss(
    predicted: Tensor, target: Tensor, weights: Tensor, kind: FeatureLossKind = "mse", normalise_predicted: bool = True, eps: float = 1e-6
) -> CellLosses:
    """Error against the teacher's tokens after a LayerNorm without affine part (Dong et al., BootMAE, 2022).

    predicted, target: [B, L, D]. weights: float32 [B, L], see `patch_loss`. kind: mean over channels of the squared error, of the smooth L1
    error (beta 1), or 1 - cosine. normalise_predicted: standardise the prediction in the same way. No gradient reaches the target.
    """
    width = predicted.shape[-1]
    with torch.no_grad():
        target = F.layer_norm(wide(target), (width,), eps=eps)
    predicted = wide(predicted)
    if normalise_predicted:
        predicted = F.layer_norm(predicted, (width,), eps=eps)
    if kind == "mse":
        per_cell = (predicted - target).square().mean(-1)
    elif kind == "smooth-l1":
        per_cell = F.smooth_l1_loss(predicted, target, reduction="none").mean(-1)
    elif kind == "cosine":
        per_cell = 1.0 - F.cosine_similarity(predicted, target, dim=-1)
    else:
        raise ValueError(f"kind must be mse, smooth-l1 or cosine, not {kind!r}")
    return CellLosses((per_cell * weights).sum(), per_cell.detach())


def add_layer_norm(
    stream: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    branch_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    eps: float = 1e-6,
) -> AddedNorm:
    """Adds a branch to the residual stream and normalises the sum: the seam between two branches of a pre-norm transformer.

        stream' = stream + row_scale * branch_scale * branch       rounded once to the stream's dtype
        normed  = LayerNorm(stream') * weight + bias               statistics in float32 of the rounded stream

    stream, branch: [B, N, D]; weight, bias: [D]; branch_scale: [D], LayerScale (Touvron et al., 2021), or None: each of any floating dtype.
    row_scale: float32 [B], drop path (0, or 1 / share kept), without gradient, or None.
    """
    added = wide(branch)
    if branch_scale is not None:
        added = added * branch_scale
    if row_scale is not None:
        added = added * row_scale[:, None, None]
    stream = (wide(stream) + added).to(stream.dtype)
    normed = F.layer_norm(wide(stream), (stream.shape[-1],), wide(weight), wide(bias), eps)
    return AddedNorm(stream, normed.to(branch.dtype))


def short_attention(qkv: Tensor) -> Tensor:
    """Self-attention over the packed output of one linear layer: softmax(q k^T / sqrt(d)) v for each head.

    qkv: [B, N, 3, H, d], N at most 256, d 32 or 64. Returns [B, N, H, d].
    """
    q, k, v = qkv.transpose(1, 3).unbind(2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def short_cross_attention(q: Tensor, kv: Tensor) -> Tensor:
    """Attention of queries to a packed context. q: [B, N, H, d]. kv: [B, M, 2, H, d], N and M at most 256, d 32 or 64. Returns [B, N, H, d]."""
    k, v = kv.transpose(1, 3).unbind(2)
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v).transpose(1, 2)


# What stands in adamw_ema's tensor of hyper-parameters, in this order.
ADAMW_HYPER = ("learning_rate", "beta1", "beta2", "eps", "correction1", "correction2", "gradient_scale", "ema_momentum")


def adamw_ema_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first_moments: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    hyper: Tensor,
    weight_decays: Sequence[float],
    averages: Sequence[Tensor] = (),
    copies: Sequence[Tensor] = (),
    average_copies: Sequence[Tensor] = (),
) -> None:
    """One step of AdamW (Loshchilov & Hutter, 2019), of the moving average of the parameters, and of their bfloat16 copies, in place.

        g  = gradient_scale * gradient
        p  = p * (1 - learning_rate * weight_decay)
        m  = beta1 m + (1 - beta1) g,      v = beta2 v + (1 - beta2) g^2
        p  = p - learning_rate * (m / correction1) / (sqrt(v / correction2) + eps)
        average = ema_momentum * average + (1 - ema_momentum) * p,      copy = bfloat16(p),      average_copy = bfloat16(average)

    parameters, first_moments, second_moments: float32, alike in shape. gradients: float32 or bfloat16. hyper: float32 [8] on their device, as
    named in ADAMW_HYPER, with correction1 = 1 - beta1**t and correction2 = 1 - beta2**t: on the device, so that no step waits for the host and a CUDA
    graph can replay it. weight_decays: one for each parameter. averages (float32), copies and average_copies (bfloat16): each one for each
    parameter, or empty.
    """
    rate, beta1, beta2, eps, correction1, correction2, scale, momentum = hyper.unbind()
    for i, (p, gradient, m, v) in enumerate(zip(parameters, gradients, first_moments, second_moments, strict=True)):
        g = gradient.to(p.dtype) * scale
        p.mul_(1 - rate * weight_decays[i])
        m.lerp_(g, (1 - beta1).to(m.dtype))
        v.mul_(beta2).addcmul_(g, g * (1 - beta2))
        p.sub_(rate * (m / correction1) / ((v / correction2).sqrt() + eps))
        if averages:
            averages[i].lerp_(p, (1 - momentum).to(p.dtype))
        if copies:
            copies[i].copy_(p)
        if average_copies:
            average_copies[i].copy_(averages[i])
