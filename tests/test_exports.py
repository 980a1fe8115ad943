"""Exports: other code's loaders take them, and compute our features; inspection says beforehand what a loader will do."""

import argparse
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from personmae.configs import UserError
from personmae.interop.checkouts import checkout_root, compare_with_checkout
from personmae.interop.exports import CARD, export_state, fold_normalisation, how_to_load, write_export
from personmae.interop.initial_weights import NORMALISATIONS, load_initial, load_state
from personmae.interop.inspection import inspect_file
from personmae.interop.model_cards import model_card
from personmae.interop.targets import TARGETS
from personmae.models.reid import ReidConfig, ReidEncoder
from personmae.models.vit import VisionTransformer, initialise
from personmae.models.weights import load_encoder, save_encoder, save_reid
from personmae.models.zoo import ENCODERS
from personmae.recipes.programs import ExportConfig, InspectConfig, VerifyConfig
from personmae.tasks import exporting
from tests.foreign_code import StandInVit

ROOT = Path(__file__).resolve().parent.parent
TINY = {"width": 192, "depth": 12, "heads": 3}
PLAIN = [name for name, target in TARGETS.items() if target.plain_vit and name not in ("safetensors",)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A vit-tiny whose every tensor is random, biases and norms too."""
    path = tmp_path_factory.mktemp("weights") / "encoder.safetensors"
    encoder = VisionTransformer(ENCODERS["vit-tiny"])
    generator = torch.Generator().manual_seed(0)
    initialise(encoder, generator)
    for parameter in encoder.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    save_encoder(path, encoder, {"step": "7", "data": "crops of a test"})
    return path


def images(size, count=3):
    return np.random.default_rng(1).integers(0, 256, (count, *size, 3), dtype=np.uint8)


def normalised(pixels, target):
    mean, std = (torch.tensor(values)[:, None, None] for values in NORMALISATIONS[TARGETS[target].normalisation])
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - mean) / std


def features_of(checkpoint, size, stride, pixels):
    """Our features by the path of fine-tuning: uint8 images, sine-cosine positions of the places themselves."""
    model = ReidEncoder(load_encoder(checkpoint), ReidConfig(image_size=size, stride_px=stride, drop_path=0.0)).eval()
    with torch.inference_mode():
        return model.describe(torch.from_numpy(pixels))["feature"]


@pytest.mark.parametrize("target", PLAIN)
@pytest.mark.parametrize(("size", "stride"), [((256, 128), 16), ((256, 128), 12), ((256, 128), 11), ((384, 128), 16), ((384, 128), 12)])
def test_their_network_with_the_file_computes_our_features(checkpoint, tmp_path, target, size, stride):
    if stride < 16 and not TARGETS[target].strides:
        with pytest.raises(UserError, match="no overlapping patches"):
            export_state(load_state(checkpoint, image_size=size, stride_px=stride), target)
        return
    file = tmp_path / "weights.pth"
    write_export(file, export_state(load_state(checkpoint, image_size=size, stride_px=stride), target))
    assert inspect_verdict(file, target, size, stride).loads
    theirs = StandInVit(**TINY, image_size=size, stride=stride).eval()
    # On the exact grid either ratio must do: nothing is resized.
    for ratio in (None, 2):
        assert theirs.load_param(file, ratio) == 150
    pixels = images(size)
    with torch.inference_mode():
        found = theirs(normalised(pixels, target))
    expected = features_of(checkpoint, size, stride, pixels)
    assert (found - expected).abs().max() < 1e-4
    assert expected.std() > 0.1


def test_a_file_holds_encoder_tensors_alone_and_no_words_that_loaders_skip(checkpoint, tmp_path):
    file = tmp_path / "weights.pth"
    write_export(file, export_state(load_state(checkpoint), "transreid"))
    content = torch.load(file, weights_only=True)
    names = set(content["state_dict"])
    assert names == set(load_encoder(checkpoint).state_dict())
    assert not [name for name in names if any(word in name for word in ("head", "dist", "mask_token", "decoder"))]
    assert {tensor.dtype for tensor in content["state_dict"].values()} == {torch.float32}
    assert content[CARD]["notes"] == {"step": "7", "data": "crops of a test"}
    with pytest.raises(UserError, match="distilled"):
        write_export(tmp_path / "distilled.pth", export_state(load_state(checkpoint), "transreid"))


def test_safetensors_carries_its_card_in_the_header(checkpoint, tmp_path):
    file = tmp_path / "weights.safetensors"
    write_export(file, export_state(load_state(checkpoint), "safetensors"))
    with safe_open(file, "pt") as opened:
        assert '"grid": [16, 8]' in opened.metadata()[CARD]
        assert len(opened.keys()) == 150
    assert inspect_verdict(file, "safetensors").loads


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_folding_the_normalisation_leaves_the_outputs(dtype):
    generator = torch.Generator().manual_seed(2)
    weight, bias = torch.randn(5, 3, 4, 4, generator=generator, dtype=dtype), torch.randn(5, generator=generator, dtype=dtype)
    raw = torch.rand(2, 3, 8, 4, generator=generator, dtype=torch.float64)
    old, new = NORMALISATIONS["imagenet"], ((0.2, 0.9, 0.4), (0.1, 0.7, 1.3))

    def convolved(weight, bias, pixels):
        mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in pixels)
        return torch.nn.functional.conv2d((raw - mean) / std, weight.double(), bias.double(), stride=4)

    folded = fold_normalisation(weight, bias, old, new)
    assert folded[0].dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    assert torch.allclose(convolved(*folded, new), convolved(weight, bias, old), atol=tolerance, rtol=0)


def test_an_export_read_again_is_the_same_encoder_for_any_pixels(checkpoint, tmp_path):
    """The file tells its normalisation and its grid, so nothing is guessed, and a chain of exports loses nothing."""
    file, back = tmp_path / "half.pth", tmp_path / "back.pth"
    write_export(file, export_state(load_state(checkpoint, image_size=(384, 128), stride_px=12), "transreid"))
    state = load_state(file)
    assert (state.config.image_size, state.stride_px, state.grid, state.config.num_heads) == ((384, 128), 12, (31, 10), 3)
    assert state.notes == {"step": "7", "data": "crops of a test"}
    write_export(back, export_state(load_state(file, image_size=(256, 128), stride_px=16), "timm"))
    again = load_initial(back).encoder
    pixels = torch.from_numpy(images((256, 128)))
    with torch.inference_mode():
        difference = again.encode(pixels).normed - load_encoder(checkpoint).encode(pixels).normed
    assert difference.abs().max() < 1e-4


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"config": 3}, "no export of ours wrote"),
        ({"stride_px": None}, "no export of ours wrote"),
        ({"stride_px": 99}, "stride of 99"),
        ({"config": {"image_size": [10**9, 10**9]}}, "does not divide|no grid"),
        ({"config": {"num_heads": 5}}, "5 heads"),
        ({"config": {"surprise": 1}}, "surprise"),
    ],
)
def test_a_card_that_somebody_has_changed_is_told(checkpoint, tmp_path, change, word):
    export = export_state(load_state(checkpoint), "transreid")
    card = dict(export.card)
    for name, value in change.items():
        card[name] = {**card[name], **value} if isinstance(value, dict) else value
    write_export(tmp_path / "w.pth", export._replace(card=card))
    with pytest.raises(UserError, match=word):
        load_state(tmp_path / "w.pth")


def test_a_card_cannot_make_the_network_larger_than_its_tensors(checkpoint, tmp_path):
    export = export_state(load_state(checkpoint), "transreid")
    card = {**export.card, "config": {**export.card["config"], "depth": 10**9, "width": 10**6 * 4}}
    write_export(tmp_path / "w.pth", export._replace(card=card))
    assert (load_state(tmp_path / "w.pth").config.depth, load_state(tmp_path / "w.pth").config.width) == (12, 192)


def test_a_fine_tuned_model_gives_its_encoder_with_its_stride(checkpoint, tmp_path):
    model = ReidEncoder(load_encoder(checkpoint), ReidConfig(image_size=(256, 128), stride_px=12, camera_weight=3.0), num_cameras=4).eval()
    save_reid(tmp_path / "reid.safetensors", model, None, {})
    state = load_state(tmp_path / "reid.safetensors")
    assert (state.stride_px, state.grid) == (12, (21, 10))
    assert list(state.report.left_out) == ["camera_embed"]
    assert torch.equal(state.tensors["pos_embed"], model.encoder.pos_embed)
    # To patches side by side: sines and cosines are computed anew, not resized.
    assert torch.allclose(load_state(tmp_path / "reid.safetensors", stride_px="patch").tensors["pos_embed"], load_encoder(checkpoint).pos_embed)


# What other people's files are like: how a file is made of a plain state dict, and whether TransReID takes it at 256x128, stride 16.
def with_prefix(prefix):
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


def square(state):
    return state | {"pos_embed": torch.randn(1, 1 + 14 * 14, 192)}


def tall(state):
    return state | {"pos_embed": torch.randn(1, 1 + 24 * 12, 192)}


BAD_FILES = {
    "plain": (lambda state: state, True, True),
    "square positions": (square, True, True),
    "positions of 384 x 192 pixels": (tall, False, True),
    "rest of MAE": (lambda state: state | {"mask_token": torch.zeros(1, 1, 192), "decoder_embed.weight": torch.zeros(3, 3)}, False, False),
    "norm of a mean": (lambda state: state | {"fc_norm.weight": torch.zeros(192)}, False, False),
    "module. in front": (with_prefix("module."), False, False),
    "backbone. in front": (with_prefix("backbone."), False, False),
    "in a container": (lambda state: {"model": state}, True, True),
    "Namespace beside": (lambda state: {"model": state, "args": argparse.Namespace(lr=1)}, False, False),
    "half precision": (lambda state: {name: tensor.half() for name, tensor in state.items()}, True, True),
    "head of a classifier": (lambda state: state | {"head.weight": torch.zeros(3, 192)}, True, True),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_inspection_says_what_the_loader_then_does(checkpoint, tmp_path, case):
    change, transreid, ssl = BAD_FILES[case]
    file = tmp_path / "weights.pth"
    torch.save(change(dict(load_encoder(checkpoint).state_dict())), file)
    for target, ratio, expected in (("transreid", None, transreid), ("transreid-ssl", 2 if "384" in case else None, ssl)):
        verdict = inspect_verdict(file, target)
        try:
            loaded = StandInVit(**TINY).load_param(file, ratio)
        except Exception:
            loaded = 0
        assert (verdict.loads, loaded == 150) == (expected, expected), verdict
        assert verdict.loads or "personmae export FILE --to" in str(verdict)


def test_inspection_tells_what_fast_reid_drops_in_silence(checkpoint, tmp_path):
    state = dict(load_encoder(checkpoint).state_dict())
    without_norms = lambda state: {name: tensor for name, tensor in state.items() if "norm" not in name}  # noqa: E731
    for name, change, word in (("prefix", with_prefix("module."), "prefix"), ("lacking", without_norms, "random")):
        torch.save(change(state), tmp_path / f"{name}.pth")
        verdict = inspect_verdict(tmp_path / f"{name}.pth", "fast-reid")
        assert not verdict.loads
        assert word in str(verdict)


def test_inspection_tells_pixels_of_the_wrong_kind_and_other_grids(checkpoint, tmp_path):
    write_export(tmp_path / "cc.pth", export_state(load_state(checkpoint), "cluster-contrast"))
    assert "its features are wrong" in str(inspect_verdict(tmp_path / "cc.pth", "transreid"))
    assert inspect_verdict(tmp_path / "cc.pth", "cluster-contrast").loads
    assert "--size 384 128 --stride 12" in str(inspect_verdict(tmp_path / "cc.pth", "fast-reid", (384, 128), 12))
    assert "through our module" in str(inspect_verdict(tmp_path / "cc.pth", "solider"))
    assert "this is safetensors" in str(inspect_verdict(checkpoint, "transreid"))
    assert inspect_verdict(checkpoint, "timm").loads


def inspect_verdict(file, target, size=(256, 128), stride=16):
    return next(verdict for verdict in inspect_file(file, size, stride).verdicts if verdict.target == target)


def test_the_commands(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = exporting.main(ExportConfig(checkpoint=checkpoint, to="transreid", stride=12))
    assert path.name == "vit-tiny-transreid-256x128-stride12.pth"
    assert "PRETRAIN_PATH vit-tiny-transreid-256x128-stride12.pth" in capsys.readouterr().out
    page = (tmp_path / f"{path.name}.md").read_text()
    for word in ("21 x 10", "crops of a test", "folded", "Intended use", "GDPR", "commit"):
        assert word in page
    with pytest.raises(UserError, match="--overwrite"):
        exporting.main(ExportConfig(checkpoint=checkpoint, to="transreid", stride=12))
    exporting.inspect(InspectConfig(file=path, stride=12))
    assert "transreid         loads" in capsys.readouterr().out
    assert exporting.verify(VerifyConfig(checkpoint=path, to="timm", stride=16)) < 1e-4


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_says_how_its_file_is_loaded(checkpoint, tmp_path, target):
    export = export_state(load_state(checkpoint), target)
    lines = how_to_load(tmp_path / "w.pth", export.card)
    assert any("w.pth" in line or "ClipReidVit" in line for line in lines)
    assert not [line for line in lines if "{" in line]
    assert all(line in model_card(tmp_path / "w.pth", export.card) for line in lines)


@pytest.fixture
def nano(tmp_path):
    encoder = VisionTransformer(ENCODERS["vit-nano"])
    initialise(encoder, torch.Generator().manual_seed(3))
    save_encoder(tmp_path / "encoder.safetensors", encoder, {})
    return tmp_path / "encoder.safetensors"


def test_onnx_computes_the_same_in_batches_of_any_size(nano, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    found = {}
    for name, int8 in (("nano.onnx", False), ("int8.onnx", True)):
        path = exporting.main(ExportConfig(checkpoint=nano, to="onnx", stride=12, output=tmp_path / name, int8=int8))
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        for count in (1, 5):
            pixels = images((128, 64), count)
            (found[name, count],) = session.run(["features"], {"images": pixels})
    expected = features_of(nano, (128, 64), 12, pixels).numpy()
    assert np.abs(found["nano.onnx", 5] - expected).max() < 1e-4
    assert np.abs(found["nano.onnx", 1] - expected[:1]).max() < 1e-4
    # In 8 bits something is lost, but not the direction.
    cosines = (found["int8.onnx", 5] * expected).sum(1) / np.linalg.norm(found["int8.onnx", 5], axis=1) / np.linalg.norm(expected, axis=1)
    assert cosines.min() > 0.9
    assert (tmp_path / "int8.onnx").stat().st_size < 0.5 * (tmp_path / "nano.onnx").stat().st_size
    assert "uint8 [batch, 128, 64, 3]" in (tmp_path / "nano.onnx.md").read_text()


def test_programs_of_torch_compute_the_same(nano, tmp_path):
    path = exporting.main(ExportConfig(checkpoint=nano, to="torch-export", output=tmp_path / "nano.pt2"))
    for count in (1, 5):
        pixels = images((128, 64), count)
        with torch.no_grad():
            found = torch.export.load(path).module()(torch.from_numpy(pixels))
        assert (found - features_of(nano, (128, 64), 16, pixels)).abs().max() < 1e-4
    for wrong, word in (({"norm": "half"}, "leave --norm out"), ({"int8": True}, "is for onnx"), ({"output": tmp_path / "nano.bin"}, r"\.pt2")):
        with pytest.raises(UserError, match=word):
            exporting.main(ExportConfig(checkpoint=nano, to="torch-export", **({"output": tmp_path / "other.pt2"} | wrong)))


CHECKOUT = """
    import sys
    sys.path.insert(0, {tests!r})
    from torch._six import container_abcs
    from tests.foreign_code import StandInVit

    def build(**settings):
        return StandInVit(image_size=settings["img_size"], stride=settings["stride_size"])

    deit_small_patch16_224_TransReID = build
"""


@pytest.fixture
def stand_in_checkout(tmp_path):
    package = tmp_path / "checkout" / "model" / "backbones"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "vit_pytorch.py").write_text(textwrap.dedent(CHECKOUT).format(tests=str(ROOT)))
    return tmp_path / "checkout"


def test_verification_runs_the_code_of_a_checkout(tmp_path, stand_in_checkout, monkeypatch):
    encoder = VisionTransformer(ENCODERS["vit-small"])
    initialise(encoder, torch.Generator().manual_seed(4))
    save_encoder(tmp_path / "encoder.safetensors", encoder, {})
    state = load_state(tmp_path / "encoder.safetensors", stride_px=12)
    found = compare_with_checkout(state, "transreid", stand_in_checkout)
    assert found.difference < 1e-4
    assert found.kind == "tests.foreign_code.StandInVit"
    with open(stand_in_checkout / "model" / "backbones" / "vit_pytorch.py", "a", encoding="utf-8") as file:
        file.write("\nimport yacs_that_nobody_has\n")
    with pytest.raises(UserError, match="pip install yacs_that_nobody_has"):
        compare_with_checkout(state, "transreid", stand_in_checkout)


def test_what_is_no_checkout_is_told(tmp_path):
    with pytest.raises(UserError, match="give --repo"):
        checkout_root("transreid", None)
    with pytest.raises(UserError, match="TransReID-SSL's copy"):
        checkout_root("cluster-contrast", tmp_path)
    with pytest.raises(UserError, match="tried on a stand-in"):
        checkout_root("clip-reid", tmp_path)
