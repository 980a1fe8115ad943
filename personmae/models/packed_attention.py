"""Attention inside sequences of different lengths that lie one after the other, without padding.

Apart from the other attention because torch.compiler.disable imports torch._dynamo, which takes a second or two, and nothing else in the package
needs that.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from personmae.models.attention import attend, choose_attention


@torch.compiler.disable
def packed_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], kind: str = "auto") -> Tensor:
    """Self-attention inside each of several sequences that lie one after the other. q, k, v: [total, H, d] -> [total, H, d].

    lengths: tokens of each sequence; their sum is total. kind: as `attend`, or "auto" for the choice of `choose_attention`. With xformers it is one
    launch, and the mask of a tuple of lengths is built at its first use, which must not be inside a CUDA graph capture, and kept for ever: a graph
    holds its address. Elsewhere it is one attention for each sequence. torch.compile calls it as it is. Raises ValueError for lengths that do not
    fit.
    """
    if any(length < 1 for length in lengths) or sum(lengths) != len(q):
        raise ValueError(f"lengths {list(lengths)} must be positive and sum to the {len(q)} tokens")
    if kind == "auto":
        kind = choose_attention("auto", q.device, "fp32" if q.dtype == torch.float32 else "bf16", torch.are_deterministic_algorithms_enabled()).kind
    if kind == "xformers":
        from xformers.ops import memory_efficient_attention

        mask = block_diagonal_mask(tuple(lengths), q.device)
        return memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask)[0]
    parts = zip(*(tensor[None].split(list(lengths), dim=1) for tensor in (q, k, v)), strict=True)
    return torch.cat([attend(one_q, one_k, one_v, kind)[0] for one_q, one_k, one_v in parts])


@functools.cache
def block_diagonal_mask(lengths: tuple[int, ...], device: torch.device) -> object:
    """xformers' mask of sequences of these lengths. Raises RuntimeError inside a CUDA graph capture, where it cannot be built."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("the mask of these lengths is new: run packed_attention with them once before the CUDA graph is captured")
    return BlockDiagonalMask.from_seqlens(list(lengths), device=device)
