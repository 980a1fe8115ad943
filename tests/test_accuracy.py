"""The benchmarks of what pre-training is worth: their runs, their tables, and that what is done is not done again."""

import importlib
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import ablations, accuracy, fidelity, finetuning
from benchmarks._parts import Part, Parts, no_rows
from personmae import pretrain
from personmae.configs import UserError
from tests.test_finetuning import mannequins, weights  # noqa: F401  (fixtures)

ROOT = Path(__file__).parent.parent


def run(folder: Path, *more: str) -> subprocess.CompletedProcess:
    small = ["--num-train-ids", "12", "--num-test-ids", "5", "--num-unlabelled", "40", "--pretrain-steps", "2", "--epochs", "1", "--seeds", "3"]
    command = [sys.executable, "benchmarks/accuracy.py", "--folder", str(folder), *small, "--output", str(folder / "accuracy.json"), *more]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)


def test_parts_add_up(tmp_path):
    first = run(tmp_path, "--tasks", "holistic", "--starts", "personmae")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "pretrain-personmae-seed3: done" in first.stdout
    second = run(tmp_path, "--tasks", "holistic", "zero-shot", "--starts", "scratch", "personmae")
    assert second.returncode == 0, second.stdout + second.stderr
    ended = [line for line in second.stdout.splitlines() if ": done in" in line]
    assert sorted(line.split(":")[0] for line in ended) == ["holistic-scratch-seed3", "zero-shot-personmae-seed3"]
    record = json.loads((tmp_path / "accuracy.json").read_text())
    found = {(row["task"], row["start"], row["model"]): row for row in record["results"]}
    for start in ("scratch", "personmae"):
        for model in ("initial weights", "last epoch", "best epoch"):
            assert 0 < found["holistic", start, model]["mAP"] < 1
    assert found["zero-shot", "personmae", "mean, whitened"]["commit"] == record["commit"]
    assert record["settings"]["missing"] == []
    table = [line for line in second.stdout.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[:2] for line in table[1:]] == [["| holistic", "scratch"], ["| holistic", "personmae"], ["| zero-shot", "personmae"]]


@pytest.mark.parametrize("scale", accuracy.SCALES)
def test_every_run_of_both_scales_is_understood(tmp_path, scale):
    size, encoder = accuracy.SCALES[scale].size, accuracy.SCALES[scale].encoder
    numbers = {"seeds": [0], "pretrain_steps": 8, "equal_time": 1.5, "epochs": None}
    options = Namespace(folder=tmp_path, scale=scale, starts=list(accuracy.STARTS), tasks=list(accuracy.TASKS), **numbers)
    first, then = accuracy.parts_of(options, accuracy.Sets("u", "l", "o", "s"))
    assert {part.name: pretrain.from_command_line(part.command[3:]).schedule.steps for part in first} == {
        "pretrain-mae-seed0": 8,
        "pretrain-mae-equal-time-seed0": 12,
        "pretrain-personmae-seed0": 8,
    }
    trained = [part for part in then if "train" in part.command]
    assert len(trained) == 4 * 4
    for part in trained:
        module = importlib.import_module(f"personmae.tasks.{part.about['task']}")
        config = module.from_command_line(list(part.command[4:]))
        assert config.model.image_size == size
        assert config.init == (f"random:{encoder}" if part.about["start"] == "scratch" else str(tmp_path / f"{part.about['start']}-seed0"))


def test_sets_of_the_users_own(tmp_path, monkeypatch, capsys):
    accuracy.draw_cities(Namespace(folder=tmp_path, num_train_ids=12, num_test_ids=5, num_unlabelled=40, tasks=["holistic"], scale="nano"))
    city, own = tmp_path / "rivermouth", tmp_path / "own"
    flags = ("--data", f"market1501={city}", "--unlabelled", str(city / "unlabelled"))
    for wrong, said in (
        ((*flags, "--tasks", "occluded"), "--tasks occluded needs --occluded-data"),
        (flags[2:], "--unlabelled goes with --data"),
        ((*flags[:2], "--tasks", "holistic"), "--data needs --unlabelled"),
    ):
        monkeypatch.setattr(sys, "argv", ["accuracy.py", *wrong])
        with pytest.raises(SystemExit):
            accuracy.main()
        assert said in capsys.readouterr().err
    assert run(own, *flags[:2], "--tasks", "holistic", "--starts", "scratch").returncode == 0
    assert not (own / "rivermouth").exists()
    record = json.loads((own / "accuracy.json").read_text())
    assert {row["task"] for row in record["results"]} == {"holistic"}


def test_a_failed_part_is_said(tmp_path, capsys):
    arguments = ("train", "holistic", "nano", "--init", "random:vit-nano", "--data", str(tmp_path / "nowhere"), "--run-dir", str(tmp_path / "run"))
    part = Part("holistic-scratch-seed0", {}, ("-m", "personmae", *arguments), no_rows)
    never = Part("never", {}, (), no_rows)
    parts = Parts(tmp_path, jobs=1)
    parts.run([part])
    assert parts.failed == [part.name]
    assert parts.rows([part, never]) == []
    assert not parts.say_what_is_not_there([part, never])
    said = capsys.readouterr().out
    assert "holistic-scratch-seed0: failed (2)" in said
    assert "missing: never" in said
    assert "nowhere" in (tmp_path / "logs" / "holistic-scratch-seed0.txt").read_text()


def test_a_part_of_other_settings_is_not_taken(tmp_path):
    part = Part("one", {}, ("-c", "pass"), lambda: [{"mAP": 1.0}])
    parts = Parts(tmp_path, jobs=1)
    parts.run([part])
    assert [row["mAP"] for row in parts.rows([part])] == [1.0]
    other = Part("one", {}, ("-c", "print()"), no_rows)
    for ask in (parts.run, parts.rows, parts.missing):
        with pytest.raises(UserError, match=r"one\.json is of a run with other settings"):
            ask([other])


def test_variants_at_equal_steps_and_time(tmp_path, monkeypatch, capsys):
    """The variant whose step takes less time has a run with more of them; the one that fails keeps no other from its scores."""
    broken = {"A1 target A": ("--no-such-flag",)}
    monkeypatch.setattr(ablations, "VARIANTS", {**ablations.VARIANTS, **broken})
    monkeypatch.setattr(ablations, "SETS", {"occluded": "occluded"})
    # As on a machine where one is half as fast again.
    monkeypatch.setattr(ablations, "steps_in_equal_time", lambda rows, steps: {"A4 pixels only": steps + 1})
    small = ["--num-unlabelled", "40", "--num-test-ids", "5", "--steps", "2", "--seeds", "3", "--output", str(tmp_path / "ablations.json")]
    monkeypatch.setattr(sys, "argv", ["ablations.py", "--folder", str(tmp_path), *small, "--variants", "A4 pixels only", "A1 target A"])
    assert ablations.main() == 1
    said = capsys.readouterr().out
    assert "failed: A1-target-A-equal-steps-seed3" in said
    record = json.loads((tmp_path / "ablations.json").read_text())
    runs = {(row["variant"], row["equal"], row["steps"]) for row in record["results"]}
    assert runs == {("full", "steps", 2), ("A4 pixels only", "steps", 2), ("A4 pixels only", "time", 3)}
    assert {row["set"] for row in record["results"]} == {"occluded"}
    lines = [line.split(" | ") for line in said.splitlines() if line.startswith("| A") or line.startswith("| full")]
    full, pixels, target = lines
    assert full[1] == full[3].removesuffix(" |") != "missing"
    assert pixels[1] != pixels[3].removesuffix(" |")
    assert (pixels[2], target[1]) == ("3", "missing")


def test_steps_in_equal_time():
    speeds = [("full", 100.0), ("full", 80.0), ("full", 101.0), ("a", 150.0), ("b", 104.0)]
    rows = [{"variant": name, "images_per_second": speed} for name, speed in speeds]
    assert ablations.steps_in_equal_time(rows, 1000) == {"a": 1500}
    assert ablations.steps_in_equal_time(rows[3:], 1000) == {}


def test_the_fast_path_is_judged_by_the_plain_one(tmp_path, monkeypatch, capsys):
    small = ["--num-unlabelled", "40", "--num-test-ids", "5", "--steps", "3", "--seeds", "1", "--batch-size", "4", "--device", "cpu"]
    monkeypatch.setattr(fidelity, "WAYS_OF", {"cpu": ("plain", "bf16")})
    monkeypatch.setattr(sys, "argv", ["fidelity.py", "--folder", str(tmp_path), *small, "--output", str(tmp_path / "fidelity.json")])
    assert fidelity.main() == 0
    assert "not measured: needs a GPU" in capsys.readouterr().out
    rows = json.loads((tmp_path / "fidelity.json").read_text())["results"]
    (verdict,) = (row for row in rows if "judged" in row)
    # Other pixels (Pillow's are the plain ones) and other roundings, but nearly the same.
    assert 0 < verdict["largest_difference"] < 0.01


def test_verdicts():
    runs = [("plain", seed, 0.0) for seed in (0, 1)] + [("far", seed, 0.01) for seed in (0, 1)]
    losses = [{"way": way, "seed": seed, "window_losses": [1.0 + 0.1 * seed, 0.5 + shift]} for way, seed, shift in runs]
    scores = [{"way": way, "seed": seed, "model": "mean, whitened", "mAP": 0.3 + 0.1 * seed} for way in ("plain", "far") for seed in (0, 1)]
    verdict = fidelity.judge("far", losses, scores)
    assert verdict["largest_difference"] == pytest.approx(0.02)
    assert not verdict["holds"]
    assert "DIFFERS" in fidelity.in_words(verdict)
    losses = [{**row, "window_losses": [row["window_losses"][0], 0.5 + 0.1 * row["seed"] + (0.001 if row["way"] == "far" else 0)]} for row in losses]
    verdict = fidelity.judge("far", losses, scores)
    assert (verdict["largest_difference"], verdict["largest_share_of_spread"]) == (pytest.approx(0.002), pytest.approx(0.01))
    assert verdict["holds"]
    worse = [{**row, "mAP": row["mAP"] - 0.2} if row["way"] == "far" else row for row in scores]
    assert not fidelity.judge("far", losses, worse)["holds"]
    alone = fidelity.judge("far", *([row for row in rows if row["seed"] == 0] for rows in (losses, worse)))
    assert alone["holds"]
    assert "one seed" in fidelity.in_words(alone)


def test_both_starts_of_a_task(mannequins, weights, tmp_path, monkeypatch, capsys):  # noqa: F811
    short = ["--schedule.epochs", "1", "--schedule.warmup-epochs", "0"]
    small = ["--model.image-size", "64", "32", "--num-people", "4", "--model.stride-px", "8", *short]
    command = ["finetuning.py", "--init", str(weights), "--data", str(mannequins), "--tasks", "occluded", "--seeds", "0", "1"]
    where = ["--folder", str(tmp_path / "runs"), "--output", str(tmp_path / "finetuning.json")]
    monkeypatch.setattr(sys, "argv", [*command, *where, "--", *small, "--device", "cpu"])
    finetuning.main()
    text = (tmp_path / "finetuning.json").read_text()
    assert str(weights.parent) not in text
    rows = json.loads(text)["results"]
    assert {(row["start"], row["seed"], row["model"]) for row in rows} == {
        (start, seed, model)
        for start in ("pre-trained", "from nothing")
        for seed in (0, 1)
        for model in ("initial weights", "last epoch", "best epoch")
    }
    assert len(list((tmp_path / "runs").iterdir())) == 4
    said = capsys.readouterr().out
    assert "occluded  from nothing  last epoch" in said
    monkeypatch.setattr(sys, "argv", [*command[:5], "--tasks", "uda"])
    with pytest.raises(SystemExit):
        finetuning.main()
