"""Multi-head attention: xformers' memory-efficient kernels on CUDA where installed, else PyTorch's scaled_dot_product_attention.

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

AttentionKind = Literal["auto", "xformers", "sdpa"]


class AttentionChoice(NamedTuple):
    """Which implementation runs, and the sentence that says why."""

    kind: Literal["xformers", "sdpa"]
    reason: str


def choose_attention(kind: AttentionKind, device: torch.device, precision: str = "fp32", deterministic: bool = False) -> AttentionChoice:
    """The attention of a run. `auto` takes xformers on CUDA where it works; asking for xformers where it does not raises UserError with the cure.

    precision: "fp32" or "bf16", as the layers will run. deterministic: bit-equal runs are asked for, which xformers' backward does not give.
    """
    if kind == "sdpa":
        return AttentionChoice("sdpa", "asked for")
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
        self.num_heads = num_heads
        self.kind: str = "sdpa"
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # [B, N, D] -> [B, N, D]
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, D // self.num_heads).unbind(2)
        return self.proj(attend(q, k, v, self.kind).reshape(B, N, D))


class CrossAttention(nn.Module):
    """Attention of queries to a context."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        if width % num_heads:
            raise UserError(f"width {width} does not divide into {num_heads} heads")
        self.num_heads = num_heads
        self.kind: str = "sdpa"
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:  # [B, N, D], [B, M, D] -> [B, N, D]
        B, N, D = x.shape
        d = D // self.num_heads
        q = self.q(x).view(B, N, self.num_heads, d)
        k, v = self.kv(context).view(B, context.shape[1], 2, self.num_heads, d).unbind(2)
        return self.proj(attend(q, k, v, self.kind).reshape(B, N, D))


def set_attention(module: nn.Module, kind: str) -> None:
    """Make every attention layer inside `module` use this implementation."""
    for part in module.modules():
        if isinstance(part, Attention | CrossAttention):
            part.kind = kind
