"""The visible tokens of each image, and back: two kernels, each the other's backward pass.

    gather:  out[b, v] = tokens[b, visible[b, v]] + positions[visible[b, v]]
    place:   out[b, l] = (tokens[b, v] where visible[b, v] = l, else fill) + positions[l]

The backward pass of gather is place with a fill of zero; assemble_tokens is place with the mask token, and its backward pass is gather. Both may
keep HEAD tokens (the class token) in front, which are copied. Every row of a result is written once, without a pass that clears it and without
atomics: place looks its rows up among the V patch numbers of the image, which cost nothing beside a row. Bytes: each row that is needed once in, each
row of the result once out; the positions stay in the cache.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from personmae_kernels import reference
from personmae_kernels.checks import HALVES_TOO, INDICES, axis_sizes, check_dtype, check_no_gradient
from personmae_kernels.launching import ceil_div, form_for, launch, next_power_of_2
from personmae_kernels.operators import operator


@triton.jit
def gather_visible_kernel(  # type: ignore[no-untyped-def]
    tokens_ptr,  # [B, HEAD + L, D], rows contiguous
    visible_ptr,  # int32 or int64 [B, V]
    positions_ptr,  # [L, D], or None
    out_ptr,  # [B, HEAD + V, D], out
    tokens_image_stride,
    tokens_row_stride,
    T,  # B * (HEAD + V)
    V,
    L,
    HEAD: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    rows = first + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    in_rows = rows < T
    inside = in_rows[:, None] & (columns < D)[None, :]
    image, token = rows // (HEAD + V), rows % (HEAD + V)
    in_head = token < HEAD
    patch = tl.load(visible_ptr + image * V + token - HEAD, mask=in_rows & (token >= HEAD), other=0)
    known = in_head | (patch >= 0) & (patch < L)
    source = tl.where(in_head, token, patch + HEAD).to(tl.int64)
    begin = image.to(tl.int64) * tokens_image_stride + source * tokens_row_stride
    value = tl.load(tokens_ptr + begin[:, None] + columns[None, :], mask=inside & known[:, None], other=0.0).to(tl.float32)
    if positions_ptr is not None:
        begin = patch.to(tl.int64) * D
        placed = inside & (known & (token >= HEAD))[:, None]
        value += tl.load(positions_ptr + begin[:, None] + columns[None, :], mask=placed, other=0.0).to(tl.float32)
    value = tl.where(known[:, None], value, float("nan"))
    place = first.to(tl.int64) * D + tl.arange(0, ROWS)[:, None] * D + columns[None, :]
    tl.store(out_ptr + place, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def find_slots(visible_ptr, image, patches, V, ROWS: tl.constexpr, BLOCK_V: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where each of `patches` [ROWS], 0 or more, stands among the V numbers of an image; -1 for one that is hidden."""
    slots = tl.full([ROWS], -1, tl.int32)
    for start in range(0, V, BLOCK_V):
        index = start + tl.arange(0, BLOCK_V)
        numbers = tl.load(visible_ptr + image * V + index, mask=index < V, other=-1)
        slots = tl.maximum(slots, tl.max(tl.where(numbers[None, :] == patches[:, None], index[None, :], -1), 1))
    return slots


@triton.jit
def place_visible_kernel(  # type: ignore[no-untyped-def]
    tokens_ptr,  # [B, HEAD + V, D], rows contiguous
    visible_ptr,  # int32 or int64 [B, V]
    fill_ptr,  # [D], or None: zero
    positions_ptr,  # [L, D], or None
    out_ptr,  # [B, HEAD + L, D], out
    tokens_image_stride,
    tokens_row_stride,
    V,
    L,
    HEAD: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    tiles = tl.cdiv(HEAD + L, ROWS)
    image, first = tl.program_id(0) // tiles, tl.program_id(0) % tiles * ROWS
    rows = first + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    in_columns = columns < D
    inside = (rows < HEAD + L)[:, None] & in_columns[None, :]
    slots = find_slots(visible_ptr, image, rows - HEAD, V, ROWS, BLOCK_V)
    # In the head the slot means nothing: the row is its own source.
    source = tl.where(rows < HEAD, rows, tl.where(slots >= 0, slots + HEAD, -1))
    begin = image.to(tl.int64) * tokens_image_stride + source.to(tl.int64) * tokens_row_stride
    value = tl.load(tokens_ptr + begin[:, None] + columns[None, :], mask=inside & (source >= 0)[:, None], other=0.0).to(tl.float32)
    if fill_ptr is not None:
        fill = tl.load(fill_ptr + columns, mask=in_columns, other=0.0).to(tl.float32)
        value = tl.where((source >= 0)[:, None], value, fill[None, :])
    if positions_ptr is not None:
        place = (rows - HEAD)[:, None] * D + columns[None, :]
        value += tl.load(positions_ptr + place, mask=inside & (rows >= HEAD)[:, None], other=0.0).to(tl.float32)
    place = (image.to(tl.int64) * (HEAD + L) + first) * D + tl.arange(0, ROWS)[:, None] * D + columns[None, :]
    tl.store(out_ptr + place, value.to(out_ptr.dtype.element_ty), mask=inside)


def tile(width: int) -> dict[str, int]:
    """Rows a program takes, and the power of two that holds a row: 16-byte loads in 4 warps, a few for each thread."""
    block = next_power_of_2(width)
    return {"D": width, "ROWS": min(16, max(1, 4096 // block)), "BLOCK_D": block}


def numbers_at_once(num_visible: int) -> int:
    """How many patch numbers a program compares its rows with at a time."""
    return min(64, next_power_of_2(max(1, num_visible)))


def with_rows(tokens: Tensor) -> Tensor:
    """The tensor itself if its last axis is contiguous, else a contiguous copy."""
    return tokens if tokens.stride(-1) == 1 else tokens.contiguous()


@operator("personmae_triton::gather_visible")
def _gather_visible(tokens: Tensor, visible: Tensor, positions: Tensor | None, num_head: int) -> Tensor:
    B, N, D = tokens.shape
    V = visible.shape[1]
    out = torch.empty(B, num_head + V, D, device=tokens.device, dtype=tokens.dtype)
    if out.numel() == 0:
        return out
    tokens = with_rows(tokens)
    sizes = tile(D)
    launch(
        gather_visible_kernel,
        (ceil_div(B * (num_head + V), sizes["ROWS"]),),
        tokens,
        visible.contiguous(),
        None if positions is None else positions.contiguous(),
        out,
        tokens.stride(0),
        tokens.stride(1),
        B * (num_head + V),
        V,
        N - num_head,
        HEAD=num_head,
        **sizes,
    )
    return out


@_gather_visible.register_fake
def _(tokens: Tensor, visible: Tensor, positions: Tensor | None, num_head: int) -> Tensor:
    return tokens.new_empty((tokens.shape[0], num_head + visible.shape[1], tokens.shape[2]))


@operator("personmae_triton::place_visible")
def _place_visible(tokens: Tensor, visible: Tensor, fill: Tensor | None, positions: Tensor | None, num_head: int, num_patches: int) -> Tensor:
    B, _, D = tokens.shape
    V = visible.shape[1]
    out = torch.empty(B, num_head + num_patches, D, device=tokens.device, dtype=tokens.dtype)
    if out.numel() == 0:
        return out
    tokens = with_rows(tokens)
    sizes = tile(D)
    launch(
        place_visible_kernel,
        (B * ceil_div(num_head + num_patches, sizes["ROWS"]),),
        tokens,
        visible.contiguous(),
        None if fill is None else fill.contiguous(),
        None if positions is None else positions.contiguous(),
        out,
        tokens.stride(0),
        tokens.stride(1),
        V,
        num_patches,
        HEAD=num_head,
        BLOCK_V=numbers_at_once(V),
        **sizes,
    )
    return out


@_place_visible.register_fake
def _(tokens: Tensor, visible: Tensor, fill: Tensor | None, positions: Tensor | None, num_head: int, num_patches: int) -> Tensor:
    return tokens.new_empty((tokens.shape[0], num_head + num_patches, tokens.shape[2]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, visible, _, ctx.num_head = inputs
    ctx.num_patches = tokens.shape[1] - ctx.num_head
    ctx.save_for_backward(visible)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    (visible,) = ctx.saved_tensors
    return _place_visible(gradient, visible, None, None, ctx.num_head, ctx.num_patches), None, None, None


_gather_visible.register_autograd(_backward, setup_context=_setup_context)


def gather_visible(tokens: Tensor, visible: Tensor, positions: Tensor | None = None) -> Tensor:
    """The visible tokens of each image, their positions added: tokens[b, visible[b, v]] + positions[visible[b, v]] (He et al., MAE, 2022).

    tokens: float32, bfloat16 or float16 [B, L, D]; only the last axis needs to be contiguous, else it is copied. visible: int32 or int64 [B, V], no
    patch twice in an image (the gradient of a patch that stands twice would be that of its last place). positions: float32 or the dtype of tokens
    [L, D], without gradient, or None. Returns [B, V, D] in the dtype of tokens, rounded once.

    Patch numbers lie in 0 .. L - 1. On CUDA they are not looked at beforehand, as that would make the host wait: no kernel reads or writes outside
    the tensors, and a row of any other number is NaN. On a CPU the compiled form raises RuntimeError for such a number, the reference IndexError.
    Raises TypeError or ValueError, naming the argument, for other shapes, dtypes or devices.
    """
    arguments = {"tokens": (tokens, "B L D"), "visible": (visible, "B V")}
    if positions is not None:
        arguments["positions"] = (positions, "L D")
    axis_sizes(**arguments)
    check_dtype(HALVES_TOO, tokens=tokens)
    check_dtype(INDICES, visible=visible)
    if positions is not None:
        check_dtype((torch.float32, tokens.dtype), positions=positions)
        check_no_gradient(positions=positions)
    form = form_for(tokens, has_compiled=True)
    if form == "reference":
        return reference.gather_visible(tokens, visible, positions)
    if form == "compiled":
        chosen = torch.ops.personmae.gather_visible(tokens, visible)
        if positions is None:
            return chosen
        # A row of a number off the grid is NaN already, and an index off the table would end the CUDA context.
        return (chosen + F.embedding(visible.clamp(0, len(positions) - 1), positions)).to(tokens.dtype)
    return _gather_visible(tokens, visible, positions, 0)
