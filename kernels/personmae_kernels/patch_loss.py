"""Squared error against patches that are standardised by their own mean and variance, straight from the uint8 image (He et al., MAE, 2022).

    t        = (image / 255 - mean) / std                            the patch, P = C * patch_px**2 values in the order (c, y, x)
    target   = (t - average(t)) / sqrt(variance(t) + eps)            unbiased over P, or per channel and biased
    per_cell = average((predicted - target)**2)                      [B, L]
    total    = sum(weights * per_cell)
    gradient = 2 * weights * (predicted - target) / P                written in the same pass

One program takes ROWS patches with all their values on chip: the target is never written. Bytes a patch: P of the image, the prediction once,
the gradient once. The bytes of an image are gathered one by one (memory order is (y, x, c)), each cache line from L1 but once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from personmae_kernels import reference
from personmae_kernels.checks import FLOATS, axis_sizes, check_dtype, check_no_gradient
from personmae_kernels.launching import ceil_div, form_for, launch, next_power_of_2
from personmae_kernels.operators import operator
from personmae_kernels.patch_rows import pixel_addresses
from personmae_kernels.reference import CellLosses
from personmae_kernels.unit_gradient import raise_if_scaled, with_gradient


@triton.jit
def patch_loss_kernel(  # type: ignore[no-untyped-def]
    predicted_ptr,  # [T, P]
    images_ptr,  # uint8 [B, H, W, C], contiguous
    weights_ptr,  # [T] float32
    scale_ptr,  # [P] float32, 1 / (255 std)
    shift_ptr,  # [P] float32, -mean / std
    per_cell_ptr,  # [T] float32, out
    gradient_ptr,  # [T, P], out, or None
    T,
    Hg,
    Wg,
    eps,
    P: tl.constexpr,
    C: tl.constexpr,
    PATCH: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    rows = first + tl.arange(0, ROWS)
    values = tl.arange(0, BLOCK_P)
    in_rows, in_values = rows < T, values < P
    inside = in_rows[:, None] & in_values[None, :]

    address = pixel_addresses(rows // (Hg * Wg), rows % (Hg * Wg), values, Hg, Wg, C, PATCH)
    pixels = tl.load(images_ptr + address, mask=inside, other=0).to(tl.float32)
    scale = tl.load(scale_ptr + values, mask=in_values, other=0.0)
    shift = tl.load(shift_ptr + values, mask=in_values, other=0.0)

    if PER_CHANNEL:
        # The shift drops out, and sums of bytes are exact, as is their division: a flat channel gives zeros.
        target = tl.zeros([ROWS, BLOCK_P], tl.float32)
        for channel in tl.static_range(C):
            own = inside & (values // (PATCH * PATCH) == channel)[None, :]
            total = tl.sum(tl.where(own, pixels, 0.0), 1)
            average = tl.div_rn(total, tl.full([ROWS], PATCH * PATCH, tl.float32))
            centred = tl.where(own, (pixels - average[:, None]) * scale[None, :], 0.0)
            variance = tl.sum(centred * centred, 1) / (PATCH * PATCH)
            target += centred * (1.0 / tl.sqrt(variance + eps))[:, None]
    else:
        t = pixels * scale[None, :] + shift[None, :]
        average = tl.sum(tl.where(inside, t, 0.0), 1) / P
        centred = tl.where(inside, t - average[:, None], 0.0)
        variance = tl.sum(centred * centred, 1) / (P - 1)
        target = centred * (1.0 / tl.sqrt(variance + eps))[:, None]

    place = first.to(tl.int64) * P + tl.arange(0, ROWS)[:, None] * P + values[None, :]
    predicted = tl.load(predicted_ptr + place, mask=inside, other=0.0).to(tl.float32)
    difference = tl.where(inside, predicted - target, 0.0)
    tl.store(per_cell_ptr + rows, tl.sum(difference * difference, 1) / P, mask=in_rows)
    if gradient_ptr is not None:
        weight = tl.load(weights_ptr + rows, mask=in_rows, other=0.0)
        gradient = difference * (weight * (2.0 / P))[:, None]
        tl.store(gradient_ptr + place, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)


@operator("personmae_triton::patch_loss")
def _patch_loss(
    predicted: Tensor,
    images: Tensor,
    weights: Tensor,
    patch_px: int,
    mean: Sequence[float],
    std: Sequence[float],
    per_channel: bool,
    eps: float,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns total [], per_cell [B, L] and, if it is needed, the gradient of the total to `predicted` [B, L, P]."""
    B, L, P = predicted.shape
    _, H, W, C = images.shape
    scale, shift = reference.channel_scale_and_shift(tuple(mean), tuple(std), patch_px, images.device)
    per_cell = weights.new_empty(weights.shape)
    gradient = predicted.new_empty(predicted.shape if needs_gradient else 0)
    block = next_power_of_2(P)
    rows = max(1, 4096 // block)
    launch(
        patch_loss_kernel,
        (ceil_div(B * L, rows),),
        predicted.contiguous(),
        images.contiguous(),
        weights.contiguous(),
        scale,
        shift,
        per_cell,
        gradient if needs_gradient else None,
        B * L,
        H // patch_px,
        W // patch_px,
        eps,
        P=P,
        C=C,
        PATCH=patch_px,
        PER_CHANNEL=per_channel,
        ROWS=rows,
        BLOCK_P=block,
    )
    return torch.dot(per_cell.flatten(), weights.flatten()), per_cell, gradient


@_patch_loss.register_fake
def _(
    predicted: Tensor,
    images: Tensor,
    weights: Tensor,
    patch_px: int,
    mean: Sequence[float],
    std: Sequence[float],
    per_channel: bool,
    eps: float,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return weights.new_empty(()), weights.new_empty(weights.shape), predicted.new_empty(predicted.shape if needs_gradient else 0)


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

    predicted: float32 or bfloat16 [B, L, P], element order (c, y, x). images: uint8 [B, H, W, C]. weights: float32 [B, L]; whatever scales the loss
    (1 / number of cells, accumulation, ramp) goes in here, and backward() is called on `total` itself: see unit_gradient. mean, std: of each
    channel, on the scale [0, 1]. The target is that of `patch_targets`. Raises TypeError or ValueError, naming the argument, for other shapes,
    dtypes or devices.
    """
    sizes = axis_sizes(predicted=(predicted, "B L P"), images=(images, "B H W C"), weights=(weights, "B L"))
    reference.check_patches(images, patch_px, mean, std)
    check_dtype(FLOATS, predicted=predicted)
    check_dtype(torch.float32, weights=weights)
    check_no_gradient(weights=weights)
    num_cells, num_values = (sizes["H"] // patch_px) * (sizes["W"] // patch_px), sizes["C"] * patch_px**2
    if (sizes["L"], sizes["P"]) != (num_cells, num_values):
        raise ValueError(f"predicted: [B, {num_cells}, {num_values}] is needed for such images and patches, got {list(predicted.shape)}")
    if form_for(predicted) == "reference":
        return reference.patch_loss(predicted, images, weights, patch_px, mean, std, per_channel, eps)
    raise_if_scaled()
    needs_gradient = predicted.requires_grad and torch.is_grad_enabled()
    total, per_cell, gradient = _patch_loss(predicted.detach(), images, weights, patch_px, mean, std, per_channel, eps, needs_gradient)
    return CellLosses(with_gradient(predicted, total, gradient, "patch_loss") if needs_gradient else total, per_cell)
