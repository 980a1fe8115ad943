"""Multi-head attention, in one of three implementations:

    xformers   memory-efficient attention, on CUDA where it is installed
    sdpa       PyTorch's scaled_dot_product_attention
    short      our kernels for at most 256 tokens, which read and write the packed output of one linear layer; only if asked for

The only file that imports xformers.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from personmae.configs import UserError
from personmae_kernels.short_attention import HEAD_SIZES, MAX_TOKENS, short_attention, short_cross_attention

AttentionKind = Literal["auto", "xformers", "sdpa", "short"]


class AttentionChoice(NamedTuple):
    """Which implementation runs, and the sentence that says why."""

    kind: Literal["xformers", "sdpa", "short"]
    reason: str


def choose_attention(kind: AttentionKind, device: torch.device, precision: str = "fp32", deterministic: bool = False) -> AttentionChoice:
    """The attention of a run. `auto` takes xformers on CUDA where it works; asking for xformers where it does not raises UserError with the cure.

    precision: "fp32" or "bf16", as the layers will run. deterministic: bit-equal runs are asked for, which xformers' backward does not give.
    """
    if kind in ("sdpa", "short"):
        return AttentionChoice(kind, "asked for")
    if device.type != "cuda":
        if kind == "xformers":
            raise UserError("xformers attention runs on CUDA only; use --attention sdpa on this device")
        return AttentionChoice("sdpa", f"PyTorch's own, on {device.type}")
    problem = _xformers_problem() or _xformers_limit(torch.cuda.get_device_capability(device), precision, deterministic)
    if problem is None:
        return AttentionChoice("xformers", "memory-efficient attention, installed and built for CUDA")
    if kind == "xformers":
        raise UserError(problem)
    return AttentionChoice("sdpa", problem)


def _xformers_limit(capability: tuple[int, int], precision: str, deterministic: bool) -> str | None:
    """Why the kernels of xformers 0.0.35 do not serve: its fp32 kernel ends at compute capability 9.0, its bf16 kernels begin at 8.0."""
    if deterministic:
        return "xformers' backward is not deterministic"
    if precision == "fp32" and capability > (9, 0):
        return f"xformers has no fp32 kernel for compute capability {capability[0]}.{capability[1]}"
    if precision == "bf16" and capability < (8, 0):
        return f"xformers has no bf16 kernel for compute capability {capability[0]}.{capability[1]}"
    return None


@functools.cache
def _xformers_problem() -> str | None:
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed (pip install -c constraints.txt xformers)"
    import xformers.ops.fmha.common as fmha

    if not fmha._built_with_cuda:
        return f"xformers' extension does not load beside torch {torch.__version__} (its wheel is built for CUDA 12)"
    return None


def attend(q: Tensor, k: Tensor, v: Tensor, kind: str) -> Tensor:
    """softmax(q k^T / sqrt(d)) v. q: [B, N, H, d], k, v: [B, M, H, d] -> [B, N, H, d]."""
    if kind == "xformers":
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(q, k, v)
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention with timm's parameter names (qkv, proj)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        if width % num_heads:
            raise UserError(f"width {width} does not divide into {num_heads} heads")
        self.num_heads, self.head_size = num_heads, width // num_heads
        self.kind: str = "sdpa"
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # [B, N, D] -> [B, N, D]
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, self.head_size)
        if self.kind == "short":
            out = short_attention(qkv)
        else:
            q, k, v = qkv.unbind(2)
            out = attend(q, k, v, self.kind)
        return self.proj(out.reshape(B, N, D))


class CrossAttention(nn.Module):
    """Attention of queries to a context."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        if width % num_heads:
            raise UserError(f"width {width} does not divide into {num_heads} heads")
        self.num_heads, self.head_size = num_heads, width // num_heads
        self.kind: str = "sdpa"
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:  # [B, N, D], [B, M, D] -> [B, N, D]
        B, N, D = x.shape
        q = self.q(x).view(B, N, self.num_heads, self.head_size)
        kv = self.kv(context).view(B, context.shape[1], 2, self.num_heads, self.head_size)
        if self.kind == "short":
            out = short_cross_attention(q, kv)
        else:
            k, v = kv.unbind(2)
            out = attend(q, k, v, self.kind)
        return self.proj(out.reshape(B, N, D))


def set_attention(module: nn.Module, kind: str, num_tokens: int | None = None) -> None:
    """Make every attention layer inside `module` use this implementation.

    num_tokens: of the longest sequence, if it is known. Raises UserError where the kernels of `short` are asked for and do not reach.
    """
    if kind == "short" and num_tokens is not None and num_tokens > MAX_TOKENS:
        raise UserError(f"attention short reaches to {MAX_TOKENS} tokens, and there are {num_tokens} here; use attention auto")
    for part in module.modules():
        if isinstance(part, Attention | CrossAttention):
            if kind == "short" and part.head_size not in HEAD_SIZES:
                sizes = " or ".join(map(str, HEAD_SIZES))
                raise UserError(f"attention short is for heads of {sizes} channels, not {part.head_size}; use attention auto")
            part.kind = kind
