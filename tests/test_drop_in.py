"""Our backbone in other code: the same features as theirs with the same weights, their signatures, attributes and outputs, a step of training."""

import copy
import sys
import types

import pytest
import torch
from torch import nn

from personmae.configs import UserError
from personmae.interop import clip_reid, cluster_contrast, fast_reid, openunreid, solider, transreid, transreid_ssl
from personmae.interop import torchreid as torchreid_module
from personmae.interop.drop_in import DropInVit
from personmae.interop.exports import export_state, write_export
from personmae.interop.initial_weights import NORMALISATIONS, load_state
from personmae.interop.plain_blocks import PlainBlock
from personmae.models import attention, fusing, vit
from personmae.models.vit import Residual, VisionTransformer, initialise
from personmae.models.weights import load_encoder, save_encoder
from personmae.models.zoo import ENCODERS
from personmae_kernels import add_layer_norm
from tests.foreign_code import ClusterContrastStandIn, StandInJigsaw, StandInVit


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A vit-small."""
    path = tmp_path_factory.mktemp("weights") / "encoder.safetensors"
    encoder = VisionTransformer(ENCODERS["vit-small"])
    generator = torch.Generator().manual_seed(0)
    initialise(encoder, generator)
    for parameter in encoder.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    save_encoder(path, encoder, {})
    return path


def pixels(size=(256, 128), count=2):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(5))


def filled(theirs, ours):
    """Theirs with our weights; their unused classifier stays."""
    own = ours.state_dict()
    theirs.load_state_dict({**{name: value for name, value in theirs.state_dict().items() if name.startswith("fc.")}, **own})
    return theirs.eval()


def assert_same(found, expected, tolerance=1e-4):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < tolerance
    assert expected.std() > 1e-3


@pytest.mark.parametrize(("cameras", "views"), [(0, 0), (6, 0), (0, 3), (6, 3)])
@pytest.mark.parametrize("stride", [16, 12])
def test_transreid_with_and_without_embeddings(cameras, views, stride):
    torch.manual_seed(1)
    settings = {"camera": cameras, "view": views, "sie_xishu": 3.0, "drop_path_rate": 0.1}
    ours = transreid.deit_small_patch16_224_TransReID(img_size=[256, 128], stride_size=[stride, stride], **settings).eval()
    theirs = filled(StandInVit(stride=stride, cameras=cameras, views=views, weight=3.0), ours)
    labels = {"cam_label": torch.tensor([1, 4]) if cameras else None, "view_label": torch.tensor([2, 0]) if views else None}
    with torch.no_grad():
        assert_same(ours(pixels(), **labels), theirs(pixels(), **labels))
    if cameras or views:
        with pytest.raises(ValueError, match=r"cam_label|view_label"):
            ours(pixels())


def test_a_single_camera_adds_nothing():
    ours = transreid.deit_small_patch16_224_TransReID(camera=1)
    assert not hasattr(ours, "sie_embed")


def test_the_jigsaw_branch_takes_our_last_block():
    """TransReID deep-copies it twice, and calls the copies with a tensor."""
    torch.manual_seed(2)
    ours = transreid_ssl.vit_small_patch16_224_TransReID(local_feature=True, camera=6, sie_xishu=3.0, drop_path_rate=0.1)
    theirs = filled(StandInVit(cameras=6, weight=3.0, local=True), ours)
    jigsaw, reference = StandInJigsaw(ours), StandInJigsaw(theirs).eval()
    with torch.no_grad():
        for found, expected in zip(jigsaw.eval()(pixels(), torch.tensor([0, 5])), reference(pixels(), torch.tensor([0, 5])), strict=True):
            assert_same(found, expected)
    sum(feature.square().mean() for feature in jigsaw.train()(pixels(), torch.tensor([0, 5]))).backward()
    # The backbone's own last block is run by nobody there.
    missing = {name for name, parameter in jigsaw.named_parameters() if parameter.grad is None}
    assert {name.rsplit(".", 2)[0] for name in missing} <= {"base.blocks.11", "base.blocks.11.attn", "base.blocks.11.mlp", "base"}
    with pytest.raises(UserError, match="768 channels"):
        transreid.deit_small_patch16_224_TransReID(local_feature=True)


def test_gradients_are_those_of_their_network():
    torch.manual_seed(3)
    ours = transreid.deit_small_patch16_224_TransReID(camera=4, drop_path_rate=0.0)
    theirs = filled(StandInVit(cameras=4, weight=1.5), ours)
    for model in (ours.train(), theirs.train()):
        model(pixels(), cam_label=torch.tensor([3, 0])).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters() if not name.startswith("fc.")}
    for name, parameter in ours.named_parameters():
        error = (parameter.grad - expected[name]).abs().max()
        assert error <= 1e-4 * expected[name].abs().max() + 1e-6, name


@pytest.mark.parametrize("pooled", [False, True])
def test_transreid_ssl(checkpoint, pooled):
    ours = transreid_ssl.vit_small_patch16_224_TransReID(gem_pool=pooled, stem_conv=False, drop_rate=0.0, attn_drop_rate=0.0)
    assert ours.in_planes == 384
    ours.load_param(str(checkpoint), hw_ratio=2)
    theirs = filled(StandInVit(), ours)
    with torch.no_grad():
        expected = theirs(pixels())
        if pooled:
            tokens = []
            theirs.norm.register_forward_hook(lambda *given: tokens.append(given[2]))
            theirs(pixels())
            expected = expected + (tokens[0][:, 1:].double().clamp(min=1e-6) ** 3).mean(1).pow(1 / 3).float()
        assert_same(ours.eval()(pixels()), expected)
    with pytest.raises(UserError, match="stem_conv"):
        transreid_ssl.vit_small_patch16_224_TransReID(stem_conv=True)


@pytest.mark.parametrize("stride", [16, 12])
def test_loading_folds_our_pixels_to_the_hosts_and_leaves_those_of_others(checkpoint, tmp_path, stride):
    """Our file tells how its pixels were normalised; a file of somebody else is taken as the host would take it."""
    state = load_state(checkpoint, stride_px=stride)
    write_export(tmp_path / "half.pth", export_state(state, "transreid"))
    torch.save(dict(load_encoder(checkpoint).state_dict()), tmp_path / "foreign.pth")
    weights = {}
    for name in ("half.pth", "foreign.pth"):
        model = transreid.deit_small_patch16_224_TransReID(stride_size=stride)
        model.load_param(tmp_path / name)
        weights[name] = model.state_dict()
    direct = transreid.deit_small_patch16_224_TransReID(stride_size=stride)
    direct.load_param(checkpoint)
    for name, tensor in direct.state_dict().items():
        assert torch.allclose(tensor, weights["half.pth"][name], atol=1e-6), name
    projection = "patch_embed.proj.weight"
    assert torch.equal(weights["foreign.pth"][projection], load_encoder(checkpoint).state_dict()[projection])
    assert not torch.allclose(direct.state_dict()[projection], weights["foreign.pth"][projection])


def test_what_our_blocks_lack_is_refused(checkpoint):
    for settings, word in (({"drop_rate": 0.1}, "drop_rate"), ({"attn_drop_rate": 0.1}, "attn_drop_rate"), ({"hybrid_backbone": True}, "hybrid")):
        with pytest.raises(UserError, match=word):
            transreid.vit_base_patch16_224_TransReID(**settings)
    with pytest.raises(UserError, match="deit_small"):
        transreid.vit_small_patch16_224_TransReID()
    with pytest.raises(UserError, match="one number"):
        transreid.deit_small_patch16_224_TransReID(stride_size=[16, 12])
    with pytest.raises(UserError, match="no encoder"):
        DropInVit("vit-huge", pixels=NORMALISATIONS["half"])
    model = transreid.deit_small_patch16_224_TransReID()
    with pytest.raises(ValueError, match=r"\[B, 3, 256, 128\]"):
        model(pixels((128, 64)))
    with pytest.raises(UserError, match="384 wide"):
        transreid.vit_base_patch16_224_TransReID().load_param(checkpoint)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_training_lowers_the_loss(dtype):
    torch.manual_seed(4)
    model = transreid.TransreidVit("vit-nano", img_size=(128, 64), camera=2, drop_path_rate=0.1)
    head = nn.Linear(128, 2)
    optimiser = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=1e-3)
    losses = []
    for _ in range(5):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            features = model(pixels((128, 64)), cam_label=torch.tensor([0, 1]))
            loss = nn.functional.cross_entropy(head(features).float(), torch.tensor([0, 1]))
        assert features.dtype == torch.float32
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.gpu
@pytest.mark.parametrize("fused_from", [0, 1 << 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_it_gives_the_same_by_any_kernels(dtype, fused_from, monkeypatch):
    monkeypatch.setattr(fusing, "FUSED_FROM", fused_from)
    torch.manual_seed(8)
    model = transreid.deit_small_patch16_224_TransReID(camera=2, drop_path_rate=0.0).eval()
    labels = torch.tensor([0, 1])
    with torch.no_grad():
        expected = model(pixels(), cam_label=labels)
    model.cuda()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        found = model(pixels().cuda(), cam_label=labels.cuda())
    found.square().mean().backward()
    tolerance = 2e-3 if dtype == torch.float32 else 0.1
    assert (found.detach().cpu().float() - expected).abs().max() < tolerance
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_small_inputs_are_computed_by_pytorchs_operators_and_are_the_same(monkeypatch):
    """As on a GPU, where there are other operators to choose from; an attention that was asked for stays."""
    torch.manual_seed(8)
    model = transreid.TransreidVit("vit-nano", img_size=(128, 64), drop_path_rate=0.0)
    called = []
    monkeypatch.setattr(vit, "add_layer_norm", lambda *inputs, **more: (called.append(1), add_layer_norm(*inputs, **more))[1])
    found = []
    for worth in (True, False):
        monkeypatch.setattr(vit, "worth_fusing", lambda x, worth=worth: worth)
        monkeypatch.setattr(attention, "worth_fusing", lambda x, worth=worth: worth)
        called.clear()
        model.zero_grad()
        features = model(pixels((128, 64)))
        features.square().sum().backward()
        found.append([features.detach(), *(parameter.grad for parameter in model.parameters())])
        # The first norm of the network has no branch to add.
        assert len(called) == (2 * len(model.blocks) - 1 if worth else 0)
    for expected, actual in zip(*found, strict=True):
        assert (actual - expected).norm() <= 1e-5 * expected.norm()
    # The attention for few tokens likewise, but one that was asked for stays.
    kinds = []
    monkeypatch.setattr(attention, "short_attention", lambda qkv: (kinds.append("short"), qkv[:, :, 2])[1])
    layer = model.blocks[0].attn
    layer.replaced = (200, "short")
    layer(torch.zeros(1, 33, model.embed_dim))
    assert kinds == []
    layer.kind = "short"
    layer(torch.zeros(1, 33, model.embed_dim))
    assert kinds == ["short"]


def test_a_block_drops_its_branches_at_its_rate_and_is_the_same_either_way():
    torch.manual_seed(5)
    block = PlainBlock(32, 2, 2.0, drop_rate=0.25)
    x = torch.randn(4000, 3, 32)
    whole = copy.deepcopy(block).eval()
    with torch.no_grad():
        torch.manual_seed(6)
        out = block.train()(x)
        torch.manual_seed(6)
        assert torch.equal(block(Residual(x)).add(), out)
        untouched = (out == x).all(dim=(1, 2)).double().mean()
        assert abs(untouched - 0.25**2) < 0.02
        # Scaled by 1 / share kept: the mean stays, up to what the second branch makes of a changed first one.
        assert (out.mean(0) - whole(x).mean(0)).abs().max() < 0.05


def test_checkpointed_activations_give_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(7)
        model = DropInVit("vit-nano", pixels=NORMALISATIONS["half"], image_size=(128, 64), drop_path_rate=0.3).train()
        model.set_grad_checkpointing(checkpointing)
        model.class_token(pixels((128, 64), 4)).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_cluster_contrast(checkpoint):
    model = cluster_contrast.vit_small(img_size=(256, 128), drop_path_rate=0.3, pretrained_path=str(checkpoint), hw_ratio=2, conv_stem=False)
    assert model.num_features == 384
    own = {name: value for name, value in model.state_dict().items() if not name.startswith("bottleneck.")}
    base = StandInVit()
    base.load_state_dict({**{name: value for name, value in base.state_dict().items() if name.startswith("fc.")}, **own})
    theirs = ClusterContrastStandIn(base).eval()
    with torch.no_grad():
        assert_same(model.eval()(pixels()), theirs(pixels()))
        assert torch.allclose(model.train()(pixels()).norm(dim=1), torch.ones(2))
    # As the original passes them for its ResNets.
    assert cluster_contrast.vit_small(num_features=0, norm=True, dropout=0, num_classes=0, pooling_type="gem").num_features == 384
    for wrong in ({"num_features": 256}, {"norm": False}, {"conv_stem": True}, {"dropout": 0.5}):
        with pytest.raises(UserError, match="Cluster Contrast"):
            cluster_contrast.vit_small(**wrong)


def fast_reid_config(**changes):
    settings = {
        "DEPTH": "small",
        "FEAT_DIM": 384,
        "PRETRAIN": False,
        "PRETRAIN_PATH": "",
        "STRIDE_SIZE": (16, 16),
        "DROP_PATH_RATIO": 0.1,
        "DROP_RATIO": 0.0,
        "ATT_DROP_RATE": 0.0,
    }
    backbone = types.SimpleNamespace(**settings | changes)
    heads = types.SimpleNamespace(POOL_LAYER=changes.get("POOL_LAYER", "Identity"))
    model = types.SimpleNamespace(BACKBONE=backbone, HEADS=heads, PIXEL_MEAN=[127.5] * 3, PIXEL_STD=[127.5] * 3)
    return types.SimpleNamespace(MODEL=model, INPUT=types.SimpleNamespace(SIZE_TRAIN=[256, 128]))


def test_fast_reid(checkpoint):
    model = fast_reid.build_personmae_backbone(fast_reid_config(PRETRAIN=True, PRETRAIN_PATH=str(checkpoint))).eval()
    reference = transreid.deit_small_patch16_224_TransReID().eval()
    reference.load_param(checkpoint)
    with torch.no_grad():
        expected = reference(pixels())
        assert torch.equal(model(pixels()), expected[:, :, None, None])
        maps = fast_reid.build_personmae_backbone(fast_reid_config(POOL_LAYER="GeneralizedMeanPooling", STRIDE_SIZE=(12, 12)))(pixels())
    assert maps.shape == (2, 384, 21, 10)
    for changes, word in (({"FEAT_DIM": 2048}, "FEAT_DIM"), ({"DROP_RATIO": 0.1}, "DROP_RATIO"), ({"DEPTH": "50x"}, "vit-50x")):
        with pytest.raises(UserError, match=word):
            fast_reid.build_personmae_backbone(fast_reid_config(**changes))


def test_fast_reids_registry_gets_the_builder_once(monkeypatch):
    class Registry:
        """Of fast-reid: it can be asked for a name only, and refuses one that it has."""

        def __init__(self):
            self.builders = {}

        def get(self, name):
            return self.builders[name]

        def register(self, builder):
            assert builder.__name__ not in self.builders
            self.builders[builder.__name__] = builder

    names = ["fastreid", "fastreid.modeling", "fastreid.modeling.backbones", "fastreid.modeling.backbones.build"]
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    registry = sys.modules[names[-1]].BACKBONE_REGISTRY = Registry()
    fast_reid.register()
    fast_reid.register()
    assert list(registry.builders) == ["build_personmae_backbone"]


def test_torchreid(checkpoint, monkeypatch):
    package, models = types.ModuleType("torchreid"), types.ModuleType("torchreid.models")
    setattr(models, "__model_factory", {"osnet_x1_0": None})
    monkeypatch.setitem(sys.modules, "torchreid", package)
    with pytest.raises(UserError, match="no factory"):
        torchreid_module.register()
    monkeypatch.setitem(sys.modules, "torchreid.models", models)
    assert "personmae_vit_small" in torchreid_module.register(image_size=(256, 128), stride=12)
    factory = getattr(models, "__model_factory")
    model = factory["personmae_vit_small"](num_classes=7, loss="triplet", pretrained=False, use_gpu=False)
    model.load_weights(checkpoint)
    logits, feature = model.train()(pixels())
    assert (logits.shape, feature.shape) == ((2, 7), (2, 384))
    with torch.no_grad():
        assert model.eval()(pixels()).shape == (2, 384)
        assert model(pixels(), return_featuremaps=True).shape == (2, 384, 21, 10)
    assert factory["personmae_vit_tiny"](num_classes=3, loss="softmax", pretrained=False).train()(pixels()).shape == (2, 3)
    assert isinstance(model.classifier, nn.Linear)
    with pytest.raises(UserError, match="no weights to download"):
        factory["personmae_vit_small"](num_classes=7, pretrained=True)


def test_openunreid_solider_and_clip_reid(checkpoint):
    reference = transreid.deit_small_patch16_224_TransReID().eval()
    reference.load_param(checkpoint)
    imagenet = openunreid.personmae_vit_small(weights=checkpoint).eval()
    half = solider.personmae_vit_small(img_size=[256, 128], pretrained=str(checkpoint), convert_weights=True, semantic_weight=0.2).eval()
    half.init_weights()
    clip = clip_reid.ClipReidVit("vit-small", weights=checkpoint).eval()
    assert (imagenet.num_features, half.num_features[-1]) == (384, 384)
    with torch.no_grad():
        expected = reference(pixels())
        feature, maps = half(pixels())
        assert_same(feature, expected, 1e-5)
        assert maps[-1].shape == imagenet(pixels()).shape == (2, 384, 16, 8)
        before, tokens, projected = clip(pixels())
        assert_same(tokens[:, 0], expected, 1e-5)
        assert_same(clip.norm(clip.blocks[-1](before)), tokens, 1e-5)
        assert projected.shape == (2, 129, 512)
        # Cameras are added to the class token alone, before the blocks.
        stream = clip.stream(pixels(), added_to_class=torch.ones(2, 384)) - clip.stream(pixels())
        assert torch.allclose(stream[:, 0], torch.ones(2, 384), atol=1e-5)
        assert stream[:, 1:].abs().max() == 0
        assert not torch.allclose(clip(pixels(), cv_emb=torch.ones(2, 384))[1], tokens)
    with pytest.raises(UserError, match="PRETRAIN_PATH"):
        solider.personmae_vit_small().init_weights()
    with pytest.raises(UserError, match="no weights to download"):
        openunreid.personmae_vit_small(pretrained=True)
