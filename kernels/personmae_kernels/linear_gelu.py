"""A linear layer and its GELU in one pass, forward only: for the teacher, which has no backward pass.

    result = gelu(x weight^T + bias),      gelu(v) = v / 2 * (1 + erf(v / sqrt 2))

The exact GELU (Hendrycks & Gimpel, 2016), in float32 on the sums of the matrix product as they leave the tensor cores: what stands before the GELU
is neither rounded nor written. Bytes saved: one write and one read of [..., E]. Programs go through the result in groups of GROUP tiles of rows, so
that the tiles of `weight` and `x` which run at a time come from L2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from personmae_kernels import reference
from personmae_kernels.checks import HALVES_TOO, axis_sizes, check_dtype
from personmae_kernels.launching import form_for, launch


@triton.jit
def linear_gelu_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [T, D]
    weight_ptr,  # [E, D]
    bias_ptr,  # [E]
    result_ptr,  # [T, E], out
    T,
    D,
    E,
    WHOLE: tl.constexpr,  # BLOCK_D divides D
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    tiles_t, tiles_e = tl.cdiv(T, BLOCK_T), tl.cdiv(E, BLOCK_E)
    group = tl.program_id(0) // (GROUP * tiles_e)
    in_group = tl.program_id(0) % (GROUP * tiles_e)
    height = tl.minimum(tiles_t - group * GROUP, GROUP)
    row = (group * GROUP + in_group % height) * BLOCK_T
    column = in_group // height * BLOCK_E

    # Rows past the end are read as the last one, which saves their masks, and are not written.
    rows, columns, depth = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_D)
    x_tile = x_ptr + row.to(tl.int64) * D + (tl.minimum(rows, T - 1 - row)[:, None] * D + depth[None, :])
    weight_tile = weight_ptr + column.to(tl.int64) * D + (tl.minimum(columns, E - 1 - column)[None, :] * D + depth[:, None])
    sums = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for start in range(0, D, BLOCK_D):
        if WHOLE:
            x, weight = tl.load(x_tile), tl.load(weight_tile)
        else:
            inside = depth < D - start
            x = tl.load(x_tile, mask=inside[None, :], other=0.0)
            weight = tl.load(weight_tile, mask=inside[:, None], other=0.0)
        sums = tl.dot(x, weight, sums, input_precision="ieee")
        x_tile += BLOCK_D
        weight_tile += BLOCK_D

    in_rows, in_columns = rows < T - row, columns < E - column
    v = sums + tl.load(bias_ptr + column + columns, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    result = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    place = result_ptr + row.to(tl.int64) * E + column + (rows[:, None] * E + columns[None, :])
    tl.store(place, result.to(result_ptr.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])


class Tiles(NamedTuple):
    """The tile of a program: rows, columns and depth of a step; and what it runs with."""

    block_t: int
    block_e: int
    block_d: int
    num_warps: int
    num_stages: int


def tiles_for(T: int, E: int, dtype: torch.dtype) -> Tiles:
    """The tile for a result [T, E]. With float32, which the tensor cores do not multiply exactly, sums run in registers and want small tiles."""
    if dtype == torch.float32:
        return Tiles(64, 64, 16, 4, 3)
    if triton.cdiv(T, 128) * triton.cdiv(E, 128) < 64:
        return Tiles(64, 64, 64, 4, 3)
    return Tiles(128, 128, 64, 8, 4)


@torch.library.custom_op("personmae_triton::linear_gelu", mutates_args=())
def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Returns [..., E]."""
    E, D = weight.shape
    result = torch.empty(*x.shape[:-1], E, device=x.device, dtype=x.dtype)
    T = x.shape[:-1].numel()
    tiles = tiles_for(T, E, x.dtype)
    launch(
        linear_gelu_kernel,
        (triton.cdiv(T, tiles.block_t) * triton.cdiv(E, tiles.block_e),),
        x.contiguous(),
        weight.contiguous(),
        bias.contiguous(),
        result,
        T,
        D,
        E,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        WHOLE=D % tiles.block_d == 0,
        BLOCK_T=tiles.block_t,
        BLOCK_E=tiles.block_e,
        BLOCK_D=tiles.block_d,
        GROUP=8,
    )
    return result


@_linear_gelu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU(x weight^T + bias) with the exact GELU (Hendrycks & Gimpel, 2016), forward only: for the teacher, which has no backward pass.

    x: float32, bfloat16 or float16 [..., D]. weight: [E, D] in the dtype of x. bias: [E], float32 or in the dtype of x. Returns [..., E] in the
    dtype of x; sums and GELU in float32. Raises TypeError or ValueError, naming the argument, for other shapes, dtypes or devices, and for one that
    requires a gradient where gradients are recorded.
    """
    axes = " ".join(f"N{axis}" for axis in range(x.ndim - 1)) if isinstance(x, Tensor) else ""
    axis_sizes(x=(x, f"{axes} D"), weight=(weight, "E D"), bias=(bias, "E"))
    check_dtype(HALVES_TOO, x=x)
    if weight.dtype != x.dtype:
        raise TypeError(f"weight: {str(x.dtype).removeprefix('torch.')} is needed, as x is, got {str(weight.dtype).removeprefix('torch.')}")
    check_dtype((torch.float32, x.dtype), bias=bias)
    if torch.is_grad_enabled():
        for name, tensor in {"x": x, "weight": weight, "bias": bias}.items():
            if tensor.requires_grad:
                raise ValueError(f"{name}: requires a gradient, which linear_gelu does not give; call it under torch.no_grad()")
    if form_for(x) == "reference":
        return reference.linear_gelu(x, weight, bias)
    return _linear_gelu(x, weight, bias)
