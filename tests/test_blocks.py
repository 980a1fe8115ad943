"""Blocks compiled or checkpointed give what plain blocks give, keep their names, and checkpointing keeps less."""

import pytest
import torch

from personmae.models.decoders import DecoderConfig
from personmae.models.masked import MaskedConfig, PersonMAE
from personmae.models.reid import ReidConfig, ReidEncoder
from personmae.models.teacher import TeacherConfig, build_teacher
from personmae.models.vit import VitConfig
from personmae.training.blocks import choose_compilation, set_blocks, uncompiled
from tests.test_masked import inputs
from tests.test_vit import as_pixels, random_encoder, random_images

ENCODER = VitConfig(image_size=(64, 32), patch_px=8, width=32, depth=3, num_heads=2)


def build(form, injection=False):
    decoder = DecoderConfig(form=form, depth=2, width=16, num_heads=2)
    config = MaskedConfig(encoder=ENCODER, pixel_decoder=decoder, feature_decoder=decoder, low_level_injection=injection)
    model = PersonMAE(config, seed=1)
    return model, build_teacher(TeacherConfig(), model.encoder)


def step(model, teacher):
    """(the loss, every gradient, bytes that autograd kept)"""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    batch = inputs()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total = model(batch, teacher(batch.region_b)).total
    total.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return total.detach(), gradients, sum(kept.values())


@pytest.mark.parametrize("form", ["cross", "joint"])
def test_checkpointing_gives_the_same_bits_and_keeps_less(form):
    model, teacher = build(form, injection=True)
    total, gradients, kept = step(model, teacher)
    set_blocks(model, compiled=False, checkpointing=True)
    again, others, kept_less = step(model, teacher)
    assert torch.equal(total, again)
    assert all(torch.equal(gradient, others[name]) for name, gradient in gradients.items())
    assert kept_less < 0.5 * kept


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("form", ["cross", "joint"])
def test_compiled_blocks_give_the_same_and_keep_their_names(form, checkpointing):
    model, teacher = build(form)
    names = list(model.state_dict())
    total, gradients, _ = step(model, teacher)
    for part in (model, teacher):
        set_blocks(part, compiled=True, checkpointing=checkpointing, backend="aot_eager")
    again, others, _ = step(model, teacher)
    assert list(model.state_dict()) == names
    assert again.item() == pytest.approx(total.item(), rel=1e-6)
    for name, gradient in gradients.items():
        assert torch.allclose(others[name], gradient, rtol=1e-4, atol=1e-6), name


def test_the_choice_says_its_reason():
    assert choose_compilation("auto", torch.device("cpu")) == (False, "on cpu")
    assert choose_compilation("auto", torch.device("cuda")) == (True, "on cuda")
    assert choose_compilation("yes", torch.device("cpu")) == (True, "asked for")
    assert choose_compilation("no", torch.device("cuda")) == (False, "asked for")


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_residual_stream_has_the_dtype_of_the_products(precision, dtype):
    model, _ = build("cross")
    seen = []
    for block in [*model.encoder.blocks, *model.pixel_decoder.blocks]:
        block.register_forward_pre_hook(lambda block, arguments: seen.append(arguments[0].stream.dtype))
    batch = inputs()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        encoded = model.encode(batch)
        model.predict_pixels(encoded, batch)
    assert seen == [dtype] * 5
    assert encoded.normed.dtype == torch.float32


@torch.no_grad()
def test_any_number_of_batch_sizes_is_evaluated_uncompiled():
    model = ReidEncoder(random_encoder(ENCODER), ReidConfig(image_size=(64, 32), stride_px=8, drop_path=0.0)).eval()
    images = random_images(24, (64, 32))
    expected = model(images)[0]
    num_compiled = 0

    def count(graph, _):
        nonlocal num_compiled
        num_compiled += 1
        return graph.forward

    torch._dynamo.reset()
    set_blocks(model, compiled=True, checkpointing=False, backend=count)
    with uncompiled():
        for size in range(1, 25):
            assert torch.allclose(model(images[:size])[0], expected[:size], atol=1e-5)
    assert num_compiled == 0
    assert torch.allclose(model(images)[0], expected, atol=1e-5)
    assert num_compiled > 0
    torch._dynamo.reset()


def test_a_compiled_training_step_with_stochastic_depth():
    config = ReidConfig(image_size=(64, 32), stride_px=8, parts="jpm", drop_path=0.3)
    plain, compiled = (ReidEncoder(random_encoder(ENCODER), config) for _ in range(2))
    set_blocks(compiled, compiled=True, checkpointing=False, backend="aot_eager")
    images = random_images(4, (64, 32))
    found = []
    for model in (plain.train(), compiled.train()):
        features = model(images, drop_paths=model.draw_drop_paths(3, 0, range(4)))
        sum(feature.square().sum() for feature in features).backward()
        found.append((features, {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}))
    assert all(torch.allclose(one, two, atol=1e-5) for one, two in zip(found[0][0], found[1][0], strict=True))
    assert found[0][1].keys() == found[1][1].keys()
    assert all(torch.allclose(gradient, found[1][1][name], atol=1e-3, rtol=1e-3) for name, gradient in found[0][1].items())


def test_many_models_of_one_process_are_compiled():
    """As in a sweep: after 8 of them torch.compile used to end with an error."""
    for depth, width in enumerate(range(16, 16 + 8 * 10, 8), 1):
        encoder = VitConfig(image_size=(32, 16), patch_px=8, width=width, depth=1, num_heads=1)
        model = random_encoder(encoder, seed=depth)
        set_blocks(model, compiled=True, checkpointing=False, backend="eager")
        images = random_images(2, encoder.image_size)
        with torch.no_grad():
            assert torch.isfinite(model(as_pixels(images))).all()
