"""The ways that `throughput.py` times, each as a function that trains on one batch.

    eager     plain PyTorch in the manner of the public MAE code (`_throughput_peers`), and so its loop: masks drawn on the device, the loss looked at
              in each step, the device waited for at its end, AdamW over groups of tensors
    sdpa      the same with F.scaled_dot_product_attention
    compile   the second under torch.compile in its default mode
    ours      what `personmae/pretrain.py` does in a step, with the masks that it draws

All clip the gradients and move the teacher's average.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from benchmarks._throughput_peers import PlainMAE
from personmae import pretrain
from personmae.data.loaders import RegionBatch
from personmae.models.masked import RegionInputs
from personmae.recipes.pretraining import PretrainConfig
from personmae.training.ema import MovingAverage
from personmae.training.optimisers import build_optimiser, decay_groups, update_weights
from personmae.training.precision import autocast
from personmae_kernels.launching import use_operators

Way = Literal["eager", "sdpa", "compile", "ours"]
WAYS: tuple[Way, ...] = get_args(Way)
# By how much the losses of two ways may differ on the same weights and images.
ALLOWED = {"fp32": 1e-4, "bf16": 1e-2}
RATE, MOMENTUM = 1e-4, 0.99


@dataclass(frozen=True)
class Beginning:
    """What all ways of a preset begin with."""

    state: dict[str, Tensor]  # of the model, on the CPU
    inputs: RegionInputs  # a few images, on the device
    loss: float  # of them with these weights, by our model in plain PyTorch


@dataclass(frozen=True)
class Trainer:
    """One way to train, ready to go."""

    step: Callable[[RegionBatch], None]  # on a batch whose regions are on the device
    description: str


def begin(config: PretrainConfig, batch: RegionBatch, device: torch.device, precision: str) -> Beginning:
    """Weights, and their loss on a small batch."""
    model, teacher = pretrain.build_models(config)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = pretrain.to_inputs(batch, config, device)
    try:
        use_operators("reference")
        with torch.no_grad(), autocast(device, precision):
            features = teacher.to(device)(inputs.region_b) if config.model.losses != "pixels" else None
            loss = model.to(device)(inputs, features).total.item()
    finally:
        use_operators(None)
    return Beginning(state, inputs, loss)


def make_trainer(way: Way, config: PretrainConfig, beginning: Beginning, device: torch.device, precision: str) -> Trainer:
    """A way to train from this beginning. Raises ValueError if its loss is another one: what computes something else is not worth timing."""
    make = train_ours if way == "ours" else train_peer
    return make(way, config, beginning, device, precision)


def train_ours(way: Way, config: PretrainConfig, beginning: Beginning, device: torch.device, precision: str) -> Trainer:
    """The step of pretrain.py."""
    model, teacher = pretrain.build_models(config)
    model.load_state_dict(beginning.state)
    placed = pretrain.place_models(model, teacher, config, device, precision)
    average = MovingAverage(teacher.encoder, model.encoder)
    optimiser = build_optimiser(model, config.optimiser, average)
    inputs = beginning.inputs
    with torch.no_grad(), autocast(device, precision):
        features = teacher(inputs.region_b) if config.model.losses != "pixels" else None
        loss = model(inputs, features).total.item()
    check_loss(loss, beginning.loss, precision)
    # After the check: what is compiled is compiled for a batch size.
    compiled = pretrain.compile_blocks(model, teacher, config, device)
    capture, gradients = pretrain.prepare_gradients(model, teacher, config, device, precision, world_size=1)

    def step(batch: RegionBatch) -> None:
        gradients(pretrain.to_inputs(batch, config, device), 1.0)
        update_weights(optimiser, model, average, RATE, MOMENTUM, config.optimiser.clip_norm)

    return Trainer(step, f"{placed}; {compiled}; {capture}")


def train_peer(way: Way, config: PretrainConfig, beginning: Beginning, device: torch.device, precision: str) -> Trainer:
    """The step of the public code. Raises UserError for a model that it does not have."""
    model = PlainMAE(config.model, beginning.state, with_sdpa=way != "eager").to(device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings = config.optimiser
    groups = decay_groups(model, settings.weight_decay)
    optimiser = torch.optim.AdamW(groups, lr=RATE, betas=settings.betas, eps=settings.eps, foreach=device.type == "cuda")
    average = None if model.teacher is None else MovingAverage(model.teacher, model.encoder)
    forward = torch.compile(model) if way == "compile" else model
    num_cells = config.model.encoder.grid[0] * config.model.encoder.grid[1]

    def step(batch: RegionBatch) -> None:
        boxes, flips = batch.boxes.to(device, non_blocking=True), batch.flips.to(device, non_blocking=True)
        noise = torch.rand(len(batch), num_cells, device=device)
        with autocast(device, precision):
            loss = forward(batch.region_a, batch.region_b, boxes, flips, noise)
        loss.item()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm or float("inf"))
        optimiser.step()
        optimiser.zero_grad()
        if average is not None:
            average.update(MOMENTUM)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    inputs = beginning.inputs
    with torch.no_grad(), autocast(device, precision):
        # As noise, the mask itself: what is hidden has more of it.
        loss = model(inputs.region_a, inputs.region_b, inputs.boxes, inputs.flips, inputs.mask.float()).item()
    check_loss(loss, beginning.loss, precision)
    return Trainer(step, {"eager": "softmax between two products", "sdpa": "SDPA", "compile": "SDPA under torch.compile"}[way])


def check_loss(loss: float, expected: float, precision: str) -> None:
    """Raises ValueError if they are not the same."""
    if not abs(loss - expected) <= ALLOWED[precision] * abs(expected):
        raise ValueError(f"the loss is {loss:.6g}, that of our model in plain PyTorch {expected:.6g}: this is not the same training")
