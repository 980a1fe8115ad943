"""Encoder files: written, read back, read by timm, and refused when they are not ours."""

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from personmae.configs import UserError
from personmae.models.vit import VitConfig
from personmae.models.weights import load_encoder, save_encoder
from tests.test_vit import as_pixels, random_encoder, random_images

CONFIG = VitConfig(image_size=(64, 32), width=192, depth=12, num_heads=3)


def test_round_trip_and_timm(tmp_path):
    encoder = random_encoder(CONFIG)
    path = tmp_path / "encoder.safetensors"
    save_encoder(path, encoder, {"run": "test"})
    again = load_encoder(path)
    assert again.config == CONFIG
    assert not again.training
    images = random_images(2, (64, 32))
    with torch.no_grad():
        assert torch.equal(again.encode(images).normed, encoder.encode(images).normed)
        peer = timm.create_model("vit_tiny_patch16_224", img_size=(64, 32), num_classes=0, checkpoint_path=str(path)).eval()
        assert torch.allclose(peer(as_pixels(images)), encoder(as_pixels(images)), atol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["encoder.safetensors"]


def test_files_that_are_not_ours(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.safetensors"):
        load_encoder(tmp_path / "nowhere.safetensors")
    (tmp_path / "text.safetensors").write_text("no weights here")
    with pytest.raises(UserError, match=r"text\.safetensors"):
        load_encoder(tmp_path / "text.safetensors")
    save_encoder(tmp_path / "good.safetensors", random_encoder(CONFIG), {})
    tensors = load_file(tmp_path / "good.safetensors")
    save_file(tensors, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="header"):
        load_encoder(tmp_path / "foreign.safetensors")
    whole = (tmp_path / "good.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cut\.safetensors"):
        load_encoder(tmp_path / "cut.safetensors")


def test_a_disk_that_refuses_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*encoder\.safetensors"):
        save_encoder(tmp_path / "gone" / "encoder.safetensors", random_encoder(CONFIG), {})
