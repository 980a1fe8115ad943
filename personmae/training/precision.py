"""How a step is run: its number format, whether it is equal to the bit, and when gradients are exchanged."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from personmae.configs import UserError


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """bf16 autocast, or nothing for fp32."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


@contextlib.contextmanager
def synchronised(model: nn.Module, last: bool) -> Iterator[None]:
    """Gradients are exchanged between processes in the last micro-batch of a step alone."""
    with contextlib.nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync():
        yield


def make_deterministic(device: torch.device) -> None:
    """Bit-equal runs on a GPU, at the price of speed."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def check_finite(line: Mapping[str, float], step: int) -> None:
    """Raises UserError if the loss or the gradient has ceased to be a number: such weights must not be saved."""
    for name in ("loss", "gradient_norm"):
        if not math.isfinite(line[name]):
            raise UserError(
                f"{name} is {line[name]} at step {step}; the checkpoints before are kept. "
                "Begin another run with a lower --optimiser.learning-rate, or with --precision fp32"
            )
