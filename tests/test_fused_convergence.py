"""Thirty steps on the Triton kernels and thirty in plain PyTorch have the same losses: very small in Triton's interpreter, on a GPU as ViT-T."""

import math

import pytest
import torch

from personmae.models.attention import set_attention
from personmae.models.decoders import DecoderConfig
from personmae.models.masked import MaskedConfig, PersonMAE, RegionInputs, longest_sequence
from personmae.models.masking import MaskingConfig, draw_masks
from personmae.models.teacher import TeacherConfig, build_teacher
from personmae.models.vit import VitConfig
from personmae.models.zoo import ENCODERS
from personmae.training.ema import MovingAverage
from personmae.training.optimisers import OptimiserConfig, build_optimiser, update_weights
from personmae.training.precision import autocast
from personmae_kernels.launching import recorded, use_operators
from personmae_kernels.sample_random import Stream, sample_seeds

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_STEPS = 30
SMALL = MaskedConfig(
    encoder=VitConfig(image_size=(16, 8), patch_px=4, width=64, depth=2, num_heads=1),
    masking=MaskingConfig(ratio=0.5),
    pixel_decoder=DecoderConfig(depth=1, width=64, num_heads=1, mlp_ratio=2.0),
    feature_decoder=DecoderConfig(depth=1, width=64, num_heads=1, mlp_ratio=2.0),
)
TINY = MaskedConfig(encoder=ENCODERS["vit-tiny"], pixel_decoder=DecoderConfig(), feature_decoder=DecoderConfig())
KERNELS = {
    "patch_rows_kernel",
    "region_codes_kernel",
    "add_codes_kernel",
    "add_codes_backward_kernel",
    "add_layer_norm_kernel",
    "add_layer_norm_backward_kernel",
    "short_attention_forward_kernel",
    "short_attention_backward_kernel",
    "patch_loss_kernel",
    "feature_loss_kernel",
    "adamw_ema_kernel",
}


def draw_batch(config: MaskedConfig, size: int, step: int) -> RegionInputs:
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (2, size, *config.encoder.image_size, 3), dtype=torch.uint8, generator=generator)
    corners = torch.randint(0, 40, (size, 2, 2), generator=generator)
    boxes = torch.cat([corners, corners + torch.randint(20, 60, (size, 2, 2), generator=generator)], dim=2).int()
    masks = draw_masks(config.masking, config.encoder.grid, sample_seeds(0, step, range(size), Stream.MASK))
    flips = torch.rand(size, 2, generator=generator) < 0.5
    return RegionInputs(*(tensor.to(DEVICE) for tensor in (images[0], images[1], boxes, flips, masks.mask, masks.visible)))


def train(config, size, precision, *, fused):
    """(losses, kernels launched, programs of a step)"""
    use_operators("triton" if fused else "reference")
    model = PersonMAE(config, seed=1)
    teacher = build_teacher(TeacherConfig(), model.encoder)
    for part in (model, teacher):
        part.to(DEVICE)
        set_attention(part, "short" if fused else "sdpa", longest_sequence(config))
    average = MovingAverage(teacher.encoder, model.encoder)
    optimiser = build_optimiser(model, OptimiserConfig(kind="adamw-ema" if fused else "adamw"), average)
    losses = []
    for step in range(NUM_STEPS):
        inputs = draw_batch(config, size, step)
        with recorded() as launches:
            with autocast(DEVICE, precision):
                total = model(inputs, teacher(inputs.region_b), feature_ramp=min(1.0, step / 20)).total
            total.backward()
            update_weights(optimiser, model, average, 1e-3, 0.95, 1.0)
        losses.append(total.item())
    return losses, {launch.kernel.fn.__name__ for launch in launches}, sum(math.prod(launch.grid) for launch in launches)


@pytest.fixture(autouse=True)
def _back_to_the_default():
    yield
    use_operators(None)


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", 1e-5), ("bf16", 1e-2)])
def test_thirty_steps_have_the_same_losses(precision, allowed):
    config, size = (TINY, 32) if DEVICE.type == "cuda" else (SMALL, 2)
    expected, nothing, _ = train(config, size, precision, fused=False)
    losses, kernels, num_programs = train(config, size, precision, fused=True)
    assert nothing == set()
    assert kernels >= KERNELS
    assert losses == pytest.approx(expected, rel=allowed)
    assert expected[-1] < expected[0]
    if DEVICE.type == "cpu":
        assert num_programs <= 450
