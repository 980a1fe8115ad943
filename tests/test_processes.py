"""Processes: two of them over gloo agree, wait, fail and stop together; one alone needs none of that."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from personmae.configs import UserError
from personmae.training.processes import Processes, StopSignal, choose_device, start_processes, threads_per_process

TORCHRUN_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# All scenarios of two processes: forked from one process that has imported torch, and started as torchrun would start them.
# Each child writes what it saw as JSON: {"value": ...} or {"error": [type, message]}.
SCENARIOS = """
import json, os, signal, socket, sys, time
from pathlib import Path
import torch
from personmae.configs import UserError
from personmae.training.processes import StopSignal, start_processes

folder = Path(sys.argv[1])


def steps_found(processes, first):
    try:
        return processes.check_same_step(first)
    except UserError as error:
        return str(error)


def collectives(processes):
    rank = processes.rank
    values = {"a": torch.tensor(1.5 + rank), "b": torch.tensor([[1, 2], [3, 4 + rank]]), "c": torch.tensor(2.0**-40 * (rank + 1))}
    processes.barrier()
    return {
        "broadcast": processes.broadcast_object({"from": rank, "path": str(folder)}),
        "gathered": processes.all_gather(["rank", rank]),
        "sum": {name: value.tolist() for name, value in processes.sum_across(values).items()},
        "from_main": processes.from_main(lambda: f"made by {processes.rank}"),
        "nothing": processes.sum_across({}),
        "steps": [steps_found(processes, 7), steps_found(processes, 500 * rank)],
        "main": processes.is_main,
        "description": processes.description,
        "threads": torch.get_num_threads(),
    }


def main_goes_first(processes):
    made = folder / "made"
    with processes.main_first():
        if processes.is_main:
            time.sleep(0.3)
            made.write_text("by the main process")
        return made.read_text()


def users_mistake_in_main(processes):
    with processes.main_first():
        (folder / f"mistake_{processes.rank}").touch()
        raise UserError("there is no folder /crops; give another with --data.source")


def bug_in_main(processes):
    with processes.main_first():
        (folder / f"bug_{processes.rank}").touch()
        {}["missing"]


def error_in_another(processes):
    with processes.main_first():
        if not processes.is_main:
            raise UserError("only here")
    return "went on"


def death_of_main(processes):
    with processes.main_first():
        if processes.is_main:
            os._exit(3)


def stop_together(processes):
    with StopSignal(processes) as stop:
        for step in range(1, 1000):
            # The processes run at different speeds; the signal comes to one of them.
            time.sleep(0.002 if processes.is_main else 0.006)
            if step == 20 and not processes.is_main:
                signal.raise_signal(signal.SIGTERM)
            if stop.requested():
                assert stop.requested()
                return {"step": step, "received": stop.received is not None}


def stop_asked_for(processes):
    with StopSignal(processes) as stop:
        for step in range(1, 1000):
            if step == 5 and processes.is_main:
                stop.ask()
            if stop.requested():
                return step


def no_stop(processes):
    with StopSignal(processes) as stop:
        return [stop.requested() for _ in range(7)]


def child(name, rank, port):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        with start_processes("cpu") as processes:
            result = {"value": globals()[name](processes)}
    except Exception as error:
        result = {"error": [type(error).__name__, str(error)]}
    (folder / f"{name}_{rank}.json").write_text(json.dumps(result))


codes = {}
for name in sys.argv[2:]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(2):
        number = os.fork()
        if number == 0:
            child(name, rank, port)
            os._exit(0)
        children.append(number)
    codes[name] = [os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) for number in children]
(folder / "codes").write_text(json.dumps(codes))
"""
NAMES = ["collectives", "main_goes_first", "users_mistake_in_main", "bug_in_main", "error_in_another", "death_of_main", "stop_together"]
NAMES += ["stop_asked_for", "no_stop"]


def child_environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in TORCHRUN_NAMES}
    return {**kept, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What each scenario's two processes saw: {"name": [of rank 0, of rank 1]}; None for a process that died."""
    folder = tmp_path_factory.mktemp("scenarios")
    command = [sys.executable, "-c", SCENARIOS, str(folder), *NAMES]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    codes = json.loads((folder / "codes").read_text())
    assert codes == {name: [3, 0] if name == "death_of_main" else [0, 0] for name in NAMES}
    files = {name: [folder / f"{name}_{rank}.json" for rank in range(2)] for name in NAMES}
    results = {name: [json.loads(path.read_text()) if path.exists() else None for path in paths] for name, paths in files.items()}
    return {**results, "files": sorted(path.name for path in folder.iterdir() if path.suffix != ".json"), "folder": [str(folder)]}


def test_small_values_go_round(seen: dict[str, list[Any]]) -> None:
    first, second = (result["value"] for result in seen["collectives"])
    for result in (first, second):
        assert result["broadcast"] == {"from": 0, "path": seen["folder"][0]}
        assert result["gathered"] == [["rank", 0], ["rank", 1]]
        # Float64: 3 * 2**-40 beside values of other sizes.
        assert result["sum"] == {"a": 4.0, "b": [[2, 4], [6, 9]], "c": 3 * 2.0**-40}
        assert result["from_main"] == "made by 0"
        assert result["nothing"] == {}
        assert result["steps"][0] is None
        assert result["steps"][1].startswith("the processes found checkpoints of different steps ([0, 500])")
        assert result["threads"] == threads_per_process(2, "1")
        assert result["description"] == f"2 processes over gloo, each on its own cpu (CPU with {result['threads']} threads)"
    assert (first["main"], second["main"]) == (True, False)


def test_the_main_process_goes_first(seen: dict[str, list[Any]]) -> None:
    assert seen["main_goes_first"] == [{"value": "by the main process"}] * 2


def test_a_mistake_of_the_user_stops_all_with_one_message(seen: dict[str, list[Any]]) -> None:
    sentence = "there is no folder /crops; give another with --data.source"
    assert seen["users_mistake_in_main"] == [{"error": ["UserError", sentence]}, {"error": ["ToldElsewhere", sentence]}]


def test_any_other_error_stops_all_too(seen: dict[str, list[Any]]) -> None:
    assert seen["bug_in_main"] == [{"error": ["KeyError", "'missing'"]}, {"error": ["RuntimeError", "process 0 failed: KeyError: 'missing'"]}]


def test_after_an_error_of_the_main_process_the_others_do_nothing(seen: dict[str, list[Any]]) -> None:
    assert seen["files"] == ["bug_0", "codes", "made", "mistake_0"]


def test_an_error_of_another_process_is_its_own(seen: dict[str, list[Any]]) -> None:
    assert seen["error_in_another"] == [{"value": "went on"}, {"error": ["UserError", "only here"]}]


def test_the_death_of_the_main_process_does_not_hang_the_others(seen: dict[str, list[Any]]) -> None:
    dead, other = seen["death_of_main"]
    assert dead is None
    # The type is torch's own (DistBackendError or RuntimeError, by version).
    assert "error" in other


def test_all_stop_after_the_same_step(seen: dict[str, list[Any]]) -> None:
    first, second = (result["value"] for result in seen["stop_together"])
    assert first["step"] == second["step"] == 21
    assert (first["received"], second["received"]) == (False, True)


def test_the_program_itself_may_ask_all_to_stop(seen: dict[str, list[Any]]) -> None:
    assert seen["stop_asked_for"] == [{"value": 6}] * 2


def test_a_run_that_is_not_stopped_ends_cleanly(seen: dict[str, list[Any]]) -> None:
    assert seen["no_stop"] == [{"value": [False] * 7}] * 2


UNDER_TORCHRUN = """
import sys, time
from pathlib import Path
from personmae.training.processes import StopSignal, start_processes

folder = Path(sys.argv[1])
with start_processes("cpu") as processes, StopSignal(processes) as stop:
    for step in range(1, 2000):
        time.sleep(0.02)
        if stop.requested():
            # Writing a checkpoint takes its time; torchrun must not end the process meanwhile.
            time.sleep(0.5)
            (folder / f"stopped_{processes.rank}").write_text(f"{step} {stop.received}")
            break
        (folder / f"started_{processes.rank}").touch()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_torchrun_hands_signals_on(tmp_path: Path, number: signal.Signals) -> None:
    program = tmp_path / "program.py"
    program.write_text(UNDER_TORCHRUN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(program), str(tmp_path)]
    with subprocess.Popen(
        command, env=child_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as run:
        try:
            limit = time.monotonic() + 90
            while not all((tmp_path / f"started_{rank}").exists() for rank in range(2)):
                assert run.poll() is None, run.communicate()[0]
                assert time.monotonic() < limit, "the processes did not start"
                time.sleep(0.05)
            # To the whole group, as a terminal does; torchrun's processes are in groups of their own and get it from torchrun.
            os.killpg(run.pid, number)
            output, _ = run.communicate(timeout=60)
        finally:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)
    stopped = [(tmp_path / f"stopped_{rank}") for rank in range(2)]
    assert all(path.exists() for path in stopped), output
    first, second = (path.read_text().split() for path in stopped)
    assert first[0] == second[0]
    assert output.count("stopping after this step") == 1


INTERRUPTED = """
import signal, time
from personmae.training.processes import Processes, StopSignal

with StopSignal(Processes()) as stop:
    assert not stop.requested()
    signal.raise_signal(signal.SIGINT)
    assert stop.requested() and stop.received == signal.SIGINT
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGINT)
    print("still here", flush=True)
    time.sleep(1.1)
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        print("and still here", flush=True)
"""


def test_a_second_interrupt_ends_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], env=child_environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGINT, done.stderr
    assert done.stdout == "still here\n"


def test_handlers_are_put_back() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with StopSignal(Processes()) as stop:
        assert all(signal.getsignal(number) != handler for number, handler in before.items())
        assert not stop.requested()
    assert {number: signal.getsignal(number) for number in before} == before


@pytest.fixture
def no_torchrun(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in TORCHRUN_NAMES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_one_process_alone(no_torchrun: pytest.MonkeyPatch) -> None:
    with start_processes("cpu") as processes:
        assert (processes.rank, processes.local_rank, processes.world_size, processes.is_main) == (0, 0, 1, True)
        assert processes.device == torch.device("cpu")
        processes.barrier()
        assert processes.broadcast_object("value") == "value"
        assert processes.all_gather("value") == ["value"]
        assert processes.from_main(lambda: "made") == "made"
        assert processes.sum_across({"a": torch.tensor(3)})["a"].item() == 3.0
        with pytest.raises(KeyError, match="missing"), processes.main_first():
            raise KeyError("missing")
        assert processes.description.startswith("1 process on cpu")
    assert not torch.distributed.is_initialized()
    # Some job systems set this for every job.
    no_torchrun.setenv("WORLD_SIZE", "1")
    assert start_processes("cpu").world_size == 1


def test_half_an_environment_is_a_mistake(no_torchrun: pytest.MonkeyPatch) -> None:
    no_torchrun.setenv("WORLD_SIZE", "4")
    no_torchrun.setenv("RANK", "1")
    with pytest.raises(UserError, match=r"WORLD_SIZE=4 but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT; start the run with torchrun"):
        start_processes("cpu")


def test_devices_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("gpu", "cuda:x", "cpu:0", "cuda:-1", ""):
        with pytest.raises(UserError, match=f"unknown device '{wrong}'"):
            choose_device(wrong, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto", 0) == torch.device("cpu")
    with pytest.raises(UserError, match="finds no GPU; choose cpu"):
        choose_device("cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", None) == torch.device("cuda", 0)
    assert choose_device("cuda:1", None) == torch.device("cuda", 1)
    assert choose_device("cuda", 1) == torch.device("cuda", 1)
    assert choose_device("cpu", 1) == torch.device("cpu")
    with pytest.raises(UserError, match=r"GPU 2 was asked for, but this machine has 2; start torchrun with --nproc_per_node=2"):
        choose_device("cuda", 2)
    with pytest.raises(UserError, match="GPU 7 was asked for"):
        choose_device("cuda:7", None)
    with pytest.raises(UserError, match="names one GPU, but torchrun gives each process its own"):
        choose_device("cuda:1", 0)


def test_the_cores_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)), raising=False)
    assert [threads_per_process(num_local, "1") for num_local in (1, 2, 5, 12, 40)] == [12, 6, 2, 1, 1]
    assert threads_per_process(2, None) == 6
    # What the user sets is honoured.
    assert threads_per_process(2, "3") == 3
    assert threads_per_process(2, "many") == 6
