"""Error against the teacher's tokens after a LayerNorm without affine part (Dong et al., BootMAE, 2022).

    n(x)     = (x - average(x)) / sqrt(variance(x) + eps)            biased, over the D channels of a token
    p, t     = n(predicted) or predicted, n(target)
    per_cell = average((p - t)**2), average(smooth_l1(p - t)) with beta 1, or 1 - cosine(p, t)      [B, L]
    total    = sum(weights * per_cell)
    gradient = weights * d per_cell / d predicted                    through n(predicted), written in the same pass

cosine is that of F.cosine_similarity: u . v with u = p / max(|p|, 1e-8), v = t / max(|t|, 1e-8); its gradient to p is
(v - (u . v) p / |p|) / max(|p|, 1e-8), where p / |p| counts as 0 at p = 0. So a constant target gives a loss of one and no gradient, and a constant
prediction a loss of one and a gradient that is finite but of the order of 1e8 / sqrt(eps).

One program takes ROWS tokens with all their channels on chip. Bytes a token: prediction and target once, the gradient once.
"""

from __future__ import annotations

from typing import get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

from personmae_kernels import reference
from personmae_kernels.checks import FLOATS, axis_sizes, check_dtype, check_no_gradient
from personmae_kernels.launching import ceil_div, form_for, launch, next_power_of_2
from personmae_kernels.operators import operator
from personmae_kernels.reference import CellLosses, FeatureLossKind
from personmae_kernels.unit_gradient import raise_if_scaled, with_gradient

MAX_WIDTH = 16384


@triton.jit
def standardised(values, first, inside, eps, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of mean 0 and variance 1, 0 outside, and 1 / sqrt(variance + eps). first: one value of each row, subtracted before the average is taken:
    then a constant row becomes exactly 0, not a rounding error times 1 / sqrt(eps)."""
    shifted = tl.where(inside, values - first[:, None], 0.0)
    centred = tl.where(inside, shifted - (tl.sum(shifted, 1) / D)[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / D + eps)
    return centred * inverse[:, None], inverse


@triton.jit
def feature_loss_kernel(  # type: ignore[no-untyped-def]
    predicted_ptr,  # [T, D], T = B * L
    target_ptr,  # [B, L, D], last axis contiguous
    weights_ptr,  # [T] float32
    per_cell_ptr,  # [T] float32, out
    gradient_ptr,  # [T, D], out, or None
    T,
    L,
    target_image_stride,
    target_token_stride,
    eps,
    D: tl.constexpr,
    KIND: tl.constexpr,
    NORMALISE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    start = tl.program_id(0) * ROWS
    rows = start + tl.arange(0, ROWS)
    channels = tl.arange(0, BLOCK_D)
    in_rows = rows < T
    inside = in_rows[:, None] & (channels < D)[None, :]

    target_rows = target_ptr + (rows // L).to(tl.int64) * target_image_stride + (rows % L).to(tl.int64) * target_token_stride
    t = tl.load(target_rows[:, None] + channels[None, :], mask=inside, other=0.0).to(tl.float32)
    t, _ = standardised(t, tl.load(target_rows, mask=in_rows, other=0.0).to(tl.float32), inside, eps, D)

    predicted_rows = predicted_ptr + start.to(tl.int64) * D + tl.arange(0, ROWS) * D
    p = tl.load(predicted_rows[:, None] + channels[None, :], mask=inside, other=0.0).to(tl.float32)
    if NORMALISE:
        p, inverse = standardised(p, tl.load(predicted_rows, mask=in_rows, other=0.0).to(tl.float32), inside, eps, D)

    # slope: of the loss to p.
    if KIND == "cosine":
        p_norm, t_norm = tl.sqrt(tl.sum(p * p, 1)), tl.sqrt(tl.sum(t * t, 1))
        p_length, t_length = tl.maximum(p_norm, 1e-8), tl.maximum(t_norm, 1e-8)
        u, v = p / p_length[:, None], t / t_length[:, None]
        cosine = tl.sum(u * v, 1)
        loss = 1.0 - cosine
        # p / |p| = u * length / norm, and 0 for a row of zeros.
        along = tl.where(p_norm > 0.0, cosine * p_length / tl.where(p_norm > 0.0, p_norm, 1.0), 0.0)
        slope = (u * along[:, None] - v) / p_length[:, None]
    else:
        difference = p - t
        if KIND == "mse":
            loss = tl.sum(difference * difference, 1) / D
            slope = difference * (2.0 / D)
        else:
            size = tl.abs(difference)
            loss = tl.sum(tl.where(size < 1.0, 0.5 * difference * difference, size - tl.where(inside, 0.5, 0.0)), 1) / D
            # Written so that NaN stays NaN.
            slope = tl.where(difference <= -1.0, -1.0, tl.where(difference >= 1.0, 1.0, difference)) / D
    if NORMALISE and gradient_ptr is not None:
        average, projected = tl.sum(slope, 1) / D, tl.sum(slope * p, 1) / D
        slope = (slope - average[:, None] - p * projected[:, None]) * inverse[:, None]

    tl.store(per_cell_ptr + rows, loss, mask=in_rows)
    if gradient_ptr is not None:
        gradient = slope * tl.load(weights_ptr + rows, mask=in_rows, other=0.0)[:, None]
        place = gradient_ptr + start.to(tl.int64) * D + (tl.arange(0, ROWS) * D)[:, None] + channels[None, :]
        tl.store(place, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)


def _tile(width: int) -> tuple[int, int, int]:  # -> ROWS, BLOCK_D, num_warps
    block = next_power_of_2(width)
    return max(1, 2048 // block), block, min(16, max(4, block // 512))


@operator("personmae_triton::feature_loss")
def _feature_loss(
    predicted: Tensor, target: Tensor, weights: Tensor, kind: str, normalise_predicted: bool, eps: float, needs_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns total [], per_cell [B, L] and, if it is needed, the gradient of the total to `predicted` [B, L, D]."""
    B, L, D = predicted.shape
    # The teacher's tokens without the class token, x[:, 1:], are read where they lie.
    target = target if target.stride(2) == 1 else target.contiguous()
    per_cell = weights.new_empty(weights.shape)
    gradient = predicted.new_empty(predicted.shape if needs_gradient else 0)
    rows, block, warps = _tile(D)
    launch(
        feature_loss_kernel,
        (ceil_div(B * L, rows),),
        predicted.contiguous(),
        target,
        weights.contiguous(),
        per_cell,
        gradient if needs_gradient else None,
        B * L,
        L,
        target.stride(0),
        target.stride(1),
        eps,
        num_warps=warps,
        D=D,
        KIND=kind,
        NORMALISE=normalise_predicted,
        ROWS=rows,
        BLOCK_D=block,
    )
    return torch.dot(per_cell.flatten(), weights.flatten()), per_cell, gradient


@_feature_loss.register_fake
def _(
    predicted: Tensor, target: Tensor, weights: Tensor, kind: str, normalise_predicted: bool, eps: float, needs_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return weights.new_empty(()), weights.new_empty(weights.shape), predicted.new_empty(predicted.shape if needs_gradient else 0)


def feature_loss(
    predicted: Tensor, target: Tensor, weights: Tensor, kind: FeatureLossKind = "mse", normalise_predicted: bool = True, eps: float = 1e-6
) -> CellLosses:
    """Error against the teacher's tokens after a LayerNorm without affine part (Dong et al., BootMAE, 2022).

    predicted, target: each float32 or bfloat16 [B, L, D], D at most 16384; the target may be a view such as tokens[:, 1:], and gets no gradient.
    weights: float32 [B, L]; whatever scales the loss (1 / number of cells, accumulation, ramp) goes in here, and backward() is called on `total`
    itself: see unit_gradient. kind: "mse", mean over channels of the squared error; "smooth-l1", of the smooth L1 error (beta 1); "cosine",
    1 - F.cosine_similarity. normalise_predicted: standardise the prediction in the same way. Raises TypeError or ValueError, naming the argument, for
    other kinds, shapes, dtypes or devices.
    """
    sizes = axis_sizes(predicted=(predicted, "B L D"), target=(target, "B L D"), weights=(weights, "B L"))
    check_dtype(FLOATS, predicted=predicted, target=target)
    check_dtype(torch.float32, weights=weights)
    check_no_gradient(weights=weights)
    if kind not in get_args(FeatureLossKind):
        raise ValueError(f"kind must be mse, smooth-l1 or cosine, not {kind!r}")
    if not 1 <= sizes["D"] <= MAX_WIDTH:
        raise ValueError(f"predicted: a width of 1 to {MAX_WIDTH} is needed, got {sizes['D']}")
    if form_for(predicted) == "reference":
        return reference.feature_loss(predicted, target, weights, kind, normalise_predicted, eps)
    raise_if_scaled()
    needs_gradient = predicted.requires_grad and torch.is_grad_enabled()
    total, per_cell, gradient = _feature_loss(predicted.detach(), target.detach(), weights, kind, normalise_predicted, eps, needs_gradient)
    return CellLosses(with_gradient(predicted, total, gradient, "feature_loss") if needs_gradient else total, per_cell)
