"""Fine-tuning as a user meets it: whole runs of both tasks on mannequins, resumed, on two processes, and given bad input."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from personmae.configs import UserError
from personmae.data.images import read_image, resize
from personmae.data.mannequins import MannequinsConfig, draw_mannequins
from personmae.data.reid import open_reid_set
from personmae.evaluation.inputs import labels_of_set
from personmae.evaluation.protocol import evaluate, score
from personmae.models.vit import VisionTransformer, VitConfig, initialise
from personmae.models.weights import load_encoder, load_reid, save_encoder
from personmae.recipes.finetuning import FinetuneConfig, finetuning_presets
from personmae.recipes.programs import RetrievalConfig
from personmae.tasks import finetuning, holistic, occluded, retrieval
from personmae.tasks.model_scores import cameras_known
from personmae.training.best_epoch import BestEpoch
from personmae.training.checkpoints import list_checkpoints, load_checkpoint

ROOT = Path(__file__).parent.parent
VIT = VitConfig(image_size=(64, 32), patch_px=8, width=64, depth=2, num_heads=2)


@pytest.fixture(scope="module")
def mannequins(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mannequins")
    config = MannequinsConfig(
        size_px=(64, 32), num_train_ids=14, num_test_ids=10, num_occluded_train_ids=14, num_occluded_test_ids=8, num_unlabelled=0, num_cameras=4
    )
    draw_mannequins(folder / "set", config, progress=False)
    return folder / "set"


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A small encoder as a file of ours."""
    encoder = VisionTransformer(VIT)
    initialise(encoder, torch.Generator().manual_seed(1))
    path = tmp_path_factory.mktemp("weights") / "encoder.safetensors"
    save_encoder(path, encoder, {})
    return path


def flags(data: Path, weights: Path, run: Path, *more: str) -> list[str]:
    """Flags of a run of three short epochs."""
    small = ["--model.image-size", "64", "32", "--model.stride-px", "8", "--num-people", "4", "--images-each", "4"]
    length = ["--schedule.epochs", "3", "--schedule.warmup-epochs", "1", "--evaluate-every", "1"]
    return ["nano", "--data", str(data), "--init", str(weights), "--run-dir", str(run), *small, *length, "--log-every", "1", "--device", "cpu", *more]


def run_here(data: Path, weights: Path, run: Path, *more: str, task=holistic) -> int:
    return task.main(task.from_command_line(flags(data, weights, run, *more)))


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def scores(run: Path) -> dict[str, float]:
    (evaluation,) = json.loads((run / "evaluation.json").read_text())["evaluations"]
    return {row["model"]: row["mAP"] for row in evaluation["rows"]}


def assert_same_weights(one: Path, other: Path) -> None:
    a, b = load_file(one / "reid.safetensors"), load_file(other / "reid.safetensors")
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.fixture(scope="module")
def undisturbed(mannequins, weights, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    run_here(mannequins, weights, run)
    return run


def test_a_run_leaves_what_it_promises(undisturbed, mannequins):
    names = {path.name for path in undisturbed.iterdir()}
    wanted = {"config.json", "metrics.jsonl", "checkpoints", "evaluation", "evaluation.json", "report.html", "log.txt", "pictures"}
    assert wanted | {"reid.safetensors", "best.safetensors", "encoder.safetensors"} <= names
    lines = metrics(undisturbed)
    steps = json.loads((undisturbed / "config.json").read_text())["started"]["steps"]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    judged = [line["judged_map"] for line in lines if "judged_map" in line]
    assert len(judged) == 3
    assert {"loss", "loss_id", "loss_triplet", "accuracy", "distance_positive", "gradient_norm", "learning_rate"} <= lines[-1].keys()
    found = scores(undisturbed)
    assert list(found) == ["initial weights", "last epoch", f"best epoch ({1 + judged.index(max(judged))})"]
    page = (undisturbed / "report.html").read_text()
    curves = ("Losses by kind", "Accuracy of the classifier")
    for words in (*curves, "initial weights", "last epoch", "held-out training people", "Ranked lists set after"):
        assert words in page, words
    assert "No reconstruction" not in page
    # Held-out people are not trained on, and test people neither.
    head = load_reid(undisturbed / "reid.safetensors").head
    assert head.config.num_people == 12
    assert load_encoder(undisturbed / "encoder.safetensors").config.image_size == (64, 32)


@pytest.mark.parametrize("task", [holistic, occluded], ids=["holistic", "occluded"])
def test_the_score_rises_well_above_the_start(mannequins, weights, tmp_path, task):
    run = tmp_path / "run"
    data = mannequins if task is holistic else mannequins / "occluded"
    length = ["--schedule.epochs", "60", "--optimiser.learning-rate", "4e-3", "--best-by", "no", "--checkpoint-every", "100"]
    run_here(data, weights, run, *length, "--model.drop-path", "0.1", task=task)
    found = scores(run)
    assert found["last epoch"] > found["initial weights"] + 0.08, found
    lines = metrics(run)
    assert np.mean([line["loss"] for line in lines[-10:]]) < 0.6 * np.mean([line["loss"] for line in lines[:10]])
    assert not (run / "best.safetensors").exists()


def stopped_after(monkeypatch, number: int) -> None:
    """The next run is asked to stop in this step."""
    usual, count = finetuning.update_weights, iter(range(1, 10**6))

    def update(*arguments):
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return usual(*arguments)

    monkeypatch.setattr(finetuning, "update_weights", update)


@pytest.mark.parametrize("more", [(), ("--ema", "0.9")], ids=["plain", "averaged"])
def test_stopped_and_resumed_is_the_same_to_the_bit(mannequins, weights, undisturbed, tmp_path, monkeypatch, more):
    run = tmp_path / "run"
    if more:
        undisturbed = tmp_path / "undisturbed"
        run_here(mannequins, weights, undisturbed, *more)
    with monkeypatch.context() as patched:
        stopped_after(patched, 14)
        left = run_here(mannequins, weights, run, *more)
    steps = metrics(undisturbed)[-1]["step"]
    assert 13 < left < steps
    assert "report.html" in {path.name for path in run.iterdir()}
    assert run_here(mannequins, weights, run, *more) == steps
    assert_same_weights(undisturbed, run)
    assert scores(run) == scores(undisturbed)
    a, b = metrics(undisturbed), metrics(run)
    assert [line["step"] for line in b] == [line["step"] for line in a]
    assert [line["loss"] for line in b] == [line["loss"] for line in a]


def test_two_processes_have_the_losses_of_one(mannequins, weights, undisturbed, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "personmae/tasks/holistic.py")]
    run = tmp_path / "run"
    done = subprocess.run([*launch, *flags(mannequins, weights, run)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for one, two in zip(metrics(undisturbed), metrics(run), strict=True):
        for name in ("loss", "loss_id", "loss_triplet", "accuracy", "gradient_norm"):
            # Rounding grows from step to step.
            assert two[name] == pytest.approx(one[name], rel=1e-4 if one["step"] < 8 else 0.05), (one["step"], name)
    assert scores(run)["last epoch"] == pytest.approx(scores(undisturbed)["last epoch"], abs=0.05)


def test_accumulation_has_the_losses_of_the_whole_batch(mannequins, weights, undisturbed, tmp_path):
    run = tmp_path / "run"
    run_here(mannequins, weights, run, "--accumulation", "4")
    for one, two in zip(metrics(undisturbed)[:8], metrics(run)[:8], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4), one["step"]
        assert two["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-3), one["step"]


@pytest.mark.parametrize(
    "more",
    [
        ("--model.stride-px", "6", "--model.parts", "jpm", "--model.camera-weight", "3", "--model.drop-path", "0.2"),
        ("--model.parts", "lem", "--model.feature", "mean", "--loss.triplet", "margin", "--model.drop-path", "0.4", "--model.drop-path-by", "subset"),
        ("--optimiser.kind", "sgd", "--model.neck", "none", "--loss.label-smoothing", "0.1", "--cross-camera", "--loader.kind", "dali"),
        ("--model.image-size", "96", "32", "--occlusion.prob", "0.5", "--occlusion.fill", "noise", "--views.brightness", "0.3", "--best-by", "test"),
    ],
    ids=["transreid", "lem", "sgd", "larger"],
)
def test_other_configurations_run_and_resume(mannequins, weights, tmp_path, monkeypatch, more):
    run, whole = tmp_path / "run", tmp_path / "whole"
    with monkeypatch.context() as patched:
        stopped_after(patched, 3)
        run_here(mannequins, weights, run, "--schedule.epochs", "1", *more)
    run_here(mannequins, weights, run, "--schedule.epochs", "1", *more)
    run_here(mannequins, weights, whole, "--schedule.epochs", "1", *more)
    assert_same_weights(whole, run)
    assert scores(run) == scores(whole)
    overlapping = "6" in more
    assert (run / "encoder.safetensors").exists() is not overlapping
    assert load_reid(run / "reid.safetensors").encoder.config.image_size == ((96, 32) if "96" in more else (64, 32))


def evaluated(checkpoint: Path, data: Path, **options) -> float:
    (row,) = retrieval.main(RetrievalConfig(checkpoint=(checkpoint,), data=(str(data),), cache=False, device="cpu", **options), say=lambda _: None)
    return row["mAP"]


def test_the_written_model_gives_the_scores_of_the_run(undisturbed, mannequins, tmp_path):
    model = load_reid(undisturbed / "reid.safetensors").encoder
    found = evaluate(model.describe, open_reid_set(None, mannequins), size=(64, 32))
    assert found.scores["feature"].mAP == pytest.approx(scores(undisturbed)["last epoch"], abs=1e-9)
    # By the command, of the run, and of a file anywhere.
    assert evaluated(undisturbed, mannequins) == pytest.approx(scores(undisturbed)["last epoch"], abs=1e-9)
    best = next(score for name, score in scores(undisturbed).items() if name.startswith("best"))
    shutil.copy(undisturbed / "best.safetensors", tmp_path / "any.safetensors")
    found_best = evaluated(tmp_path / "any.safetensors", mannequins, output=tmp_path / "scores", page=True, flip=False)
    assert found_best == pytest.approx(best, abs=1e-9)
    assert list((tmp_path / "scores").rglob("scores.json"))
    assert list((tmp_path / "scores").rglob("*.html"))
    with pytest.raises(UserError, match="no --attention"):
        evaluated(undisturbed, mannequins, attention=True, page=True, output=tmp_path)


def test_camera_embeddings_are_those_of_the_training_set(mannequins, weights, tmp_path):
    run = tmp_path / "run"
    run_here(mannequins, weights, run, "--schedule.epochs", "2", "--model.camera-weight", "40", "--best-by", "no", "--test", str(mannequins))
    own = evaluated(run, mannequins)
    assert own == pytest.approx(scores(run)["last epoch"], abs=1e-9)
    # By hand: one image after the other, each with its own camera.
    model, _, notes = load_reid(run / "reid.safetensors")
    reid_set = open_reid_set(None, mannequins)
    known = cameras_known(notes, reid_set)
    assert known == {1: 0, 2: 1, 3: 2, 4: 3}
    features = []
    for image in [*reid_set.query, *reid_set.gallery]:
        pixels = torch.from_numpy(resize(read_image(image.path), (64, 32)))[None]
        features.append(model.describe(pixels, torch.tensor([known[image.camera]]))["feature"])
    joined = torch.cat(features).detach()
    expected = score(joined[: len(reid_set.query)], joined[len(reid_set.query) :], *labels_of_set(reid_set)).mAP
    assert own == pytest.approx(expected, abs=1e-6)
    # Of another set the numbers mean other cameras.
    assert cameras_known(notes, replace(reid_set, name="another")) == {}
    assert cameras_known(notes, replace(reid_set, name=f"{reid_set.name} held out")) == known


@pytest.mark.gpu
def test_a_gpu_has_the_losses_of_the_cpu_in_fp32(mannequins, weights, undisturbed, tmp_path):
    run = tmp_path / "run"
    run_here(mannequins, weights, run, "--device", "cuda", "--precision", "fp32", "--compile", "no", "--loader.kind", "threads")
    for one, two in zip(metrics(undisturbed)[:6], metrics(run)[:6], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3), one["step"]


@pytest.mark.gpu
@pytest.mark.parametrize("more", [(), ("--model.parts", "jpm", "--model.stride-px", "6", "--accumulation", "2", "--model.drop-path", "0.1")])
def test_a_gpu_run_in_bf16_ends_with_scores(mannequins, weights, tmp_path, more):
    run_here(mannequins, weights, tmp_path / "run", "--device", "cuda", *more)
    assert scores(tmp_path / "run")["last epoch"] > 0


def test_from_nothing(mannequins, weights, tmp_path):
    run_here(mannequins, weights, tmp_path / "run", "--init", "random:vit-nano", "--model.stride-px", "16", "--schedule.epochs", "1")
    assert "vit-nano from nothing" in (tmp_path / "run" / "log.txt").read_text()


def test_the_first_of_equal_scores_is_the_best(tmp_path):
    best = BestEpoch(tmp_path / "best.safetensors")
    assert [best.is_better(score, epoch) for epoch, score in enumerate([0.2, 0.2, 0.1, 0.3], 1)] == [True, False, False, True]
    again = BestEpoch(tmp_path / "best.safetensors")
    again.restore(best.state())
    assert (again.score, again.epoch) == (0.3, 4)


def test_recipes_are_the_published_ones():
    presets = {name: config for name, (_, config) in finetuning_presets("holistic").items()}
    transreid, male = presets["transreid"], presets["male"]
    assert (transreid.num_people, transreid.images_each, transreid.optimiser.kind, transreid.optimiser.learning_rate) == (16, 4, "sgd", 4e-4)
    assert (transreid.schedule.epochs, transreid.schedule.warmup_epochs, transreid.loss.triplet, transreid.model.neck) == (120, 20, "soft", "bn")
    assert (male.num_people, male.images_each, male.optimiser.kind, male.optimiser.learning_rate) == (8, 8, "adamw", 8e-3)
    assert (male.optimiser.layer_decay, male.optimiser.weight_decay, male.schedule.epochs, male.model.neck) == (0.4, 0.05, 100, "none")
    assert presets["transreid-384"].model.image_size == (384, 128)
    assert presets["transreid-jpm"].model.stride_px == 12
    for name, (_, config) in finetuning_presets("occluded").items():
        assert (config.occlusion.prob, config.occlusion.fill) == (0.5, "others")
        same = {field: getattr(presets[name], field) for field in ("occlusion", "views", "run_dir")}
        assert replace(config, **same) == presets[name]
    erasing = transreid.occlusion
    assert (erasing.fill, erasing.prob, erasing.scale, transreid.views.erasing_prob) == ("noise", 0.5, (0.02, 1 / 3), 0.0)


def test_commands_of_the_readme_are_read():
    lines = [line.split() for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("    ")]
    found = []
    for words in lines:
        if words[:2] == ["personmae", "train"]:
            found.append((words[2], words[3:]))
        elif words[0] == "torchrun" and "personmae/tasks/" in " ".join(words):
            place = next(number for number, word in enumerate(words) if word.startswith("personmae/tasks/"))
            found.append((Path(words[place]).stem, words[place + 1 :]))
    assert {task for task, _ in found} == {"holistic", "occluded", "usl", "uda"}
    for task, words in found:
        config = importlib.import_module(f"personmae.tasks.{task}").from_command_line(words)
        assert config.data is not None
        assert config.init is not None


def message(data, weights, run, *more) -> str:
    with pytest.raises(UserError) as error:
        run_here(data, weights, run, *more)
    return str(error.value)


def test_mistakes_are_told_in_a_sentence(mannequins, weights, tmp_path):
    run = tmp_path / "run"
    (tmp_path / "empty").mkdir()
    assert "set --num-people 12 or lower" in message(mannequins, weights, run, "--num-people", "13")
    assert "there is no encoder 'vit-huge'" in message(mannequins, weights, run, "--init", "random:vit-huge")
    assert "nowhere.safetensors" in message(mannequins, weights, run, "--init", str(tmp_path / "nowhere.safetensors"))
    assert str(tmp_path / "empty") in message(tmp_path / "empty", weights, run)
    assert "multiple of 3" in message(mannequins, weights, run, "--accumulation", "3")
    assert "occlusion.fill others needs 2 people" in message(mannequins, weights, run, "--accumulation", "4", "--occlusion.prob", "0.5")
    assert "stride_px is 20, more than a patch" in message(mannequins, weights, run, "--model.stride-px", "20")
    with pytest.raises(UserError, match="--data NAME=FOLDER"):
        holistic.main(replace(FinetuneConfig(), run_dir=run))
    with pytest.raises(UserError, match="--init RUN"):
        holistic.main(replace(FinetuneConfig(), run_dir=run, data=str(mannequins)))
    for wrong, word in (({"ema": 1.0}, "ema"), ({"hold_out": 0.0, "best_by": "held-out"}, "hold_out"), ({"evaluate_every": 0}, "evaluate_every")):
        with pytest.raises(UserError, match=word):
            FinetuneConfig(**wrong)


def test_one_camera_and_one_image_each(mannequins, weights, tmp_path):
    train = mannequins / "bounding_box_train"
    single = tmp_path / "single"
    shutil.copytree(mannequins, single)
    for path in (single / "bounding_box_train").iterdir():
        if "_c1" not in path.name:
            path.unlink()
    assert "seen by two cameras" in message(single, weights, tmp_path / "a")
    assert "at least 2 cameras, and there are 1" in message(single, weights, tmp_path / "b", "--best-by", "no", "--model.camera-weight", "1")
    alone = tmp_path / "alone"
    shutil.copytree(mannequins, alone)
    seen: set[str] = set()
    for path in sorted((alone / "bounding_box_train").iterdir()):
        if path.name[:4] in seen:
            path.unlink()
        seen.add(path.name[:4])
    assert len(seen) == len({path.name[:4] for path in train.iterdir()})
    assert "one image alone" in message(alone, weights, tmp_path / "c", "--best-by", "no")


def test_a_run_is_not_continued_with_other_people_or_settings(mannequins, weights, undisturbed, tmp_path):
    run, data = tmp_path / "run", tmp_path / "set"
    shutil.copytree(undisturbed, run)
    assert "num_people: 4 -> 5" in message(mannequins, weights, run, "--num-people", "5")
    # Elsewhere it is the same set; with a person less it is not.
    shutil.copytree(mannequins, data)
    for path in (data / "bounding_box_train").iterdir():
        if path.name.startswith("0001_"):
            path.unlink()
    assert "was trained on other images" in message(data, weights, run)
    step, path = list_checkpoints(undisturbed / "checkpoints")[-1]
    assert load_checkpoint(path).state["best"]["epoch"] > 0
    assert step == metrics(undisturbed)[-1]["step"]
