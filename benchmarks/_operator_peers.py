"""What an operator is timed against: plain PyTorch, torch.compile of it, and the libraries that have an equivalent, where they are installed."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks._operator_cases import FILES
from personmae.models.attention import xformers_problem
from personmae_kernels import compiled, reference
from personmae_kernels.block_masks import block_masks, block_masks_reference
from personmae_kernels.launching import Form

Arguments = dict[str, Any]
# Takes the arguments of an operator, gives what is timed.
Bind = Callable[[Arguments], Callable[[], Any]]


class Version(NamedTuple):
    """One way to compute an operator."""

    name: str
    bind: Bind
    form: Form | None = None  # the form of ours; None: a peer


def public_function(operator: str) -> Callable[..., Any]:
    """The operator as users call it; of block_masks the form that takes its seeds on the device."""
    module = importlib.import_module(f"personmae_kernels.{FILES.get(operator, operator)}")
    return getattr(module, {"block_masks": "block_masks_of"}.get(operator, operator))


def versions(operator: str, device: torch.device, can_compile: bool = True) -> list[Version]:
    """Ours first, then plain PyTorch ("eager"), torch.compile of it, libraries. On a CPU without Triton and without libraries."""
    found = []
    if device.type == "cuda":
        found.append(Version("triton", _plain(public_function(operator)), "triton"))
    if has_compiled(operator, device):
        found.append(Version("compiled", _masks(block_masks) if operator == "block_masks" else _plain(public_function(operator)), "compiled"))
    twin = _masks(block_masks_reference) if operator == "block_masks" else _plain(getattr(reference, operator, None))
    found.append(Version("eager", twin))
    if can_compile:
        found.append(Version("torch.compile", _compiled(getattr(reference, operator, None))))
    return [*found, *(libraries(operator)[0] if device.type == "cuda" else [])]


def has_compiled(operator: str, device: torch.device) -> bool:
    """Whether csrc/ has this operator for this device and is built."""
    if not compiled.available():
        return False
    # The masks are always made on the host, where they are made in C++.
    key = "CPU" if operator == "block_masks" else device.type.upper()
    names = {f"personmae::{operator}", f"personmae::{operator.rstrip('_')}"}
    return any(torch._C._dispatch_has_kernel(name) and torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for name in names)


def libraries(operator: str) -> tuple[list[Version], list[str]]:
    """(equivalents on CUDA, sentences on those that are not installed)"""
    found, missing = list(_OF_TORCH.get(operator, [])), []
    for name, (why_missing, equivalents) in _LIBRARIES.items():
        if operator in equivalents:
            if problem := why_missing():
                missing.append(f"{name}: {problem}")
            else:
                found.append(Version(name, equivalents[operator]))
    return found, missing


def _plain(function: Callable[..., Any] | None) -> Bind:
    assert function is not None
    return lambda arguments: functools.partial(function, **arguments)


def _compiled(function: Callable[..., Any] | None) -> Bind:
    assert function is not None

    def bind(arguments: Arguments) -> Callable[[], Any]:
        torch._dynamo.reset()
        # A backward pass is timed many times over one forward pass.
        torch._functorch.config.donated_buffer = False
        return functools.partial(torch.compile(function, dynamic=False), **arguments)

    return bind


def _masks(function: Callable[..., Any]) -> Bind:
    """Masks made on the host, and taken to the device of the seeds."""

    def bind(arguments: Arguments) -> Callable[[], Any]:
        seeds, grid, num_visible = arguments["seeds"], arguments["grid"], arguments["num_visible"]
        return lambda: torch.from_numpy(function(seeds.cpu().numpy().view(np.uint64), grid, num_visible)).to(seeds.device)

    return bind


def _sdpa(operator: str, backend: SDPBackend) -> Bind:
    def bind(arguments: Arguments) -> Callable[[], Any]:
        def call() -> Tensor:
            with sdpa_kernel(backend):
                return getattr(reference, operator)(**arguments)

        return call

    return bind


def _layer_norm_of_torch(arguments: Arguments) -> Callable[[], Any]:
    return _add_then(lambda x, weight, bias, eps: F.layer_norm(x, (x.shape[-1],), weight.to(x.dtype), bias.to(x.dtype), eps), arguments)


def _add_then(normalise: Callable[[Tensor, Tensor, Tensor, float], Tensor], arguments: Arguments) -> Callable[[], Any]:
    """Addition in the stream's format, then a LayerNorm of some library."""
    stream, branch, weight, bias = (arguments[name] for name in ("stream", "branch", "weight", "bias"))
    scale, row_scale = arguments.get("branch_scale"), arguments.get("row_scale")

    def call() -> tuple[Tensor, Tensor]:
        added = branch if scale is None else branch * scale.to(branch.dtype)
        added = added if row_scale is None else added * row_scale.to(branch.dtype)[:, None, None]
        total = stream + added
        return total, normalise(total, weight, bias, 1e-6)

    return call


def _liger_layer_norm(arguments: Arguments) -> Callable[[], Any]:
    function = importlib.import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction
    return _add_then(lambda x, weight, bias, eps: function.apply(x, weight, bias, eps), arguments)


def _apex_layer_norm(arguments: Arguments) -> Callable[[], Any]:
    function = importlib.import_module("apex.normalization.fused_layer_norm").fused_layer_norm_affine
    return _add_then(lambda x, weight, bias, eps: function(x, weight.to(x.dtype), bias.to(x.dtype), (x.shape[-1],), eps), arguments)


def _xformers_self_attention(arguments: Arguments) -> Callable[[], Any]:
    attention = importlib.import_module("xformers.ops").memory_efficient_attention
    return lambda: attention(*arguments["qkv"].unbind(2))


def _xformers_cross_attention(arguments: Arguments) -> Callable[[], Any]:
    attention = importlib.import_module("xformers.ops").memory_efficient_attention
    return lambda: attention(arguments["q"], *arguments["kv"].unbind(2))


def _xformers_select(arguments: Arguments) -> Callable[[], Any]:
    """Its rows are numbered through the batch; where there are positions they are added afterwards."""
    select = importlib.import_module("xformers.ops").index_select_cat
    tokens, visible, positions = arguments["tokens"], arguments["visible"], arguments["positions"]
    B, L, D = tokens.shape
    offsets = torch.arange(B, device=tokens.device)[:, None] * L

    def call() -> Tensor:
        chosen = select([tokens.reshape(B * L, D)], [(visible + offsets).flatten()]).reshape(B, -1, D)
        return chosen if positions is None else (chosen + F.embedding(visible, positions)).to(tokens.dtype)

    return call


def _optimiser_and_average(make: Callable[..., Any], arguments: Arguments) -> Callable[[], Any]:
    """A step of AdamW, then averages and copies with PyTorch's multi-tensor functions."""
    parameters, decays = arguments["parameters"], arguments["weight_decays"]
    for parameter, gradient in zip(parameters, arguments["gradients"], strict=True):
        parameter.grad = gradient.to(parameter.dtype)
    groups = [
        {"params": [p for p, own in zip(parameters, decays, strict=True) if own == decay], "weight_decay": decay} for decay in sorted(set(decays))
    ]
    optimiser = make(groups, lr=1e-4, betas=(0.9, 0.95), eps=1e-8)

    @torch.no_grad()
    def call() -> None:
        optimiser.step()
        torch._foreach_lerp_(arguments["averages"], parameters, 0.01)
        torch._foreach_copy_(arguments["copies"], parameters)
        torch._foreach_copy_(arguments["average_copies"], arguments["averages"])

    return call


def _fused_adamw(arguments: Arguments) -> Callable[[], Any]:
    return _optimiser_and_average(functools.partial(torch.optim.AdamW, fused=True), arguments)


def _foreach_adamw(arguments: Arguments) -> Callable[[], Any]:
    return _optimiser_and_average(functools.partial(torch.optim.AdamW, foreach=True), arguments)


def _apex_adamw(arguments: Arguments) -> Callable[[], Any]:
    return _optimiser_and_average(functools.partial(importlib.import_module("apex.optimizers").FusedAdam, adam_w_mode=True), arguments)


def _no_liger() -> str:
    return "" if importlib.util.find_spec("liger_kernel") else "not installed (pip install liger-kernel)"


def _no_apex() -> str:
    """PyPI's `apex` is a toolkit for web sites. NVIDIA's has a folder `normalization`; looked for without importing either."""
    found = importlib.util.find_spec("apex")
    if found is None:
        return "not installed (it is built from github.com/NVIDIA/apex)"
    if not any((Path(folder) / "normalization").is_dir() for folder in found.submodule_search_locations or []):
        return "the `apex` that is installed is another package, PyPI's; NVIDIA's is built from github.com/NVIDIA/apex"
    if importlib.util.find_spec("fused_layer_norm_cuda") is None or importlib.util.find_spec("amp_C") is None:
        return "installed without its CUDA extensions; build it with them (github.com/NVIDIA/apex)"
    return ""


_BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
# Equivalents within PyTorch itself.
_OF_TORCH: dict[str, list[Version]] = {
    "add_layer_norm": [Version("F.layer_norm", _layer_norm_of_torch)],
    "adamw_ema_": [Version("AdamW(fused), foreach", _fused_adamw), Version("AdamW(foreach), foreach", _foreach_adamw)],
    **{
        operator: [Version(f"sdpa {name}", _sdpa(operator, backend)) for name, backend in _BACKENDS.items()]
        for operator in ("short_attention", "short_cross_attention")
    },
}
# Library: why it is missing (empty or None if it is there), and the operators that it has an equivalent of.
_LIBRARIES: dict[str, tuple[Callable[[], str | None], dict[str, Bind]]] = {
    "xformers": (
        xformers_problem,
        {"short_attention": _xformers_self_attention, "short_cross_attention": _xformers_cross_attention, "gather_visible": _xformers_select},
    ),
    "liger": (_no_liger, {"add_layer_norm": _liger_layer_norm}),
    "apex": (_no_apex, {"add_layer_norm": _apex_layer_norm, "adamw_ema_": _apex_adamw}),
}
