"""The teacher: whole region, no gradient, and three kinds of it."""

import pytest
import timm
import torch

from personmae.configs import UserError
from personmae.models.teacher import TeacherConfig, build_teacher
from personmae.models.vit import VisionTransformer, VitConfig
from personmae.models.weights import save_encoder
from tests.test_vit import as_pixels, random_encoder, random_images

CONFIG = VitConfig(image_size=(64, 32), patch_px=16, width=192, depth=2, num_heads=3)


def test_moving_average_teacher_sees_the_whole_region_without_gradient():
    student = random_encoder(CONFIG)
    images = random_images(2, (64, 32))
    teacher = build_teacher(TeacherConfig(), student)
    target = teacher(images)
    assert not target.requires_grad
    assert torch.equal(target, student.encode(images, with_class=False).tokens)
    assert not teacher.train().training
    with_class = build_teacher(TeacherConfig(with_class=True), student)(images)
    assert with_class.shape == target.shape
    assert torch.equal(with_class, student.encode(images).tokens[:, 1:])
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(teacher.parameters(), student.parameters(), strict=True))


def test_a_frozen_teacher_from_our_weights(tmp_path):
    other = random_encoder(CONFIG, seed=9)
    save_encoder(tmp_path / "encoder.safetensors", other, {})
    teacher = build_teacher(TeacherConfig(kind="frozen", weights=tmp_path / "encoder.safetensors"), random_encoder(CONFIG))
    images = random_images(2, (64, 32))
    assert torch.equal(teacher(images), other.encode(images, with_class=False).tokens)
    with pytest.raises(UserError, match=r"teacher\.weights"):
        build_teacher(TeacherConfig(kind="frozen"), random_encoder(CONFIG))
    large = VisionTransformer(VitConfig(image_size=(128, 64), patch_px=16, width=192, depth=2, num_heads=3))
    with pytest.raises(UserError, match=r"\(128, 64\)|128"):
        build_teacher(TeacherConfig(kind="frozen", weights=tmp_path / "encoder.safetensors"), large)


def test_a_frozen_timm_teacher(tmp_path):
    peer = timm.create_model("vit_tiny_patch16_224", img_size=(64, 32), num_classes=0).eval()
    torch.save(peer.state_dict(), tmp_path / "peer.pth")
    teacher = build_teacher(TeacherConfig(kind="timm", timm_name="vit_tiny_patch16_224", weights=tmp_path / "peer.pth"), random_encoder(CONFIG))
    images = random_images(2, (64, 32))
    mean, std = (torch.tensor(peer.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    pixels = (images.permute(0, 3, 1, 2).float() / 255 - mean) / std
    with torch.no_grad():
        assert torch.allclose(teacher(images), peer.forward_features(pixels)[:, 1:], atol=1e-5)
        assert not torch.allclose(teacher(images), peer.forward_features(as_pixels(images))[:, 1:], atol=1e-2)  # its own mean and std, not ours
    assert teacher.width == 192
    with pytest.raises(UserError, match="vit_tiny_patch17"):
        build_teacher(TeacherConfig(kind="timm", timm_name="vit_tiny_patch17"), random_encoder(CONFIG))
    torch.save(timm.create_model("vit_tiny_patch16_224", img_size=(64, 32), num_classes=0, patch_size=8).state_dict(), tmp_path / "other.pth")
    with pytest.raises(UserError, match="cannot be a teacher"):
        build_teacher(TeacherConfig(kind="timm", timm_name="vit_tiny_patch16_224", weights=tmp_path / "other.pth"), random_encoder(CONFIG))
