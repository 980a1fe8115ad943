"""Which form of an operator runs, and the one place where Triton kernels are launched.

By default tensors on CUDA go to the Triton kernels; all others to the compiled operator where there is one and it is built, else to the reference in
plain PyTorch. PERSONMAE_OPERATORS in the environment, or `use_operators`, forces a form:

    reference   plain PyTorch, everywhere
    triton      the Triton kernels. On a CPU they run in Triton's interpreter, which takes TRITON_INTERPRET=1 before Python starts: slow, for tests
    compiled    the C++ and CUDA operators of csrc/, for those operators that have them; the others as by default
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from personmae_kernels import compiled, interpreter

Form = Literal["reference", "triton", "compiled"]
FORMS: tuple[Form, ...] = get_args(Form)
_forced: Form | None = None


class Launch(NamedTuple):
    """One launch of a kernel, as `launch` was called."""

    kernel: Any  # triton's JITFunction (InterpretedFunction in the interpreter)
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]  # in the order of the kernel's parameters
    constants: dict[str, Any]  # the tl.constexpr parameters by name
    num_warps: int
    num_stages: int


_records: list[Launch] | None = None
_skip = False


def use_operators(form: Form | None) -> None:
    """Forces a form for the rest of the process; None goes back to PERSONMAE_OPERATORS, or without it to the device's own."""
    global _forced
    if form not in (*FORMS, None):
        raise ValueError(f"form: reference, triton, compiled or None is needed, got {form!r}")
    _forced = form


def form_for(tensor: Tensor, has_compiled: bool = False, has_triton: bool = True) -> Form:
    """The form of an operator for this tensor.

    has_compiled: the operator has a compiled form for the tensor's device. has_triton: it has a Triton form; where not, one that is asked for counts
    as nothing asked for. Raises ValueError for a PERSONMAE_OPERATORS that is none of the forms,
    RuntimeError for a form that is asked for and cannot run, TypeError for float64, which the Triton kernels do not compute in.
    """
    asked = _forced or os.environ.get("PERSONMAE_OPERATORS") or ""
    if asked == "triton" and not has_triton:
        asked = ""
    if asked not in ("", *FORMS):
        raise ValueError(f"PERSONMAE_OPERATORS is {asked!r}; it may be reference, triton or compiled")
    if asked == "reference":
        return "reference"
    if asked == "compiled" and has_compiled:
        if not compiled.available(tensor.is_cuda):
            raise RuntimeError(f"PERSONMAE_OPERATORS is compiled, but {compiled.why_missing(tensor.is_cuda)}")
        return "compiled"
    if asked != "triton" and not tensor.is_cuda:
        return "compiled" if has_compiled and compiled.available() else "reference"
    if not (tensor.is_cuda or interpreter.wanted() or _skip):
        raise RuntimeError(
            f"the Triton operators cannot run on {tensor.device}: unset PERSONMAE_OPERATORS for plain PyTorch, or set TRITON_INTERPRET=1 "
            "before Python starts to run them in Triton's interpreter (slow, for tests)"
        )
    if tensor.dtype == torch.float64:
        raise TypeError("the Triton operators do not compute in float64; PERSONMAE_OPERATORS=reference does")
    return "triton"


def runs_compiled(tensor: Tensor) -> bool:
    """Whether C++ runs, of an operator that has a C++ form for the CPU and is plain PyTorch elsewhere."""
    return tensor.is_cpu and form_for(tensor, has_compiled=True, has_triton=False) == "compiled"


def describe_operators(device: torch.device) -> str:
    """The form that operators run in on this device, and why, in one sentence. Raises as form_for does."""
    asked = _forced or os.environ.get("PERSONMAE_OPERATORS")
    reason = f"{'asked for' if _forced else 'PERSONMAE_OPERATORS'}" if asked else f"on {device.type}"
    form = form_for(torch.empty(0, device=device), has_compiled=True)
    if form == "reference" and not asked:
        reason += f"; {compiled.why_missing()}"
    where = {"cpu": "C++ where an operator has it, else plain PyTorch", "cuda": "CUDA C++ where an operator has it, else Triton"}
    names = {"reference": "plain PyTorch", "triton": "Triton", "compiled": where.get(device.type, "")}
    return f"{names[form]} ({reason})"


def ceil_div(dividend: int, divisor: int) -> int:
    """The quotient, rounded up. Triton's own `cdiv` takes the host ten times as long, and so does its `next_power_of_2`."""
    return -(-dividend // divisor)


def next_power_of_2(number: int) -> int:
    """The least power of two that is not less than a positive number."""
    return 1 << (number - 1).bit_length()


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int = 4, num_stages: int = 2, **constants: Any) -> None:
    """Launches kernel[grid] on the device of its first tensor argument; nothing for an empty grid.

    arguments: tensors, integers, floats and None, in the order of the kernel's parameters. constants: its tl.constexpr parameters.
    """
    if 0 in grid:
        return
    if _records is not None:
        _records.append(Launch(kernel, grid, arguments, constants, num_warps, num_stages))
    if _skip:
        return
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    if device.type == "cuda":
        with torch.cuda.device(device):
            kernel[grid](*arguments, num_warps=num_warps, num_stages=num_stages, **constants)
    else:
        interpreter.mend()
        kernel[grid](*arguments, **constants)


@contextlib.contextmanager
def recorded(run: bool = True) -> Iterator[list[Launch]]:
    """The launches inside the context, in order. run=False only notes them, on any device: to compile kernels ahead of time as they would be
    launched, without a GPU; the results of the operators are then meaningless."""
    global _records, _skip
    before = (_records, _skip)
    _records, _skip = [], not run
    try:
        yield _records
    finally:
        _records, _skip = before
