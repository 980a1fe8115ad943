"""How a step is run: its number format, and whether it is equal to the bit."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping
from typing import Any

import torch

from personmae.configs import UserError


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """bf16 autocast, or nothing for fp32."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


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
