"""The tables on the device that let one launch of adamw_ema's kernel work on many tensors: where they lie, and who does which part of them.

They are made anew only when a tensor has moved, and uploaded without waiting.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from personmae_kernels.launching import ceil_div

BLOCK = 1024  # elements of one tensor, for one program
_KEPT_PLANS = 8  # gradients come to lie in a few places in turn


class Group(NamedTuple):
    """The tensors of one launch."""

    half_gradient: bool
    aligned: bool  # all addresses to 16 bytes, and as many elements as fill 16-byte words
    blocks: Tensor  # int32 [num_programs, 2]


class Plan(NamedTuple):
    """The tables of one set of tensors, on their device."""

    tensors: Tensor  # int64 [num_tensors, 8]
    decays: Tensor  # float32 [num_tensors]
    groups: list[Group]
    num_bytes: int  # of all the tables


# The plans of the last sets of tensors, by all that stands in them: a plan found here is right, whatever has become of the tensors.
_plans: collections.OrderedDict[tuple[object, ...], Plan] = collections.OrderedDict()
# What CUDA graphs read when they are replayed, for the rest of the process; and pinned memory by its size for the next capture, during which none
# can be had.
_captured: list[tuple[Plan, Tensor]] = []
_spare: dict[int, Tensor] = {}


def plan_for(
    lists: Sequence[Sequence[Tensor]],  # of the columns 0 to 6 of the table; empty: none
    decays: Sequence[float],
    device: torch.device,
) -> Plan:
    """The plan of these tensors, from the last calls if it is among them, else made and uploaded without waiting."""
    parameters, gradients = lists[0], lists[1]
    zeros = [0] * len(parameters)
    columns = [[tensor.data_ptr() for tensor in tensors] if tensors else zeros for tensors in lists]
    rows = tuple(zip(*columns, [tensor.numel() for tensor in parameters], strict=True))
    half = tuple(gradient.dtype == torch.bfloat16 for gradient in gradients)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return make_plan(rows, half, decays, device, captured=True)
    # A plan is uploaded on a stream, so it is that stream's alone.
    key = (rows, half, tuple(decays), device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)
    if key in _plans:
        _plans.move_to_end(key)
    else:
        _plans[key] = make_plan(rows, half, decays, device)
        if len(_plans) > _KEPT_PLANS:
            _plans.popitem(last=False)
    plan = _plans[key]
    if device.type == "cuda" and plan.num_bytes not in _spare:
        _spare[plan.num_bytes] = torch.empty(plan.num_bytes, dtype=torch.uint8, pin_memory=True)
    return plan


def make_plan(
    rows: tuple[tuple[int, ...], ...], half: tuple[bool, ...], decays: Sequence[float], device: torch.device, captured: bool = False
) -> Plan:
    """Makes the tables and uploads them in one piece. captured: in a CUDA graph, which uploads them anew at each replay; see `_captured`."""
    members: dict[tuple[bool, bool], list[int]] = {}
    for i, (*addresses, num_elements) in enumerate(rows):
        aligned = num_elements % 8 == 0 and not any(address % 16 for address in addresses)
        members.setdefault((half[i], aligned), []).append(i)
    num_blocks = torch.tensor([ceil_div(row[-1], BLOCK) for row in rows])
    tables = [torch.tensor(rows, dtype=torch.int64), torch.tensor(decays, dtype=torch.float32)]
    for indices in members.values():
        num = num_blocks[indices]
        first = (num.cumsum(0) - num).repeat_interleave(num)
        tables.append(torch.stack([torch.tensor(indices).repeat_interleave(num), torch.arange(len(first)) - first], dim=1).int())

    num_bytes = [table.numel() * table.element_size() for table in tables]
    padded = [ceil_div(size, 16) * 16 for size in num_bytes]
    host = _spare.pop(sum(padded), None) if captured else torch.empty(sum(padded), dtype=torch.uint8, pin_memory=device.type == "cuda")
    if host is None:
        raise RuntimeError("adamw_ema_: before each capture of a CUDA graph, take a step with as many tensors of the same sizes")
    for table, part, size in zip(tables, host.split(padded), num_bytes, strict=True):
        part[:size].view(table.dtype).view(table.shape).copy_(table)
    uploaded = host.to(device, non_blocking=True).split(padded)
    tensors, weights, *blocks = (
        part[:size].view(table.dtype).view(table.shape) for table, part, size in zip(tables, uploaded, num_bytes, strict=True)
    )
    plan = Plan(tensors, weights, [Group(*member, blocks=table) for member, table in zip(members, blocks, strict=True)], len(host))
    if captured:
        _captured.append((plan, host))
    return plan
