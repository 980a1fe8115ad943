"""The contract of the loss operators: backward() on their total itself, unscaled.

They write the gradient in the forward pass, so what scales the loss (accumulation, ramp, a weight) must be known then: it goes into `weights`. A
total that was multiplied afterwards would give wrong gradients in silence. Here it does not: the gradient becomes NaN, and an error names the cure.
On a CPU the error comes at once. On CUDA, where looking at the factor would make the host wait, it comes from the next call of a loss operator (or
from `raise_if_scaled`), and the CUDA context lives on; while a CUDA graph is captured there are the NaN alone.
"""

from __future__ import annotations

import collections

import torch
import triton
import triton.language as tl
from torch import Tensor

from personmae_kernels.launching import ceil_div, launch

# Factors on their way to the host: (name of the operator, the copy's event, pinned copy).
_pending: collections.deque[tuple[str, torch.cuda.Event, Tensor]] = collections.deque(maxlen=256)


@triton.jit
def poison_kernel(  # type: ignore[no-untyped-def]
    gradient_ptr,  # [n] float32 or bfloat16, overwritten with NaN unless the factor is one
    factor_ptr,  # [1] float32
    n,
    BLOCK: tl.constexpr,
):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        start = tl.program_id(0).to(tl.int64) * BLOCK
        while start < n:
            offsets = start + tl.arange(0, BLOCK)
            tl.store(gradient_ptr + offsets, tl.full([BLOCK], float("nan"), tl.float32).to(gradient_ptr.dtype.element_ty), mask=offsets < n)
            start += tl.num_programs(0).to(tl.int64) * BLOCK


@torch.library.custom_op("personmae_triton::require_unit", mutates_args=("gradient",))
def require_unit(gradient: Tensor, factor: Tensor, name: str) -> None:
    """gradient: any shape, contiguous, to be returned by a backward pass; factor: [], the gradient of the total. See the head of the file."""
    if not factor.is_cuda:
        if bool(factor != 1):
            gradient.fill_(float("nan"))
            raise RuntimeError(message(name, float(factor)))
        return
    # Programs that find a one end at once: few of them, so that the launch is all it costs.
    launch(poison_kernel, (min(1024, ceil_div(gradient.numel(), 1024)),), gradient, factor, gradient.numel(), BLOCK=1024)
    if not torch.cuda.is_current_stream_capturing():
        copy = torch.empty((), dtype=factor.dtype, pin_memory=True)
        copy.copy_(factor.detach(), non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(factor.device))
        _pending.append((name, event, copy))


@require_unit.register_fake
def _(gradient: Tensor, factor: Tensor, name: str) -> None:
    return None


class _WithGradient(torch.autograd.Function):
    """A total whose gradient to `predicted` is known."""

    @staticmethod
    def forward(ctx, predicted, total, gradient, name):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(gradient)
        ctx.name = name
        return total.clone()

    @staticmethod
    def backward(ctx, factor):  # type: ignore[no-untyped-def]
        (gradient,) = ctx.saved_tensors
        # Its data: the version that autograd keeps for saved tensors is not that of a later backward pass over the same graph.
        require_unit(gradient.data, factor, ctx.name)
        return gradient, None, None, None


def with_gradient(predicted: Tensor, total: Tensor, gradient: Tensor, name: str) -> Tensor:
    """`total` [] with `gradient` as its gradient to `predicted` (both of one shape and dtype), under the contract at the head of the file.

    name: of the operator, for the error.
    """
    return _WithGradient.apply(predicted, total, gradient, name)


def raise_if_scaled() -> None:
    """Raises RuntimeError if an earlier backward pass began at a loss that had been multiplied, as far as the device has got; never waits. In
    compiled code it does nothing: the error comes from the next call outside it."""
    if torch.compiler.is_compiling() or not _pending or torch.cuda.is_current_stream_capturing():
        return
    while _pending and _pending[0][1].query():
        name, _, factor = _pending.popleft()
        if float(factor) != 1.0:
            _pending.clear()
            raise RuntimeError(message(name, float(factor)))


def message(name: str, factor: float) -> str:
    """What to say of a scaled total."""
    return (
        f"{name}: the total reached backward() with a gradient of {factor:g}, so it was multiplied or divided after the operator; "
        "put the factor into `weights`. The gradients of that backward pass are NaN."
    )
