"""How a model is spread over the processes of a run, and put together again where one process needs all of it.

    ddp    every process holds the whole model, its teacher and its moments, and gradients are exchanged: the default
    fsdp   every process holds a part of each tensor; a block's weights are gathered when it runs (PyTorch's fully_shard, "FSDP2")

Both compute the same, and a checkpoint is the same whole state: a run may go on with the other.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from personmae.configs import UserError
from personmae.models.vit import Blocks, VisionTransformer

# Importing these takes a second, and most runs divide nothing.
if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

ParallelKind = Literal["ddp", "fsdp"]


def choose_parallel(kind: ParallelKind, world_size: int, optimiser: str) -> str:
    """The choice in words. optimiser: its kind. Raises UserError for an optimiser that cannot work on parts of tensors."""
    if world_size == 1:
        return "none (one process)"
    if kind == "fsdp" and optimiser != "adamw":
        raise UserError(f"optimiser {optimiser} needs whole tensors, which --parallel fsdp divides; use --optimiser.kind adamw, or --parallel ddp")
    return "ddp (each process has the whole state)" if kind == "ddp" else f"fsdp (each process has 1/{world_size} of the state)"


def is_divided(module: nn.Module) -> TypeGuard[FSDPModule]:
    """Whether `shard` has divided this very module."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def is_part(value: Any) -> TypeGuard[DTensor]:
    """Whether it is the part of a divided tensor that this process holds."""
    tensor = sys.modules.get("torch.distributed.tensor")
    return tensor is not None and isinstance(value, tensor.DTensor)


def shard(*modules: nn.Module) -> None:
    """Divides the parameters of modules among the processes, block by block. Before anything takes hold of the parameters."""
    from torch.distributed.fsdp import fully_shard

    for module in modules:
        for part in module.modules():
            if isinstance(part, Blocks):
                for block in part:
                    fully_shard(block, reshard_after_forward=True)
        # The teacher has no backward pass after which its own part would be divided again, so always after the forward one.
        fully_shard(module, reshard_after_forward=True)


def exchange_gradients(model: nn.Module) -> nn.Module:
    """The model as the step calls it: itself where it is divided, else in what exchanges its gradients."""
    divided: bool = is_divided(model)
    return model if divided else DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


@contextlib.contextmanager
def synchronised(model: nn.Module, last: bool) -> Iterator[None]:
    """Gradients are exchanged between processes in the last micro-batch of a step alone."""
    if is_divided(model):
        model.set_requires_gradient_sync(last)
    with model.no_sync() if isinstance(model, DistributedDataParallel) and not last else contextlib.nullcontext():
        yield


def whole_state(state: Any, keep: bool) -> Any:
    """A nested state with every divided tensor whole, on the host; every process has to call it. keep: False gives None in their place.

    One tensor after the other, so that no device ever holds more than one of them.
    """
    if is_part(state):
        whole = state.full_tensor()
        return whole.cpu() if keep else None
    if isinstance(state, Mapping):
        return {key: whole_state(value, keep) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(whole_state(value, keep) for value in state)
    return state


def divided_moments(saved: Mapping[str, Any], optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimiser as saved, its moments divided as the parameters of this optimiser are."""
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]

    def divided(value: Any, parameter: Tensor) -> Any:
        if not (isinstance(value, Tensor) and value.ndim and is_part(parameter)):
            return value
        from torch.distributed.tensor import distribute_tensor

        # Every process has read the same file: nothing is sent.
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)

    entries = {
        index: {name: divided(value, parameters[index]) for name, value in entry.items()} if index < len(parameters) else entry
        for index, entry in saved["state"].items()
    }
    return {**saved, "state": entries}


@contextlib.contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Inside, each process has the whole module, so that other methods than forward may be called, once and by all processes alike.

    Nothing is done where it is not divided.
    """
    parts = [part for part in module.modules() if is_divided(part)]
    for part in parts:
        part.unshard()
    yield
    for part in parts:
        part.reshard()


def whole_encoder(encoder: VisionTransformer) -> VisionTransformer:
    """The encoder with whole weights, itself or a copy on the host; every process has to call it."""
    state = encoder.state_dict()
    if not any(is_part(tensor) for tensor in state.values()):
        return encoder
    whole = VisionTransformer(encoder.config)
    whole.load_state_dict(whole_state(state, keep=True))
    return whole
