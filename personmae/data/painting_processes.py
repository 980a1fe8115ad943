"""Processes of one thread each that draw rows of a plan, and hand them over in memory that they share with the process that trains.

Threads of one process come to nothing where they are many: each image takes some twenty calls that give Python's lock away and want it back, and on
16 cores the threads wait for it most of the time. One program of its own (`painting_worker`) imports what drawing needs and then forks them, so they
are ready after a few seconds however many they are, and what they have to know of the images lies in memory once.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress
from dataclasses import dataclass, fields
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

from personmae.configs import UserError
from personmae.data.decoded_file import DecodedFile
from personmae.data.delivery import LoaderConfig
from personmae.data.image_index import ImageIndex
from personmae.data.images import UInt8Array
from personmae.data.plan import BatchPlan
from personmae.data.shared_pixels import SharedPixels
from personmae.data.worker_environment import worker_environment

Images = ImageIndex | DecodedFile | SharedPixels
# What the program adds to the number of the signal that ended one of its processes, in its own status.
SIGNALLED = 128
_ALIGNMENT = 64


@dataclass(frozen=True)
class Setup:
    """What a process is told once. lengths: bytes of the arrays that follow each other in the shared memory of `columns`. images: pickled, without
    those arrays. scratch: (R, rows, H, W, 3), where it draws. repeats: rows of each image."""

    columns: int
    lengths: list[int]
    images: bytes
    config: LoaderConfig
    scratch: tuple[int, ...]
    repeats: int


@dataclass(frozen=True)
class Drawn:
    """An answer. failed: the first rows of images that could not be read. problem: what the user has to mend."""

    failed: list[int]
    problem: str | None = None


class PaintingProcesses:
    """Draws rows like `RowPainter`, on `num_processes` processes; any number of threads may ask.

    images: where pixels come from. size: (H, W) of the regions. num_regions: R. rows_at_once: most rows of one call. repeats: rows of each image.
    """

    def __init__(
        self,
        images: Images,
        config: LoaderConfig,
        size: tuple[int, int],
        *,
        num_regions: int,
        rows_at_once: int,
        repeats: int,
        num_processes: int,
    ) -> None:
        self._scratch_shape = (num_regions, rows_at_once, *size, 3)
        self._free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._program: subprocess.Popen[bytes] | None = None
        columns = os.memfd_create("personmae columns")
        with ExitStack() as stack:
            stack.callback(self.close)
            stack.callback(os.close, columns)
            setup = _setup(images, config, columns, self._scratch_shape, repeats)
            inherited = [columns, images.descriptor] if isinstance(images, SharedPixels) else [columns]
            self._program, workers = _start(num_processes, self._scratch_shape, inherited)
            for worker in workers:
                with suppress(OSError):
                    worker.connection.send(setup)
                self._free.put(worker)
            os.close(columns)
            stack.pop_all()

    def paint(self, planned: BatchPlan, rows: range, pixels: UInt8Array) -> list[int]:
        """Draws some rows of a batch into pixels, uint8 [R, B, H, W, 3], which other threads may be drawing into elsewhere.

        Returns the first rows of images that could not be read, whose pixels mean nothing. Raises UserError if a process has died.
        """
        worker = self._free.get()
        try:
            worker.connection.send(planned.cut(slice(rows.start, rows.stop)))
            answer = worker.connection.recv()
        except (EOFError, OSError) as error:
            raise UserError(f"a process of the loader has ended, {self._ending()}") from error
        else:
            if answer.problem is not None:
                raise UserError(answer.problem)
            pixels[:, rows.start : rows.stop] = worker.scratch[:, : len(rows)]
            return [rows.start + row for row in answer.failed]
        finally:
            self._free.put(worker)

    def close(self) -> None:
        """Ends the processes, whatever they are doing: they write to nothing but their memory."""
        if self._program is not None:
            # The program and all that it has forked are a group.
            with suppress(ProcessLookupError):
                os.killpg(self._program.pid, signal.SIGKILL)
            self._program.wait()

    def _ending(self) -> str:
        """How one ended, for people, and what may help: the program that forked them ends with the first."""
        assert self._program is not None
        fewer = "resume with fewer (--data.loader.num-threads), or with --data.loader.kind threads"
        try:
            status = self._program.wait(5)
        except subprocess.TimeoutExpired:
            return f"or does not answer: {fewer}"
        number = status - SIGNALLED if status > SIGNALLED else -status
        return f"signal {number}: was it killed for memory? Then {fewer}" if number > 0 else f"status {status}: its own message stands above"


class _Worker(NamedTuple):
    connection: Connection
    scratch: UInt8Array  # [R, rows, H, W, 3]


class _Pickler(pickle.Pickler):
    """Takes all that is long as plain arrays, which pickle keeps apart from the rest, and of an index only what drawing needs."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is np.memmap:
            return np.asarray(obj).__reduce_ex__(5)
        if type(obj) is ImageIndex:
            names = np.frombuffer(obj.names, dtype=np.uint8) if isinstance(obj.names, bytes) else obj.names
            values = {field.name: getattr(obj, field.name) for field in fields(obj)}
            return _index_of, ({**values, "names": names, "rejected": []},)
        return NotImplemented


def _index_of(values: dict[str, Any]) -> ImageIndex:
    return ImageIndex(**values)


def _setup(images: Images, config: LoaderConfig, columns: int, scratch: tuple[int, ...], repeats: int) -> Setup:
    """Writes the arrays into `columns`, and the rest of what is told."""
    buffers: list[memoryview] = []
    with os.fdopen(os.dup(columns), "wb") as file:
        content = io.BytesIO()
        _Pickler(content, 5, buffer_callback=lambda buffer: buffers.append(buffer.raw())).dump(images)
        for buffer in buffers:
            file.write(buffer)
            file.write(bytes(-len(buffer) % _ALIGNMENT))
    return Setup(columns, [len(buffer) for buffer in buffers], content.getvalue(), config, scratch, repeats)


def restore_images(setup: Setup) -> Images:
    """In such a process: the images, their arrays being the shared memory."""
    padded = [length + -length % _ALIGNMENT for length in setup.lengths]
    content = memoryview(mmap.mmap(setup.columns, sum(padded), access=mmap.ACCESS_READ)) if sum(padded) else memoryview(b"")
    starts = np.cumsum([0, *padded])
    buffers = [content[start : start + length] for start, length in zip(starts.tolist(), setup.lengths, strict=False)]
    return pickle.loads(setup.images, buffers=buffers)


def _start(num_processes: int, scratch: tuple[int, ...], inherited: list[int]) -> tuple[subprocess.Popen[bytes], list[_Worker]]:
    """The program and the processes that it forks. Not a fork of this process, which has threads, and not multiprocessing's spawn, which runs the
    user's script again."""
    num_bytes = int(np.prod(scratch))
    workers = []
    with ExitStack() as stack:
        pairs = []
        for _ in range(num_processes):
            # Their end stays open in its process alone, so that ours tells when that has died.
            ours, theirs = map(stack.enter_context, socket.socketpair())
            memory = os.memfd_create("personmae rows")
            stack.callback(os.close, memory)
            os.ftruncate(memory, num_bytes)
            pairs += [theirs.fileno(), memory]
            rows = np.frombuffer(mmap.mmap(memory, num_bytes), dtype=np.uint8).reshape(scratch)
            workers.append(_Worker(Connection(os.dup(ours.fileno())), rows))
        command = [sys.executable, "-P", "-m", "personmae.data.painting_worker", *map(str, pairs)]
        # A job scheduler sends this to all of its processes, and the one that trains decides what to do about it: these keep it blocked, as they
        # inherit it. What a terminal sends stays with its own group.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            program = subprocess.Popen(
                command, pass_fds=[*pairs, *inherited], stdin=subprocess.DEVNULL, env=worker_environment(), start_new_session=True
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return program, workers
