"""Our Triton operators: known to PyTorch by name, and called past it where it has no need to look on.

A custom operator costs the host several times what an operator of PyTorch's own costs, mostly in layers of Python that serve tracing. In a training
loop that is not compiled, as other people's are, that is longer than the kernels run. So in plain eager code the body is called directly, with
torch.autograd.Function where a gradient is asked for; under torch.compile, export, tracing, dispatch modes and for subclasses of tensors it is the
registered operator. Both have the same body and the same backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


class Operator:
    """A function of tensors, without side effects, as an operator of PyTorch. Its outputs are new tensors.

    registered: the operator as PyTorch knows it.
    """

    def __init__(self, name: str, body: Callable[..., Any]) -> None:
        self.registered = torch.library.custom_op(name, body, mutates_args=())
        self._body = body
        self._function: type[torch.autograd.Function] | None = None

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Shapes and dtypes of the results, as torch.library has it."""
        self.registered.register_fake(fake)
        return fake

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """The gradient, as torch.library has it: setup_context(ctx, inputs, output), backward(ctx, *gradients)."""
        self.registered.register_autograd(backward, setup_context=setup_context)
        body = self._body

        class Function(torch.autograd.Function):
            # One method, as of old: with a setup_context of its own PyTorch looks at the signature in every call, which costs more than all the rest.
            @staticmethod
            def forward(ctx: Any, *inputs: Any) -> Any:
                output = body(*inputs)
                setup_context(ctx, inputs, output)
                return output

        Function.backward = staticmethod(backward)  # type: ignore[assignment]
        self._function = Function

    def __call__(self, *inputs: Any) -> Any:
        """The results for these inputs, given in the order of the body's parameters."""
        if torch.compiler.is_compiling() or _watched():
            return self.registered(*inputs)
        needs_gradient = False
        for value in inputs:
            if isinstance(value, Tensor):
                if type(value) is not Tensor and type(value) is not torch.nn.Parameter:
                    return self.registered(*inputs)
                needs_gradient = needs_gradient or value.requires_grad
        if not (needs_gradient and torch.is_grad_enabled()):
            return self._body(*inputs)
        # Without a gradient the registered operator says so.
        return self.registered(*inputs) if self._function is None else self._function.apply(*inputs)


def _watched() -> bool:
    """Whether something wants to see the operators that run: a dispatch mode, a tracer, torch.func."""
    return is_in_torch_dispatch_mode() or torch._C._are_functorch_transforms_active() or torch.jit.is_tracing()


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Makes a function with annotated parameters an operator of this name, NAMESPACE::NAME."""
    return functools.partial(Operator, name)
