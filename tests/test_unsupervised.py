"""Unsupervised training as a user meets it: usl and uda on mannequins, resumed, on two processes, and where no clusters are to be found."""

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

from personmae.configs import UserError
from personmae.models.identity_head import NeckedEncoder, calibrate_necks
from personmae.models.weights import load_reid
from personmae.recipes.unsupervised import UnsupervisedConfig, adaptation_presets, unsupervised_presets
from personmae.tasks import uda, unsupervised, usl
from personmae.tasks.pseudo_labelling import extract_all, of_source
from personmae.training.processes import Processes
from personmae.training.schedules import StepScheduleConfig, stepwise_rate
from personmae.visuals.cluster_sheets import choose_clusters, cluster_sheet
from tests.test_finetuning import assert_same_weights, evaluated, mannequins, metrics, run_here, scores, weights  # noqa: F401  (two are fixtures)

ROOT = Path(__file__).parent.parent
SMALL = ["--model.image-size", "64", "32", "--model.stride-px", "8", "--num-people", "4", "--images-each", "4", "--log-every", "1"]
SHORT = ["--steps-per-epoch", "6", "--schedule.epochs", "3", "--pseudo.k1", "10", "--pseudo.k2", "3", "--device", "cpu"]


@pytest.fixture(scope="module")
def tuned(mannequins, weights, tmp_path_factory) -> Path:  # noqa: F811
    """A model that can tell people apart a little, as pre-training gives one; from other people than those of the tests."""
    run = tmp_path_factory.mktemp("tuned") / "run"
    more = ["--schedule.epochs", "30", "--optimiser.learning-rate", "4e-3", "--best-by", "no", "--checkpoint-every", "100", "--model.feature", "mean"]
    run_here(mannequins / "occluded", weights, run, *more)
    return run / "reid.safetensors"


def flags(data: Path, init: Path, run: Path, *more: str) -> list[str]:
    return ["nano", "--data", str(data), "--init", str(init), "--run-dir", str(run), *SMALL, *SHORT, *more]


def usl_here(data: Path, init: Path, run: Path, *more: str) -> int:
    return usl.main(usl.from_command_line(flags(data, init, run, *more)))


@pytest.fixture(scope="module")
def undisturbed(mannequins, tuned, tmp_path_factory) -> Path:  # noqa: F811
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert usl_here(mannequins, tuned, run) == 18
    return run


def clusters_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "clusters.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_it_promises(undisturbed, mannequins):  # noqa: F811
    found = clusters_of(undisturbed)
    assert [row["epoch"] for row in found] == [1, 2, 3]
    for row in found:
        assert row["clusters"] >= 4
        assert 0 <= row["outliers"] < 173
        assert 0 < row["purity"] <= 1
    lines = metrics(undisturbed)
    assert [line["step"] for line in lines] == list(range(1, 19))
    assert {"loss", "accuracy", "clusters", "outlier_ratio", "gradient_norm"} <= lines[-1].keys()
    assert {path.name for path in (undisturbed / "pictures").glob("clusters_*")} == {f"clusters_000{epoch}.png" for epoch in (1, 2, 3)}
    page = (undisturbed / "report.html").read_text()
    for words in ("Clusters at the start of each epoch", "Other eps, before the first epoch", "last epoch"):
        assert words in page, words
    log = (undisturbed / "log.txt").read_text()
    assert "what eps gives before the first epoch" in log
    assert (undisturbed / "eps.txt").read_text().splitlines()[0].split()[:2] == ["eps", "clusters"]
    model = load_reid(undisturbed / "reid.safetensors")
    assert isinstance(model.scored, NeckedEncoder)
    # Compared as it was trained, after the neck.
    assert evaluated(undisturbed, mannequins) == pytest.approx(scores(undisturbed)["last epoch"], abs=1e-9)


def test_it_learns_to_tell_its_clusters_apart(mannequins, tuned, tmp_path):  # noqa: F811
    """So few people make no better model of others; what is asked of the training can be seen within an epoch."""
    run = tmp_path / "run"
    # Nothing but the views changes from step to step, and the memory hardly.
    still = ["--views.erasing-prob", "0", "--views.pad-px", "0", "--memory.update", "mean", "--memory.momentum", "0.9"]
    usl_here(mannequins, tuned, run, "--schedule.epochs", "1", "--steps-per-epoch", "80", "--optimiser.learning-rate", "1e-3", *still)
    lines = metrics(run)
    first, last = ({name: np.mean([line[name] for line in part]) for name in ("loss", "accuracy")} for part in (lines[:10], lines[-10:]))
    assert last["loss"] < 0.7 * first["loss"]
    assert last["accuracy"] > first["accuracy"] + 0.1


def stop_in(monkeypatch, number: int) -> None:
    usual, count = unsupervised.update_weights, iter(range(1, 10**6))

    def update(*arguments):
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return usual(*arguments)

    monkeypatch.setattr(unsupervised, "update_weights", update)


@pytest.mark.parametrize("step", [6, 9])
def test_stopped_and_resumed_is_the_same_to_the_bit(mannequins, tuned, undisturbed, tmp_path, monkeypatch, step):  # noqa: F811
    """At the end of an epoch, and in the middle of one."""
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        stop_in(patched, step)
        left = usl_here(mannequins, tuned, run)
    assert step <= left < 18
    assert usl_here(mannequins, tuned, run) == 18
    assert_same_weights(undisturbed, run)
    assert clusters_of(run) == clusters_of(undisturbed)
    assert [line["loss"] for line in metrics(run)] == [line["loss"] for line in metrics(undisturbed)]


def test_two_processes_have_the_losses_of_one(mannequins, tuned, undisturbed, tmp_path):  # noqa: F811
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "personmae/tasks/usl.py")]
    run = tmp_path / "run"
    done = subprocess.run([*launch, *flags(mannequins, tuned, run)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert clusters_of(run)[0] == clusters_of(undisturbed)[0]
    for one, two in zip(metrics(undisturbed)[:6], metrics(run)[:6], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3), one["step"]


@pytest.mark.parametrize(
    "more",
    [
        ("--model.camera-weight", "2", "--memory.update", "all", "--ghost-size", "8", "--optimiser.kind", "sgd", "--accumulation", "2"),
        ("--memory.update", "mean", "--model.drop-path", "0.3", "--best-by", "test", "--evaluate-every", "1", "--occlusion.prob", "0.3"),
    ],
    ids=["cameras", "best"],
)
def test_other_configurations_run(mannequins, tuned, tmp_path, more):  # noqa: F811
    run = tmp_path / "run"
    assert usl_here(mannequins, tuned, run, "--schedule.epochs", "2", *more) == 12
    assert (run / "best.safetensors").exists() is ("test" in more)
    assert evaluated(run, mannequins) == pytest.approx(scores(run)["last epoch"], abs=1e-9)


def test_domain_adaptation(mannequins, weights, tmp_path):  # noqa: F811
    """From the holistic set to the occluded one, whose people have the same numbers: source and target share nothing but names."""
    run = tmp_path / "run"
    arguments = flags(mannequins / "occluded", weights, run, "--source", str(mannequins), "--source-epochs", "2", "--ghost-size", "None")
    steps = uda.main(uda.from_command_line(arguments))
    assert (run / "source" / "reid.safetensors").exists()
    assert (run / "report.html").exists()
    assert json.loads((run / "config.json").read_text())["init"] == str(run / "source" / "reid.safetensors")
    # The supervised recipe has its own batch.
    assert steps == 18 + metrics(run / "source")[-1]["step"]
    assert "the encoder of a fine-tuned model" in (run / "log.txt").read_text()
    # Begun again, all of it is there.
    before = (run / "source" / "checkpoints").stat().st_mtime_ns
    assert uda.main(uda.from_command_line(arguments)) == steps
    assert (run / "source" / "checkpoints").stat().st_mtime_ns == before
    for missing, word in (("--source", "--source NAME=FOLDER"), ("--data", "--data NAME=FOLDER")):
        place = arguments.index(missing)
        with pytest.raises(UserError, match=word):
            uda.main(uda.from_command_line(arguments[:place] + arguments[place + 2 :]))


def test_joint_adaptation(mannequins, weights, tmp_path, monkeypatch):  # noqa: F811
    run, whole = tmp_path / "run", tmp_path / "whole"

    def adapt(folder: Path) -> int:
        more = ["--source", str(mannequins), "--source-epochs", "2", "--joint", "--ghost-size", "8", "--pseudo.min-samples", "2"]
        return uda.main(uda.from_command_line(flags(mannequins / "occluded", weights, folder, *more)))

    adapt(whole)
    lines = metrics(whole)
    found = clusters_of(whole)
    # 14 people of the source, and the target's clusters.
    assert [row["clusters"] + 14 for row in found] == [lines[step]["clusters"] for step in (0, 6, 12)]
    assert evaluated(whole, mannequins / "occluded") == pytest.approx(scores(whole)["last epoch"], abs=1e-9)
    with monkeypatch.context() as patched:
        stop_in(patched, 9)
        adapt(run)
    adapt(run)
    assert_same_weights(whole, run)
    assert clusters_of(run) == found
    # Half of each batch is of either set, and those of the source come first.
    joint = ["--source", str(mannequins), "--joint", "--ghost-size", "8"]
    config = uda.target_run(uda.from_command_line([*flags(mannequins / "occluded", weights, whole), *joint]))
    train = unsupervised.open_target(config).train
    source = of_source(train)
    assert (source.sum(), (~source).sum()) == (173, 159)
    labels = np.where(source, train.labels, -1)
    labels = np.unique(labels, return_inverse=True)[1] - 1
    labels[~source] = np.arange((~source).sum()) % 20 + labels.max() + 1
    plan = unsupervised.plan_of(train, labels, config)
    for step in range(6):
        assert source[plan.step_samples(step)].tolist() == [True] * 8 + [False] * 8
    with pytest.raises(UserError, match="joint needs an even"):
        replace(config, ghost_size=None)
    with pytest.raises(UserError, match="joint needs an even"):
        replace(config, num_people=6, ghost_size=8)


def message(data, init, run, *more) -> str:
    with pytest.raises(UserError) as error:
        usl_here(data, init, run, *more)
    return str(error.value)


def test_the_neck_is_set_to_the_images(mannequins, tuned, tmp_path):  # noqa: F811
    config = usl.from_command_line(flags(mannequins, tuned, tmp_path / "run"))
    assert config.calibrate_neck
    sets = unsupervised.open_target(config)
    encoder, neck = unsupervised.build_model(config, unsupervised.initial_encoder(config)[0], sets.train)
    raw = extract_all(encoder, sets.train, config, Processes())
    calibrate_necks(neck, [torch.from_numpy(raw)])
    necked = neck.eval()((torch.from_numpy(raw),)).necked[0].detach().numpy().astype(np.float64)
    assert np.abs(necked.mean(0)).max() < 1e-3
    assert np.abs(necked.std(0) - 1).max() < 0.05
    found = extract_all(NeckedEncoder(encoder, neck), sets.train, config, Processes())
    assert np.allclose(found, necked / np.linalg.norm(necked, axis=1, keepdims=True), atol=1e-4)


def test_no_clusters(mannequins, tuned, tmp_path):  # noqa: F811
    tiny_eps = ("--pseudo.eps", "0.01")
    assert "all 173 images outliers: raise --pseudo.eps" in message(mannequins, tuned, tmp_path / "a", *tiny_eps)
    said = message(mannequins, tuned, tmp_path / "b", "--pseudo.eps", "0.99", "--pseudo.min-samples", "2")
    assert "lower --pseudo.eps" in said
    run = tmp_path / "c"
    usl_here(mannequins, tuned, run, *tiny_eps, "--if-too-few", "widen", "--schedule.epochs", "1")
    assert "trying eps 0.06" in (run / "log.txt").read_text()
    assert clusters_of(run)[0]["eps"] > 0.01


def test_one_camera_alone_and_other_mistakes(mannequins, tuned, tmp_path):  # noqa: F811
    single = tmp_path / "single"
    shutil.copytree(mannequins, single)
    for path in (single / "bounding_box_train").iterdir():
        if "_c1" not in path.name:
            path.unlink()
    more = ("--schedule.epochs", "1", "--num-people", "2", "--pseudo.min-samples", "2", "--if-too-few", "widen", "--steps-per-epoch", "2")
    assert usl_here(single, tuned, tmp_path / "run", *more) == 2
    config = usl.from_command_line(flags(mannequins, tuned, tmp_path / "x"))
    with pytest.raises(UserError, match="--init RUN"):
        usl.main(replace(config, init=None))
    with pytest.raises(UserError, match="--data NAME=FOLDER"):
        usl.main(replace(config, data=None))
    with pytest.raises(UserError, match="4 clusters cannot be shared among 3 parts"):
        usl.main(replace(config, accumulation=3))
    for wrong, word in (({"ghost_size": 3}, "ghost_size is 3"), ({"steps_per_epoch": 0}, "steps_per_epoch is 0")):
        with pytest.raises(UserError, match=word):
            replace(config, **wrong)
    with pytest.raises(UserError, match="parts jpm"):
        replace(config, model=replace(config.model, parts="jpm"))


def test_a_run_is_not_continued_with_other_settings(mannequins, tuned, undisturbed, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    assert "pseudo.eps: 0.5 -> 0.6" in message(mannequins, tuned, run, "--pseudo.eps", "0.6")


def test_recipes_are_the_published_ones():
    presets = {name: config for name, (_, config) in unsupervised_presets().items()}
    market = presets["market"]
    assert (market.pseudo.eps, market.pseudo.min_samples, market.pseudo.k1, market.pseudo.k2) == (0.6, 4, 30, 6)
    assert (market.num_people, market.images_each, market.steps_per_epoch, market.schedule.epochs) == (32, 8, 200, 50)
    assert (market.memory.temperature, market.memory.momentum, market.memory.update) == (0.05, 0.2, "hard")
    assert (market.optimiser.kind, market.optimiser.learning_rate, market.optimiser.weight_decay) == ("sgd", 3.5e-4, 5e-4)
    assert market.model.drop_path == 0.3
    assert presets["msmt17"].pseudo.eps == 0.7
    adapted = adaptation_presets()["market"][1]
    assert isinstance(adapted, UnsupervisedConfig)
    assert uda.target_run(replace(adapted, run_dir=Path("x"))) == replace(market, run_dir=Path("x"), init="x/source/reid.safetensors")
    rates = [stepwise_rate(epoch, 1.0, StepScheduleConfig()) for epoch in (0, 19, 20, 39, 40, 49)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert [stepwise_rate(epoch, 1.0, StepScheduleConfig(warmup_epochs=10)) for epoch in (0, 5, 10)] == pytest.approx([0.1, 0.55, 1])


def test_sheets_of_clusters():
    labels = np.array([0] * 9 + [1] * 5 + [2] * 2 + [-1] * 4)
    people = np.array([7] * 8 + [1] + [3] * 5 + [4, 5] + [0] * 4)
    assert choose_clusters(labels, 3) == [0, 1, 2]
    assert choose_clusters(labels, 1) == [1]
    pixels = np.full((30, 14, 3), 128, dtype=np.uint8)
    sheet = cluster_sheet(lambda _: pixels, labels, people, 3)
    plain = cluster_sheet(lambda _: pixels, labels, None, 3)
    assert sheet.size == plain.size
    colours = {colour for _, colour in sheet.getcolors(1 << 20)}
    assert {(0, 140, 100), (213, 70, 0)} <= colours
    assert not {(0, 140, 100), (213, 70, 0)} & {colour for _, colour in plain.getcolors(1 << 20)}
    assert cluster_sheet(lambda _: pixels, np.full(4, -1), None, 3) is None


@pytest.mark.gpu
def test_a_gpu_run_ends_with_scores(mannequins, tuned, tmp_path):  # noqa: F811
    usl_here(mannequins, tuned, tmp_path / "run", "--device", "cuda")
    assert scores(tmp_path / "run")["last epoch"] > 0
    assert torch.cuda.is_available()
