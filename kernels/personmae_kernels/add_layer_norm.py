"""Residual, LayerScale, drop path and LayerNorm in one pass each way: the seam between two branches of a pre-norm transformer.

    stream' = stream + row_scale[b] * branch_scale * branch          rounded once to the stream's dtype
    normed  = (stream' - mean) * rstd * weight + bias                statistics in float32, of the rounded stream

    g       = d normed * weight,    x = (stream' - mean) * rstd
    d stream = d stream' + rstd * (g - average(g) - x * average(g * x)),    d branch = row_scale[b] * branch_scale * d stream
    d weight = sum(d normed * x),    d bias = sum(d normed),    d branch_scale = sum(row_scale[b] * branch * d stream)

One program takes ROWS tokens with their whole width on chip. Sums over tokens are kept by a fixed number of programs, each over a fixed set of
tokens, and added by a second, small reduction: no atomics, equal to the bit in every run. Bytes a token in bfloat16: 8 D forward (two reads, two
writes), 8 D backward (three reads and one write; without scales d branch is d stream itself). Under autocast, with a float32 stream and
a bfloat16 branch, 12 D and 16 D.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from personmae_kernels import reference
from personmae_kernels.checks import HALVES_TOO, axis_sizes, check_dtype, check_no_gradient
from personmae_kernels.launching import ceil_div, form_for, launch, next_power_of_2
from personmae_kernels.operators import operator
from personmae_kernels.reference import AddedNorm


@triton.jit
def add_layer_norm_kernel(  # type: ignore[no-untyped-def]
    stream_ptr,  # [T, D]
    branch_ptr,  # [T, D]
    weight_ptr,  # [D]
    bias_ptr,  # [D]
    branch_scale_ptr,  # [D] or None
    row_scale_ptr,  # [T / N] float32 or None
    out_ptr,  # [T, D], the stream's dtype
    normed_ptr,  # [T, D], the branch's dtype
    mean_ptr,  # [T] float32, out
    rstd_ptr,  # [T] float32, out
    T,
    N,
    eps,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    rows = first + tl.arange(0, ROWS)
    channels = tl.arange(0, BLOCK_D)
    in_rows, in_channels = rows < T, channels < D
    inside = in_rows[:, None] & in_channels[None, :]
    place = first.to(tl.int64) * D + tl.arange(0, ROWS)[:, None] * D + channels[None, :]

    added = tl.load(branch_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if branch_scale_ptr is not None:
        added *= tl.load(branch_scale_ptr + channels, mask=in_channels, other=0.0).to(tl.float32)[None, :]
    if row_scale_ptr is not None:
        added *= tl.load(row_scale_ptr + rows // N, mask=in_rows, other=0.0)[:, None]
    stream = tl.load(stream_ptr + place, mask=inside, other=0.0).to(tl.float32) + added
    rounded = stream.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + place, rounded, mask=inside)

    stream = rounded.to(tl.float32)
    mean = tl.sum(stream, 1) / D
    centred = tl.where(inside, stream - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / D + eps)
    tl.store(mean_ptr + rows, mean, mask=in_rows)
    tl.store(rstd_ptr + rows, rstd, mask=in_rows)
    weight = tl.load(weight_ptr + channels, mask=in_channels, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channels, mask=in_channels, other=0.0).to(tl.float32)
    normed = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(normed_ptr + place, normed.to(normed_ptr.dtype.element_ty), mask=inside)


@triton.jit
def add_layer_norm_backward_kernel(  # type: ignore[no-untyped-def]
    d_out_ptr,  # [T, D], the stream's dtype, or None: nothing reads the stream after this norm
    d_normed_ptr,  # [T, D]
    out_ptr,  # [T, D], the stream of the forward pass
    branch_ptr,  # [T, D], or None without a branch_scale
    weight_ptr,  # [D]
    branch_scale_ptr,  # [D] or None
    row_scale_ptr,  # [T / N] float32 or None
    mean_ptr,  # [T] float32
    rstd_ptr,  # [T] float32
    d_stream_ptr,  # [T, D], out
    d_branch_ptr,  # [T, D], out, or None where it is d_stream itself
    sums_ptr,  # [num_programs, 2 or 3, D] float32, out: of each program, for weight, bias and branch_scale
    T,
    N,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    channels = tl.arange(0, BLOCK_D)
    in_channels = channels < D
    weight = tl.load(weight_ptr + channels, mask=in_channels, other=0.0).to(tl.float32)
    d_weight = tl.zeros([BLOCK_D], tl.float32)
    d_bias = tl.zeros([BLOCK_D], tl.float32)
    if branch_scale_ptr is not None:
        branch_scale = tl.load(branch_scale_ptr + channels, mask=in_channels, other=0.0).to(tl.float32)
        d_branch_scale = tl.zeros([BLOCK_D], tl.float32)

    for first in range(tl.program_id(0) * ROWS, T, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)
        in_rows = rows < T
        inside = in_rows[:, None] & in_channels[None, :]
        place = tl.cast(first, tl.int64) * D + tl.arange(0, ROWS)[:, None] * D + channels[None, :]
        mean = tl.load(mean_ptr + rows, mask=in_rows, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=in_rows, other=0.0)
        x = tl.load(out_ptr + place, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, (x - mean[:, None]) * rstd[:, None], 0.0)
        d_normed = tl.load(d_normed_ptr + place, mask=inside, other=0.0).to(tl.float32)
        d_weight += tl.sum(d_normed * x, 0)
        d_bias += tl.sum(d_normed, 0)
        g = d_normed * weight[None, :]
        average_g = tl.sum(g, 1) / D
        average_gx = tl.sum(g * x, 1) / D
        d_stream = rstd[:, None] * (g - average_g[:, None] - x * average_gx[:, None])
        if d_out_ptr is not None:
            d_stream += tl.load(d_out_ptr + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_stream_ptr + place, d_stream.to(d_stream_ptr.dtype.element_ty), mask=inside)
        if d_branch_ptr is not None:
            if row_scale_ptr is not None:
                d_stream *= tl.load(row_scale_ptr + rows // N, mask=in_rows, other=0.0)[:, None]
            if branch_scale_ptr is not None:
                branch = tl.load(branch_ptr + place, mask=inside, other=0.0).to(tl.float32)
                d_branch_scale += tl.sum(tl.where(inside, d_stream * branch, 0.0), 0)
                d_stream *= branch_scale[None, :]
            tl.store(d_branch_ptr + place, d_stream.to(d_branch_ptr.dtype.element_ty), mask=inside)

    num_sums: tl.constexpr = 2 if branch_scale_ptr is None else 3
    own = sums_ptr + tl.program_id(0) * (num_sums * D) + channels
    tl.store(own, d_weight, mask=in_channels)
    tl.store(own + D, d_bias, mask=in_channels)
    if branch_scale_ptr is not None:
        tl.store(own + 2 * D, d_branch_scale, mask=in_channels)


def _tile(width: int) -> dict[str, int]:
    """Tokens and channels of a program: as many as stay in the registers of four warps."""
    block = next_power_of_2(width)
    return {"D": width, "ROWS": max(1, min(4, 4096 // block)), "BLOCK_D": block}


# Warps that the resident programs of the backward pass have together on a multiprocessor. Measured on an H100, 2026-11-26: with 32, with 2 or 8
# tokens a program, or with the next loads under way (num_stages of 2 and 3) it is as fast or slower.
RESIDENT_WARPS = 16


def _backward_tile(width: int) -> dict[str, int]:
    """As many warps as one token takes at 16 bytes a thread, so that a thread sees the same channels of each token and sums them by itself (on an
    H100 twice as fast as four warps at a width of 384, five times at 256)."""
    return {**_tile(width), "num_warps": min(8, max(1, next_power_of_2(width) // 256))}


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _num_programs(device: torch.device, num_warps: int) -> int:
    """Programs of the backward pass: all that are resident at once on the GPU; in the interpreter four."""
    return RESIDENT_WARPS // num_warps * _num_multiprocessors(device) if device.type == "cuda" else 4


@operator("personmae_triton::add_layer_norm")
def _add_layer_norm(
    stream: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, branch_scale: Tensor | None, row_scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns stream' and normed [B, N, D], mean and rstd [B, N]."""
    B, N, D = stream.shape
    out, normed = torch.empty(B, N, D, dtype=stream.dtype, device=stream.device), torch.empty(B, N, D, dtype=branch.dtype, device=stream.device)
    mean, rstd = (torch.empty(B, N, dtype=torch.float32, device=stream.device) for _ in range(2))
    tile = _tile(D)
    launch(
        add_layer_norm_kernel,
        (ceil_div(B * N, tile["ROWS"]),),
        stream.contiguous(),
        branch.contiguous(),
        weight.contiguous(),
        bias.contiguous(),
        None if branch_scale is None else branch_scale.contiguous(),
        None if row_scale is None else row_scale.contiguous(),
        out,
        normed,
        mean,
        rstd,
        B * N,
        N,
        eps,
        **tile,
    )
    return out, normed, mean, rstd


@_add_layer_norm.register_fake
def _(
    stream: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, branch_scale: Tensor | None, row_scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean = stream.new_empty(stream.shape[:2], dtype=torch.float32)
    return stream.new_empty(stream.shape), branch.new_empty(branch.shape), mean, torch.empty_like(mean)


@operator("personmae_triton::add_layer_norm_backward")
def _add_layer_norm_backward(
    d_out: Tensor | None,
    d_normed: Tensor,
    out: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    branch_scale: Tensor | None,
    row_scale: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns d stream and d branch [B, N, D] (d branch is empty where it is d stream itself), and the sums for weight, bias and branch_scale
    [2 or 3, D] float32."""
    B, N, D = out.shape
    d_stream = torch.empty(B, N, D, dtype=out.dtype, device=out.device)
    apart = _has_own_branch_gradient(d_normed, out, branch_scale, row_scale)
    d_branch = torch.empty((B, N, D) if apart else (0,), dtype=d_normed.dtype, device=out.device)
    tile = _backward_tile(D)
    num_programs = min(_num_programs(out.device, tile["num_warps"]), ceil_div(B * N, tile["ROWS"]))
    sums = torch.empty(num_programs, 2 if branch_scale is None else 3, D, dtype=torch.float32, device=out.device)
    launch(
        add_layer_norm_backward_kernel,
        (num_programs,),
        None if d_out is None else d_out.contiguous(),
        d_normed.contiguous(),
        out,
        None if branch is None else branch.contiguous(),
        weight.contiguous(),
        None if branch_scale is None else branch_scale.contiguous(),
        None if row_scale is None else row_scale.contiguous(),
        mean,
        rstd,
        d_stream,
        d_branch if apart else None,
        sums,
        B * N,
        N,
        **tile,
    )
    return d_stream, d_branch, sums.sum(0).to(weight.dtype)


@_add_layer_norm_backward.register_fake
def _(
    d_out: Tensor | None,
    d_normed: Tensor,
    out: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    branch_scale: Tensor | None,
    row_scale: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    apart = _has_own_branch_gradient(d_normed, out, branch_scale, row_scale)
    d_branch = d_normed.new_empty(out.shape if apart else (0,))
    return out.new_empty(out.shape), d_branch, weight.new_empty((2 if branch_scale is None else 3, out.shape[-1]))


def _has_own_branch_gradient(d_normed: Tensor, out: Tensor, branch_scale: Tensor | None, row_scale: Tensor | None) -> bool:
    return branch_scale is not None or row_scale is not None or d_normed.dtype != out.dtype


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, branch, weight, _, branch_scale, row_scale, _ = inputs
    out, _, mean, rstd = output
    ctx.set_materialize_grads(False)
    # The branch itself is needed for the gradient of its scale alone.
    ctx.save_for_backward(out, branch if branch_scale is not None else None, weight, branch_scale, row_scale, mean, rstd)
    ctx.branch_dtype = branch.dtype


def _backward(ctx, d_out: Tensor | None, d_normed: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    out, branch, weight, branch_scale, row_scale, mean, rstd = ctx.saved_tensors
    if d_out is None and d_normed is None:
        return (None,) * 7
    if d_normed is None:
        d_normed = torch.zeros_like(out, dtype=ctx.branch_dtype)
    d_stream, d_branch, sums = _add_layer_norm_backward(d_out, d_normed, out, branch, weight, branch_scale, row_scale, mean, rstd)
    if not _has_own_branch_gradient(d_normed, out, branch_scale, row_scale):
        d_branch = d_stream
    return d_stream, d_branch, sums[0], sums[1], None if branch_scale is None else sums[2], None, None


_add_layer_norm.register_autograd(_backward, setup_context=_keep)


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

    stream, branch: [B, N, D]; weight, bias: [D], of the LayerNorm; branch_scale: [D], LayerScale (Touvron et al., "Going deeper with Image
    Transformers", 2021), or None: each float32, bfloat16 or float16. row_scale: float32 [B], drop path (0, or 1 / share kept; Huang et al., "Deep
    Networks with Stochastic Depth", 2016), without gradient, or None. Returns AddedNorm: stream [B, N, D] = stream + row_scale * branch_scale *
    branch in the stream's dtype, normed [B, N, D] in the branch's dtype. Gradients reach all but row_scale. Raises TypeError or ValueError, naming
    the argument, for other shapes, dtypes or devices.
    """
    given = {"stream": (stream, "B N D"), "branch": (branch, "B N D"), "weight": (weight, "D"), "bias": (bias, "D")}
    if branch_scale is not None:
        given["branch_scale"] = (branch_scale, "D")
        check_dtype(HALVES_TOO, branch_scale=branch_scale)
    if row_scale is not None:
        given["row_scale"] = (row_scale, "B")
        check_dtype(torch.float32, row_scale=row_scale)
        check_no_gradient(row_scale=row_scale)
    axis_sizes(**given)
    check_dtype(HALVES_TOO, stream=stream, branch=branch, weight=weight, bias=bias)
    if form_for(stream) == "reference":
        return reference.add_layer_norm(stream, branch, weight, bias, branch_scale, row_scale, eps)
    out, normed, _, _ = _add_layer_norm(stream, branch, weight, bias, branch_scale, row_scale, eps)
    return AddedNorm(out, normed)
