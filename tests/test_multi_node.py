"""Several machines: the launch file of docs/multi-node.md, run as it stands by two torchrun agents on this machine, and how processes meet."""

import datetime
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from crops import SMALL, draw_crops
from torch.distributed.run import get_args_parser

from personmae import pretrain
from personmae.configs import UserError
from personmae.training.rendezvous import agree_on_name

ROOT = Path(pretrain.__file__).parent.parent
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "multi-node.md").read_text(encoding="utf-8"), re.DOTALL)
SBATCH, PLAIN = BLOCKS
SBATCH_OPTIONS = {
    *("job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "mem", "time", "partition", "account"),
    *("array", "signal", "requeue", "open-mode", "output"),
}

# Takes the place of Slurm's: writes down what it was asked for, and starts one agent for each machine, with a network and a run of this test's.
SRUN = """#!{python}
import json, os, subprocess, sys
words = sys.argv[1:]
launcher, program = words.index("torchrun"), words.index("personmae/pretrain.py")
options = [word.replace(":29500", ":" + os.environ["TEST_PORT"]) for word in words[launcher + 1 : program]]
asked = {{"srun": words[:launcher], "torchrun": words[launcher + 1 : program], "program": words[program + 1 :]}}
with open("asked.json", "w") as file:
    json.dump(asked, file)
command = [sys.executable, "-m", "torch.distributed.run", *options, "--local-addr=127.0.0.1", words[program], *json.loads(os.environ["TEST_FLAGS"])]
agents = [subprocess.Popen(command) for _ in range(int(os.environ["SLURM_NNODES"]))]
sys.exit(max(abs(agent.wait()) for agent in agents))
"""


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def write_program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def workers_of(run_id):
    """{rank: process id} of the workers of a run."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        values = dict(word.split("=", 1) for word in words if "=" in word)
        if values.get("TORCHELASTIC_RUN_ID") == run_id and "RANK" in values:
            found[int(values["RANK"])] = int(folder.name)
    return found


def test_the_sbatch_file_trains_on_two_machines_and_outlives_a_worker(tmp_path):
    """Two agents, loopback only; the worker of the second dies in mid-run, so that each machine counts another number of restarts."""
    run_id, port = f"test-{os.getpid()}-{time.time_ns()}", free_port()
    write_program(tmp_path / "bin" / "srun", SRUN.format(python=sys.executable))
    write_program(tmp_path / "bin" / "scontrol", "#!/bin/bash\n[ \"$*\" = 'show hostnames node[1-2]' ] && printf '127.0.0.1\\n127.0.0.2\\n'\n")
    write_program(tmp_path / ".venv" / "bin" / "activate", "")
    (tmp_path / "personmae").symlink_to(ROOT / "personmae")
    (tmp_path / "pretrain.sbatch").write_text(SBATCH)
    crops, run = draw_crops(tmp_path / "crops"), tmp_path / "run"
    where = ["--data.source", str(crops), "--data.index-dir", str(tmp_path / "index"), "--run-dir", str(run)]
    flags = [*SMALL, *where, "--schedule.steps", "40", "--checkpoint-every", "5", "--picture-every", "1000"]
    environment = {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "TEST_PORT": str(port),
        "TEST_FLAGS": json.dumps(flags),
        "SLURM_JOB_ID": run_id,
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_CPUS_PER_TASK": "1",
    }
    command = ["bash", "-eu", "pretrain.sbatch"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    job = subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not (run / "checkpoints" / "step_0000005.pt").exists():
            assert job.poll() is None, job.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(workers_of(run_id)[1], signal.SIGKILL)
        text = job.communicate(timeout=150)[0]
    finally:
        for process in workers_of(run_id).values():
            os.kill(process, signal.SIGKILL)
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode == 0, text
    assert "2 processes over gloo" in text
    assert text.count("continuing ") == 1, text
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 41))
    assert (run / "encoder.safetensors").exists()

    asked = json.loads((tmp_path / "asked.json").read_text())
    assert asked["srun"] == ["--kill-on-bad-exit=1", "--cpus-per-task=1"]
    assert f"--rdzv-id={run_id}" in asked["torchrun"]
    assert "--rdzv-endpoint=127.0.0.1:29500" in asked["torchrun"]
    config = pretrain.from_command_line(asked["program"])
    assert (config.preset, config.run_dir, config.checkpoint_minutes) == ("vit-base", Path("/shared/runs/base"), 10)


def test_the_sbatch_options_are_slurms():
    lines = [line for line in SBATCH.splitlines() if line.startswith("#SBATCH")]
    options = dict(re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line).groups() for line in lines)
    assert set(options) <= SBATCH_OPTIONS
    assert (options["nodes"], options["ntasks-per-node"], options["signal"]) == ("2", "1", "TERM@120")


def test_the_command_without_slurm_is_read_by_torchrun_and_by_us():
    words = shlex.split(PLAIN.replace("\\\n", " "))
    assert words[0] == "torchrun"
    options = get_args_parser().parse_args(words[1:])
    assert (options.nnodes, options.nproc_per_node, options.max_restarts, options.rdzv_backend) == ("2", "8", 3, "c10d")
    assert options.training_script == "personmae/pretrain.py"
    assert pretrain.from_command_line(options.training_script_args).run_dir == Path("/shared/runs/base")


LIMIT = datetime.timedelta(seconds=30)


def start_together(store, world_size, late=()):
    """The names that the processes of one start agree on, by rank; those in `late` come a moment after the others."""
    names = {}

    def one(rank):
        if rank in late:
            time.sleep(0.2)
        names[rank] = agree_on_name(store, rank, world_size, LIMIT)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [names[rank] for rank in range(world_size)]


def test_each_start_has_a_name_of_its_own():
    store = dist.HashStore()
    store.set_timeout(LIMIT)
    seen = set()
    for late in ((), (0,), (1, 2), (3,)):
        names = start_together(store, 4, late)
        assert len(set(names)) == 1
        assert names[0] not in seen
        seen.add(names[0])
    # A start that only some processes have come to, as others died before: it leaves a greeting that nobody waits on.
    abandoned = threading.Thread(target=agree_on_name, args=(store, 2, 4, LIMIT), daemon=True)
    abandoned.start()
    time.sleep(0.1)
    names = start_together(store, 4, late=(0,))
    assert len(set(names)) == 1


def test_processes_that_do_not_come_are_named():
    store = dist.HashStore()
    with pytest.raises(UserError, match=r"2 of 3 processes did not come within 0:00:00.1\d*, the first of them number 1: look at"):
        agree_on_name(store, 0, 3, datetime.timedelta(seconds=0.1))
