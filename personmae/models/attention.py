"""Multi-head attention, in one of these implementations:

    xformers         memory-efficient attention: on CUDA where it is installed
    sdpa             PyTorch's scaled_dot_product_attention, which chooses among its own kernels
    sdpa-flash, sdpa-efficient, sdpa-cudnn   the same, held to one of those kernels, on CUDA
    short            our kernels for at most 256 tokens, which read and write the packed output of one linear layer

`auto` takes xformers on CUDA and PyTorch's elsewhere, but for what `MEASURED` says. Only this file and packed_attention import xformers.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from personmae.configs import UserError
from personmae.models.fusing import worth_fusing
from personmae_kernels.short_attention import HEAD_SIZES, MAX_TOKENS, short_attention, short_cross_attention

AttentionKind = Literal["auto", "xformers", "sdpa", "sdpa-flash", "sdpa-efficient", "sdpa-cudnn", "short"]
SDPA_BACKENDS = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
}


class Measured(NamedTuple):
    """Where an implementation was faster than xformers, forward and backward together, and the committed file with the measurement."""

    kind: str
    max_tokens: int  # queries and keys: up to so many
    head_sizes: tuple[int, ...]
    precision: str  # "bf16" or "fp32"
    capability: tuple[int, int]  # of the GPU
    result: str


# What replaces xformers under `auto`.
MEASURED: tuple[Measured, ...] = (Measured("short", 129, (32, 64), "bf16", (9, 0), "benchmarks/results/operators-h100.json"),)

# Up to this version cuDNN's backward reads beyond its inputs where a sequence is no multiple of 128 tokens (pytorch#169849, #171627).
LAST_BROKEN_CUDNN = 91500


class AttentionChoice(NamedTuple):
    """Which implementation runs, and the sentence that says why."""

    kind: str
    reason: str
    replaced: Mapping[int, tuple[int, str]] = MappingProxyType({})  # head size -> (tokens, the kind that runs up to so many of them instead)


def choose_attention(kind: AttentionKind, device: torch.device, precision: str = "fp32", deterministic: bool = False) -> AttentionChoice:
    """The attention of a run. `auto` takes xformers on CUDA where it works, and what `MEASURED` holds for this device where that is faster.

    precision: "fp32" or "bf16", as the layers will run. deterministic: bit-equal runs are asked for, which xformers' backward does not give.
    On CUDA a cuDNN with a broken attention is kept from PyTorch for the rest of the process. Raises UserError with the cure where what is asked for
    does not work.
    """
    if device.type != "cuda":
        if kind in ("sdpa", "short"):
            return AttentionChoice(kind, "asked for")
        if kind != "auto":
            raise UserError(f"attention {kind} runs on CUDA only; use --attention sdpa on this device")
        return AttentionChoice("sdpa", f"PyTorch's own, on {device.type}")
    broken = _broken_cudnn()
    if broken:
        torch.backends.cuda.enable_cudnn_sdp(False)
    note = f"; cuDNN's attention is switched off: {broken}" if broken else ""
    if kind in SDPA_BACKENDS:
        problem = _backend_limit(kind, precision, deterministic)
        if problem:
            raise UserError(problem)
    if kind not in ("auto", "xformers"):
        return AttentionChoice(kind, f"asked for{note}")
    problem = xformers_problem() or _xformers_limit(torch.cuda.get_device_capability(device), precision, deterministic)
    if problem and kind == "xformers":
        raise UserError(problem)
    base = AttentionChoice("sdpa", problem + note) if problem else AttentionChoice("xformers", f"installed and built for CUDA{note}")
    return base if kind == "xformers" or deterministic else _replace_measured(base, device, precision)


def _replace_measured(base: AttentionChoice, device: torch.device, precision: str) -> AttentionChoice:
    here = (precision, torch.cuda.get_device_capability(device))
    usable = [
        found
        for found in MEASURED
        if (found.precision, found.capability) == here and (found.kind not in SDPA_BACKENDS or not _backend_limit(found.kind, precision, False))
    ]
    if not usable:
        return base
    said = ", ".join(
        f"{found.kind} up to {found.max_tokens} tokens with heads of {' or '.join(map(str, found.head_sizes))} ({found.result})" for found in usable
    )
    replaced = {size: (found.max_tokens, found.kind) for found in usable for size in found.head_sizes}
    return AttentionChoice(base.kind, f"{base.reason}; measured faster here: {said}", replaced)


def _backend_limit(kind: str, precision: str, deterministic: bool) -> str | None:
    """Why a kernel of PyTorch does not serve, with the cure."""
    if precision == "fp32" and kind != "sdpa-efficient":
        return f"attention {kind} has no fp32 kernel; use --attention sdpa or --precision bf16"
    if kind != "sdpa-cudnn":
        return None
    if deterministic:
        return "cuDNN's attention is not deterministic; use --attention sdpa"
    broken = _broken_cudnn()
    return f"{broken}; use --attention auto" if broken else None


def _broken_cudnn() -> str | None:
    version = torch.backends.cudnn.version()
    if version is None or version > LAST_BROKEN_CUDNN:
        return None
    return f"cuDNN {version // 10000}.{version // 100 % 100}.{version % 100} reads beyond its inputs there, as all up to 9.15.0"


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
def xformers_problem() -> str | None:
    """Why xformers does not serve, with the cure; None where it does. Imports it."""
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed (pip install -c constraints.txt xformers)"
    missing = _load_cuda_12_runtime()
    import xformers.ops.fmha.common as fmha

    if not fmha._built_with_cuda:
        return missing or f"xformers' extension does not load beside torch {torch.__version__} (its wheel is built for CUDA 12)"
    return None


def _load_cuda_12_runtime() -> str | None:
    """Beside a torch for CUDA 13, load libcudart.so.12 for the extension in xformers' wheel, before xformers is imported; why not, if that fails.

    The extension holds none of the attention kernels, which are PyTorch's own, but without it xformers refuses them all.
    """
    cuda = torch.version.cuda
    if cuda is None or int(cuda.split(".")[0]) <= 12:
        return None
    needs = f"xformers' wheel is built for CUDA 12, torch {torch.__version__} for CUDA {cuda}"
    try:
        wheel = importlib.metadata.distribution("nvidia-cuda-runtime-cu12")
    except importlib.metadata.PackageNotFoundError:
        return f"{needs}, and libcudart.so.12 is missing (pip install nvidia-cuda-runtime-cu12==12.8.90)"
    library = wheel.locate_file("nvidia/cuda_runtime/lib/libcudart.so.12")
    try:
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        return f"{needs}, and {library} does not load: {error} (pip install --force-reinstall nvidia-cuda-runtime-cu12==12.8.90)"
    return None


def attend(q: Tensor, k: Tensor, v: Tensor, kind: str) -> Tensor:
    """softmax(q k^T / sqrt(d)) v. q: [B, N, H, d], k, v: [B, M, H, d] -> [B, N, H, d]. kind: "xformers", "sdpa" or one of `SDPA_BACKENDS`."""
    # torch.compile cannot trace xformers' fp32 backward (a mix of CPU and CUDA arguments); its kernel is the one that PyTorch calls efficient.
    if kind == "xformers" and q.dtype == torch.float32 and torch.compiler.is_compiling():
        kind = "sdpa-efficient"
    if kind == "xformers":
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(q, k, v)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if kind == "sdpa":
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    with sdpa_kernel(SDPA_BACKENDS[kind]):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class _Heads(nn.Module):
    """What self-attention and cross-attention share."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        if width % num_heads:
            raise UserError(f"width {width} does not divide into {num_heads} heads")
        self.num_heads, self.head_size = num_heads, width // num_heads
        self.kind: str = "sdpa"
        self.replaced: tuple[int, str] | None = None  # up to so many tokens, this kind instead
        self.fuse_small = False  # small inputs too get what replaces it; see `personmae.models.fusing`

    def kind_for(self, queries: int, keys: int) -> str:
        """The implementation for so many tokens."""
        return self.replaced[1] if self.replaced and max(queries, keys) <= self.replaced[0] else self.kind


class Attention(_Heads):
    """Self-attention with timm's parameter names (qkv, proj)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__(width, num_heads)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # [B, N, D] -> [B, N, D]
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, self.head_size)
        kind = self.kind_for(N, N) if self.fuse_small or worth_fusing(x) else self.kind
        if kind == "short":
            out = short_attention(qkv)
        else:
            q, k, v = qkv.unbind(2)
            out = attend(q, k, v, kind)
        return self.proj(out.reshape(B, N, D))


class CrossAttention(_Heads):
    """Attention of queries to a context."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__(width, num_heads)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:  # [B, N, D], [B, M, D] -> [B, N, D]
        B, N, D = x.shape
        M = context.shape[1]
        q = self.q(x).view(B, N, self.num_heads, self.head_size)
        kv = self.kv(context).view(B, M, 2, self.num_heads, self.head_size)
        kind = self.kind_for(N, M)
        if kind == "short":
            out = short_cross_attention(q, kv)
        else:
            k, v = kv.unbind(2)
            out = attend(q, k, v, kind)
        return self.proj(out.reshape(B, N, D))


def set_attention(module: nn.Module, choice: AttentionChoice | str, num_tokens: int | None = None) -> None:
    """Make every attention layer inside `module` use this implementation; what a choice replaces it by, where the tokens and heads are those.

    num_tokens: of the longest sequence, if it is known. Raises UserError where the kernels of `short` are asked for and do not reach.
    """
    if isinstance(choice, str):
        choice = AttentionChoice(choice, "")
    kind = choice.kind
    if kind == "short" and num_tokens is not None and num_tokens > MAX_TOKENS:
        raise UserError(f"attention short reaches to {MAX_TOKENS} tokens, and there are {num_tokens} here; use attention auto")
    for part in module.modules():
        if isinstance(part, _Heads):
            if kind == "short" and part.head_size not in HEAD_SIZES:
                sizes = " or ".join(map(str, HEAD_SIZES))
                raise UserError(f"attention short is for heads of {sizes} channels, not {part.head_size}; use attention auto")
            part.kind = kind
            part.replaced = choice.replaced.get(part.head_size)
