"""The re-identification encoder: what it adds to an encoder, each addition against a plain rendering of it."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from personmae.configs import UserError
from personmae.models.identity_head import GhostBatchNorm, IdentityHead, IdentityHeadConfig
from personmae.models.part_features import jigsaw_order
from personmae.models.positions import resized_positions, sin_cos_positions
from personmae.models.reid import ReidConfig, ReidEncoder, plain_encoder
from personmae.models.vit import VisionTransformer, VitConfig
from personmae.models.weights import load_encoder, load_reid, save_encoder, save_reid
from tests.test_vit import random_encoder, random_images

VIT = VitConfig(image_size=(64, 32), patch_px=8, width=32, depth=3, num_heads=2)
SIZE = (64, 32)


def build(num_cameras=0, vit=VIT, **options) -> ReidEncoder:
    options = {"image_size": SIZE, "stride_px": vit.patch_px, "drop_path": 0.0, **options}
    return ReidEncoder(random_encoder(vit), ReidConfig(**options), num_cameras).eval()


def learned(encoder: VisionTransformer, seed: int = 3) -> VisionTransformer:
    """With positions that are no sines and cosines."""
    generator = torch.Generator().manual_seed(seed)
    encoder.set_positions(torch.randn(encoder.pos_embed.shape, generator=generator), learned=True)
    return encoder


@torch.no_grad()
def test_by_itself_it_is_the_encoder():
    encoder, images = random_encoder(VIT), random_images(3, SIZE)
    model = ReidEncoder(encoder, ReidConfig(image_size=SIZE, stride_px=8)).eval()
    normed = encoder.encode(images).normed
    (feature,) = model(images)
    assert torch.allclose(feature, normed[:, 0], atol=1e-5)
    assert torch.equal(model.describe(images)["feature"], feature)
    assert torch.allclose(build(feature="mean")(images)[0], normed[:, 1:].mean(1), atol=1e-5)
    both = build(feature="class+mean")
    assert both.widths == (64,)
    assert torch.allclose(both(images)[0], torch.cat([normed[:, 0], normed[:, 1:].mean(1)], dim=1), atol=1e-5)
    # A copy: training it leaves the weights that it began with alone.
    assert model.encoder.blocks[0].attn.qkv.weight.data_ptr() != encoder.blocks[0].attn.qkv.weight.data_ptr()


@torch.no_grad()
@pytest.mark.parametrize(("size", "stride", "grid"), [((256, 128), 12, (21, 10)), ((384, 128), 12, (31, 10)), ((256, 128), 16, (16, 8))])
def test_grids_of_transreid(size, stride, grid):
    vit = VitConfig(image_size=(256, 128), width=32, depth=1, num_heads=2)
    model = build(vit=vit, image_size=size, stride_px=stride)
    assert model.grid == grid
    assert model.num_tokens == 1 + grid[0] * grid[1]
    images = random_images(2, size)
    assert model._tokens(images, None).shape == (2, 1 + grid[0] * grid[1], 32)
    # Positions of patches that begin `stride` pixels apart, in units of a patch.
    y, x = torch.meshgrid(torch.arange(grid[0]) * stride / 16, torch.arange(grid[1]) * stride / 16, indexing="ij")
    frequencies = 10000 ** -(torch.arange(8, dtype=torch.float64) / 8)
    parts = [wave(place.flatten()[:, None] * frequencies) for place in (y.double(), x.double()) for wave in (torch.sin, torch.cos)]
    assert torch.allclose(model.encoder.pos_embed[0, 1:].double(), torch.cat(parts, dim=1), atol=1e-6)
    assert isinstance(model.config.learned_positions, bool)


@torch.no_grad()
def test_overlapping_patches_are_those_cut_out_one_by_one():
    model, images = build(stride_px=6), random_images(2, SIZE)
    tokens = model._tokens(images, None)[:, 1:] - model.encoder.pos_embed[:, 1:]
    mean, std = (torch.tensor(values) for values in (VIT.mean, VIT.std))
    pixels = (images / 255 - mean) / std
    projection = model.encoder.patch_embed.proj
    cut = [pixels[:, y : y + 8, x : x + 8].permute(0, 3, 1, 2).flatten(1) for y in range(0, 57, 6) for x in range(0, 25, 6)]
    expected = torch.stack(cut, dim=1) @ projection.weight.flatten(1).T + projection.bias
    assert torch.allclose(tokens, expected, atol=1e-4)


def test_learned_positions_are_resized_as_transreid_and_timm_do_it():
    from timm.layers import resample_abs_pos_embed

    positions = torch.randn(1, 1 + 8 * 4, 32)
    ours = resized_positions(positions, (8, 4), (10, 5))
    image = positions[:, 1:].reshape(1, 8, 4, 32).permute(0, 3, 1, 2)
    theirs = F.interpolate(image, size=(10, 5), mode="bilinear").permute(0, 2, 3, 1).flatten(1, 2)
    assert torch.allclose(ours[:, 1:], theirs, atol=1e-6)
    assert torch.equal(ours[:, :1], positions[:, :1])
    peer = resample_abs_pos_embed(positions, [10, 5], [8, 4], num_prefix_tokens=1)
    assert torch.allclose(resized_positions(positions, (8, 4), (10, 5), "bicubic", antialias=True), peer, atol=1e-5)
    assert resized_positions(positions, (8, 4), (8, 4)) is positions
    with pytest.raises(ValueError, match="for a grid"):
        resized_positions(positions, (9, 4), (10, 5))
    model = ReidEncoder(learned(random_encoder(VIT)), ReidConfig(image_size=(80, 40), stride_px=8))
    assert model.config.learned_positions
    assert isinstance(model.encoder.pos_embed, nn.Parameter)
    assert model.encoder.pos_embed.shape == (1, 1 + 10 * 5, 32)
    fixed = ReidEncoder(random_encoder(VIT), ReidConfig(image_size=(80, 40), stride_px=8))
    assert not fixed.config.learned_positions
    assert torch.allclose(fixed.encoder.pos_embed[0, 1:], sin_cos_positions((10, 5), 32))


@torch.no_grad()
def test_camera_embeddings_are_added_to_every_token():
    model, images = build(num_cameras=3, camera_weight=2.0), random_images(4, SIZE)
    plain = build()
    cameras = torch.tensor([0, 2, -1, 1])
    table = torch.cat([model.camera_embed, model.camera_embed.mean(0, keepdim=True)])
    assert torch.allclose(model._tokens(images, cameras), plain._tokens(images, None) + 2.0 * table[cameras][:, None], atol=1e-5)
    with pytest.raises(ValueError, match="give the cameras"):
        model(images)
    assert build(num_cameras=3).num_cameras == 0


def dealt(tokens):
    """The patches of JPM with tensors, from the paper's words: shifted, then in two halves, dealt alternately."""
    shifted = torch.cat([tokens[:, 4:], tokens[:, :4]], dim=1)
    if shifted.shape[1] % 2:
        shifted = torch.cat([shifted, shifted[:, -2:-1]], dim=1)
    return shifted.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


@torch.no_grad()
@pytest.mark.parametrize(("size", "stride"), [(SIZE, 8), ((64, 40), 8), (SIZE, 6), ((72, 40), 8)])
def test_jigsaw_parts_are_computed_part_by_part(size, stride):
    model, images = build(parts="jpm", image_size=size, stride_px=stride), random_images(3, size)
    num = model.grid[0] * model.grid[1]
    tokens = model._tokens(images, None)
    for block in list(model.encoder.blocks)[:-1]:
        tokens = tokens + block.attn(block.norm1(tokens))
        tokens = tokens + block.mlp(block.norm2(tokens))
    features = model(images)
    assert len(features) == 5
    assert model.widths == (32,) * 5
    patches, each = dealt(tokens[:, 1:]), num // 4
    assert jigsaw_order(num) == dealt(torch.arange(num)[None])[0, : 4 * each].tolist()
    block, norm = model.parts.blocks[0], model.parts.norm
    for part in range(4):
        x = torch.cat([tokens[:, :1], patches[:, part * each : (part + 1) * each]], dim=1)
        x = x + block.attn(block.norm1(x))
        x = x + block.mlp(block.norm2(x))
        assert torch.allclose(features[1 + part], norm(x)[:, 0], atol=1e-4)
    described = model.describe(images)["feature"]
    assert torch.allclose(described, torch.cat([features[0], *(part / 4 for part in features[1:])], dim=1))


def test_the_locality_map_is_a_feature_of_twice_the_width():
    model = build(parts="lem")
    assert model.widths == (32, 64)
    features = model(random_images(2, SIZE))
    assert [tuple(feature.shape) for feature in features] == [(2, 32), (2, 64)]
    again = build(parts="lem")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.parametrize("by", ["sample", "subset"])
@pytest.mark.parametrize("parts", ["none", "jpm"])
def test_drop_path_follows_its_draws(by, parts):
    model, images = build(drop_path=0.5, drop_path_by=by, parts=parts), random_images(6, SIZE)
    model.train()
    draws = model.draw_drop_paths(7, 0, range(6))
    first, again = model(images, drop_paths=draws), model(images, drop_paths=draws.clone())
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    other = model(images, drop_paths=model.draw_drop_paths(7, 1, range(6)))
    assert not torch.allclose(first[0], other[0])
    with pytest.raises(ValueError, match="a training step needs drop_paths"):
        model(images)
    model.eval()
    assert all(torch.equal(a, b) for a, b in zip(model(images, drop_paths=draws), model(images), strict=True))


@torch.no_grad()
@pytest.mark.parametrize("by", ["sample", "subset"])
def test_dropped_branches_are_those_of_the_draws(by):
    """The blocks once more, branch by branch and sample by sample."""
    model, images = build(drop_path=0.5, drop_path_by=by), random_images(5, SIZE)
    model.train()
    draws = model.draw_drop_paths(1, 0, range(5))
    tokens = model._tokens(images, None)
    for sample in range(5):
        x = tokens[sample : sample + 1]
        for number, block in enumerate(model.encoder.blocks):
            for row, (norm, branch) in enumerate(((block.norm1, block.attn), (block.norm2, block.mlp))):
                own = draws[2 * number + row]
                factor = float(own[sample]) if by == "sample" else (5 / len(own) if sample in own.tolist() else 0.0)
                if factor:
                    x = x + factor * branch(norm(x))
        assert torch.allclose(model(images, drop_paths=draws)[0][sample], model.encoder.norm(x)[0, 0], atol=1e-4)


def test_every_parameter_is_trained():
    for options in ({"parts": "jpm"}, {"parts": "lem", "feature": "class+mean"}, {"stride_px": 6}):
        model = build(num_cameras=2, camera_weight=3.0, **options)
        features = model(random_images(3, SIZE), torch.tensor([0, 1, 1]))
        sum(feature.square().sum() for feature in features).backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.abs().sum()] == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stride_px": 9}, "more than a patch"),
        ({"stride_px": 0}, "at least 1 pixel"),
        ({"image_size": (60, 32)}, "does not divide"),
        ({"camera_weight": 1.0}, "needs at least 2 cameras"),
        ({"camera_weight": -1.0}, "or more"),
        ({"drop_path": 1.0}, r"drop_path is 1\.0"),
        ({"parts": "jpm", "image_size": (24, 16)}, "only 6"),
    ],
)
def test_settings_that_do_not_fit(options, said):
    with pytest.raises(UserError, match=said):
        build(**options)


def test_images_of_another_size_or_kind():
    with pytest.raises(ValueError, match=r"uint8 \[B, 64, 32, 3\]"):
        build()(random_images(2, (64, 40)))
    with pytest.raises(ValueError, match=r"not torch\.float32"):
        build()(random_images(2, SIZE).float())


def test_a_file_holds_the_whole_model(tmp_path):
    model = build(num_cameras=3, camera_weight=3.0, parts="jpm", stride_px=6)
    head = IdentityHead(IdentityHeadConfig(widths=model.widths, num_people=7))
    head.train()(tuple(torch.randn(8, 32) for _ in range(5)))
    save_reid(tmp_path / "reid.safetensors", model, head, {"run": "test"})
    again = load_reid(tmp_path / "reid.safetensors")
    assert again.encoder.config == model.config
    images, cameras = random_images(2, SIZE), torch.tensor([1, -1])
    assert torch.equal(again.encoder.describe(images, cameras)["feature"], model.describe(images, cameras)["feature"])
    assert again.head is not None
    assert all(torch.equal(a, b) for a, b in itertools.zip_longest(again.head.state_dict().values(), head.state_dict().values()))
    with pytest.raises(UserError, match="holds a re-identification model, not an encoder"):
        load_encoder(tmp_path / "reid.safetensors")
    assert plain_encoder(model) is None
    plain = build()
    save_encoder(tmp_path / "encoder.safetensors", plain_encoder(plain), {})
    assert torch.equal(load_encoder(tmp_path / "encoder.safetensors").encode(images).normed, plain.encoder.encode(images).normed)
    with pytest.raises(UserError, match="has no personmae-reid header"):
        load_reid(tmp_path / "encoder.safetensors")


def test_the_head_is_a_neck_and_a_classifier_for_each_feature():
    head = IdentityHead(IdentityHeadConfig(widths=(6, 4), num_people=5), seed=1).train()
    features = torch.randn(8, 6), torch.randn(8, 4)
    out = head(features)
    for number, feature in enumerate(features):
        necked = (feature - feature.mean(0)) / (feature.var(0, unbiased=False) + 1e-5).sqrt()
        assert torch.allclose(out.necked[number], necked, atol=1e-5)
        assert torch.allclose(out.logits[number], necked @ head.classifiers[number].weight.T, atol=1e-5)
    assert not any(neck.bias.requires_grad for neck in head.necks)
    assert [tuple(logits.shape) for logits in out.logits] == [(8, 5), (8, 5)]
    assert 0.0005 < head.classifiers[0].weight.std() < 0.002
    bare = IdentityHead(IdentityHeadConfig(widths=(6,), num_people=5, neck="none"))
    assert torch.equal(bare(features[:1]).necked[0], features[0])
    with pytest.raises(ValueError, match="zip"):
        head(features[:1])
    for options, said in (({"num_people": -1}, "num_people is -1"), ({"num_people": 2, "ghost_size": 1}, "at least 2 samples")):
        with pytest.raises(UserError, match=said):
            IdentityHeadConfig(widths=(6,), **options)


def test_ghost_batches_are_normalised_by_themselves():
    ghost, x = GhostBatchNorm(5, 4).train(), torch.randn(12, 5, requires_grad=True)
    with torch.no_grad():
        ghost.weight.copy_(torch.rand(5))
    plain = [nn.BatchNorm1d(5).train() for _ in range(3)]
    for one in plain:
        one.load_state_dict({**ghost.state_dict()})
    expected = torch.cat([one(part) for one, part in zip(plain, x.split(4), strict=True)])
    out = ghost(x)
    assert torch.allclose(out, expected, atol=1e-6)
    weights = torch.randn(12, 5)
    ours, theirs = (torch.autograd.grad((y * weights).sum(), x, retain_graph=True)[0] for y in (out, expected))
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert torch.allclose(ghost.running_mean, torch.stack([one.running_mean for one in plain]).mean(0), atol=1e-6)
    assert torch.allclose(ghost.running_var, torch.stack([one.running_var for one in plain]).mean(0), atol=1e-6)
    one = nn.BatchNorm1d(5).eval()
    one.load_state_dict(ghost.state_dict())
    assert torch.equal(ghost.eval()(x), one(x))
    with pytest.raises(ValueError, match="does not divide into groups of 4"):
        ghost.train()(x[:10])


