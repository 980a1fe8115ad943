"""personmae evaluate: several checkpoints and sets, files of features, rules, splits; what it writes, and what it refuses."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from personmae.configs import UserError
from personmae.data.reid import read_market_layout
from personmae.evaluation import features
from personmae.evaluation.conventions import CONVENTIONS
from personmae.evaluation.feature_files import FeatureFile, write_feature_file
from personmae.evaluation.inputs import labels_of_set
from personmae.evaluation.protocol import evaluate_features
from personmae.evaluation.ranking import Labels
from personmae.models.vit import VisionTransformer, VitConfig, initialise
from personmae.models.weights import save_encoder
from personmae.recipes.programs import RetrievalConfig
from personmae.tasks import retrieval

VIT = VitConfig(image_size=(32, 16), patch_px=8, width=32, depth=1, num_heads=2)


def draw_set(root: Path, seed: int, num_people: int = 5) -> Path:
    """A small set in Market-1501's layout: each person has a colour, each camera a tint."""
    generator = np.random.default_rng(seed)
    for person in range(1, num_people + 1):
        colour = generator.integers(0, 200, 3)
        for camera in range(1, 4):
            folder = root / ("query" if camera == 1 else "bounding_box_test")
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.clip(colour + 10 * camera + generator.normal(0, 25, (40, 20, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{person:04d}_c{camera}s1_000001_00.jpg")
    return root


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("retrieval")
    for seed in (0, 1):
        encoder = VisionTransformer(VIT)
        initialise(encoder, torch.Generator().manual_seed(seed))
        save_encoder(folder / f"encoder{seed}.safetensors", encoder, {})
    return folder, draw_set(folder / "one", 0), draw_set(folder / "two", 1, num_people=7)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def config(**settings) -> RetrievalConfig:
    return RetrievalConfig(**{"compare": False, "num_resamples": 50, **settings})


def test_several_checkpoints_and_sets_in_one_call(drawn, tmp_path):
    folder, one, two = drawn
    said: list[str] = []
    checkpoints = (folder / "encoder0.safetensors", folder / "encoder1.safetensors")
    rows = retrieval.main(config(checkpoint=checkpoints, data=(str(one), f"market-layout={two}"), output=tmp_path / "out", page=True), said.append)
    assert [(Path(row["checkpoint"]).name, row["set"], row["feature"]) for row in rows] == [
        (checkpoint.name, name, feature) for checkpoint in checkpoints for name in ("one", "two") for feature in ("class", "mean")
    ]
    assert {row["num_queries"] for row in rows if row["set"] == "two"} == {7}
    # Each checkpoint has a folder of its own: none overwrites another's.
    for number in (0, 1):
        for name, num_people in (("one", 5), ("two", 7)):
            found = tmp_path / "out" / f"encoder{number}" / name
            content = json.loads((found / "scores.json").read_text())
            assert content["checkpoint"].endswith(f"encoder{number}.safetensors")
            assert content["scores"]["mean"]["convention"]["name"] == "standard"
            table = list(csv.DictReader((found / "queries.csv").open()))
            assert len(table) == num_people
            assert Path(table[0]["query"]).is_file()
            assert (found / "ranked_lists" / "index.html").is_file()
    table = (tmp_path / "out" / "table.txt").read_text()
    assert "encoder1: mean" in table
    assert table.strip() in "\n".join(said)
    with (tmp_path / "out" / "scores.csv").open() as file:
        listed = list(csv.DictReader(file))
    assert [(row["set"], float(row["mAP"])) for row in listed] == [(row["set"], row["mAP"]) for row in rows]


def test_the_scores_are_those_of_the_protocol(drawn):
    folder, one, _ = drawn
    reid_set = read_market_layout(one)
    encoder = VisionTransformer(VIT)
    initialise(encoder, torch.Generator().manual_seed(0))

    def describe(images, mirrored):
        pixels = [np.asarray(Image.open(image.path).convert("RGB").resize((16, 32), Image.Resampling.BILINEAR)) for image in images]
        batch = torch.from_numpy(np.stack([image[:, ::-1] if mirrored else image for image in pixels]).copy())
        with torch.no_grad():
            return encoder.eval().describe(batch)["mean"]

    query, gallery = labels_of_set(reid_set)
    parts = [[describe(images, mirrored) for images in (reid_set.query, reid_set.gallery)] for mirrored in (False, True)]
    for settings, options in (
        ({}, {}),
        ({"convention": "layumi"}, {"convention": "layumi"}),
        ({"metric": "euclidean"}, {"metric": "euclidean"}),
        ({"flip": True}, {"flipped": tuple(parts[1])}),
        ({"expand": True}, {"expansion": True}),
        ({"rerank": "own"}, {"rerank": True}),
        ({"roc": True}, {"roc": True}),
    ):
        (row,) = (
            row
            for row in retrieval.main(config(checkpoint=(folder / "encoder0.safetensors",), data=(str(one),), **settings), lambda text: None)
            if row["feature"].split(", ")[0] == "mean"
        )
        found = evaluate_features(*parts[0], query.people, gallery.people, query.cameras, gallery.cameras, bootstrap=None, **options).row()
        # The resizing is another one: the features are nearly the same.
        assert row["mAP"] == pytest.approx(found["mAP"], abs=0.15), settings
        assert row["convention"] == found["convention"]
        assert row["metric"] == found["metric"]
        assert {name for name in row if "fpr" in name.lower()} == {name for name in found if "fpr" in name.lower()}


def test_files_of_features(drawn, tmp_path):
    _, one, _ = drawn
    reid_set = read_market_layout(one)
    query, gallery = labels_of_set(reid_set)
    generator = np.random.default_rng(0)
    drawn_features = generator.normal(size=(len(query), 8)).astype(np.float32), generator.normal(size=(len(gallery), 8)).astype(np.float32)
    write_feature_file(tmp_path / "mine.npz", FeatureFile(*drawn_features, query, gallery))
    said: list[str] = []
    (row,) = retrieval.main(config(features=(tmp_path / "mine.npz",), convention="market-matlab", output=tmp_path / "out"), said.append)
    expected = evaluate_features(*drawn_features, query.people, gallery.people, query.cameras, gallery.cameras, convention="market-matlab")
    assert row["mAP"] == pytest.approx(expected.mAP)
    assert any(CONVENTIONS["market-matlab"].about in line for line in said)
    assert json.loads((tmp_path / "out" / "mine" / "scores.json").read_text())["scores"]["features"]["mAP"] == pytest.approx(expected.mAP)
    lonely = tmp_path / "lonely.npz"
    write_feature_file(lonely, FeatureFile(*drawn_features, query, type(gallery)(gallery.people + 100, gallery.cameras)))
    with pytest.raises(UserError, match=r"lonely\.npz: none of the 5 queries"):
        retrieval.main(config(features=(lonely,)), said.append)


def test_a_second_evaluation_reads_the_features_that_were_kept(drawn, tmp_path, monkeypatch):
    folder, one, _ = drawn
    settings = config(checkpoint=(folder / "encoder0.safetensors",), data=(str(one),))
    first = retrieval.main(settings, lambda text: None)

    def describe(*arguments):
        raise AssertionError("computed again")

    monkeypatch.setattr(features, "describe_batch", describe)
    assert retrieval.main(settings, lambda text: None) == first
    with pytest.raises(AssertionError, match="computed again"):
        retrieval.main(config(checkpoint=settings.checkpoint, data=settings.data, cache=False), lambda text: None)


def test_all_splits_and_their_mean(drawn, tmp_path):
    folder, one, _ = drawn
    generator = np.random.default_rng(0)
    for camera in ("cam_a", "cam_b"):
        (tmp_path / "VIPeR" / camera).mkdir(parents=True)
        for person in range(632):
            Image.fromarray(generator.integers(0, 256, (16, 8, 3), dtype=np.uint8)).save(tmp_path / "VIPeR" / camera / f"{person:03d}_0.bmp")
    said: list[str] = []
    settings = config(checkpoint=(folder / "encoder0.safetensors",), data=(f"viper={tmp_path}", str(one)), split="all", num_resamples=0)
    rows = retrieval.main(settings, said.append)
    means = [row for row in rows if "mean of" in row["set"]]
    rows = [row for row in rows if "mean of" not in row["set"]]
    # Another set in the call has no part in the mean; a set found out has all its splits.
    assert len(rows) == 20 * 2 + 2
    assert len({row["set"] for row in rows}) == 21
    assert [row["set"] for row in means] == ["viper, mean of 20 splits"] * 2
    mean = np.mean([row["mAP"] for row in rows if row["feature"] == "mean" and row["folder"] == "viper"])
    assert means[1]["mAP"] == pytest.approx(mean)
    assert any(f"mean of 20 splits: mAP {mean:.2%}" in line for line in said)
    found = retrieval.main(config(**{**vars(settings), "data": (str(tmp_path / "VIPeR"),)}), said.append)
    assert sum("mean of" not in row["set"] for row in found) == 20 * 2


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"checkpoint": (Path("x"),)}, "--data"),
        ({}, "--features"),
        ({"features": (Path("x.npz"),), "data": ("y",)}, "either"),
        ({"num_resamples": 1, "features": (Path("x"),)}, "num_resamples is 1"),
        ({"features": (Path("x.npz"),), "convention": "nobody"}, "nobody"),
        ({"features": (Path("x.npz"),)}, "no such file"),
        ({"checkpoint": (Path("x.safetensors"),), "data": ("nosuch=/tmp",)}, "unknown data set 'nosuch'"),
        ({"features": (Path("x.npz"),), "flip": True}, "--flip works on images"),
        ({"features": (Path("x.npz"),), "page": True}, "--page works on images"),
        ({"checkpoint": (Path("x"),), "data": ("y",), "attention": True}, "give --page too"),
    ],
)
def test_mistakes_are_named(settings, named):
    with pytest.raises(UserError, match=named):
        retrieval.main(config(**settings), lambda text: None)


def test_an_unknown_set_is_named(drawn):
    folder, one, _ = drawn
    with pytest.raises(UserError, match="nosuch"):
        retrieval.main(config(checkpoint=(folder / "encoder0.safetensors",), data=(f"nosuch={one}",)), lambda text: None)


def test_encoders_sets_and_files_of_one_name_stay_apart(drawn, tmp_path):
    folder, one, two = drawn
    checkpoints, sets = [], []
    for number, root in ((0, one), (1, two)):
        checkpoints.append(tmp_path / f"run{number}" / "encoder.safetensors")
        checkpoints[-1].parent.mkdir()
        shutil.copy(folder / f"encoder{number}.safetensors", checkpoints[-1])
        sets.append(tmp_path / f"sets{number}" / "reid")
        shutil.copytree(root, sets[-1])
    rows = retrieval.main(config(checkpoint=tuple(checkpoints), data=tuple(map(str, sets)), output=tmp_path / "out"), lambda text: None)
    table = (tmp_path / "out" / "table.txt").read_text().splitlines()
    assert sum(line.startswith("sets") for line in table) == len(rows) == 8
    assert len(list((tmp_path / "out").rglob("scores.json"))) == 4
    assert {row["set"] for row in rows} == {"sets0-reid", "sets1-reid"}
    with pytest.raises(UserError, match="is given twice"):
        retrieval.main(config(checkpoint=(checkpoints[0], checkpoints[0]), data=(str(one),)), lambda text: None)


def test_a_path_that_is_wrong_is_told_before_anything_is_computed(drawn, monkeypatch):
    folder, one, _ = drawn
    monkeypatch.setattr(features, "describe_batch", lambda *arguments: pytest.fail("computed"))
    with pytest.raises(UserError, match="nowhere"):
        retrieval.main(config(checkpoint=(folder / "encoder0.safetensors",), data=(str(one), "/nowhere")), lambda text: None)


def test_a_set_that_is_not_what_its_name_says_is_told(drawn):
    folder, one, _ = drawn
    said: list[str] = []
    retrieval.main(config(checkpoint=(folder / "encoder0.safetensors",), data=(f"market1501={one}",)), said.append)
    assert any("not market1501 as published" in line and "query has 5 images, 3,363 fewer" in line for line in said)
    assert any(line.startswith("operators: ") for line in said)


def test_the_page_shows_the_scored_precision(drawn, tmp_path):
    folder, one, _ = drawn
    settings = config(checkpoint=(folder / "encoder0.safetensors",), data=(str(one),), convention="layumi", page=True, output=tmp_path)
    retrieval.main(settings, lambda text: None)
    place = tmp_path / "encoder0" / "one-layumi"
    expected = {row["query"]: float(row["average_precision"]) for row in csv.DictReader((place / "queries.csv").open())}
    page = (place / "ranked_lists" / "index.html").read_text()
    (found,) = re.findall(r"<script[^>]*application/json[^>]*>(.*?)</script>", page, flags=re.DOTALL)
    shown = sorted(value for row in json.loads(found)["queries"] for value in row if isinstance(value, float))
    assert all(any(abs(value - wanted) < 1e-3 for value in shown) for wanted in expected.values())


def test_features_with_pairs_of_one_kind_and_errors_of_scoring(drawn, tmp_path):
    labels = Labels(np.array([1, 1]), np.array([0, 0])), Labels(np.array([1, 1]), np.array([1, 1]))
    write_feature_file(tmp_path / "one.npz", FeatureFile(np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32), *labels))
    (row,) = retrieval.main(config(features=(tmp_path / "one.npz",), roc=True, output=tmp_path / "out"), lambda text: None)
    assert row["TPR@FPR=1e-01"] is None
    write_feature_file(tmp_path / "huge.npz", FeatureFile(np.full((2, 2), 1e200), np.full((2, 2), 1e200), *labels))
    with pytest.raises(UserError, match=r"huge\.npz: .*longer than"):
        retrieval.main(config(features=(tmp_path / "huge.npz",)), lambda text: None)
