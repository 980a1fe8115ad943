"""Runs that are stopped, killed, restarted and changed in their number of processes end as the undisturbed one does."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from crops import SMALL, draw_crops
from safetensors.torch import load_file

from personmae import pretrain
from personmae.configs import UserError
from personmae.training.checkpoint_writer import CheckpointWriter
from personmae.training.checkpoints import list_checkpoints

ROOT = Path(pretrain.__file__).parent.parent
# 5 steps in an epoch, so that 4, 8, 9, 12 and 13 lie within one.
NUM_IMAGES, NUM_STEPS = 40, 16


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    return draw_crops(tmp_path_factory.mktemp("crops"), NUM_IMAGES)


def flags(crops, run, *more):
    where = ["--data.source", str(crops), "--data.index-dir", str(crops.parent / "index"), "--run-dir", str(run)]
    return [*SMALL, *where, "--schedule.steps", str(NUM_STEPS), "--checkpoint-every", "1000", "--picture-every", "1000", *more]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_checkpoints_by_the_clock_come_with_lines_of_the_log(crops, tmp_path):
    arguments = flags(crops, tmp_path / "run", "--schedule.steps", "7", "--log-every", "2", "--keep-last", "9", "--checkpoint-minutes", "1e-9")
    pretrain.main(pretrain.from_command_line(arguments))
    assert [step for step, _ in list_checkpoints(tmp_path / "run" / "checkpoints")] == [2, 4, 6, 7]
    assert [line["step"] for line in metrics(tmp_path / "run")] == [2, 4, 6, 7]
    arguments = flags(crops, tmp_path / "other", "--schedule.steps", "7", "--log-every", "2", "--checkpoint-minutes", "0")
    pretrain.main(pretrain.from_command_line(arguments))
    assert [step for step, _ in list_checkpoints(tmp_path / "other" / "checkpoints")] == [7]
    with pytest.raises(SystemExit):
        pretrain.from_command_line(flags(crops, tmp_path / "run", "--checkpoint-minutes", "-1"))


def test_a_checkpoint_that_the_thread_cannot_write_stops_the_run(crops, tmp_path, monkeypatch):
    """Two steps later at most, with the reason, and the checkpoint before is still there."""
    original, steps = CheckpointWriter._write, []

    def write(self, step, copy, copied):
        steps.append(step)
        if step == 4:
            raise UserError(f"cannot write the checkpoint of step 4: {os.strerror(errno.ENOSPC)}")
        return original(self, step, copy, copied)

    monkeypatch.setattr(CheckpointWriter, "_write", write)
    run = tmp_path / "run"
    with pytest.raises(UserError, match="step 4: No space left"):
        pretrain.main(pretrain.from_command_line(flags(crops, run, "--checkpoint-every", "2", "--schedule.steps", "1000")))
    assert steps == [2, 4]
    assert metrics(run)[-1]["step"] <= 6
    assert [step for step, _ in list_checkpoints(run / "checkpoints")] == [2]


@pytest.fixture(scope="module")
def forked(crops, tmp_path_factory):
    """A run of one process; one that goes on with 1, 2, 4 and 1 processes; one of 4 processes. Each with a folder `record` in it."""
    folder = tmp_path_factory.mktemp("forked")
    often = ["--checkpoint-every", "5", "--log-every", "2", "--schedule.steps", "40"]
    phases = [
        {"run": "alone", "processes": 1, "stop_at": None, "more": []},
        {"run": "changing", "processes": 1, "stop_at": 3, "more": []},
        {"run": "changing", "processes": 2, "stop_at": 7, "more": []},
        {"run": "changing", "processes": 4, "stop_at": 11, "more": []},
        {"run": "changing", "processes": 1, "stop_at": None, "more": []},
        {"run": "four", "processes": 4, "stop_at": None, "more": often},
    ]
    for phase in phases:
        run = folder / phase.pop("run")
        (run / "record").mkdir(parents=True, exist_ok=True)
        phase.update(record=str(run / "record"), arguments=flags(crops, run, *phase.pop("more")))
    (folder / "phases.json").write_text(json.dumps(phases))
    command = [sys.executable, str(ROOT / "tests" / "forked_runs.py"), str(folder / "phases.json")]
    done = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    return folder


def batches_seen(record):
    """{step: (samples, boxes)} of whole batches, their parts joined; and the numbers of processes that saw each step."""
    parts, worlds = {}, {}
    for path in record.iterdir():
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            assert parts.setdefault((entry["step"], entry["part"]), entry) is entry, "delivered twice"
            worlds.setdefault(entry["step"], set()).add(int(path.name.split("_")[0]))
    batches = {}
    for (step, _), entry in sorted(parts.items()):
        samples, boxes = batches.setdefault(step, ([], []))
        samples += entry["samples"]
        boxes += entry["boxes"]
    return batches, worlds


def test_another_number_of_processes_goes_on_with_the_same_samples(forked):
    """1, then 2, 4 and 1 processes, each stopped within an epoch: every sample once and in its place, with its boxes; losses as of one process."""
    alone, _ = batches_seen(forked / "alone" / "record")
    changing, worlds = batches_seen(forked / "changing" / "record")
    assert list(alone) == list(range(NUM_STEPS))
    assert changing == alone
    numbers = [worlds[step] for step in range(NUM_STEPS)]
    assert all(len(number) == 1 for number in numbers)
    order = [next(iter(number)) for number in numbers]
    changes = [step for step in range(1, NUM_STEPS) if order[step] != order[step - 1]]
    assert [order[0], *(order[step] for step in changes)] == [1, 2, 4, 1]
    assert all(step % 5 for step in changes)
    one, other = metrics(forked / "alone"), metrics(forked / "changing")
    assert [line["step"] for line in one] == [line["step"] for line in other] == list(range(1, NUM_STEPS + 1))
    for left, right in zip(one, other, strict=True):
        for name in ("loss", "loss_pixels", "loss_features", "gradient_norm"):
            assert right[name] == pytest.approx(left[name], rel=1e-5), (left["step"], name)


def worker_of(launcher, rank):
    """The process id of torchrun's child of this rank."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"no child of {launcher} has rank {rank}")


def test_a_killed_worker_is_restarted_and_the_run_ends_as_the_undisturbed_one(crops, forked, tmp_path):
    run = tmp_path / "run"
    more = ["--checkpoint-every", "5", "--log-every", "2", "--schedule.steps", "40"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4", "--max-restarts=1"]
    command = [*launch, str(ROOT / "personmae" / "pretrain.py"), *flags(crops, run, *more)]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (run / "checkpoints" / "step_0000010.pt").exists():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(worker_of(process.pid, 2), signal.SIGKILL)
        text = process.communicate(timeout=120)[0]
    finally:
        if process.poll() is None:
            process.terminate()
    assert process.returncode == 0, text
    assert text.count("continuing ") == 1, text
    assert [path.name for path in (run / "checkpoints").glob("*.partial")] == []
    undisturbed = forked / "four"
    left, right = load_file(undisturbed / "encoder.safetensors"), load_file(run / "encoder.safetensors")
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    timed = ("images_per_second", "data_wait_ratio")
    lines = [[{name: value for name, value in line.items() if name not in timed} for line in metrics(folder)] for folder in (undisturbed, run)]
    assert lines[0] == lines[1]
    assert np.isfinite([line["loss"] for line in lines[0]]).all()
