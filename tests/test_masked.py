"""The masked model: what is predicted, what has a gradient, and that plain MAE is one of its configurations."""

import dataclasses

import pytest
import torch

from personmae.models.decoders import DecoderConfig
from personmae.models.masked import MaskedConfig, PersonMAE, RegionInputs
from personmae.models.masking import MaskingConfig
from personmae.models.regions import HIDDEN, SEEN, cell_origins
from personmae.models.teacher import TeacherConfig, build_teacher
from personmae.models.vit import VitConfig
from personmae_kernels import patch_loss, patch_targets

ENCODER = VitConfig(image_size=(64, 32), patch_px=8, width=32, depth=2, num_heads=2)
DECODER = DecoderConfig(depth=1, width=16, num_heads=2)
CONFIG = MaskedConfig(encoder=ENCODER, pixel_decoder=DECODER, feature_decoder=DECODER, masking=MaskingConfig())


def inputs(B=3, seed=0, same=False):
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (2, B, 64, 32, 3), dtype=torch.uint8, generator=g)
    visible = torch.stack([torch.randperm(32, generator=g)[:15].sort().values for _ in range(B)])
    mask = torch.ones(B, 32, dtype=torch.bool).scatter_(1, visible, False)
    corner = torch.randint(0, 30, (B, 2, 2), generator=g)
    boxes = torch.cat([corner, corner + torch.tensor([80, 40])], dim=2).int()
    flips = torch.rand(B, 2, generator=g) < 0.5
    if same:
        return RegionInputs(images[0], images[0], boxes[:, :1].expand(-1, 2, -1), flips[:, :1].expand(-1, 2), mask, visible.int())
    return RegionInputs(images[0], images[1], boxes, flips, mask, visible.int())


def run(config, batch, **options):
    model = PersonMAE(config)
    features = build_teacher(TeacherConfig(), model.encoder)(batch.region_b)
    return model, model(batch, features, **options)


@pytest.mark.parametrize("form", ["cross", "joint"])
@pytest.mark.parametrize("injection", [False, True])
def test_every_parameter_learns(form, injection):
    decoder = dataclasses.replace(DECODER, form=form)
    config = dataclasses.replace(CONFIG, pixel_decoder=decoder, feature_decoder=decoder, low_level_injection=injection)
    model, output = run(config, inputs())
    output.total.backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_the_total_is_the_mean_over_all_cells_of_both_losses():
    _, output = run(CONFIG, inputs())
    means = output.sums.sum(1) / output.counts.sum()
    assert output.counts.sum() == 3 * 32
    assert torch.allclose(means, output.averages, rtol=1e-5)
    assert output.total.item() == pytest.approx(means.sum().item(), rel=1e-5)


def test_under_bf16_the_losses_are_still_summed_in_fp32():
    with torch.autocast("cpu", torch.bfloat16):
        _, output = run(CONFIG, inputs())
    assert output.sums.dtype == torch.float32
    assert torch.allclose(output.sums.sum(1) / output.counts.sum(), output.averages, rtol=1e-5)


def test_ramp_and_scale_are_inside_the_total():
    _, whole = run(CONFIG, inputs())
    _, ramped = run(CONFIG, inputs(), feature_ramp=0.25, scale=0.5)
    assert ramped.total.item() == pytest.approx(0.5 * (whole.averages[0] + 0.25 * whole.averages[1]).item(), rel=1e-5)
    assert torch.allclose(ramped.sums, whole.sums)


@pytest.mark.parametrize("predict", ["masked", "unseen"])
def test_what_is_predicted(predict):
    config = dataclasses.replace(CONFIG, predict=predict)
    batch = inputs(seed=4)
    _, output = run(config, batch)
    origins = cell_origins(batch.boxes, batch.flips, batch.mask, ENCODER.grid)
    chosen = origins == HIDDEN if predict == "masked" else origins != SEEN
    model = PersonMAE(config)
    encoded = model.encoder.encode(batch.region_a, batch.visible)
    predicted = model.predict_pixels(encoded, batch).detach().requires_grad_()
    per_cell = patch_loss(predicted, batch.region_b, torch.ones(3, 32), 8, ENCODER.mean, ENCODER.std).per_cell
    expected = torch.stack([per_cell[b][chosen[b]].mean() for b in range(3)]).mean()
    assert output.averages[0].item() == pytest.approx(expected.item(), rel=1e-4)


def test_plain_mae_is_a_configuration():
    """Against MAE written out: encoder on the visible patches, grid filled with the mask token, loss on the hidden patches alone."""
    config = dataclasses.replace(
        CONFIG, target_region="A", predict="masked", losses="pixels", pixel_decoder=dataclasses.replace(DECODER, form="mae")
    )
    batch = inputs(same=True)
    model = PersonMAE(config)
    output = model(batch, None)
    decoder = model.pixel_decoder
    tokens = decoder.embed(model.encoder.encode(batch.region_a, batch.visible).normed)
    grid = decoder.mask_token.repeat(3, 32, 1)
    for b in range(3):
        grid[b, batch.visible[b].long()] = tokens[b, 1:]
    x = torch.cat([tokens[:, :1], grid + decoder.positions], dim=1)
    for block in decoder.blocks:
        x = x + block.attn(block.norm1(x))
        x = x + block.mlp(block.norm2(x))
    predicted = decoder.head(decoder.norm(x))[:, 1:]
    pixels = (batch.region_a.float() / 255 - torch.tensor(ENCODER.mean)) / torch.tensor(ENCODER.std)
    patches = pixels.view(3, 8, 8, 4, 8, 3).permute(0, 1, 3, 5, 2, 4).reshape(3, 32, 192)
    target = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    loss = ((predicted - target) ** 2).mean(-1)
    expected = (loss * batch.mask).sum() / batch.mask.sum()
    assert output.total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert not hasattr(model, "feature_decoder")


def test_the_prediction_depends_on_where_b_lies_unless_told_not_to():
    batch = inputs()
    moved = batch._replace(boxes=batch.boxes + torch.tensor([[0, 0, 0, 0], [9, 4, 9, 4]], dtype=torch.int32))
    for codes, same in (("relative", False), ("own", True)):
        config = dataclasses.replace(CONFIG, pixel_decoder=dataclasses.replace(DECODER, codes=codes))
        model = PersonMAE(config)
        encoded = model.encoder.encode(batch.region_a, batch.visible)
        assert torch.equal(model.predict_pixels(encoded, batch), model.predict_pixels(encoded, moved)) is same


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_perfect_prediction_is_painted_as_the_image_itself(per_channel, monkeypatch):
    model = PersonMAE(dataclasses.replace(CONFIG, per_channel_pixels=per_channel))
    batch = inputs()
    perfect = patch_targets(batch.region_b, 8, ENCODER.mean, ENCODER.std, per_channel)
    monkeypatch.setattr(model, "predict_pixels", lambda encoded, inputs: perfect)
    painted = model.predict_image(batch)
    assert painted.dtype == torch.uint8
    assert (painted.int() - batch.region_b.int()).abs().max() <= 1


def test_the_encoder_starts_the_same_whatever_the_decoders():
    a = PersonMAE(CONFIG, seed=5).encoder.state_dict()
    b = PersonMAE(dataclasses.replace(CONFIG, losses="pixels"), seed=5).encoder.state_dict()
    c = PersonMAE(CONFIG, seed=6).encoder.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["blocks.0.attn.qkv.weight"], c["blocks.0.attn.qkv.weight"])


def test_impossible_configurations_are_refused():
    with pytest.raises(ValueError, match="region A only"):
        dataclasses.replace(CONFIG, pixel_decoder=dataclasses.replace(DECODER, form="mae"))
    with pytest.raises(ValueError, match="first block only"):
        dataclasses.replace(CONFIG, losses="pixels", low_level_injection=True)
    with pytest.raises(ValueError, match="teacher"):
        PersonMAE(CONFIG)(inputs(), None)
