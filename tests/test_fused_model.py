"""The model on the Triton kernels against the model in plain PyTorch: same losses, same gradients, and every kernel is launched."""

import pytest
import torch

from personmae.models.attention import set_attention
from personmae.models.decoders import DecoderConfig
from personmae.models.masked import MaskedConfig, PersonMAE, RegionInputs, longest_sequence
from personmae.models.masking import MaskingConfig, draw_masks
from personmae.models.teacher import TeacherConfig, build_teacher
from personmae.models.vit import VitConfig
from personmae.training.ema import MovingAverage
from personmae.training.optimisers import OptimiserConfig, build_optimiser, update_weights
from personmae.training.precision import autocast
from personmae_kernels.launching import recorded, use_operators
from personmae_kernels.sample_random import Stream, sample_seeds

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ENCODER = VitConfig(image_size=(32, 16), patch_px=4, width=64, depth=2, num_heads=2)
BATCH = 2
ALWAYS = {
    "patch_rows_kernel",
    "add_layer_norm_kernel",
    "add_layer_norm_backward_kernel",
    "short_attention_forward_kernel",
    "short_attention_backward_kernel",
    "patch_loss_kernel",
    "feature_loss_kernel",
}
OF_FORM = {
    "cross": {"region_codes_kernel", "add_codes_kernel", "add_codes_backward_kernel"},
    "joint": {"region_codes_kernel", "add_codes_kernel", "add_codes_backward_kernel", "join_tokens_kernel"},
    "mae": {"place_visible_kernel", "hidden_sum_kernel", "gather_visible_kernel"},
}


@pytest.fixture(autouse=True)
def _back_to_the_default():
    yield
    use_operators(None)


def settings(form):
    decoder = DecoderConfig(form=form, depth=1, width=32, num_heads=1)
    own = form == "mae"
    return MaskedConfig(
        encoder=ENCODER,
        masking=MaskingConfig(ratio=0.5),
        pixel_decoder=decoder,
        feature_decoder=decoder,
        target_region="A" if own else "B",
        predict="masked" if own else "whole",
    )


def batch(config):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, BATCH, *ENCODER.image_size, 3), dtype=torch.uint8, generator=generator)
    boxes = torch.tensor([[[0, 0, 60, 30], [10, 4, 50, 20]], [[20, 10, 90, 50], [0, 0, 64, 32]]], dtype=torch.int32)
    flips = torch.tensor([[False, True], [True, True]])
    if config.target_region == "A":
        images, boxes, flips = images[:1].expand(2, -1, -1, -1, -1), boxes[:, :1].expand(-1, 2, -1), flips[:, :1].expand(-1, 2)
    masks = draw_masks(config.masking, ENCODER.grid, sample_seeds(0, 0, range(BATCH), Stream.MASK))
    return RegionInputs(*(tensor.to(DEVICE) for tensor in (images[0], images[1], boxes, flips, masks.mask, masks.visible)))


def step(form, operators, precision):
    """The losses and the gradient of every parameter, on one batch."""
    config = settings(form)
    use_operators(operators)
    model = PersonMAE(config, seed=1)
    teacher = build_teacher(TeacherConfig(), model.encoder)
    for part in (model, teacher):
        part.to(DEVICE)
        set_attention(part, "short", longest_sequence(config))
    inputs = batch(config)
    with autocast(DEVICE, precision):
        output = model(inputs, teacher(inputs.region_b), feature_ramp=0.5, scale=0.5)
    output.total.backward()
    results = {f"gradient of {name}": parameter.grad for name, parameter in model.named_parameters()}
    return {"total": output.total.detach(), "averages": output.averages} | results


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", 1e-5), ("bf16", 0.05)])
@pytest.mark.parametrize("form", ["cross", "joint", "mae"])
def test_the_kernels_train_as_plain_pytorch_does(form, precision, allowed):
    expected = step(form, "reference", precision)
    with recorded() as launches:
        results = step(form, "triton", precision)
    assert {launch.kernel.fn.__name__ for launch in launches} >= ALWAYS | OF_FORM[form]
    assert results.keys() == expected.keys()
    size = torch.stack([gradient.norm() for name, gradient in expected.items() if name.startswith("gradient")]).norm()
    wrong = {}
    for name, value in expected.items():
        # Some gradients are zero but for rounding, as that of a key's bias: so a share of all is allowed for.
        scale = value.norm() + (0.01 * size if name.startswith("gradient") else 0)
        error = ((results[name] - value).norm() / scale).item()
        if not error <= allowed:
            wrong[name] = error
    assert wrong == {}


@pytest.mark.gpu
def test_a_step_never_waits_for_the_device():
    config = settings("cross")
    use_operators("triton")
    model = PersonMAE(config, seed=1).to(DEVICE)
    teacher = build_teacher(TeacherConfig(), model.encoder).to(DEVICE)
    average = MovingAverage(teacher.encoder, model.encoder)
    optimiser = build_optimiser(model, OptimiserConfig(kind="adamw-ema"), average)
    for part in (model, teacher):
        set_attention(part, "short", longest_sequence(config))
    inputs = batch(config)
    try:
        for number in range(3):
            # The first step compiles, makes tables and moments.
            torch.cuda.set_sync_debug_mode("default" if number == 0 else "error")
            with autocast(DEVICE, "bf16"):
                output = model(inputs, teacher(inputs.region_b))
            output.total.backward()
            update_weights(optimiser, model, average, 1e-3, 0.9, 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_gradients_of_kernels_and_of_plain_pytorch_are_equally_exact_in_bf16():
    """The kernels round less: against fp32, their gradients are no worse than those of plain PyTorch under autocast."""
    exact = step("cross", "reference", "fp32")
    error = {}
    for operators in ("reference", "triton"):
        results = step("cross", operators, "bf16")
        names = [name for name in exact if name.startswith("gradient")]
        error[operators] = torch.stack([(results[name] - exact[name]).norm() for name in names]).norm()
    assert error["triton"] <= 1.25 * error["reference"]


