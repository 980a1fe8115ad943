"""A model divided among processes computes what the whole one does, writes the same checkpoints, and goes on from either kind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from crops import SMALL, draw_crops
from safetensors.torch import load_file

from personmae import pretrain
from personmae.configs import UserError
from personmae.training.checkpoints import list_checkpoints, load_checkpoint
from personmae.training.parallel import choose_parallel, gathered, whole_state

ROOT = Path(pretrain.__file__).parent.parent
NUM_STEPS = 12


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of 2 processes: "ddp", "fsdp", and "both", which changes from one kind to the other, and ends as one process."""
    folder = tmp_path_factory.mktemp("parallel")
    crops = draw_crops(folder / "crops", 24)
    phases = [
        {"run": "ddp", "processes": 2, "stop_at": None, "more": ["--parallel", "ddp"]},
        {"run": "fsdp", "processes": 2, "stop_at": None, "more": ["--parallel", "fsdp", "--accumulation", "2"]},
        {"run": "both", "processes": 2, "stop_at": 2, "more": ["--parallel", "ddp"]},
        {"run": "both", "processes": 2, "stop_at": 5, "more": ["--parallel", "fsdp"]},
        {"run": "both", "processes": 2, "stop_at": 8, "more": ["--parallel", "ddp"]},
        {"run": "both", "processes": 1, "stop_at": None, "more": ["--parallel", "fsdp"]},
    ]
    for phase in phases:
        run = folder / phase.pop("run")
        (run / "record").mkdir(parents=True, exist_ok=True)
        where = ["--data.source", str(crops), "--data.index-dir", str(folder / "index"), "--run-dir", str(run)]
        often = ["--schedule.steps", str(NUM_STEPS), "--checkpoint-every", "4", "--picture-every", "6", "--keep-last", "9"]
        phase.update(record=str(run / "record"), arguments=[*SMALL, *where, *often, *phase.pop("more")])
    (folder / "phases.json").write_text(json.dumps(phases))
    command = [sys.executable, str(ROOT / "tests" / "forked_runs.py"), str(folder / "phases.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    return folder


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["fsdp", "both"])
def test_losses_are_those_of_ddp(runs, name):
    expected, got = metrics(runs / "ddp"), metrics(runs / name)
    assert [line["step"] for line in got] == [line["step"] for line in expected] == list(range(1, NUM_STEPS + 1))
    for left, right in zip(expected, got, strict=True):
        for key in ("loss", "loss_pixels", "loss_features", "gradient_norm"):
            assert right[key] == pytest.approx(left[key], rel=1e-5), (left["step"], key)
    # Of the last micro-batch, so another one where gradients are accumulated.
    if name == "both":
        assert got[5]["loss_features_shuffled"] == pytest.approx(expected[5]["loss_features_shuffled"], rel=1e-5)


def layout(value):
    """A state without its numbers: names, types, shapes."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.is_contiguous()
    if isinstance(value, dict):
        return {key: layout(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [layout(entry) for entry in value]
    return type(value)


def test_checkpoints_have_one_format(runs):
    ours, theirs = (load_checkpoint(list_checkpoints(runs / name / "checkpoints")[0][1]) for name in ("ddp", "fsdp"))
    assert ours.step == theirs.step == 4
    assert layout(ours.state) == layout(theirs.state)
    for part in ("model", "teacher"):
        for name, tensor in ours.state[part].items():
            assert torch.allclose(tensor, theirs.state[part][name], rtol=1e-3, atol=1e-4), name


def test_whole_weights_and_pictures_come_out(runs):
    for name in ("encoder.safetensors", "teacher.safetensors"):
        ours, theirs = (load_file(runs / run / name) for run in ("ddp", "fsdp"))
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[key], theirs[key], rtol=1e-3, atol=1e-3) for key in ours)
    pictures = sorted(path.name for path in (runs / "fsdp" / "pictures").iterdir())
    assert pictures == ["reconstruction_0000006.png", "reconstruction_0000012.png"]


def test_one_process_and_whole_states_are_left_alone():
    assert choose_parallel("fsdp", 1, "adamw-ema").startswith("none")
    assert choose_parallel("fsdp", 4, "adamw") == "fsdp (each process has 1/4 of the state)"
    with pytest.raises(UserError, match="optimiser adamw-ema needs whole tensors"):
        choose_parallel("fsdp", 2, "adamw-ema")
    layer = torch.nn.Linear(2, 3)
    state = {"layer": layer.state_dict(), "plain": [1, ("text", None)]}
    assert whole_state(state, keep=False)["layer"]["weight"].data_ptr() == layer.weight.data_ptr()
    with gathered(layer):
        assert layer.weight.shape == (3, 2)
