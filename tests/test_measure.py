"""The benchmarks' measuring, and the loaders' benchmark on a few images."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks._measure import Spread, commit, spread, time_calls, write_result

ROOT = Path(__file__).resolve().parent.parent


def test_spread():
    assert spread([3.0]) == Spread(3.0, 3.0, 3.0, 1)
    assert spread([float(value) for value in range(11)]) == Spread(5.0, 1.0, 9.0, 11)
    assert spread([5.0, 1.0]).median == 3.0
    with pytest.raises(ValueError, match="at least one"):
        spread([])


def test_calls_are_counted_after_the_warm_up(monkeypatch):
    now = [0.0]
    calls = []

    def call():
        calls.append(now[0])
        # The first three are slow, as they would be while something compiles.
        now[0] += 100 if len(calls) <= 3 else len(calls)

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    assert time_calls(call, num=5, num_warm_up=3) == spread([4.0, 5.0, 6.0, 7.0, 8.0])


def test_results_say_where_they_come_from(tmp_path):
    path = tmp_path / "new" / "speed.json"
    settings = {"batch_size": 8, "source": tmp_path, "output": ROOT / "benchmarks" / "results" / "speed.json"}
    write_result(path, "speed", settings, [{"kind": "a", "seconds": Spread(2.0, 1.0, 3.0, 9)}])
    record = json.loads(path.read_text())
    assert record["results"] == [{"kind": "a", "seconds": {"median": 2.0, "low": 1.0, "high": 3.0, "num": 9}}]
    assert record["settings"] == {"batch_size": 8, "source": tmp_path.name, "output": "benchmarks/results/speed.json"}
    assert record["commit"] == commit()
    assert record["machine"]["cores"] == len(os.sched_getaffinity(0))
    assert record["date"].endswith("+00:00")
    assert [file.name for file in path.parent.iterdir()] == ["speed.json"]


def test_the_benchmark_names_a_wrong_source(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "benchmarks/loading.py", "--source", str(tmp_path / "none"), "--output", str(tmp_path / "loading.json")]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2
    assert "No such file" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "loading.json").exists()


def test_the_benchmark_of_drawing_runs(tmp_path):
    options = ["--sizes", "64x32", "32x32", "--num-images", "4", "--num-turns", "2", "--output", str(tmp_path / "drawing.json")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "benchmarks/drawing.py", *options]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "drawing.json").read_text())["results"]
    assert [row["size"] for row in rows] == [[64, 32], [32, 32]]
    assert all(row["images_per_second"]["low"] > 0 and row["bytes_per_image"]["low"] > 100 for row in rows)
