"""Weights of other projects: each family's keys around a real model of timm, whose output our encoder then has; and what is refused."""

import argparse
import os
import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file

from personmae.configs import UserError
from personmae.interop.initial_weights import load_initial
from personmae.models.positions import sin_cos_positions
from personmae.models.vit import VitConfig
from personmae.models.weights import save_encoder
from personmae.recipes.programs import RetrievalConfig
from personmae.tasks.retrieval import read_encoder
from tests.test_vit import random_encoder, random_images

SIZE = (128, 64)
GRID = (8, 4)


def model_of_timm(size=SIZE, seed=0, **options):
    torch.manual_seed(seed)
    model = timm.models.VisionTransformer(img_size=size, patch_size=16, embed_dim=128, depth=2, num_heads=2, num_classes=0, **options).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def tokens_of(model, images, config):
    pixels = (images / 255 - torch.tensor(config.mean)) / torch.tensor(config.std)
    return model.forward_features(pixels.permute(0, 3, 1, 2))


def assert_same(found, model, size=SIZE):
    images = random_images(2, size)
    with torch.no_grad():
        assert torch.allclose(found.encoder.encode(images).normed, tokens_of(model, images, found.encoder.config), atol=1e-4)
    assert not found.encoder.training


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


HEAD = {"head.weight": torch.zeros(3, 128), "head.bias": torch.zeros(3)}
DINO_HEAD = {"head.mlp.0.weight": torch.zeros(8, 128), "head.last_layer.weight_g": torch.ones(4, 1)}
PART = {"part_token1": torch.zeros(1, 1, 128), "part1_pos": torch.zeros(1, 1, 128)}
DECODER = {"mask_token": torch.zeros(1, 1, 64), "decoder_embed.weight": torch.zeros(64, 128), "decoder_blocks.0.x": torch.ones(2)}
NECK = {"bottleneck.weight": torch.ones(128), "bottleneck.running_mean": torch.zeros(128), "classifier.weight": torch.zeros(5, 128)}
FAMILIES = {
    "timm": lambda s: {**s, **HEAD},
    "wrapped": lambda s: {"state_dict": prefixed(s, "module."), "epoch": 3, "args": argparse.Namespace(lr=0.1)},
    "mae": lambda s: {"model": {**s, **DECODER}},
    "dino": lambda s: {"teacher": prefixed({**s, **DINO_HEAD}, "backbone."), "student": prefixed(prefixed(s, "backbone."), "module.")},
    "pass": lambda s: {"teacher": prefixed({**s, **PART}, "backbone.")},
    "moco": lambda s: {"state_dict": prefixed(s, "module.momentum_encoder.") | prefixed({**s, **HEAD}, "module.base_encoder.")},
    "transreid": lambda s: {**prefixed(s, "base."), "base.sie_embed": torch.zeros(6, 1, 128), **NECK},
    "deit": lambda s: {"model": {**s, "head_dist.weight": torch.zeros(3, 128)}},
}
PARTS = {"dino": "teacher", "moco": "teacher"}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_gives_the_model_of_timm(family, tmp_path):
    model = model_of_timm()
    torch.save(FAMILIES[family](model.state_dict()), tmp_path / "weights.pth")
    found = load_initial(tmp_path / "weights.pth", PARTS.get(family), image_size=SIZE)
    assert_same(found, model)
    assert len(found.report.used) == len(model.state_dict())
    assert not found.report.changed
    expected_half = family == "transreid"
    assert (found.encoder.config.mean == (0.5, 0.5, 0.5)) is expected_half
    if family == "transreid":
        assert "embedding of the cameras" in str(found.report)
        assert "neck of a ReID model" in str(found.report)
    if family == "mae":
        assert found.report.left_out["decoder_embed.weight"] == "decoder of masked pre-training"


def test_student_and_teacher_are_told_apart(tmp_path):
    student, teacher = model_of_timm(seed=1), model_of_timm(seed=2)
    both = {"student": prefixed(student.state_dict(), "module.backbone."), "teacher": prefixed(teacher.state_dict(), "backbone.")}
    torch.save(both, tmp_path / "a.pth")
    assert_same(load_initial(tmp_path / "a.pth", "student", image_size=SIZE), student)
    assert_same(load_initial(tmp_path / "a.pth", "teacher", image_size=SIZE), teacher)
    with pytest.raises(UserError, match=r"has several networks: student .* teacher .*--foreign\.part student"):
        load_initial(tmp_path / "a.pth", image_size=SIZE)
    torch.save(student.state_dict(), tmp_path / "b.pth")
    with pytest.raises(UserError, match="has no teacher, only: one without a name; leave"):
        load_initial(tmp_path / "b.pth", "teacher", image_size=SIZE)


def test_scales_of_branches_are_folded_in(tmp_path):
    model = model_of_timm(init_values=0.5)
    torch.save({"model": model.state_dict()}, tmp_path / "dinov2.pth")
    found = load_initial(tmp_path / "dinov2.pth", image_size=SIZE)
    assert_same(found, model)
    assert "LayerScale" in str(found.report)


def test_separate_biases_of_beit(tmp_path):
    model = model_of_timm()
    state = model.state_dict()
    for number in range(2):
        bias = state.pop(f"blocks.{number}.attn.qkv.bias")
        bias[128:256] = 0
        state[f"blocks.{number}.attn.q_bias"], state[f"blocks.{number}.attn.v_bias"] = bias[:128].clone(), bias[256:].clone()
        model.blocks[number].attn.qkv.bias.data.copy_(bias)
    torch.save({"model": state}, tmp_path / "bootmae.pth")
    found = load_initial(tmp_path / "bootmae.pth", image_size=SIZE, normalisation="imagenet")
    assert_same(found, model)
    assert found.report.family == "BEiT or BootMAE"


def test_the_jigsaw_branch_replaces_the_block_that_nobody_trained(tmp_path):
    model = model_of_timm()
    trained = model.state_dict()
    base = {name: torch.randn_like(tensor) if name.startswith(("blocks.1.", "norm.")) else tensor for name, tensor in trained.items()}
    branch = {name.replace("blocks.1.", "b1.0."): tensor for name, tensor in trained.items() if name.startswith("blocks.1.")}
    branch |= {"b1.1.weight": trained["norm.weight"], "b1.1.bias": trained["norm.bias"]}
    other = {name.replace("b1.", "b2."): torch.zeros_like(tensor) for name, tensor in branch.items()}
    torch.save({**prefixed(base, "base."), **branch, **other, **NECK}, tmp_path / "jpm.pth")
    found = load_initial(tmp_path / "jpm.pth", image_size=SIZE, normalisation="imagenet")
    assert_same(found, model)
    assert "never trained" in str(found.report)


@pytest.mark.parametrize(("order", "name"), [("rows first", "ours"), ("columns first", "MAE's")])
def test_fixed_positions_are_computed_anew(order, name, tmp_path):
    del name

    def fixed(grid):
        cells = sin_cos_positions(grid, 128)
        cells = cells if order == "rows first" else torch.cat([cells[:, 64:], cells[:, :64]], dim=1)
        return torch.cat([torch.zeros(1, 128), cells])[None]

    model = model_of_timm()
    model.pos_embed.data.copy_(fixed(GRID))
    torch.save(model.state_dict(), tmp_path / "fixed.pth")
    found = load_initial(tmp_path / "fixed.pth", image_size=(96, 64))
    assert torch.allclose(found.encoder.pos_embed, fixed((6, 4)), atol=1e-6)
    assert not isinstance(found.encoder.pos_embed, torch.nn.Parameter)
    assert "computed anew from 8x4 to 6x4 cells" in str(found.report)


def test_learned_positions_are_resized(tmp_path):
    model = model_of_timm(size=(64, 64))
    torch.save(model.state_dict(), tmp_path / "square.pth")
    found = load_initial(tmp_path / "square.pth", image_size=(128, 64))
    image = model.pos_embed[:, 1:].reshape(1, 4, 4, 128).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(image, size=(8, 4), mode="bilinear").permute(0, 2, 3, 1).flatten(1, 2)
    assert torch.allclose(found.encoder.pos_embed[:, 1:], expected, atol=1e-6)
    assert isinstance(found.encoder.pos_embed, torch.nn.Parameter)
    # 33 cells lie in no usual way.
    odd = model_of_timm(size=(48, 176))
    torch.save(odd.state_dict(), tmp_path / "odd.pth")
    with pytest.raises(UserError, match=r"--foreign\.grid ROWS"):
        load_initial(tmp_path / "odd.pth", image_size=SIZE)
    assert "from 3x11 to 8x4" in str(load_initial(tmp_path / "odd.pth", image_size=SIZE, grid=(3, 11)).report)
    with pytest.raises(UserError, match="no grid of 6x6"):
        load_initial(tmp_path / "odd.pth", image_size=SIZE, grid=(6, 6))


def test_our_own_files_and_runs(tmp_path):
    encoder = random_encoder(VitConfig(image_size=SIZE, width=128, depth=2, num_heads=4, mean=(0.1, 0.2, 0.3)))
    save_encoder(tmp_path / "encoder.safetensors", encoder, {})
    save_encoder(tmp_path / "teacher.safetensors", random_encoder(encoder.config, seed=5), {})
    found = load_initial(tmp_path, image_size=SIZE)
    images = random_images(2, SIZE)
    with torch.no_grad():
        assert torch.equal(found.encoder.encode(images).normed, encoder.encode(images).normed)
    # Heads and pixels are those of its header, not guessed.
    assert found.encoder.config == encoder.config
    other = load_initial(tmp_path, "teacher", image_size=(96, 32))
    assert other.encoder.config.image_size == (96, 32)
    assert not torch.equal(other.encoder.norm.weight, encoder.norm.weight)


def test_weights_of_timm_by_name(monkeypatch):
    model = model_of_timm()
    model.pretrained_cfg = {"mean": (0.4, 0.5, 0.6), "std": (0.5, 0.5, 0.5)}
    monkeypatch.setattr(timm, "create_model", lambda name, **options: model)
    found = load_initial("timm:vit_small_patch16_224", image_size=SIZE)
    assert_same(found, model)
    assert found.encoder.config.mean == (0.4, 0.5, 0.6)

    def offline(name, **options):
        raise OSError("Cannot reach the hub")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match=r"cannot be had: Cannot reach the hub; is the network there"):
        load_initial("timm:vit_small_patch16_224")
    with pytest.raises(UserError, match="timm has no model 'vit_gigantic_9000'"):
        load_initial("timm:vit_gigantic_9000")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: {name: tensor for name, tensor in s.items() if name != "blocks.1.mlp.fc2.bias"}, r"missing: blocks\.1\.mlp\.fc2\.bias"),
        (lambda s: {**s, "blocks.0.gate.weight": torch.ones(2)}, r"of no known use: blocks\.0\.gate\.weight"),
        (lambda s: {**s, "norm.weight": torch.ones(7)}, r"norm\.weight is \[7\], and \[128\] is wanted"),
        (lambda s: {**s, "norm.weight": torch.full((128,), float("nan"))}, "numbers that are not finite"),
        (lambda s: {**s, "patch_embed.conv.0.weight": torch.ones(2)}, "convolutional stem"),
        (lambda s: {**s, "blocks.0.attn.relative_position_bias_table": torch.ones(2)}, "relative position"),
        (lambda s: {**s, "blocks.0.attn.q_norm.weight": torch.ones(2)}, "normalises inside attention"),
        (lambda s: {name: tensor for name, tensor in s.items() if name != "pos_embed"}, "has no positions"),
        (lambda s: {"layer1.0.conv1.weight": torch.ones(2)}, "holds no Vision Transformer .*it is a ResNet"),
        (lambda s: {"layers.0.blocks.0.attn.relative_position_bias_table": torch.ones(2)}, "it is a Swin Transformer"),
        (lambda s: {"epoch": 3}, "there are no named tensors in it"),
        (lambda s: [1, 2], "holds a list"),
    ],
)
def test_what_does_not_fit_is_named(change, said, tmp_path):
    torch.save(change(model_of_timm().state_dict()), tmp_path / "weights.pth")
    with pytest.raises(UserError, match=said) as caught:
        load_initial(tmp_path / "weights.pth", image_size=SIZE)
    assert "weights.pth" in str(caught.value)


class Exploit:
    def __reduce__(self):
        return os.system, ("touch /tmp/personmae_was_here",)


def test_files_that_want_to_run_code_or_are_broken(tmp_path):
    torch.save({"model": Exploit()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil\.pth is not loaded: reading it would run Python code"):
        load_initial(tmp_path / "evil.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps({"model": Exploit()}))
    with pytest.raises(UserError, match=r"raw\.pth"):
        load_initial(tmp_path / "raw.pth")
    assert not os.path.exists("/tmp/personmae_was_here")
    torch.save(model_of_timm().state_dict(), tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "page.pth").write_text("<!doctype html><html>log in</html>")
    (tmp_path / "empty.pth").write_bytes(b"")
    for name, said in (("cut", "cannot be read"), ("page", "a web page"), ("empty", "is empty"), ("nowhere", "cannot be read")):
        with pytest.raises(UserError, match=said):
            load_initial(tmp_path / f"{name}.pth")


def test_safetensors_of_others_and_sizes_that_do_not_fit(tmp_path):
    model = model_of_timm()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "model.safetensors")
    assert_same(load_initial(tmp_path / "model.safetensors", image_size=SIZE), model)
    with pytest.raises(UserError, match="does not divide into the patches"):
        load_initial(tmp_path / "model.safetensors", image_size=(60, 32))
    narrow = timm.models.VisionTransformer(img_size=SIZE, patch_size=16, embed_dim=96, depth=1, num_heads=3, num_classes=0)
    torch.save(narrow.state_dict(), tmp_path / "narrow.pth")
    with pytest.raises(UserError, match=r"96 wide, from which the number of its heads cannot be told; give --foreign\.num-heads"):
        load_initial(tmp_path / "narrow.pth", image_size=SIZE)
    assert_same(load_initial(tmp_path / "narrow.pth", image_size=SIZE, num_heads=3), narrow.eval())


def test_the_evaluator_takes_them(tmp_path, capsys):
    model = model_of_timm()
    torch.save(prefixed(model.state_dict(), "base."), tmp_path / "foreign.pth")
    config = RetrievalConfig(checkpoint=(tmp_path / "foreign.pth",), data=("market1501=x",))
    encoder = read_encoder(tmp_path / "foreign.pth", config, print)
    assert encoder.config.image_size == (256, 128)
    assert "tensors taken" in capsys.readouterr().out
