"""Checks at the boundary of the operators: made once, before anything runs; each error names the argument."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16)
HALVES_TOO = (torch.float32, torch.bfloat16, torch.float16)
INDICES = (torch.int32, torch.int64)


def axis_sizes(**arguments: tuple[Tensor, str]) -> dict[str, int]:
    """The size of each named axis, after checking that all arguments agree on it and lie on one device.

    arguments: name = (tensor, axes), axes such as "B L D"; a number stands for itself. Returns {"B": 2, "L": 128, "D": 384}. Raises TypeError for
    what is no tensor, ValueError for a wrong number of axes, a size that another argument contradicts, or another device.

        axis_sizes(tokens=(tokens, "B L D"), visible=(visible, "B V"))
    """
    sizes: dict[str, int] = {}
    source: dict[str, str] = {}
    first: str | None = None
    for name, (tensor, axes) in arguments.items():
        letters = axes.split()
        wanted = ", ".join(letters)
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: a tensor [{wanted}] is needed, got {type(tensor).__name__}")
        if tensor.ndim != len(letters):
            raise ValueError(f"{name}: [{wanted}] is needed, got shape {list(tensor.shape)}")
        if first is None:
            first = name
        elif tensor.device != arguments[first][0].device:
            raise ValueError(f"{name}: is on {tensor.device}, but {first} is on {arguments[first][0].device}")
        for letter, size in zip(letters, tensor.shape, strict=True):
            if letter.isdigit():
                if size != int(letter):
                    raise ValueError(f"{name}: [{wanted}] is needed, got shape {list(tensor.shape)}")
            elif letter not in sizes:
                sizes[letter], source[letter] = size, name
            elif sizes[letter] != size:
                raise ValueError(f"{name}: axis {letter} of [{wanted}] is {size}, but {sizes[letter]} in {source[letter]}")
    return sizes


def check_dtype(allowed: torch.dtype | Sequence[torch.dtype], **tensors: Tensor) -> None:
    """Raises TypeError, naming the argument, for a tensor of another dtype. Where a float32 is allowed a float64 is too: the reference computes in
    it, as the oracle of the tests."""
    dtypes = (allowed,) if isinstance(allowed, torch.dtype) else tuple(allowed)
    for name, tensor in tensors.items():
        if tensor.dtype not in dtypes and not (tensor.dtype == torch.float64 and torch.float32 in dtypes):
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise TypeError(f"{name}: {names} is needed, got {str(tensor.dtype).removeprefix('torch.')}")


def check_no_gradient(**tensors: Tensor) -> None:
    """Raises ValueError, naming the argument, for a tensor that asks for a gradient which the operator does not give."""
    for name, tensor in tensors.items():
        if tensor.requires_grad:
            raise ValueError(f"{name}: the operator has no gradient for it; pass {name}.detach()")


def wide(tensor: Tensor) -> Tensor:
    """The tensor in the format that the references compute in: float64 stays, all else becomes float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
