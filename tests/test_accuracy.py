"""The benchmarks of what pre-training is worth: their runs, their tables, and that what is done is not done again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import finetuning
from benchmarks._parts import Part, Parts, no_rows
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
