"""Attention over the few tokens of a person crop: at most 256 queries and keys, straight from and into the packed layout of the linear layers.

    s   = q k^T / sqrt(d)
    p   = softmax(s)                   lse = log2 of the sum of exp(s), kept for the backward pass
    out = p v
    dv  = p^T g,   dp = g v^T,   ds = p * (dp - delta),   dq = ds k / sqrt(d),   dk = ds^T q / sqrt(d)
    delta = the sum over a row of p * dp, which is that of g * out

Up to 128 queries and keys one program has a whole head on chip. Everything is read and written once, dq, dk and dv into their places in the packed
gradient. Bytes a token of width D: forward 4 D values (q, k, v, out), backward 7 D (q, k, v, g, dq, dk, dv). Beyond 128 the forward pass takes tiles
of 64 queries, each of which reads k and v, mostly from L2; the backward pass takes tiles of 32 keys and reads out too, for delta.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from personmae_kernels import reference
from personmae_kernels.checks import HALVES_TOO, axis_sizes, check_dtype
from personmae_kernels.launching import ceil_div, form_for, launch, next_power_of_2
from personmae_kernels.operators import operator
from personmae_kernels.short_attention_kernels import short_attention_backward_kernel, short_attention_forward_kernel

MAX_TOKENS = 256
HEAD_SIZES = (32, 64)


class Tiles(NamedTuple):
    """How a kernel cuts a head."""

    queries: int  # BLOCK_N
    keys: int  # BLOCK_M
    num_warps: int


def _tile(length: int, limit: int, beyond: int) -> int:
    """The next power of two that holds the length, up to a limit; a smaller tile beyond it."""
    return max(16, next_power_of_2(length)) if length <= limit else beyond


def forward_tiles(N: int, M: int, dtype: torch.dtype) -> Tiles:
    """The tiles for N queries and M keys."""
    if dtype == torch.float32:
        # Its products run without tensor cores, and keep their operands in registers.
        return Tiles(_tile(N, 32, 32), _tile(M, 32, 32), num_warps=4)
    queries, keys = _tile(N, 128, 64), _tile(M, 128, 64)
    return Tiles(queries, keys, num_warps=min(8, max(queries, keys) // 16))


def backward_tiles(N: int, M: int, dtype: torch.dtype) -> Tiles:
    """The tiles for N queries, which are all taken at once, and M keys."""
    queries = _tile(N, MAX_TOKENS, MAX_TOKENS)
    if dtype == torch.float32:
        keys = _tile(M, 32, 16) if queries < 256 else 16
        return Tiles(queries, keys, num_warps=4 if queries <= 64 else queries // 16)
    # With 256 queries the registers hold 32 keys at once. 65 to 96 keys are less work as three tiles of 32, which also need fewer registers.
    keys = 32 if queries == 256 or 64 < M <= 96 else _tile(M, 128, 32)
    return Tiles(queries, keys, num_warps=min(8, max(queries, keys) // 16))


def _addressable(tensor: Tensor) -> Tensor:
    """[B, N, ..., d] as it is if the kernels can address it: the last axis dense, the rows of an image within 32-bit offsets. Else a copy."""
    if tensor.stride(-1) == 1 and tensor.shape[1] * tensor.stride(1) < 2**31:
        return tensor
    return tensor.contiguous()


def _forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """q [B, N, H, d], k and v [B, M, H, d] -> out [B, N, H, d], lse [B, H, N]."""
    B, N, H, d = q.shape
    M = k.shape[1]
    out = torch.empty(B, N, H, d, device=q.device, dtype=q.dtype)
    lse = torch.empty(B, H, N, dtype=torch.float32, device=q.device)
    tiles = forward_tiles(N, M, q.dtype)
    query_tiles = ceil_div(N, tiles.queries)
    launch(
        short_attention_forward_kernel,
        (B * H * query_tiles,),
        q,
        k,
        v,
        out,
        lse,
        *q.stride()[:3],
        *k.stride()[:3],
        N,
        M,
        num_warps=tiles.num_warps,
        # With the default of 2 the tiles of 64 spill on sm_100.
        num_stages=3,
        H=H,
        HEAD=d,
        BLOCK_N=tiles.queries,
        BLOCK_M=tiles.keys,
        QUERY_TILES=query_tiles,
        KEY_TILES=ceil_div(M, tiles.keys),
        RAGGED_N=N % tiles.queries != 0,
        RAGGED_M=M % tiles.keys != 0,
    )
    return out, lse


def _backward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Writes dq, dk and dv: parts of packed tensors that are contiguous."""
    B, N, H, d = q.shape
    M = k.shape[1]
    tiles = backward_tiles(N, M, q.dtype)
    launch(
        short_attention_backward_kernel,
        (B * H,),
        gradient.contiguous(),
        q,
        k,
        v,
        out,
        lse,
        dq,
        dk,
        dv,
        *q.stride()[:3],
        *k.stride()[:3],
        dq.stride(1),
        dk.stride(1),
        N,
        M,
        num_warps=tiles.num_warps,
        H=H,
        HEAD=d,
        BLOCK_N=tiles.queries,
        BLOCK_M=tiles.keys,
        KEY_TILES=ceil_div(M, tiles.keys),
        RAGGED_N=N % tiles.queries != 0,
        RAGGED_M=M % tiles.keys != 0,
    )


@operator("personmae_triton::short_attention")
def _short_attention(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """Returns out [B, N, H, d] and lse [B, H, N]."""
    q, k, v = _addressable(qkv).unbind(2)
    return _forward(q, k, v)


@_short_attention.register_fake
def _(qkv: Tensor) -> tuple[Tensor, Tensor]:
    B, N, _, H, d = qkv.shape
    return qkv.new_empty(B, N, H, d), qkv.new_empty(B, H, N, dtype=torch.float32)


@operator("personmae_triton::short_attention_backward")
def _short_attention_backward(gradient: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """Returns the gradient [B, N, 3, H, d] to qkv."""
    packed = torch.empty(qkv.shape, device=qkv.device, dtype=qkv.dtype)
    q, k, v = _addressable(qkv).unbind(2)
    dq, dk, dv = packed.unbind(2)
    _backward(gradient, q, k, v, out, lse, dq, dk, dv)
    return packed


@_short_attention_backward.register_fake
def _(gradient: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _keep_for_backward(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _backward_of_self(ctx, gradient, _):  # type: ignore[no-untyped-def]
    return _short_attention_backward(gradient, *ctx.saved_tensors)


_short_attention.register_autograd(_backward_of_self, setup_context=_keep_for_backward)


@operator("personmae_triton::short_cross_attention")
def _short_cross_attention(q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
    """Returns out [B, N, H, d] and lse [B, H, N]."""
    k, v = _addressable(kv).unbind(2)
    return _forward(_addressable(q), k, v)


@_short_cross_attention.register_fake
def _(q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
    B, N, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(B, H, N, dtype=torch.float32)


@operator("personmae_triton::short_cross_attention_backward")
def _short_cross_attention_backward(gradient: Tensor, q: Tensor, kv: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradients [B, N, H, d] to q and [B, M, 2, H, d] to kv."""
    dq = torch.empty(q.shape, device=q.device, dtype=q.dtype)
    packed = torch.empty(kv.shape, device=kv.device, dtype=kv.dtype)
    k, v = _addressable(kv).unbind(2)
    dk, dv = packed.unbind(2)
    _backward(gradient, _addressable(q), k, v, out, lse, dq, dk, dv)
    return dq, packed


@_short_cross_attention_backward.register_fake
def _(gradient: Tensor, q: Tensor, kv: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), kv.new_empty(kv.shape)


def _backward_of_cross(ctx, gradient, _):  # type: ignore[no-untyped-def]
    return _short_cross_attention_backward(gradient, *ctx.saved_tensors)


_short_cross_attention.register_autograd(_backward_of_cross, setup_context=_keep_for_backward)


def _check_sizes(name: str, num_tokens: int, head_size: int) -> None:
    if not 1 <= num_tokens <= MAX_TOKENS:
        raise ValueError(f"{name}: 1 to {MAX_TOKENS} tokens are needed, got {num_tokens}")
    if head_size not in HEAD_SIZES:
        raise ValueError(f"{name}: heads of {' or '.join(map(str, HEAD_SIZES))} channels are needed, got {head_size}")


def short_attention(qkv: Tensor) -> Tensor:
    """Self-attention over the packed output of one linear layer: softmax(q k^T / sqrt(d)) v for each head (Vaswani et al., 2017).

    qkv: float32, bfloat16 or float16 [B, N, 3, H, d], N from 1 to 256, d 32 or 64; a view with a dense last axis is read in place. Returns
    [B, N, H, d] in its dtype. Sums and the softmax are float32; the probabilities are rounded to the dtype before they meet v, as in FlashAttention
    (Dao, 2023). Differentiable once. Raises TypeError or ValueError, naming the argument, for other shapes or dtypes.
    """
    sizes = axis_sizes(qkv=(qkv, "B N 3 H d"))
    check_dtype(HALVES_TOO, qkv=qkv)
    _check_sizes("qkv", sizes["N"], sizes["d"])
    if form_for(qkv) == "reference":
        return reference.short_attention(qkv)
    out, _ = _short_attention(qkv)
    return out


def short_cross_attention(q: Tensor, kv: Tensor) -> Tensor:
    """Attention of queries to a packed context: softmax(q k^T / sqrt(d)) v for each head (Vaswani et al., 2017).

    q: float32, bfloat16 or float16 [B, N, H, d], kv: of the same dtype [B, M, 2, H, d], N and M from 1 to 256, d 32 or 64; views with a dense last
    axis are read in place. Returns [B, N, H, d]; see `short_attention`. Differentiable once. Raises TypeError or ValueError, naming the argument, for
    other shapes, dtypes or devices.
    """
    sizes = axis_sizes(q=(q, "B N H d"), kv=(kv, "B M 2 H d"))
    check_dtype(HALVES_TOO, q=q, kv=kv)
    if kv.dtype != q.dtype:
        raise TypeError(f"kv: {str(q.dtype).removeprefix('torch.')} is needed, as in q, got {str(kv.dtype).removeprefix('torch.')}")
    _check_sizes("q", sizes["N"], sizes["d"])
    _check_sizes("kv", sizes["M"], sizes["d"])
    if form_for(q) == "reference":
        return reference.short_cross_attention(q, kv)
    out, _ = _short_cross_attention(q, kv)
    return out
