"""Checkpoints written beside the training: the same file, of the state as it was; one at a time; no error lost; whole even when killed."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from personmae.configs import UserError
from personmae.training import checkpoint_writer
from personmae.training.checkpoint_writer import CheckpointWriter, HostCopy
from personmae.training.checkpoints import list_checkpoints, load_checkpoint, load_newest, save_checkpoint
from personmae.training.resuming import state_bytes


def example_state() -> dict[str, object]:
    """Views, shared memory, other strides and types: what torch.save writes differently when it is copied carelessly."""
    layer = nn.Linear(40, 50)
    buffer = torch.arange(10_000.0)
    moments = {0: {"step": torch.tensor(3.0), "exp_avg": torch.rand(50, 40)}}
    return {
        "model": layer.state_dict(),
        "shared": [layer.weight, layer.weight.detach(), buffer],
        "view": buffer[30:90],
        "transposed": torch.rand(30, 20).t(),
        "kinds": (torch.arange(7, dtype=torch.bfloat16), torch.tensor([True, False]), torch.empty(0), torch.tensor(5)),
        "optimiser": {"state": moments, "param_groups": [{"lr": 1e-3, "params": [0], "betas": (0.9, 0.95)}]},
        "plain": [None, True, 1, 0.5, "text", b"bytes"],
    }


@pytest.mark.parametrize("piece_bytes", [1 << 26, 4096])
def test_the_file_is_the_same_to_the_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int) -> None:
    monkeypatch.setattr(checkpoint_writer, "PIECE_BYTES", piece_bytes)
    state = example_state()
    expected = save_checkpoint(tmp_path / "sync", 7, state, keep_last=1).read_bytes()
    with CheckpointWriter(tmp_path / "async", 1, print) as writer:
        for _ in range(2):
            writer.save(7, state)
            writer.wait()
            assert (tmp_path / "async" / "step_0000007.pt").read_bytes() == expected


class Disk:
    """A disk whose sync waits until it is let go, and fails if told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.let_go, self.error = threading.Event(), threading.Event(), 0
        original = os.fsync

        def slow(descriptor: int) -> None:
            self.entered.set()
            assert self.let_go.wait(30)
            if self.error:
                raise OSError(self.error, os.strerror(self.error))
            original(descriptor)

        monkeypatch.setattr(os, "fsync", slow)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    weight = torch.ones(1000)
    with CheckpointWriter(tmp_path, 3, print) as writer:
        writer.save(1, {"weight": weight})
        weight.fill_(2)
        assert disk.entered.wait(30)
        assert list_checkpoints(tmp_path) == []
        disk.let_go.set()
    assert torch.equal(load_checkpoint(tmp_path / "step_0000001.pt").state["weight"], torch.ones(1000))


def test_a_second_one_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    said: list[str] = []
    weight = torch.ones(1000)
    with CheckpointWriter(tmp_path, 3, said.append) as writer:
        writer.save(1, {"weight": weight})
        assert disk.entered.wait(30)
        weight.fill_(2)
        waiting = threading.Thread(target=writer.save, args=(2, {"weight": weight}))
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        assert list_checkpoints(tmp_path) == []
        disk.let_go.set()
        waiting.join(30)
        assert not waiting.is_alive()
        assert [step for step, _ in list_checkpoints(tmp_path)][:1] == [1]
        writer.wait()
        writer.save(3, {"weight": weight})
    assert len(said) == 1
    assert "training waits for a checkpoint" in said[0]
    values = [load_checkpoint(path).state["weight"][0].item() for _, path in list_checkpoints(tmp_path)]
    assert values == [1, 2, 2]


@pytest.mark.parametrize("met_by", ["save", "wait", "leaving"])
def test_an_error_of_the_thread_is_met_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, met_by: str) -> None:
    disk = Disk(monkeypatch)
    disk.error = errno.ENOSPC
    disk.let_go.set()
    writer = CheckpointWriter(tmp_path, 3, print)

    def body() -> None:
        with writer:
            writer.save(1, {"weight": torch.ones(10)})
            while not writer.failed:
                disk.entered.wait(0.01)
            if met_by == "save":
                writer.save(2, {"weight": torch.ones(10)})
            elif met_by == "wait":
                writer.wait()

    with pytest.raises(UserError, match=r"step_0000001.pt: the disk is full"):
        body()
    assert list(tmp_path.iterdir()) == []
    assert not writer.failed


def test_another_error_does_not_hide_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    disk.error = errno.EIO
    disk.let_go.set()
    said: list[str] = []

    def body() -> None:
        with CheckpointWriter(tmp_path, 3, said.append) as writer:
            writer.save(1, {})
            raise KeyError("of the training")

    with pytest.raises(KeyError, match="of the training"):
        body()
    assert len(said) == 1
    assert "Input/output error" in said[0]


def test_a_value_that_is_not_plain_is_refused_at_once(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, 3, print) as writer, pytest.raises(TypeError, match=r"state\['path'\] is a pathlib"):
        writer.save(1, {"path": tmp_path})


def test_the_memory_of_a_copy_is_used_again() -> None:
    state, copy = example_state(), HostCopy()
    first, _ = copy.take(state)
    place = first["model"]["weight"].data_ptr()
    second, copied = copy.take(state)
    assert copied is None
    assert second["model"]["weight"].data_ptr() == place
    assert second["shared"][0].data_ptr() == second["shared"][1].data_ptr() == place
    assert second["transposed"].stride() == (1, 20)


def test_the_time_since_the_last_one(tmp_path: Path) -> None:
    times = iter([10.0, 25.0, 30.0, 31.5])
    with CheckpointWriter(tmp_path, 3, print, clock=lambda: next(times)) as writer:
        assert writer.seconds_since_save == 15
        writer.save(1, {})
        assert writer.seconds_since_save == 1.5


# As in test_checkpoints, of a process that trains on while its thread writes.
KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from personmae.training.checkpoint_writer import CheckpointWriter
from personmae.training.checkpoints import load_newest, save_checkpoint

folder = Path(sys.argv[1])


def train_on(first):
    weight = torch.full((200_000,), float(first - 1))
    with CheckpointWriter(folder, 2, sys.exit) as writer:
        for step in range(first, first + 1_000_000):
            weight += 1
            time.sleep(0.001)
            if step % 5 == 0:
                writer.wait()
                writer.save(step, {"weight": weight})


torch.set_num_threads(1)
random.seed(1)
save_checkpoint(folder, 5, {"weight": torch.full((200_000,), 5.0)}, keep_last=2)
step = num_kills = num_partial = 0
while num_kills < 10 or num_partial < 3:
    assert num_kills < 300, num_partial
    child = os.fork()
    if child == 0:
        train_on(step + 1)
        os._exit(0)
    time.sleep(random.uniform(0.01, 0.08))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    num_kills += 1
    num_partial += any(folder.glob("*.partial"))
    newest = load_newest(folder, sys.exit)
    assert newest is not None and newest.step >= step, (newest, step)
    assert torch.equal(newest.state["weight"], torch.full((200_000,), float(newest.step)))
    step = newest.step
print(num_kills, num_partial, step)
"""


def test_killed_while_the_thread_writes(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    num_kills, num_partial, step = map(int, done.stdout.split())
    assert num_kills >= 10
    assert num_partial >= 3
    assert step > 5
    newest = load_newest(tmp_path, pytest.fail)
    assert newest is not None
    assert newest.step == step


@pytest.mark.gpu
def test_from_a_gpu_by_way_of_pinned_memory(tmp_path: Path) -> None:
    weight = torch.ones(20_000_000, device="cuda")
    with CheckpointWriter(tmp_path, 3, print) as writer:
        for step in (1, 2):
            writer.save(step, {"weight": weight, "scalar": weight[3]})
            weight += 1
    for step in (1, 2):
        state = load_checkpoint(tmp_path / f"step_000000{step}.pt").state
        assert (state["weight"] == step).all()
        assert state["scalar"] == step


def test_what_is_reserved_is_what_the_first_checkpoint_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_writer, "PIECE_BYTES", 1 << 13)
    model = nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.Linear(30, 20))
    teacher = nn.Linear(30, 20)
    optimiser = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 20)).sum().backward()
    optimiser.step()
    copy = HostCopy()
    copy.reserve(state_bytes(model, teacher), pinned=False)
    reserved = list(copy._pieces)
    taken, _ = copy.take({"model": model.state_dict(), "teacher": teacher.state_dict(), "optimiser": optimiser.state_dict()})
    assert len(copy._pieces) <= len(reserved) + 1
    assert all(ours is theirs for ours, theirs in zip(reserved, copy._pieces, strict=False))
    assert torch.equal(taken["model"]["0.weight"], model.state_dict()["0.weight"])
    assert len(reserved) >= 2
