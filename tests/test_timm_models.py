"""Our models in timm: names, options, weights, and the same features as timm's own network."""

import subprocess
import sys

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2

import personmae  # noqa: F401
from personmae.configs import UserError
from personmae.models.vit import VisionTransformer, initialise
from personmae.models.weights import save_encoder
from personmae.models.zoo import ENCODERS

NAMES = [f"personmae_vit_{size}_patch16" for size in ("nano", "tiny", "small", "base", "large")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A vit-tiny."""
    path = tmp_path_factory.mktemp("weights") / "encoder.safetensors"
    encoder = VisionTransformer(ENCODERS["vit-tiny"])
    initialise(encoder, torch.Generator().manual_seed(0))
    save_encoder(path, encoder, {})
    return path


ORDERS = ["import personmae, timm", "import timm, personmae", "import importlib.util as u, personmae; u.find_spec('timm'); import timm"]


@pytest.mark.parametrize("first", ORDERS)
def test_the_names_are_there_in_either_order_and_nothing_is_built_yet(first):
    check = "import sys; print(*timm.list_models('personmae_*')); assert not {'personmae.interop.timm_vit', 'personmae_kernels'} & set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", f"{first}; {check}"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.split()) == sorted(NAMES)


def test_importing_personmae_alone_imports_neither_timm_nor_torch():
    check = "import personmae, sys; assert not {'timm', 'torch'} & set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_features_are_those_of_timm_at_another_size(checkpoint):
    ours = timm.create_model("personmae_vit_tiny_patch16", img_size=(384, 128), num_classes=0, checkpoint_path=str(checkpoint)).eval()
    # The right way in timm: at the size of the file, then to the other; ours computes the sines and cosines anew instead of resizing them.
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=(384, 128), num_classes=0).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 384, 128)
    with torch.no_grad():
        assert (ours(x) - theirs(x)).abs().max() < 1e-4
        assert (ours.forward_features(x) - theirs.forward_features(x)).abs().max() < 1e-4
    wide = VisionTransformer(ENCODERS["vit-tiny"].__class__(**{**vars(ENCODERS["vit-tiny"]), "image_size": (384, 128)}))
    assert torch.allclose(ours.pos_embed, wide.pos_embed, atol=1e-6)


def test_a_head_for_other_classes_stays_as_it_was_drawn(checkpoint, capsys):
    model = timm.create_model("personmae_vit_tiny_patch16", num_classes=751, checkpoint_path=str(checkpoint))
    assert model(torch.randn(1, 3, 256, 128)).shape == (1, 751)
    assert "the new one, for 751 classes" in capsys.readouterr().out
    state = model.state_dict()
    del state["blocks.3.norm1.weight"]
    with pytest.raises(RuntimeError, match=r"blocks\.3\.norm1\.weight"):
        model.load_state_dict(state)
    assert model.load_state_dict(model.state_dict()).missing_keys == []


def test_timms_options():
    features = timm.create_model("personmae_vit_tiny_patch16", features_only=True, out_indices=(3, 11))
    assert [tuple(one.shape) for one in features(torch.randn(1, 3, 256, 128))] == [(1, 192, 16, 8)] * 2
    model = timm.create_model("personmae_vit_tiny_patch16", num_classes=5, drop_path_rate=0.2, drop_rate=0.1, global_pool="avg", fc_norm=False)
    model.set_input_size((384, 128))
    assert model(torch.randn(2, 3, 384, 128)).shape == (2, 5)
    assert model.blocks[-1].drop_rate == pytest.approx(0.2)
    groups = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5).param_groups
    scales = {group["lr_scale"] for group in groups}
    assert len(scales) == 14
    assert min(scales) == 0.5**13
    no_decay = {id(parameter) for group in groups if group["weight_decay"] == 0 for parameter in group["params"]}
    assert {id(model.pos_embed), id(model.cls_token)} <= no_decay
    model.reset_classifier(3)
    model.set_grad_checkpointing()
    model.train()(torch.randn(2, 3, 384, 128)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    config = timm.data.resolve_model_data_config(timm.create_model("personmae_vit_nano_patch16"))
    assert config["input_size"] == (3, 128, 64)
    assert config["mean"] == (0.485, 0.456, 0.406)


def test_what_our_blocks_lack_is_refused():
    for settings, word in (({"attn_drop_rate": 0.1}, "attn_drop"), ({"qk_norm": True}, "qk_norm"), ({"init_values": 1e-4}, "init_values")):
        with pytest.raises(UserError, match=word):
            timm.create_model("personmae_vit_tiny_patch16", **settings)
    model = timm.create_model("personmae_vit_nano_patch16")
    with pytest.raises(ValueError, match="mask"):
        model.forward_features(torch.randn(1, 3, 128, 64), is_causal=True)
