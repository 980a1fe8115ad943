"""The processes of a run: what torchrun started, or one process alone; how they agree, wait for one another, and stop
together.

Tensors of the training step go through the main group (NCCL on CUDA, gloo on the CPU). Small objects, waiting and
stopping go through a gloo group of their own with a long time limit, so that they never touch a GPU's stream and one
process may index millions of files while the others wait.
"""

from __future__ import annotations

import datetime
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from personmae.configs import ToldElsewhere, UserError
from personmae.training.rendezvous import join_store

Value = TypeVar("Value")
# In which all processes must have come up.
JOIN_LIMIT = datetime.timedelta(minutes=30)
CONTROL_LIMIT = datetime.timedelta(hours=24)
# A launcher may hand a Ctrl-C on to a process that the terminal has interrupted already: two within this time are one.
SAME_INTERRUPT_SECONDS = 1.0


@dataclass(frozen=True)
class Processes:
    """This process among those of the run. A context manager: leaving it ends the communication.

    rank: 0 ... world_size - 1 over all machines. local_rank: the number on this machine, of local_world_size. device: this process's own.
    control: the group for objects and waiting; None for a process alone.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    device: torch.device = torch.device("cpu")
    control: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """True in the one process that writes files and talks to the user."""
        return self.rank == 0

    @property
    def description(self) -> str:
        """What runs where, in words, to be announced."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else f"CPU with {torch.get_num_threads()} threads"
        if self.world_size == 1:
            return f"1 process on {self.device} ({name})"
        return f"{self.world_size} processes over {dist.get_backend()}, each on its own {self.device.type} ({name})"

    def barrier(self) -> None:
        """Wait until every process has come here."""
        if self.control is not None:
            dist.barrier(group=self.control)

    def broadcast_object(self, value: Value) -> Value:
        """The main process's value (anything that can be pickled), in every process."""
        if self.control is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def all_gather(self, value: Value) -> list[Value]:
        """Every process's value (anything that can be pickled), by rank, in every process."""
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def check_same_step(self, first: int) -> None:
        """Raises UserError if the processes would go on from different steps: then they do not see the same run folder."""
        firsts = sorted(set(self.all_gather(first)))
        if len(firsts) > 1:
            raise UserError(
                f"the processes found checkpoints of different steps ({firsts}): the run folder must be on a disk that all machines share"
            )

    def main_first(self) -> MainFirst:
        """`with processes.main_first():` the main process runs the body, then the others do (to read what it has made).

        If it fails in the main process, the others do not run it but raise with the same message: UserError for a
        UserError, else RuntimeError.
        """
        return MainFirst(self)

    def from_main(self, make: Callable[[], Value]) -> Value:
        """What `make()` gives in the main process, in every process; if it fails there, the others raise as in `main_first`."""
        made: list[Value] = []
        with self.main_first():
            if self.is_main:
                made.append(make())
        return self.broadcast_object(made)[0]

    def sum_across(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sums of named tensors over the processes, in one all_reduce and without waiting for the GPU.

        values: the same names and shapes in every process, on its device. Returns float64 tensors of the same shapes.
        """
        flat = {name: value.detach().to(torch.float64) for name, value in values.items()}
        if self.world_size == 1 or not flat:
            return flat
        joined = torch.cat([value.reshape(-1) for value in flat.values()])
        dist.all_reduce(joined)
        parts = joined.split([value.numel() for value in flat.values()])
        return {name: part.reshape(value.shape) for (name, value), part in zip(flat.items(), parts, strict=True)}

    def close(self) -> None:
        """End the communication; every process has to call it (or end)."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # After an error the others may be inside a collective that NCCL's shutdown would wait for: torchrun stops them.
        if error is None or self.device.type == "cpu":
            self.close()


class MainFirst:
    """The context manager of `Processes.main_first`."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes

    def __enter__(self) -> None:
        if self.processes.is_main:
            return
        failure = self.processes.broadcast_object(None)
        if failure is not None:
            is_users_mistake, message = failure
            raise ToldElsewhere(message) if is_users_mistake else RuntimeError(message)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self.processes.is_main:
            return
        failure: Any = None
        if isinstance(error, UserError):
            failure = (True, str(error))
        elif error is not None:
            failure = (False, f"process 0 failed: {type(error).__name__}: {error}")
        self.processes.broadcast_object(failure)


class StopSignal:
    """Turns SIGTERM and Ctrl-C into a question that all processes answer alike, so that they stop after the same step.

    A context manager: the handlers are in place inside it. Every process calls `requested()` once per step. The answer
    of one call is the flags at the call before, exchanged meanwhile (4 bytes over gloo): nobody waits for it, and the
    run stops at most one step later. A second Ctrl-C ends the process at once.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.received: signal.Signals | None = None
        self._asked = False
        self._first_time = 0.0
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._exchange: dist.Work | None = None
        self._before: dict[signal.Signals, Any] = {}

    def ask(self) -> None:
        """Stop all processes, as a signal would."""
        self._asked = True

    def requested(self) -> bool:
        """Whether any process was asked to stop, the same answer in every process; call it once per step in each."""
        wanted = self._asked or self.received is not None
        if self.processes.control is None:
            return wanted
        if self._finish_exchange():
            return True
        self._flag[0] = int(wanted)
        self._exchange = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, group=self.processes.control, async_op=True)
        return False

    def _finish_exchange(self) -> bool:
        if self._exchange is not None:
            self._exchange.wait()
            self._exchange = None
        return bool(self._flag.item())

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
            self._first_time = time.monotonic()
            if self.processes.is_main:
                # Not print: a handler may interrupt a print, which cannot be entered twice.
                os.write(2, b"\nstopping after this step; Ctrl-C once more ends the run at once, without a checkpoint\n")
        elif number == signal.SIGINT and time.monotonic() - self._first_time > SAME_INTERRUPT_SECONDS:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)

    def __enter__(self) -> Self:
        assert threading.current_thread() is threading.main_thread(), "signals are received by the main thread"
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        # An exchange under way must end before its group is closed; after an error another process may never answer it.
        if error is None:
            self._finish_exchange()


def start_processes(device: str = "auto") -> Processes:
    """Join the processes that torchrun started; without torchrun, be one process alone.

    device: "auto" (CUDA if there is a GPU, else the CPU), "cpu", "cuda", or for a process alone "cuda:1". Under
    torchrun each process of a machine takes the GPU of its local number. Raises UserError naming a device that is not
    there, or an incomplete environment.
    """
    needed = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in os.environ]
    if len(missing) == len(needed) or (missing and os.environ.get("WORLD_SIZE", "1") == "1"):
        alone = choose_device(device, local_rank=None)
        if alone.type == "cuda":
            # What names no device (streams, CUDA graphs) is then on this one.
            torch.cuda.set_device(alone)
        return Processes(device=alone)
    if missing:
        raise UserError(
            f"the environment sets WORLD_SIZE={os.environ.get('WORLD_SIZE')} but not {', '.join(missing)}; "
            "start the run with torchrun, or unset WORLD_SIZE for a single process"
        )
    rank, local_rank, world_size = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    chosen = choose_device(device, local_rank=local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world_size == 1:
        return Processes(device=chosen)
    if chosen.type == "cpu":
        torch.set_num_threads(threads_per_process(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), os.environ.get("OMP_NUM_THREADS")))
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    store = join_store(rank, world_size, JOIN_LIMIT)
    device_id = chosen if chosen.type == "cuda" else None
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, device_id=device_id)
    control = dist.new_group(backend="gloo", timeout=CONTROL_LIMIT)
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    return Processes(
        rank=rank, local_rank=local_rank, world_size=world_size, local_world_size=local_world_size, device=chosen, control=control
    )


def choose_device(name: str, local_rank: int | None) -> torch.device:
    """The device of this process. local_rank: its number on the machine; None if it runs alone. Raises UserError if it
    is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not (kind == "cuda" and number.isdecimal())):
        raise UserError(f"unknown device {name!r}; choose auto, cpu, cuda or cuda:NUMBER")
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            f"device {name} was asked for, but torch {torch.__version__} finds no GPU; choose cpu, "
            "or check nvidia-smi and that torch is a build with CUDA"
        )
    if number and local_rank is not None:
        raise UserError(f"device {name} names one GPU, but torchrun gives each process its own; choose cuda")
    index = int(number or 0) if local_rank is None else local_rank
    if index >= torch.cuda.device_count():
        raise UserError(
            f"GPU {index} was asked for, but this machine has {torch.cuda.device_count()}; "
            f"start torchrun with --nproc_per_node={torch.cuda.device_count()} or fewer"
        )
    return torch.device("cuda", index)


def threads_per_process(num_local: int, omp_setting: str | None) -> int:
    """How many threads of torch each of `num_local` processes on one CPU machine should use: an equal share of the
    cores.

    omp_setting: the value of OMP_NUM_THREADS, which is honoured, except 1: torchrun itself sets that where the user set
    nothing.
    """
    if omp_setting is not None and omp_setting.isdecimal() and int(omp_setting) > 1:
        return int(omp_setting)
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, num_cores // num_local)
