"""FeatureExtractor: every kind of image gives the features of its file; folders with broken files; fine-tuned models."""

import numpy as np
import pytest
import torch
from PIL import Image

import personmae
from personmae.configs import UserError
from personmae.data.images import resize
from personmae.interop.exports import export_state, write_export
from personmae.interop.initial_weights import load_state
from personmae.models.reid import ReidConfig, ReidEncoder
from personmae.models.vit import VisionTransformer, initialise
from personmae.models.weights import load_encoder, save_encoder, save_reid
from personmae.models.zoo import ENCODERS
from personmae.recipes.programs import ExtractConfig
from personmae.tasks import extracting


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder like a run's, with a vit-nano."""
    folder = tmp_path_factory.mktemp("run")
    encoder = VisionTransformer(ENCODERS["vit-nano"])
    initialise(encoder, torch.Generator().manual_seed(0))
    save_encoder(folder / "encoder.safetensors", encoder, {})
    return folder


@pytest.fixture
def crops(tmp_path):
    """Five pictures of different sizes, one in a folder below, and two files that are none."""
    folder = tmp_path / "crops"
    (folder / "below").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(5):
        pixels = rng.integers(0, 256, (90 + 13 * number, 50 + number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / ("below/4.png" if number == 4 else f"{number}.png"))
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff half a picture")
    (folder / "notes.txt").write_text("no picture")
    return folder


def pixels_of(path):
    return np.asarray(Image.open(path).convert("RGB"))


def test_features_are_those_of_the_encoder_at_unit_length(run, crops):
    extractor = personmae.FeatureExtractor(run, batch_size=2)
    paths = [crops / f"{number}.png" for number in range(4)]
    found = extractor(paths)
    batch = torch.from_numpy(np.stack([resize(pixels_of(path), (128, 64)) for path in paths]))
    with torch.no_grad():
        expected = load_encoder(run / "encoder.safetensors").describe(batch)
    assert torch.allclose(found, torch.nn.functional.normalize(expected["class"]), atol=1e-5)
    assert (found.dtype, tuple(found.shape), extractor.feature_dim) == (torch.float32, (4, 128), 128)
    mean = personmae.FeatureExtractor(run, feature="mean")(paths)
    assert torch.allclose(mean, torch.nn.functional.normalize(expected["mean"]), atol=1e-5)


def test_every_kind_of_image_gives_the_same(run, crops):
    extractor = personmae.FeatureExtractor(run)
    path = crops / "2.png"
    pixels = pixels_of(path)
    expected = extractor(path)
    upright = torch.from_numpy(pixels.copy())
    kinds = [str(path), [path], pixels, upright, upright.permute(2, 0, 1).float() / 255, Image.open(path), pixels[None], [Image.open(path)]]
    for image in kinds:
        found = extractor(image)
        assert found.shape == (1, 128)
        assert torch.allclose(found, expected, atol=1e-5), type(image)
    assert extractor([]).shape == (0, 128)
    both = extractor([pixels, str(crops / "1.png")])
    assert torch.allclose(both[:1], expected, atol=1e-5)


def test_wrong_images_are_told(run, crops):
    extractor = personmae.FeatureExtractor(run)
    wrong = {
        r"values in \[0, 1\]": torch.randn(3, 128, 64) * 3,
        r"uint8 RGB": np.zeros((128, 64, 4), np.uint8),
        r"\[H, W, 3\] or": np.zeros((128, 64), np.uint8),
        r"float image is a tensor": torch.zeros(128, 64, 3),
        r"not int": 7,
        r"broken\.jpg": crops / "broken.jpg",
        r"is a folder": crops,
        r"nowhere": crops / "nowhere.png",
    }
    for word, image in wrong.items():
        with pytest.raises(UserError, match=word):
            extractor(image)
    for settings, word in (({"feature": "both"}, "class and mean"), ({"batch_size": 0}, "at least 1"), ({"device": "tpu"}, "unknown device")):
        with pytest.raises(UserError, match=word):
            personmae.FeatureExtractor(run, **settings)
    with pytest.raises(UserError):
        personmae.FeatureExtractor(crops)


def test_a_folder_with_broken_files(run, crops, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    said = []
    found = extracting.main(ExtractConfig(source=crops, output=tmp_path / "out" / "f.npz", checkpoint=run, flip=True), say=said.append)
    assert sorted(found.names) == ["0.png", "1.png", "2.png", "3.png", "below/4.png"]
    assert [name for name, _ in found.rejected] == [str(crops / "broken.jpg")]
    assert any("broken.jpg" in str(line) for line in said)
    with np.load(tmp_path / "out" / "f.npz") as file:
        assert file["names"].tolist() == found.names
        features = file["features"]
    mirrored = [np.ascontiguousarray(resize(pixels_of(crops / name), (128, 64))[:, ::-1]) for name in found.names]
    extractor = personmae.FeatureExtractor(run)
    # The mean of both is the same for an image and its mirror image.
    again = personmae.FeatureExtractor(run, flip=True)(mirrored)
    assert np.abs(features - again.numpy()).max() < 1e-5
    assert np.abs(features - extractor(mirrored).numpy()).max() > 1e-4
    with pytest.raises(UserError, match=r"\.npz"):
        extracting.main(ExtractConfig(source=crops, output=tmp_path / "f.csv", checkpoint=run))


def test_a_fine_tuned_model_with_cameras_is_taken_before_its_encoder(run, crops, tmp_path):
    model = ReidEncoder(load_encoder(run / "encoder.safetensors"), ReidConfig(image_size=(128, 64), stride_px=12, camera_weight=3.0), num_cameras=3)
    save_reid(tmp_path / "reid.safetensors", model.eval(), None, {})
    extractor = personmae.FeatureExtractor(tmp_path)
    batch = torch.from_numpy(resize(pixels_of(crops / "0.png"), (128, 64)))[None]
    with torch.no_grad():
        expected = model.describe(batch, torch.tensor([-1]))["feature"]
    assert torch.allclose(extractor(crops / "0.png"), torch.nn.functional.normalize(expected), atol=1e-5)
    with pytest.raises(UserError, match="leave image_size out"):
        personmae.FeatureExtractor(tmp_path, image_size=(256, 128))


@pytest.mark.parametrize("feature", ["class", "mean"])
def test_an_export_with_overlapping_patches_keeps_its_stride(run, crops, tmp_path, feature):
    write_export(tmp_path / "w.pth", export_state(load_state(run, image_size=(128, 64), stride_px=12), "transreid"))
    extractor = personmae.FeatureExtractor(tmp_path / "w.pth", feature=feature)
    model = ReidEncoder(load_encoder(run / "encoder.safetensors"), ReidConfig(image_size=(128, 64), stride_px=12, feature=feature, drop_path=0.0))
    batch = torch.from_numpy(resize(pixels_of(crops / "0.png"), (128, 64)))[None]
    with torch.no_grad():
        expected = model.eval().describe(batch)["feature"]
    assert torch.allclose(extractor(crops / "0.png"), torch.nn.functional.normalize(expected), atol=1e-5)


def test_identities_tell_extractors_apart(run, tmp_path):
    other = load_encoder(run / "encoder.safetensors")
    other.norm.bias.data += 1e-3
    save_encoder(tmp_path / "encoder.safetensors", other, {})
    makers = [{}, {"flip": True}, {"feature": "mean"}, {"image_size": (256, 128)}]
    identities = [personmae.FeatureExtractor(run, **settings).identity for settings in makers]
    identities.append(personmae.FeatureExtractor(tmp_path).identity)
    assert len(set(identities)) == len(identities)
    assert personmae.FeatureExtractor(run).identity == identities[0]
