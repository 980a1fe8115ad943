"""Checkpoints: whole or not at all, whatever happens while they are written; nothing but tensors and plain values; clear errors."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from personmae.configs import UserError
from personmae.training import checkpoints
from personmae.training.checkpoints import (
    BrokenCheckpoint,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    restore_module,
    restore_optimiser,
    save_checkpoint,
)


def example_state(step: int) -> dict[str, Any]:
    return {
        "preset": "nano",
        "model": OrderedDict(weight=torch.full((3, 5), float(step)), bias=torch.arange(7, dtype=torch.bfloat16)),
        "optimizer": {"state": {0: {"step": torch.tensor(float(step))}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95)}]},
        "position": [step, None, True, "text", b"bytes"],
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and bool(a == b)


def newest_checkpoint(folder: Path, announce: Callable[[str], object]) -> Path | None:
    newest = load_newest(folder, announce)
    return None if newest is None else newest.path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "run" / "checkpoints", 1000, example_state(1000), keep_last=2)
    assert path == tmp_path / "run" / "checkpoints" / "step_0001000.pt"
    assert names(path.parent) == [path.name]
    loaded = load_checkpoint(path)
    assert (loaded.path, loaded.step) == (path, 1000)
    assert same(loaded.state, {**example_state(1000), "model": dict(example_state(1000)["model"])})


def test_plain_torch_reads_the_file(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 3, example_state(3), keep_last=1)
    content = torch.load(path, weights_only=True)
    assert content["step"] == 3
    assert torch.equal(content["state"]["model"]["weight"], torch.full((3, 5), 3.0))


def test_parameters_and_views_are_saved_as_their_own_values(tmp_path: Path) -> None:
    buffer = torch.arange(1_000_000.0)
    state = {"view": buffer[10:20], "parameter": nn.Parameter(torch.ones(2)), "transposed": buffer[:6].view(2, 3).t()}
    path = save_checkpoint(tmp_path, 1, state, keep_last=1)
    assert path.stat().st_size < 20_000
    loaded = load_checkpoint(path).state
    assert torch.equal(loaded["view"], torch.arange(10.0, 20.0))
    assert torch.equal(loaded["transposed"], torch.tensor([[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]))
    assert type(loaded["parameter"]) is torch.Tensor
    assert not loaded["parameter"].requires_grad


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (np.float64(1.0), r"state\['a'\]\[1\]\['b'\] is a numpy.float64"),
        (np.zeros(2), r"state\['a'\]\[1\]\['b'\] is a numpy.ndarray"),
        (Path("x"), r"state\['a'\]\[1\]\['b'\] is a pathlib"),
        ({1, 2}, r"state\['a'\]\[1\]\['b'\] is a set"),
        (torch.Size([1]), r"state\['a'\]\[1\]\['b'\] is a torch.Size"),
        ({(1, 2): 3}, r"state\['a'\]\[1\]\['b'\] has the key \(1, 2\) of type tuple"),
        (torch.eye(2).to_sparse(), r"state\['a'\]\[1\]\['b'\] is a torch.sparse_coo tensor"),
        (torch.empty(2, device="meta"), r"state\['a'\]\[1\]\['b'\] is a meta tensor"),
    ],
)
def test_a_value_that_is_not_plain_is_refused_by_its_place(tmp_path: Path, value: object, place: str) -> None:
    with pytest.raises(TypeError, match=place):
        save_checkpoint(tmp_path, 1, {"a": [0, {"b": value}]}, keep_last=1)
    assert names(tmp_path) == []


@pytest.mark.parametrize(("step", "keep_last"), [(1, 0), (-1, 1)])
def test_senseless_numbers_are_refused(tmp_path: Path, step: int, keep_last: int) -> None:
    with pytest.raises(ValueError, match=r"keep_last is 0|step is -1"):
        save_checkpoint(tmp_path, step, {}, keep_last)


def test_the_last_ones_are_kept_and_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "step_best.pt").write_bytes(b"the user's own")
    (tmp_path / "step_0000007.pt.partial").write_bytes(b"of a killed process")
    for step in (10, 20, 30, 40):
        save_checkpoint(tmp_path, step, example_state(step), keep_last=2)
    assert names(tmp_path) == ["step_0000030.pt", "step_0000040.pt", "step_best.pt"]
    save_checkpoint(tmp_path, 12_345_678, example_state(0), keep_last=2)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [40, 12_345_678]


def test_later_steps_of_a_continuation_given_up_are_set_aside(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, step, example_state(step), keep_last=3)
    path = save_checkpoint(tmp_path, 15, example_state(15), keep_last=1)
    assert names(tmp_path) == ["step_0000015.pt", "step_0000020.pt.aside", "step_0000030.pt.aside"]
    assert newest_checkpoint(tmp_path, print) == path


def test_older_ones_go_only_when_the_new_one_is_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, 10, example_state(10), keep_last=1)
    removed = []
    unlink = Path.unlink

    def watched(path: Path, missing_ok: bool = False) -> None:
        if path.name == "step_0000010.pt":
            removed.append(load_checkpoint(tmp_path / "step_0000020.pt").step)
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", watched)
    save_checkpoint(tmp_path, 20, example_state(20), keep_last=1)
    assert removed == [20]


def test_every_altered_or_missing_byte_is_noticed(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, {"weight": torch.arange(20.0)}, keep_last=1)
    good = path.read_bytes()
    generator = np.random.default_rng(0)
    for place in [0, len(good) - 1, *generator.integers(0, len(good), 200).tolist()]:
        damaged = bytearray(good)
        damaged[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(BrokenCheckpoint, match=r"step_0000001.pt is (damaged|cut off)"):
            load_checkpoint(path)
    for size in [0, 1, 50, len(good) // 2, len(good) - 83, len(good) - 82, len(good) - 1]:
        path.write_bytes(good[:size])
        with pytest.raises(BrokenCheckpoint, match=r"step_0000001.pt is cut off"):
            load_checkpoint(path)
    path.write_bytes(good + b"\0")
    with pytest.raises(BrokenCheckpoint, match="cut off"):
        load_checkpoint(path)
    path.write_bytes(good)
    assert load_checkpoint(path).step == 1


def test_the_newest_good_one_is_found_and_the_others_are_named(tmp_path: Path) -> None:
    said: list[str] = []
    assert newest_checkpoint(tmp_path / "missing", said.append) is None
    assert newest_checkpoint(tmp_path, said.append) is None
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, step, example_state(step), keep_last=3)
    assert newest_checkpoint(tmp_path, said.append) == tmp_path / "step_0000030.pt"
    assert said == []
    for step in (20, 30):
        file = tmp_path / f"step_00000{step}.pt"
        file.write_bytes(file.read_bytes()[:-100])
    newest = load_newest(tmp_path, said.append)
    assert newest is not None
    assert newest.step == 10
    assert same(newest.state["optimizer"], example_state(10)["optimizer"])
    assert len(said) == 2
    assert "step_0000030.pt" in said[0]
    assert "step_0000020.pt" in said[1]
    (tmp_path / "step_0000010.pt").write_bytes(b"")
    with pytest.raises(UserError, match="none of the 3 checkpoints"):
        newest_checkpoint(tmp_path, said.append)


def test_going_on_from_an_older_one_replaces_the_broken_one(tmp_path: Path) -> None:
    for step in (10, 20):
        save_checkpoint(tmp_path, step, example_state(step), keep_last=2)
    (tmp_path / "step_0000020.pt").write_bytes(b"broken")
    save_checkpoint(tmp_path, 15, example_state(15), keep_last=1)
    said: list[str] = []
    assert newest_checkpoint(tmp_path, said.append) == tmp_path / "step_0000015.pt"
    assert said == []


class Attack:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.target,)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "step_0000001.pt"
    target = tmp_path / "attacked"
    torch.save({"format": "personmae", "version": 1, "step": 1, "state": Attack(target)}, path)
    body = path.read_bytes()
    path.write_bytes(body + b"\npersonmae-sha256 " + hashlib.sha256(body).hexdigest().encode() + b"\n")
    with pytest.raises(BrokenCheckpoint, match="more than tensors and plain values"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps(Attack(target)))
    with pytest.raises(BrokenCheckpoint, match="not of this project"):
        load_checkpoint(path)
    assert not target.exists()


def test_files_of_other_kinds_and_versions_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"there is no checkpoint .*missing.pt"):
        load_checkpoint(tmp_path / "missing.pt")
    with pytest.raises(UserError, match="cannot read the checkpoint"):
        load_checkpoint(tmp_path)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other.pt is cut off or not of this project"):
        load_checkpoint(tmp_path / "other.pt")
    monkeypatch.setattr(checkpoints, "FORMAT_VERSION", 2)
    save_checkpoint(tmp_path, 1, {}, keep_last=1)
    monkeypatch.undo()
    # A newer version is no damage: falling back over it would throw steps away in silence.
    with pytest.raises(UserError, match=r"format 2, this PersonMAE reads format 1; update"):
        newest_checkpoint(tmp_path, print)


def refuse(number: int) -> Callable[..., None]:
    def raise_error(*arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    return raise_error


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "the disk is full; free more than"),
        (errno.EDQUOT, "your quota is used up; free more than"),
        (errno.EACCES, "Permission denied"),
    ],
)
def test_a_disk_that_refuses_leaves_the_previous_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, message: str) -> None:
    save_checkpoint(tmp_path, 10, example_state(10), keep_last=1)
    monkeypatch.setattr(os, call, refuse(number))
    with pytest.raises(UserError, match=f"step_0000020.pt: {message}"):
        save_checkpoint(tmp_path, 20, example_state(20), keep_last=1)
    monkeypatch.undo()
    assert names(tmp_path) == ["step_0000010.pt"]
    assert load_checkpoint(tmp_path / "step_0000010.pt").step == 10


SMALL_DISK = """
import resource, sys
from pathlib import Path
import torch
from personmae.configs import UserError
from personmae.training.checkpoints import load_checkpoint, save_checkpoint

folder = Path(sys.argv[1])
state = {"weights": [torch.ones(70_000), torch.ones(3), torch.ones(70_000)]}
size = save_checkpoint(folder, 2, state, keep_last=1).stat().st_size
save_checkpoint(folder, 1, {"weight": torch.ones(1000)}, keep_last=1)
# The limit is met in the first bytes, within a tensor, between two, in the archive's own end, and in the checksum.
for limit in (100, 100_000, 281_000, size // 2, size - 500, size - 84, size - 20, size - 1):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        save_checkpoint(folder, 2, state, keep_last=1)
    except UserError as error:
        assert "file size limit" in str(error), error
        assert sorted(path.name for path in folder.glob("step*[!e]")) == ["step_0000001.pt"], limit
        assert load_checkpoint(folder / "step_0000001.pt").step == 1
        print("refused")
    else:
        raise SystemExit(f"{size} bytes fitted into {limit}")
resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
assert save_checkpoint(folder, 2, state, keep_last=1).stat().st_size == size
assert not any(folder.glob("*.partial")) and not any(folder.glob("*_0000001.pt"))
"""


def test_a_write_that_stops_half_way(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SMALL_DISK, str(tmp_path)], env=child_environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["refused"] * 8


# Children are forked from one process that has imported torch: an import per kill would take minutes.
KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from personmae.training.checkpoints import load_newest, save_checkpoint

folder = Path(sys.argv[1])


def save_on(first):
    for step in range(first, first + 1_000_000):
        save_checkpoint(folder, step, {"weight": torch.full((200_000,), float(step))}, keep_last=2)


def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)


def in_child(body):
    child = os.fork()
    if child == 0:
        body()
        os._exit(0)
    return child


def check(least):
    newest = load_newest(folder, sys.exit)
    assert newest is not None and newest.step >= least, (newest, least)
    assert torch.equal(newest.state["weight"], torch.full((200_000,), float(newest.step)))
    return newest.step


def die_in(place, call_number):
    calls = []
    original = getattr(place[0], place[1])
    def counted(*arguments, **options):
        calls.append(1)
        if len(calls) == call_number:
            die()
        return original(*arguments, **options)
    setattr(place[0], place[1], counted)


torch.set_num_threads(1)
save_checkpoint(folder, 1, {"weight": torch.ones(200_000)}, keep_last=2)
save_checkpoint(folder, 2, {"weight": torch.full((200_000,), 2.0)}, keep_last=2)
step = 2
# At every stage of a save: the file's sync, the rename, the folder's sync, the removal of an old one (the second unlink).
for place, call_number in (((os, "fsync"), 1), ((os, "replace"), 1), ((os, "fsync"), 2), ((Path, "unlink"), 2)):
    def body():
        die_in(place, call_number)
        save_on(step + 1)
    _, status = os.waitpid(in_child(body), 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (place, status)
    step = check(step)

# At random moments, until it has hit the middle of a write at least five times.
random.seed(1)
num_kills = num_partial = 0
while num_kills < 20 or num_partial < 5:
    assert num_kills < 300, num_partial
    child = in_child(lambda: save_on(step + 1))
    time.sleep(random.uniform(0.005, 0.06))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    num_kills += 1
    num_partial += any(folder.glob("*.partial"))
    step = check(step)
save_checkpoint(folder, step + 1, {"weight": torch.full((200_000,), float(step + 1))}, keep_last=2)
assert len(list(folder.iterdir())) == 2 and not any(folder.glob("*.partial"))
print(num_kills, num_partial, step)
"""


def test_a_process_killed_while_saving_leaves_a_good_one(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=child_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    num_kills, num_partial, step = map(int, done.stdout.split())
    assert num_kills >= 20
    assert num_partial >= 5
    assert step > 2


def child_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}


def network(width: int, extra: bool = False) -> nn.Module:
    layers: dict[str, nn.Module] = {"embed": nn.Linear(4, width), "norm": nn.LayerNorm(width)}
    return nn.ModuleDict({**layers, "head": nn.Linear(width, 2)} if extra else layers)


def test_weights_of_another_preset_are_refused_by_name(tmp_path: Path) -> None:
    source = tmp_path / "step_0000001.pt"
    module = network(8)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}

    def restore(saved: nn.Module, saved_preset: str = "vit-base") -> None:
        restore_module(module, saved.state_dict(), part="model", source=source, saved_preset=saved_preset, preset="vit-small")

    with pytest.raises(UserError, match=r"preset vit-base, .* preset vit-small .*embed.weight is \[16, 4\] .* \[8, 4\] in this run"):
        restore(network(16))
    with pytest.raises(UserError, match=r"both are of preset vit-small .*head.weight \[2, 8\] of the checkpoint is not in"):
        restore(network(8, extra=True), "vit-small")
    with pytest.raises(UserError, match=r"embed.weight is torch.bfloat16 in the checkpoint and torch.float32 in this run"):
        restore(network(8).bfloat16(), "vit-small")
    with pytest.raises(UserError, match=r"norm.weight \[8\] of this run is not in the checkpoint"):
        restore(nn.ModuleDict({"embed": nn.Linear(4, 8)}), "vit-small")
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    other = network(8)
    restore(other, "vit-small")
    assert all(torch.equal(tensor, module.state_dict()[name]) for name, tensor in other.state_dict().items())


def trained(width: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    module = nn.Linear(4, width)
    groups: list[dict[str, Any]] = [{"params": [module.weight]}, {"params": [module.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    module(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return module, optimizer


def test_an_optimiser_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    module, optimizer = trained(3)
    path = save_checkpoint(tmp_path, 1, {"model": module.state_dict(), "optimizer": optimizer.state_dict()}, keep_last=1)
    saved = load_checkpoint(path).state
    other_module, other = trained(3)
    restore_module(other_module, saved["model"], part="model", source=path, saved_preset="nano", preset="nano")
    restore_optimiser(other, saved["optimizer"], source=path, saved_preset="nano", preset="nano")
    for network_, optimizer_ in ((module, optimizer), (other_module, other)):
        optimizer_.zero_grad()
        network_(torch.full((1, 4), 2.0)).square().sum().backward()
        optimizer_.step()
    assert all(torch.equal(tensor, other_module.state_dict()[name]) for name, tensor in module.state_dict().items())


def test_an_optimiser_of_other_shapes_is_refused(tmp_path: Path) -> None:
    _, optimizer = trained(3)
    _, wider = trained(5)
    before = optimizer.state_dict()["state"][0]["exp_avg"].clone()

    def restore(saved: dict[str, Any]) -> None:
        restore_optimiser(optimizer, saved, source=tmp_path, saved_preset="nano", preset="nano")

    with pytest.raises(UserError, match=r"exp_avg of parameter 0 is \[5, 4\] in the checkpoint and \[3, 4\] in this run"):
        restore(wider.state_dict())
    with pytest.raises(UserError, match="1 parameter groups in the checkpoint and 2 in this run"):
        restore(torch.optim.AdamW([nn.Parameter(torch.ones(1))]).state_dict())
    groups: list[dict[str, Any]] = [{"params": [nn.Parameter(torch.ones(1))]}, {"params": []}]
    with pytest.raises(UserError, match="group 1 has 0 parameters in the checkpoint and 1 in this run"):
        restore(torch.optim.AdamW(groups).state_dict())
    assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], before)
