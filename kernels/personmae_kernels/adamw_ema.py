"""One step of AdamW (Loshchilov & Hutter, 2019), of the moving average of the parameters and of bfloat16 copies of both, for all tensors at once.

    g  = gradient_scale * gradient
    p  = p * (1 - learning_rate * weight_decay)
    m  = beta1 m + (1 - beta1) g,      v = beta2 v + (1 - beta2) g^2
    p  = p - learning_rate * (m / correction1) / (sqrt(v / correction2) + eps)
    average = ema_momentum * average + (1 - ema_momentum) * p,      copy = bfloat16(p),      average_copy = bfloat16(average)

A table on the device says where the tensors lie, another which BLOCK of which tensor a program takes: one launch for all of one gradient format
(and one more for tensors that no 16-byte words can read). Bytes a parameter: 28 with float32 gradients, 40 with an average and both copies, each
number read and written once. What changes from step to step is read from the device, so that a CUDA graph can replay the step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from personmae_kernels import reference
from personmae_kernels.adamw_tables import BLOCK, plan_for
from personmae_kernels.checks import axis_sizes, check_dtype
from personmae_kernels.launching import form_for, launch


@triton.jit
def address_of(row_ptr, column: tl.constexpr, dtype: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The pointer in a column of a row of the table; ALIGNED: to 16 bytes."""
    pointer = tl.load(row_ptr + column).to(tl.pointer_type(dtype), bitcast=True)
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def adamw_ema_kernel(  # type: ignore[no-untyped-def]
    tensors_ptr,  # int64 [num_tensors, 8]: addresses of parameter, gradient, moments, average, its and the parameter's copy; number of elements
    decays_ptr,  # float32 [num_tensors]
    blocks_ptr,  # int32 [num_programs, 2]: tensor, which BLOCK of it
    hyper_ptr,  # float32 [8], reference.ADAMW_HYPER
    HALF_GRADIENT: tl.constexpr,
    HAS_AVERAGE: tl.constexpr,
    HAS_COPY: tl.constexpr,
    HAS_AVERAGE_COPY: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = blocks_ptr + tl.program_id(0).to(tl.int64) * 2
    tensor = tl.load(block)
    row = tensors_ptr + tensor.to(tl.int64) * 8
    num_elements = tl.load(row + 7)
    if ALIGNED:
        num_elements = tl.multiple_of(num_elements, 8)
    offsets = tl.load(block + 1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < num_elements

    rate, beta1, beta2, eps = tl.load(hyper_ptr), tl.load(hyper_ptr + 1), tl.load(hyper_ptr + 2), tl.load(hyper_ptr + 3)
    correction1, correction2 = tl.load(hyper_ptr + 4), tl.load(hyper_ptr + 5)
    kept = 1.0 - rate * tl.load(decays_ptr + tensor)

    # All loads come before the first store, which the compiler must take for a write to any of them.
    parameter_ptr = address_of(row, 0, tl.float32, ALIGNED) + offsets
    gradient_ptr = address_of(row, 1, tl.bfloat16 if HALF_GRADIENT else tl.float32, ALIGNED) + offsets
    first_ptr = address_of(row, 2, tl.float32, ALIGNED) + offsets
    second_ptr = address_of(row, 3, tl.float32, ALIGNED) + offsets
    p = tl.load(parameter_ptr, mask=inside, other=0.0)
    g = tl.load(gradient_ptr, mask=inside, other=0.0).to(tl.float32) * tl.load(hyper_ptr + 6)
    m = tl.load(first_ptr, mask=inside, other=0.0)
    v = tl.load(second_ptr, mask=inside, other=0.0)
    if HAS_AVERAGE:
        average_ptr = address_of(row, 4, tl.float32, ALIGNED) + offsets
        average = tl.load(average_ptr, mask=inside, other=0.0)
        momentum = tl.load(hyper_ptr + 7)

    m = beta1 * m + (1.0 - beta1) * g
    v = beta2 * v + (1.0 - beta2) * (g * g)
    p = p * kept - rate * (m / correction1) / (tl.sqrt(v / correction2) + eps)
    tl.store(first_ptr, m, mask=inside)
    tl.store(second_ptr, v, mask=inside)
    tl.store(parameter_ptr, p, mask=inside)
    if HAS_COPY:
        tl.store(address_of(row, 5, tl.bfloat16, ALIGNED) + offsets, p.to(tl.bfloat16), mask=inside)
    if HAS_AVERAGE:
        average = momentum * average + (1.0 - momentum) * p
        tl.store(average_ptr, average, mask=inside)
        if HAS_AVERAGE_COPY:
            tl.store(address_of(row, 6, tl.bfloat16, ALIGNED) + offsets, average.to(tl.bfloat16), mask=inside)


@torch.library.custom_op(
    "personmae_triton::adamw_ema_",
    mutates_args=("parameters", "first_moments", "second_moments", "averages", "copies", "average_copies"),
)
def _adamw_ema(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first_moments: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    hyper: Tensor,
    weight_decays: Sequence[float],
    averages: Sequence[Tensor],
    copies: Sequence[Tensor],
    average_copies: Sequence[Tensor],
) -> None:
    lists = (parameters, gradients, first_moments, second_moments, averages, copies, average_copies)
    plan = plan_for(lists, weight_decays, hyper.device)
    for group in plan.groups:
        launch(
            adamw_ema_kernel,
            (len(group.blocks),),
            plan.tensors,
            plan.decays,
            group.blocks,
            hyper,
            HALF_GRADIENT=group.half_gradient,
            HAS_AVERAGE=bool(averages),
            HAS_COPY=bool(copies),
            HAS_AVERAGE_COPY=bool(average_copies),
            ALIGNED=group.aligned,
            BLOCK=BLOCK,
        )


@_adamw_ema.register_fake
def _(*_: object) -> None:
    return None


def check_tensors(name: str, tensors: Sequence[Tensor], parameters: Sequence[Tensor], dtypes: tuple[torch.dtype, ...], hyper: Tensor) -> None:
    """Raises TypeError or ValueError, naming the tensor, unless the list is alike to the parameters in length and shapes, of one of the dtypes, on
    the device of hyper, and contiguous."""
    if len(tensors) != len(parameters):
        raise ValueError(f"{name}: {len(parameters)} tensors are needed, as many as parameters, got {len(tensors)}")
    for i, (tensor, parameter) in enumerate(zip(tensors, parameters, strict=True)):
        if tensor.shape != parameter.shape:
            raise ValueError(f"{name}[{i}]: shape {list(parameter.shape)} of the parameter is needed, got {list(tensor.shape)}")
        if tensor.dtype not in dtypes:
            check_dtype(dtypes, **{f"{name}[{i}]": tensor})
        if tensor.device != hyper.device:
            raise ValueError(f"{name}[{i}]: is on {tensor.device}, but hyper is on {hyper.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name}[{i}]: a contiguous tensor is needed, got strides {list(tensor.stride())}")


@torch.no_grad()
def adamw_ema_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first_moments: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    hyper: Tensor,
    weight_decays: Sequence[float],
    averages: Sequence[Tensor] = (),
    copies: Sequence[Tensor] = (),
    average_copies: Sequence[Tensor] = (),
) -> None:
    """One step of AdamW (Loshchilov & Hutter, 2019), of the moving average of the parameters, and of their bfloat16 copies, in place; the formula
    stands at the head of the file.

    parameters, first_moments, second_moments: float32, contiguous, alike in shape. gradients: float32 or bfloat16. hyper: float32 [8] on their
    device, from `adamw_hyper`. weight_decays: one for each parameter. averages (float32), copies and average_copies (bfloat16): each one for each
    parameter, or empty. No tensor may share memory with another. Raises TypeError or ValueError, naming the argument, for other lengths, shapes,
    dtypes, devices or strides; RuntimeError in the capture of a CUDA graph that no step went before.
    """
    axis_sizes(hyper=(hyper, "8"))
    check_dtype(torch.float32, hyper=hyper)
    floats = (torch.float32,)
    check_tensors("parameters", parameters, parameters, floats, hyper)
    if not all(gradient.is_contiguous() for gradient in gradients):
        gradients = [gradient.contiguous() for gradient in gradients]
    check_tensors("gradients", gradients, parameters, (torch.float32, torch.bfloat16), hyper)
    check_tensors("first_moments", first_moments, parameters, floats, hyper)
    check_tensors("second_moments", second_moments, parameters, floats, hyper)
    if len(weight_decays) != len(parameters):
        raise ValueError(f"weight_decays: {len(parameters)} values are needed, as many as parameters, got {len(weight_decays)}")
    if averages:
        check_tensors("averages", averages, parameters, floats, hyper)
    if copies:
        check_tensors("copies", copies, parameters, (torch.bfloat16,), hyper)
    if average_copies:
        check_tensors("average_copies", average_copies, parameters, (torch.bfloat16,), hyper)
        if not averages:
            raise ValueError("average_copies: are copies of averages, which are not given")
    if not parameters:
        return
    arguments = (parameters, gradients, first_moments, second_moments, hyper, weight_decays, averages, copies, average_copies)
    form = form_for(parameters[0], has_compiled=parameters[0].is_cuda)
    if form == "reference":
        reference.adamw_ema_(*arguments)
    elif form == "compiled":
        torch.ops.personmae.adamw_ema_(*arguments)
        if not torch.compiler.is_compiling():  # C++ does not tell autograd what it has changed
            torch.autograd.graph.increment_version([*parameters, *first_moments, *second_moments, *averages, *copies, *average_copies])
    else:
        _adamw_ema(*arguments)


def adamw_hyper(
    learning_rate: float,
    betas: tuple[float, float],
    eps: float,
    step: int,
    gradient_scale: float | Tensor = 1.0,
    ema_momentum: float = 0.0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """What `adamw_ema_` reads in step number `step`, the first being 1: float32 [8] on the device, in the order of reference.ADAMW_HYPER.

    betas, eps: of AdamW. gradient_scale: what gradients are multiplied by, such as min(1, largest norm / norm) to clip them; a tensor [] on the
    device never makes the host wait. ema_momentum: of the moving average; 0 copies the parameters. The corrections are computed in float64 from the
    betas as float32 holds them, which are those that the step works with: 1 - 0.999 in float32 is off by 1e-5. Raises ValueError for a step below 1
    or a momentum that is not in [0, 1].
    """
    if step < 1:
        raise ValueError(f"step: 1 or more is needed, got {step}")
    if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1):
        raise ValueError(f"betas: values in [0, 1) are needed, got {betas}")
    if not 0 <= ema_momentum <= 1:
        raise ValueError(f"ema_momentum: 0 to 1 is needed, got {ema_momentum}")
    beta1, beta2 = torch.tensor(betas, dtype=torch.float32).tolist()
    scale = 1.0 if isinstance(gradient_scale, Tensor) else gradient_scale
    values = [learning_rate, beta1, beta2, eps, 1 - beta1**step, 1 - beta2**step, scale, ema_momentum]
    device = torch.device(device)
    hyper = torch.tensor(values, dtype=torch.float32, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    if isinstance(gradient_scale, Tensor):
        hyper[6].copy_(gradient_scale)
    return hyper
