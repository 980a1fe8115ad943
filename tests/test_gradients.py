"""One batch's gradients, replayed: the same as computed directly, for each new batch and each ramp, with the weights changed in between."""

import pytest
import torch

from personmae.configs import UserError
from personmae.models.decoders import DecoderConfig
from personmae.models.masked import MaskedConfig, PersonMAE, RegionInputs
from personmae.models.masking import MaskingConfig
from personmae.models.teacher import TeacherConfig, build_teacher
from personmae.models.vit import VitConfig
from personmae.training.ema import MovingAverage
from personmae.training.gradients import CapturedGradients, choose_capture, compute_gradients
from personmae.training.optimisers import OptimiserConfig, build_optimiser, update_weights
from tests.test_fused_convergence import draw_batch

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CONFIG = MaskedConfig(
    encoder=VitConfig(image_size=(64, 32), patch_px=8, width=64, depth=2, num_heads=2),
    masking=MaskingConfig(ratio=0.5),
    pixel_decoder=DecoderConfig(depth=1, width=32, num_heads=1),
    feature_decoder=DecoderConfig(depth=1, width=32, num_heads=1),
)


def batch(number, size=3, device=CPU):
    return RegionInputs(*(tensor.to(device) for tensor in draw_batch(CONFIG, size, number)))


class Recorder:
    """Stands for a CUDA graph where there is none: what is replayed is computed again, into the memory of the first results."""

    def __init__(self, parameters):
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.num_replays = 0

    def __call__(self, function):
        assert all(parameter.grad is None for parameter in self.parameters), "a backward pass would add to these in each replay"
        held = function()
        gradients = [parameter.grad for parameter in self.parameters]
        for tensor in [*held.output, held.features, *gradients]:
            tensor.fill_(float("nan"))

        def replay():
            self.num_replays += 1
            for parameter in self.parameters:
                parameter.grad = None
            again = function()
            new = [*again.output, again.features, *(parameter.grad for parameter in self.parameters)]
            for tensor, value in zip([*held.output, held.features, *gradients], new, strict=True):
                tensor.copy_(value)

        return replay, held


def train(device, captured, capture=None, num_steps=4, precision="fp32"):
    """(losses, features of the last batch, weights)"""
    model = PersonMAE(CONFIG, seed=1).to(device)
    teacher = build_teacher(TeacherConfig(), model.encoder).to(device)
    average = MovingAverage(teacher.encoder, model.encoder)
    optimiser = build_optimiser(model, OptimiserConfig(), average)

    def compute(inputs, ramp):
        return compute_gradients(model, teacher, inputs, ramp, scale=1.0, precision=precision)

    gradients = compute
    if captured:
        gradients = CapturedGradients(compute, model.parameters(), **({"capture": capture(model.parameters())} if capture else {}))
    losses = []
    for step in range(num_steps):
        output, features = gradients(batch(step, device=device), step / num_steps)
        norm = update_weights(optimiser, model, average, 1e-3, 0.9, 1.0)
        losses.append([output.total.item(), norm.item()])
    return torch.tensor(losses), features.clone(), model.state_dict()


@pytest.mark.parametrize(
    ("device", "capture"), [pytest.param(CPU, Recorder, id="stand-in"), pytest.param(CUDA, None, id="graph", marks=pytest.mark.gpu)]
)
def test_replayed_steps_are_those_computed_directly(device, capture):
    expected, features, weights = train(device, captured=False)
    losses, others, same_weights = train(device, captured=True, capture=capture)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(others, features, rtol=1e-4, atol=1e-5)
    for name, value in weights.items():
        torch.testing.assert_close(same_weights[name], value, rtol=1e-3, atol=1e-5, msg=name)
    assert losses[0, 0] != losses[1, 0]


def test_it_is_captured_once_and_replayed_for_every_batch():
    recorders = []

    def capture(parameters):
        recorders.append(Recorder(parameters))
        return recorders[-1]

    train(CPU, captured=True, capture=capture, num_steps=3)
    assert [recorder.num_replays for recorder in recorders] == [3]


def test_another_shape_is_named():
    model = PersonMAE(CONFIG, seed=1)
    teacher = build_teacher(TeacherConfig(), model.encoder)

    def compute(inputs, ramp):
        return compute_gradients(model, teacher, inputs, ramp, scale=1.0, precision="fp32")

    gradients = CapturedGradients(compute, model.parameters(), capture=Recorder(model.parameters()))
    gradients(batch(0, size=3), 1.0)
    with pytest.raises(ValueError, match=r"region_a has shape \[2, .*captured with \[3, "):
        gradients(batch(1, size=2), 1.0)


def test_what_cannot_be_captured_is_said_or_raised():
    model = PersonMAE(CONFIG, seed=1)
    teacher = build_teacher(TeacherConfig(), model.encoder)

    def compute(inputs, ramp):
        return compute_gradients(model, teacher, inputs, ramp, scale=1.0, precision="fp32")

    def refuse(function):
        function()
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        CapturedGradients(compute, model.parameters(), capture=refuse)(batch(0), 1.0)
    gradients = CapturedGradients(compute, model.parameters(), required=False, capture=refuse)
    for parameter in model.parameters():
        parameter.grad = None
    with pytest.warns(UserWarning, match="launched one by one: operation not permitted"):
        output, _ = gradients(batch(0), 1.0)
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    expected, _ = compute(batch(0), 1.0)
    assert torch.equal(output.total, expected.total)
    # Not those of the failed attempt on top.
    assert all(torch.equal(value, model.get_parameter(name).grad) for name, value in found.items())
    model.zero_grad(set_to_none=True)
    gradients(batch(1), 1.0)  # no second attempt, no second warning


@pytest.mark.parametrize(
    ("kind", "device", "world_size", "accumulation", "captured", "reason"),
    [
        ("auto", CUDA, 1, 1, True, "one process on CUDA"),
        ("auto", CUDA, 2, 1, False, "2 processes"),
        ("auto", CUDA, 1, 4, False, "4 micro-batches"),
        ("auto", CPU, 1, 1, False, "on cpu"),
        ("yes", CUDA, 1, 1, True, "asked for"),
        ("no", CUDA, 1, 1, False, "asked for"),
    ],
)
def test_the_steps_of_one_process_are_captured(kind, device, world_size, accumulation, captured, reason):
    choice = choose_capture(kind, device, world_size, accumulation)
    assert choice.captured == captured
    assert reason in choice.reason
    assert reason in str(choice)


@pytest.mark.parametrize(("device", "world_size", "accumulation"), [(CPU, 1, 1), (CUDA, 2, 1), (CUDA, 1, 2)])
def test_a_yes_that_cannot_be_is_an_error(device, world_size, accumulation):
    with pytest.raises(UserError, match=r"cannot be captured.*--cuda-graph auto"):
        choose_capture("yes", device, world_size, accumulation)
