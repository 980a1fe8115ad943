"""The encoder against timm's ViT, on any grid."""

import pytest
import timm
import torch

from personmae.models.positions import sin_cos_positions
from personmae.models.vit import IMAGENET_MEAN, IMAGENET_STD, VisionTransformer, VitConfig, initialise
from personmae.models.zoo import ENCODERS


def random_encoder(config: VitConfig, seed: int = 0) -> VisionTransformer:
    encoder = VisionTransformer(config)
    generator = torch.Generator().manual_seed(seed)
    initialise(encoder, generator)
    for parameter in encoder.parameters():  # zeros and ones would hide a wrong bias or norm
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return encoder.eval()


def random_images(B: int, size: tuple[int, int], seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, (B, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def as_pixels(images: torch.Tensor) -> torch.Tensor:
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    return (images.permute(0, 3, 1, 2).float() / 255 - mean) / std


@pytest.mark.parametrize(("size", "patch_px"), [((256, 128), 16), ((384, 128), 16), ((96, 48), 8), ((48, 96), 16)])
def test_same_weights_same_output_as_timm(size, patch_px):
    encoder = random_encoder(VitConfig(image_size=size, patch_px=patch_px, width=96, depth=3, num_heads=3))
    peer = timm.models.VisionTransformer(
        img_size=size, patch_size=patch_px, embed_dim=96, depth=3, num_heads=3, num_classes=0, norm_layer=None
    ).eval()
    peer.load_state_dict(encoder.state_dict())
    images = random_images(2, size)
    with torch.no_grad():
        theirs = peer.forward_features(as_pixels(images))
        assert torch.allclose(encoder.forward_features(as_pixels(images)), theirs, atol=1e-5, rtol=1e-5)
        assert torch.allclose(encoder.encode(images).normed, theirs, atol=1e-5, rtol=1e-5)
        assert torch.allclose(encoder(as_pixels(images)), peer(as_pixels(images)), atol=1e-5, rtol=1e-5)
        features = encoder.describe(images)
    assert torch.allclose(features["class"], theirs[:, 0], atol=1e-5, rtol=1e-5)
    assert torch.allclose(features["mean"], theirs[:, 1:].mean(1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("preset", "timm_name", "num_parameters"),
    [("vit-tiny", "vit_tiny_patch16_224", 5.5e6), ("vit-small", "vit_small_patch16_224", 21.6e6), ("vit-base", "vit_base_patch16_224", 85.7e6)],
)
def test_presets_are_timms_models(preset, timm_name, num_parameters):
    with torch.device("meta"):
        ours = VisionTransformer(ENCODERS[preset])
        theirs = timm.create_model(timm_name, img_size=(256, 128), num_classes=0)
    assert {n: t.shape for n, t in ours.state_dict().items()} == {n: t.shape for n, t in theirs.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) == pytest.approx(num_parameters, rel=0.01)


def test_visible_tokens_do_not_see_the_hidden_ones():
    config = VitConfig(image_size=(64, 32), patch_px=8, width=32, depth=2, num_heads=2)
    encoder = random_encoder(config)
    images = random_images(2, (64, 32))
    visible = torch.tensor([[0, 3, 9, 31], [5, 6, 7, 30]], dtype=torch.int32)
    changed = images.clone()
    hidden = torch.ones(2, 32, dtype=torch.bool).scatter_(1, visible.long(), False)
    blocks = hidden.view(2, 8, 4).repeat_interleave(8, 1).repeat_interleave(8, 2)
    changed[blocks] = 255 - changed[blocks]
    with torch.no_grad():
        one, other = encoder.encode(images, visible).tokens, encoder.encode(changed, visible).tokens
        assert torch.equal(one, other)
        assert not torch.allclose(encoder.encode(images).tokens, encoder.encode(changed).tokens)
        # All patches named as visible is the same as none hidden.
        everything = torch.arange(32, dtype=torch.int32).expand(2, -1)
        assert torch.allclose(encoder.encode(images, everything).tokens, encoder.encode(images).tokens, atol=1e-6)


def test_positions_are_those_of_the_grid_cell():
    table = sin_cos_positions((5, 3), 16).double()
    row, column = 4, 2
    w = [1 / 10000 ** (k / 4) for k in range(4)]
    expected = [f(p * x) for p in (row, column) for f in (torch.sin, torch.cos) for x in torch.tensor(w, dtype=torch.float64)]
    assert torch.allclose(table[row * 3 + column], torch.stack(expected), atol=1e-6)


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="100x48"):
        VisionTransformer(VitConfig(image_size=(100, 48), patch_px=8, width=32, depth=1, num_heads=2))
    encoder = VisionTransformer(VitConfig(image_size=(96, 48), patch_px=8, width=32, depth=1, num_heads=2))
    with pytest.raises(ValueError, match="96, 48"):
        encoder.encode(random_images(1, (48, 96)))
    with pytest.raises(ValueError, match="3 heads"):
        VisionTransformer(VitConfig(width=32, num_heads=3))
