"""The gradients of a batch: teacher, student and backward pass, one kernel after another or replayed as one CUDA graph.

A step launches about 1,700 kernels, and from Python that takes the host some 90 ms (measured on an H100, 2026-11-26): longer than the GPU needs for
1,024 images of ViT-S. A graph is launched as a whole. Clipping, the optimiser and the moving average stay outside: they are few launches, and their
learning rate changes with every step.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from personmae.configs import UserError
from personmae.models.masked import MaskedOutput, RegionInputs
from personmae.training.precision import autocast

CaptureKind = Literal["auto", "yes", "no"]
# In which torch.compile and Triton compile, and libraries take their work space: none of that may happen while a graph is captured.
NUM_WARM_UP = 3


class CaptureChoice(NamedTuple):
    """Whether the gradients are captured as a CUDA graph, and the words that say why."""

    captured: bool
    reason: str

    def __str__(self) -> str:
        return f"{'one CUDA graph' if self.captured else 'no CUDA graph'} ({self.reason})"


def choose_capture(kind: CaptureKind, device: torch.device, world_size: int, accumulation: int) -> CaptureChoice:
    """auto: on CUDA, for one process without accumulation. Raises UserError for a yes that cannot be."""
    obstacle = None
    if device.type != "cuda":
        obstacle = f"on {device.type}"
    elif world_size > 1:
        obstacle = f"{world_size} processes exchange gradients during the backward pass"
    elif accumulation > 1:
        obstacle = f"gradients are summed over {accumulation} micro-batches"
    if kind == "yes":
        if obstacle:
            raise UserError(f"a step cannot be captured as a CUDA graph here ({obstacle}); use --cuda-graph auto")
        return CaptureChoice(True, "asked for")
    if kind == "no":
        return CaptureChoice(False, "asked for")
    if obstacle:
        return CaptureChoice(False, obstacle)
    return CaptureChoice(True, "one process on CUDA")


class BatchResult(NamedTuple):
    """What a batch gave, besides the gradients."""

    output: MaskedOutput  # without gradient
    features: Tensor | None  # [B, L, E], the teacher's tokens


# (inputs, factor of the feature loss from 0 to 1) -> result; adds to the gradients of the student's parameters
Compute = Callable[[RegionInputs, float | Tensor], BatchResult]


def compute_gradients(
    student: nn.Module, teacher: nn.Module | None, inputs: RegionInputs, ramp: float | Tensor, *, scale: float, precision: str
) -> BatchResult:
    """Teacher, student and backward pass of one batch; gradients are added to those that are there.

    student: a PersonMAE, or what wraps one. teacher: None where features are not predicted. ramp: factor of the feature loss, [] on the device of
    the inputs or a number. scale: factor of the whole loss. precision: "fp32" or "bf16".
    """
    with autocast(inputs.region_a.device, precision):
        features = None if teacher is None else teacher(inputs.region_b)
        output: MaskedOutput = student(inputs, features, ramp, scale)
    output.total.backward()
    return BatchResult(output._replace(total=output.total.detach()), features)


# Runs a function and keeps what it did on the device: -> (does it again, what the function returned, which every repetition overwrites)
Capture = Callable[[Callable[[], BatchResult]], tuple[Callable[[], None], BatchResult]]


def capture_cuda_graph(function: Callable[[], BatchResult]) -> tuple[Callable[[], None], BatchResult]:
    """See `Capture`. Raises RuntimeError where the function makes the host wait, or allocates in a way that a graph cannot hold."""
    graph = torch.cuda.CUDAGraph()
    # Loader threads may ask the driver for memory meanwhile: that is no business of the capture.
    # Of a capture that fails, the stream stays the current one: the outer context puts the right one back.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = function()
    return graph.replay, result


class CapturedGradients:
    """A `Compute` that is captured at its first batch and replayed from then on.

    All batches must have the shapes of the first. The result and the gradients lie in memory that the next batch overwrites. The parameters may be
    changed in place between batches, and their gradients set to None; gradients are not added to those that are there, but replace them.
    """

    def __init__(
        self, compute: Compute, parameters: Iterable[nn.Parameter], *, required: bool = True, capture: Capture = capture_cuda_graph
    ) -> None:
        """parameters: of the student. required: a first batch that cannot be captured is an error; else there is a warning with the reason, and
        batches are computed without a graph."""
        self._compute = compute
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._required = required
        self._capture = capture
        self._replay: Callable[[], None] | None = None
        self._given_up = False

    def __call__(self, inputs: RegionInputs, ramp: float | Tensor) -> BatchResult:
        """Raises ValueError for inputs of other shapes than the first ones, RuntimeError where the first ones cannot be captured."""
        if self._replay is None and not self._given_up:
            self._prepare(inputs)
        if self._replay is None:
            return self._compute(inputs, ramp)
        for name, held, given in zip(inputs._fields, self._inputs, inputs, strict=True):
            if held.shape != given.shape:
                raise ValueError(f"{name} has shape {list(given.shape)}; the CUDA graph was captured with {list(held.shape)}")
            held.copy_(given, non_blocking=True)
        self._ramp.copy_(ramp) if isinstance(ramp, Tensor) else self._ramp.fill_(ramp)
        self._replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return self._result

    def _prepare(self, inputs: RegionInputs) -> None:
        device = inputs.region_a.device
        self._inputs = RegionInputs(*(tensor.clone() for tensor in inputs))
        self._ramp = torch.ones((), device=device)
        if device.type == "cuda":
            # Not on the stream of the capture: what is started there while compiling would be waited for in it.
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                self._warm_up()
            torch.cuda.current_stream(device).wait_stream(side)
        else:
            self._warm_up()
        try:
            self._replay, self._result = self._capture(lambda: self._compute(self._inputs, self._ramp))
        except RuntimeError as error:
            if self._required:
                raise
            self._given_up = True
            warnings.warn(f"the step is not captured as a CUDA graph, its kernels are launched one by one: {error}", stacklevel=3)
            self._drop_gradients()
        else:
            self._gradients = [parameter.grad for parameter in self._parameters]

    def _warm_up(self) -> None:
        for _ in range(NUM_WARM_UP):
            self._compute(self._inputs, self._ramp)
            # So that the captured backward pass writes gradients of its own instead of adding to these.
            self._drop_gradients()

    def _drop_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None
