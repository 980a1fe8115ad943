"""The processes that do the jobs of packing: one shard at a time each, so that no pixel travels between them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from tqdm import tqdm

from personmae.configs import UserError
from personmae.data.packs.jobs import Job, do_job
from personmae.data.worker_environment import worker_environment


def do_jobs(jobs: Iterator[Job], num_images: int, num_workers: int, description: str, progress: bool) -> None:
    """Do all jobs.

    num_images: in them, for the bar. num_workers: processes; 1 = this one. Raises UserError if a job does; the others are ended then.
    """
    with tqdm(total=num_images, unit="img", desc=description, disable=None if progress else True) as bar:
        if num_workers == 1:
            for job in jobs:
                do_job(job, bar.update)
        else:
            _Crew(jobs, num_workers, bar).work()


class _Crew:
    def __init__(self, jobs: Iterator[Job], num_workers: int, bar: Any) -> None:
        self._jobs, self._num_workers, self._bar = jobs, num_workers, bar
        self._lock = threading.Lock()
        self._problems: list[Exception] = []

    def work(self) -> None:
        workers: list[tuple[subprocess.Popen[bytes], Connection]] = []
        finished = False
        try:
            for _ in range(self._num_workers):
                workers.append(_start_worker())
            threads = [threading.Thread(target=self._feed, args=(connection,), daemon=True) for _, connection in workers]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            finished = not self._problems
        finally:
            for worker, connection in workers:
                connection.close()
                if not finished:
                    worker.terminate()
                worker.wait()
        if self._problems:
            raise self._problems[0]

    def _feed(self, connection: Connection) -> None:
        """Give one worker job after job, and pass its counts on."""
        while True:
            with self._lock:
                job = None if self._problems else next(self._jobs, None)
            if job is None:
                return
            try:
                connection.send(job)
                while (answer := connection.recv()) is not None:
                    if isinstance(answer, str):
                        raise UserError(answer)
                    with self._lock:
                        self._bar.update(answer)
            except (EOFError, OSError) as error:
                said = f"a process that packs has ended in shard {job.number} ({type(error).__name__}): was it killed for memory?"
                self._note(UserError(f"{said} The same command goes on from there, with fewer --num-processes if need be"))
                return
            except UserError as error:
                self._note(error)
                return

    def _note(self, problem: Exception) -> None:
        with self._lock:
            self._problems.append(problem)


def _start_worker() -> tuple[subprocess.Popen[bytes], Connection]:
    """A program of its own, not a fork (this process has threads) and not multiprocessing's spawn (which runs the user's script again)."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-P", "-m", "personmae.data.packs.worker", str(theirs.fileno())]
    # Their end stays open in the worker alone, so that ours tells when it has died.
    with ours, theirs:
        worker = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=worker_environment())
        return worker, Connection(os.dup(ours.fileno()))
