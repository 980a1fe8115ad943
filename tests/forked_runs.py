"""Pre-training runs of several processes, started as torchrun would, but forked from one that has imported torch: an import takes longer than a run.

python tests/forked_runs.py PHASES.json
A phase is {"processes", "arguments" of the pretrain program, "record": folder for what each process was given, "stop_at": a step or null}.
"""

import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

from personmae import pretrain


def recorded(open_loader, folder, stop_at):
    """`open_loader` whose loaders write down each batch that training takes; process 0 gets SIGTERM in step `stop_at`."""

    def open_recorded(*arguments, **options):
        loader = open_loader(*arguments, **options)
        rank, world_size = options["rank"], options["world_size"]
        original = loader._to_device

        def to_device(batch):
            entry = {"step": batch.step, "part": batch.micro * world_size + rank, "samples": batch.samples.tolist(), "boxes": batch.boxes.tolist()}
            with open(folder / f"{world_size}_{rank}.jsonl", "a") as file:
                file.write(json.dumps(entry) + "\n")
            if rank == 0 and batch.step == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(batch)

        loader._to_device = to_device
        return loader

    return open_recorded


def run_process(phase, rank, port):
    """One process of a phase; never returns."""
    status = 1
    try:
        if phase["processes"] > 1:
            size, rank_ = str(phase["processes"]), str(rank)
            os.environ.update(RANK=rank_, LOCAL_RANK=rank_, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        pretrain.open_loader = recorded(pretrain.open_loader, Path(phase["record"]), phase["stop_at"])
        pretrain.main(pretrain.from_command_line(phase["arguments"]))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run_phase(phase):
    """Exits with an error if one of the processes does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(phase["processes"]):
        child = os.fork()
        if child == 0:
            run_process(phase, rank, port)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        sys.exit(f"the processes of {phase} ended with {codes}")


if __name__ == "__main__":
    for phase in json.loads(Path(sys.argv[1]).read_text()):
        run_phase(phase)
