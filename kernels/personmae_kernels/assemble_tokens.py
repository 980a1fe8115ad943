"""The input sequences of the decoders: `assemble_tokens` (He et al., MAE, 2022) and `join_tokens` (Tao et al., Siamese Image Modeling, 2023).

    assembled[b, 0]     = tokens[b, 0]                                                     the class token
    assembled[b, 1 + l] = (tokens[b, 1 + v] where visible[b, v] = l, else mask_token) + positions[l]
    joined[b]           = tokens[b, 0], tokens[b, 1 + v] + positions[visible[b, v]] for all v, queries[b]

assemble_tokens is the kernel `place_visible` of gather_visible.py, and the gradient to its tokens is `gather_visible` of the incoming one. The
gradient to the mask token is the sum over the hidden cells: each program sums in float32 over its share of them into one row of partial sums, and a
small reduction ends it, always in the same order. Both together read the incoming gradient once. The gradients of join_tokens are parts of the
incoming one and cost nothing. Bytes forward: each row in once, each row out once; the positions stay in the cache.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from personmae_kernels import reference
from personmae_kernels.checks import HALVES_TOO, INDICES, axis_sizes, check_dtype, check_no_gradient
from personmae_kernels.gather_visible import _gather_visible, _place_visible, find_slots, numbers_at_once, tile, with_rows
from personmae_kernels.launching import ceil_div, form_for, launch
from personmae_kernels.operators import operator

# Programs that share the sum over the hidden cells: a few for each multiprocessor, and the same number on all devices, so that the sums are the same.
NUM_SUMS = 512


@triton.jit
def hidden_sum_kernel(  # type: ignore[no-untyped-def]
    gradient_ptr,  # [B, HEAD + L, D], rows contiguous
    visible_ptr,  # int32 or int64 [B, V]
    partial_ptr,  # [programs, D] float32, out
    gradient_image_stride,
    gradient_row_stride,
    num_tiles,
    V,
    L,
    HEAD: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    columns = tl.arange(0, BLOCK_D)
    tiles_per_image = tl.cdiv(L, ROWS)
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for number in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        image = number // tiles_per_image
        patches = number % tiles_per_image * ROWS + tl.arange(0, ROWS)
        hidden = (patches < L) & (find_slots(visible_ptr, image, patches, V, ROWS, BLOCK_V) < 0)
        begin = image.to(tl.int64) * gradient_image_stride + (patches + HEAD).to(tl.int64) * gradient_row_stride
        mask = hidden[:, None] & (columns < D)[None, :]
        total += tl.load(gradient_ptr + begin[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(partial_ptr + tl.program_id(0) * D + columns, tl.sum(total, 0), mask=columns < D)


@triton.jit
def join_tokens_kernel(  # type: ignore[no-untyped-def]
    tokens_ptr,  # [B, 1 + V, D], rows contiguous
    visible_ptr,  # int32 or int64 [B, V]
    positions_ptr,  # [L, D]
    queries_ptr,  # [B, Q, D], rows contiguous
    out_ptr,  # [B, 1 + V + Q, D], out
    tokens_image_stride,
    tokens_row_stride,
    queries_image_stride,
    queries_row_stride,
    T,  # B * (1 + V + Q)
    V,
    Q,
    L,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    rows = first + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    in_rows = rows < T
    inside = in_rows[:, None] & (columns < D)[None, :]
    image, token = rows // (1 + V + Q), rows % (1 + V + Q)
    is_query = token > V
    is_visible = (token >= 1) & (token <= V)
    patch = tl.load(visible_ptr + image * V + token - 1, mask=in_rows & is_visible, other=0)
    known = (patch >= 0) & (patch < L)

    # A row has one or two of the three parts; the loads of the others are masked and give zero.
    begin = image.to(tl.int64) * tokens_image_stride + token.to(tl.int64) * tokens_row_stride
    value = tl.load(tokens_ptr + begin[:, None] + columns[None, :], mask=inside & (token <= V)[:, None], other=0.0).to(tl.float32)
    begin = patch.to(tl.int64) * D
    value += tl.load(positions_ptr + begin[:, None] + columns[None, :], mask=inside & (is_visible & known)[:, None], other=0.0).to(tl.float32)
    begin = image.to(tl.int64) * queries_image_stride + (token - 1 - V).to(tl.int64) * queries_row_stride
    value += tl.load(queries_ptr + begin[:, None] + columns[None, :], mask=inside & is_query[:, None], other=0.0).to(tl.float32)

    value = tl.where(known[:, None], value, float("nan"))
    place = first.to(tl.int64) * D + tl.arange(0, ROWS)[:, None] * D + columns[None, :]
    tl.store(out_ptr + place, value.to(out_ptr.dtype.element_ty), mask=inside)


@operator("personmae_triton::hidden_sum")
def _hidden_sum(gradient: Tensor, visible: Tensor, num_head: int) -> Tensor:
    """gradient: [B, num_head + L, D]. Returns the sum over the cells of all images that are not in `visible`, float32 [D]."""
    B, N, D = gradient.shape
    L, V = N - num_head, visible.shape[1]
    gradient = with_rows(gradient)
    sizes = tile(D)
    num_tiles = B * ceil_div(L, sizes["ROWS"])
    partial = torch.empty(min(num_tiles, NUM_SUMS), D, dtype=torch.float32, device=gradient.device)
    launch(
        hidden_sum_kernel,
        (len(partial),),
        gradient,
        visible.contiguous(),
        partial,
        gradient.stride(0),
        gradient.stride(1),
        num_tiles,
        V,
        L,
        HEAD=num_head,
        BLOCK_V=numbers_at_once(V),
        **sizes,
    )
    return partial.sum(0)


@_hidden_sum.register_fake
def _(gradient: Tensor, visible: Tensor, num_head: int) -> Tensor:
    return gradient.new_empty((gradient.shape[2],), dtype=torch.float32)


def _setup_assemble(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, visible, fill, _, ctx.num_head, _ = inputs
    ctx.fill_dtype = None if fill is None else fill.dtype
    ctx.save_for_backward(visible)


def _assemble_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    (visible,) = ctx.saved_tensors
    to_tokens = _gather_visible(gradient, visible, None, ctx.num_head) if ctx.needs_input_grad[0] else None
    to_fill = _hidden_sum(gradient, visible, ctx.num_head).to(ctx.fill_dtype) if ctx.needs_input_grad[2] else None
    return to_tokens, None, to_fill, None, None, None


_place_visible.register_autograd(_assemble_backward, setup_context=_setup_assemble)


@operator("personmae_triton::join_tokens")
def _join_tokens(tokens: Tensor, visible: Tensor, positions: Tensor, queries: Tensor) -> Tensor:
    B, N, D = tokens.shape
    Q = queries.shape[1]
    out = torch.empty(B, N + Q, D, device=tokens.device, dtype=tokens.dtype)
    if out.numel() == 0:
        return out
    tokens, queries = with_rows(tokens), with_rows(queries)
    sizes = tile(D)
    launch(
        join_tokens_kernel,
        (ceil_div(B * (N + Q), sizes["ROWS"]),),
        tokens,
        visible.contiguous(),
        positions.contiguous(),
        queries,
        out,
        tokens.stride(0),
        tokens.stride(1),
        queries.stride(0),
        queries.stride(1),
        B * (N + Q),
        N - 1,
        Q,
        len(positions),
        **sizes,
    )
    return out


@_join_tokens.register_fake
def _(tokens: Tensor, visible: Tensor, positions: Tensor, queries: Tensor) -> Tensor:
    B, N, D = tokens.shape
    return tokens.new_empty((B, N + queries.shape[1], D))


def _setup_join(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, _, _, queries = inputs
    ctx.num_tokens, ctx.query_dtype = tokens.shape[1], queries.dtype


def _join_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, Tensor]:
    return gradient[:, : ctx.num_tokens], None, None, gradient[:, ctx.num_tokens :].to(ctx.query_dtype)


_join_tokens.register_autograd(_join_backward, setup_context=_setup_join)


def assemble_tokens(tokens: Tensor, visible: Tensor, mask_token: Tensor, positions: Tensor) -> Tensor:
    """The input of MAE's decoder (He et al., 2022): the class token, then the grid with the visible tokens in their places and the mask token
    elsewhere; positions are added to the grid.

    tokens: float32, bfloat16 or float16 [B, 1 + V, D], class token first. visible: int32 or int64 [B, V], each of 0 .. L - 1, no patch twice in an
    image. mask_token: of any of these dtypes [D]. positions: float32 or the dtype of tokens [L, D], without gradient. Returns [B, 1 + L, D] in the
    dtype of tokens, rounded once. Gradients reach tokens and mask_token, whose sum is taken in float32.

    Patch numbers are not looked at beforehand: the kernels never read or write outside the tensors, and a token whose number is not on the grid is
    left out and gets NaN as its gradient. Raises TypeError or ValueError, naming the argument, for other shapes, dtypes or devices.
    """
    sizes = axis_sizes(visible=(visible, "B V"), tokens=(tokens, "B N D"), mask_token=(mask_token, "D"), positions=(positions, "L D"))
    _check_decoder_input(tokens, visible, positions, sizes)
    check_dtype(HALVES_TOO, mask_token=mask_token)
    if form_for(tokens) == "reference":
        return reference.assemble_tokens(tokens, visible, mask_token, positions)
    return _place_visible(tokens, visible, mask_token, positions, 1, sizes["L"])


def join_tokens(tokens: Tensor, visible: Tensor, positions: Tensor, queries: Tensor) -> Tensor:
    """The input of a joint decoder (Tao et al., Siamese Image Modeling, 2023): the class token, the visible tokens with their positions added, the
    queries, in one sequence.

    tokens: float32, bfloat16 or float16 [B, 1 + V, D], class token first. visible: int32 or int64 [B, V], each of 0 .. L - 1. positions: float32 or
    the dtype of tokens [L, D], without gradient. queries: of any of these dtypes [B, Q, D]. Returns [B, 1 + V + Q, D] in the dtype of tokens, rounded
    once. Gradients reach tokens and queries.

    Patch numbers are not looked at beforehand: the kernel never reads outside the tensors, and a token whose number is not on the grid becomes NaN.
    Raises TypeError or ValueError, naming the argument, for other shapes, dtypes or devices.
    """
    sizes = axis_sizes(visible=(visible, "B V"), tokens=(tokens, "B N D"), positions=(positions, "L D"), queries=(queries, "B Q D"))
    _check_decoder_input(tokens, visible, positions, sizes)
    check_dtype(HALVES_TOO, queries=queries)
    if form_for(tokens) == "reference":
        return reference.join_tokens(tokens, visible, positions, queries)
    return _join_tokens(tokens, visible, positions, queries)


def _check_decoder_input(tokens: Tensor, visible: Tensor, positions: Tensor, sizes: dict[str, int]) -> None:
    if sizes["N"] != 1 + sizes["V"]:
        raise ValueError(f"tokens: [B, {1 + sizes['V']}, D] is needed for {sizes['V']} visible patches, got shape {list(tokens.shape)}")
    check_dtype(HALVES_TOO, tokens=tokens)
    check_dtype(INDICES, visible=visible)
    check_dtype((torch.float32, tokens.dtype), positions=positions)
    check_no_gradient(positions=positions)
