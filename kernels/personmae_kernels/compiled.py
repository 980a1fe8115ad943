"""Loads the compiled operators (personmae_kernels._C, built by setup.py from csrc/) at first use, and says what is missing with its cure.

Loading registers the operators with PyTorch: afterwards they are torch.ops.personmae.<name>. What C++ does not say of them, their shapes under
torch.compile and their gradients, is registered here right after that.
"""

from __future__ import annotations

import functools
import importlib
import threading
from typing import Any

# torch comes first: the binary needs its libraries in the process.
import torch
from torch import Tensor

CURE = "`python setup.py build_ext --inplace` builds it; it takes a C++ compiler and Python's headers (Debian: apt-get install g++ python3-dev)"
CUDA_CURE = "put nvcc (CUDA 12.1 or newer) on the path or into PERSONMAE_NVCC, then `python setup.py build_ext --inplace`"
_loading = threading.Lock()


def available(cuda: bool = False) -> bool:
    """Whether the compiled operators are there, with `cuda` those for tensors on CUDA; loads them on the first call."""
    return not why_missing(cuda)


# A constant to torch.compile, for tracing through the import of a binary would end the graph. This is all that torch.compiler.assume_constant_result
# does, but calling that imports torch._dynamo, a second or more in every program.
available._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def why_missing(cuda: bool = False) -> str:
    """Why the compiled operators (with `cuda`: those for tensors on CUDA) are not used, with the cure, in one sentence; empty if they are there.
    Loads them on the first call."""
    with _loading:
        reason = load()
    if not reason and cuda and not torch._C._dispatch_has_kernel_for_dispatch_key("personmae::adamw_ema_", "CUDA"):
        return f"the compiled operators (personmae_kernels._C) are built without CUDA: {CUDA_CURE}"
    return reason


def load() -> str:
    """Loads the binary and completes its operators. Returns why that fails, or an empty string."""
    try:
        importlib.import_module("personmae_kernels._C")
        complete()
    except ModuleNotFoundError:
        return f"the compiled operators (personmae_kernels._C) are not built: {CURE}"
    except (ImportError, OSError, RuntimeError) as error:
        return f"the compiled operators (personmae_kernels._C) do not load with torch {torch.__version__} ({error}): {CURE}"
    return ""


@functools.cache
def complete() -> None:
    """Registers, once in a process, the shapes of the operators' results and the gradients of gather_visible and scatter_visible."""

    @torch.library.register_fake("personmae::block_masks")
    def _(seeds: Tensor, shapes: Tensor, ranges: Tensor, rows: int, columns: int, num_visible: int, num_tries: int) -> Tensor:
        return seeds.new_empty((seeds.shape[0], rows * columns), dtype=torch.bool)

    @torch.library.register_fake("personmae::gather_visible")
    def _(tokens: Tensor, visible: Tensor) -> Tensor:
        return tokens.new_empty((visible.shape[0], visible.shape[1], tokens.shape[2]))

    @torch.library.register_fake("personmae::scatter_visible")
    def _(gradient: Tensor, visible: Tensor, num_tokens: int) -> Tensor:
        return gradient.new_empty((visible.shape[0], num_tokens, gradient.shape[2]))

    @torch.library.register_fake("personmae::pair_distances")
    def _(query: Tensor, query_scale: Tensor, gallery: Tensor, gallery_scale: Tensor, rows: Tensor, columns: Tensor, cosine: bool) -> Tensor:
        return query_scale.new_empty(rows.shape)

    for name in ("adamw_ema_", "area_resize_", "place_distances_", "place_products_"):
        torch.library.register_fake(f"personmae::{name}", lambda *_: None)

    # Each is the other's gradient, as often as one likes.
    def keep_for_gather(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        tokens, visible = inputs
        ctx.save_for_backward(visible)
        ctx.num_tokens = tokens.shape[1]

    def gather_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return torch.ops.personmae.scatter_visible(gradient, *ctx.saved_tensors, ctx.num_tokens), None

    def keep_for_scatter(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    def scatter_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return torch.ops.personmae.gather_visible(gradient, *ctx.saved_tensors), None, None

    torch.library.register_autograd("personmae::gather_visible", gather_backward, setup_context=keep_for_gather)
    torch.library.register_autograd("personmae::scatter_visible", scatter_backward, setup_context=keep_for_scatter)
