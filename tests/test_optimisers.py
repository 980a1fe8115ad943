"""AdamW against its formula, decay groups, clipping."""

import numpy as np
import pytest
import torch

from personmae.models.decoders import DecoderConfig
from personmae.models.masked import MaskedConfig, PersonMAE
from personmae.models.vit import VisionTransformer, VitConfig
from personmae.training.ema import MovingAverage
from personmae.training.optimisers import (
    AdamWEma,
    OptimiserConfig,
    build_optimiser,
    clip_gradients,
    decay_groups,
    peak_learning_rate,
    set_learning_rate,
    update_weights,
)

DECODER = DecoderConfig(depth=1, width=16, num_heads=2)
ENCODER = VitConfig(image_size=(64, 32), patch_px=8, width=32, depth=1, num_heads=2)
MODEL = MaskedConfig(encoder=ENCODER, pixel_decoder=DECODER, feature_decoder=DECODER)


def test_matrices_decay_and_vectors_and_tokens_do_not():
    model = PersonMAE(MODEL)
    names = {id(p): n for n, p in model.named_parameters()}
    decayed, free = ([names[id(p)] for p in group["params"]] for group in decay_groups(model, 0.05))
    assert sorted(decayed + free) == sorted(names.values())
    assert "encoder.blocks.0.attn.qkv.weight" in decayed
    assert "encoder.patch_embed.proj.weight" in decayed
    assert {"encoder.cls_token", "pixel_decoder.mask_token", "encoder.norm.weight", "encoder.blocks.0.mlp.fc1.bias"} <= set(free)
    assert all(n.endswith("weight") and "norm" not in n for n in decayed)


def test_adamw_follows_its_formula():
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 3)
    config = OptimiserConfig(weight_decay=0.1, betas=(0.8, 0.9))
    optimiser = build_optimiser(layer, config)
    weight = layer.weight.detach().double().numpy().copy()
    first, second = np.zeros_like(weight), np.zeros_like(weight)
    for step in range(1, 5):
        gradient = torch.randn(3, 4)
        layer.weight.grad, layer.bias.grad = gradient, torch.zeros(3)
        set_learning_rate(optimiser, 0.01 * step)
        optimiser.step()
        g = gradient.double().numpy()
        first, second = 0.8 * first + 0.2 * g, 0.9 * second + 0.1 * g * g
        weight -= 0.01 * step * (0.1 * weight + first / (1 - 0.8**step) / (np.sqrt(second / (1 - 0.9**step)) + 1e-8))
    assert np.allclose(layer.weight.detach().numpy(), weight, atol=1e-6)


def test_clipping_bounds_the_norm_and_reports_it():
    layer = torch.nn.Linear(4, 3)
    layer.weight.grad, layer.bias.grad = torch.full((3, 4), 2.0), torch.full((3,), 1.0)
    norm = np.sqrt(12 * 4 + 3)
    assert clip_gradients(layer, None).item() == pytest.approx(norm)
    assert layer.weight.grad[0, 0] == 2.0
    assert clip_gradients(layer, 0.5).item() == pytest.approx(norm)
    clipped = layer.weight.grad.square().sum() + layer.bias.grad.square().sum()
    assert clipped.sqrt().item() == pytest.approx(0.5, rel=1e-4)


def test_learning_rate_scales_with_the_batch():
    assert peak_learning_rate(OptimiserConfig(learning_rate=1.5e-4), 4096) == pytest.approx(2.4e-3)


def train(kind, num_steps, clip_norm, model=None, saved=None, start=0):
    """(model, teacher's encoder, optimiser, norms) after some steps with drawn gradients; one parameter never gets any."""
    model = model or PersonMAE(MODEL, seed=3)
    teacher = VisionTransformer(ENCODER)
    teacher.load_state_dict(saved["teacher"] if saved else PersonMAE(MODEL, seed=4).encoder.state_dict())
    average = MovingAverage(teacher, model.encoder)
    optimiser = build_optimiser(model, OptimiserConfig(kind=kind, weight_decay=0.1), average)
    if saved:
        optimiser.load_state_dict(saved["optimiser"])
    norms = []
    for step in range(start, start + num_steps):
        generator = torch.Generator().manual_seed(step)
        for name, parameter in model.named_parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = None if name == "encoder.cls_token" else gradient
        norms.append(update_weights(optimiser, model, average, 1e-3 * (step + 1), 0.9 + 0.01 * step, clip_norm).item())
        assert all(parameter.grad is None for parameter in model.parameters())
    return model, teacher, optimiser, norms


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_one_pass_gives_what_step_and_average_give(clip_norm):
    (model, teacher, _, norms), (other, other_teacher, other_optimiser, other_norms) = (
        train(kind, 4, clip_norm) for kind in ("adamw", "adamw-ema")
    )
    assert isinstance(other_optimiser, AdamWEma)
    assert other_norms == pytest.approx(norms, rel=1e-6)
    for one, two in ((model, other), (teacher, other_teacher)):
        for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6), name
    assert not torch.equal(teacher.cls_token, PersonMAE(MODEL, seed=4).encoder.cls_token)


@pytest.mark.parametrize("first_gradient", [1, 3])
def test_each_parameter_counts_its_own_steps(first_gradient):
    weights = []
    for kind in ("adamw", "adamw-ema"):
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 3)
        optimiser = build_optimiser(layer, OptimiserConfig(kind=kind))
        assert update_weights(optimiser, layer, None, 0.1, 0.9, None) == 0  # no gradient at all
        for step in range(1, 5):
            layer.weight.grad = torch.randn(3, 4)
            layer.bias.grad = torch.randn(3) if step >= first_gradient else None
            update_weights(optimiser, layer, None, 0.1, 0.9, None)
        weights.append(torch.cat([layer.weight.flatten(), layer.bias]).detach())
    assert torch.allclose(*weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("first", "second"), [("adamw", "adamw-ema"), ("adamw-ema", "adamw")])
def test_a_run_goes_on_with_the_other_kind(first, second):
    straight, straight_teacher, _, _ = train(first, 4, 0.5)
    model, teacher, optimiser, _ = train(first, 2, 0.5)
    saved = {"teacher": teacher.state_dict(), "optimiser": optimiser.state_dict()}
    model, teacher, _, _ = train(second, 2, 0.5, model, saved, start=2)
    for one, two in ((straight, model), (straight_teacher, teacher)):
        for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6), name
