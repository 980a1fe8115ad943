"""Checkpoints written beside the training: the step waits for a copy of the state in host memory, a thread does all the rest.

The thread serialises, hashes, syncs and renames as `save_checkpoint` does, and the file is the same to the byte (but that tensors from a GPU say they
came from host memory). What it costs is memory: one copy of the state (of ViT-B with its teacher and both moments 1.5 GiB) in the main process,
held from the start on. On CUDA it is pinned, so that the device copies into it without making the host wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from personmae.configs import UserError
from personmae.training.checkpoints import plain_state, save_checkpoint

# Pinned memory is given out in powers of two: pieces of one waste little, one allocation for each tensor would waste a third.
PIECE_BYTES = 1 << 26
ALIGNMENT = 64


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time. A context manager: leaving it waits for the one under way.

    An error of the thread (a full disk) is raised by the next `save` or `wait`, or on leaving; `failed` tells of it before.
    """

    def __init__(self, folder: Path, keep_last: int, announce: Callable[[str], object], clock: Callable[[], float] = time.monotonic) -> None:
        """folder, keep_last: see `save_checkpoint`. announce: is told, once, that training had to wait for the disk. clock: in seconds."""
        self._folder, self._keep_last, self._announce, self._clock = folder, keep_last, announce, clock
        self._copy = HostCopy()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None
        self._last_save = clock()

    @property
    def failed(self) -> bool:
        """Whether the checkpoint under way could not be written."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    @property
    def seconds_since_save(self) -> float:
        """Since the last call of `save`, or since the writer was made."""
        return self._clock() - self._last_save

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Take a copy of the state and have it written; the state may change as soon as this returns.

        Waits for the checkpoint before, if that is still under way. Raises its error, and TypeError as `save_checkpoint` does.
        """
        self._last_save = self._clock()
        if self._pending is not None and not self._pending.done():
            self._announce("training waits for a checkpoint, as the one before is still being written: a faster disk or fewer checkpoints would help")
        self.wait()
        copy, copied = self._copy.take(plain_state(state))
        self._pending = self._thread.submit(self._write, step, copy, copied)

    def reserve(self, num_bytes: int, device: torch.device) -> None:
        """Take the memory for states of so many bytes now, which would make the first `save` wait. device: of their tensors."""
        self._copy.reserve(num_bytes, pinned=device.type == "cuda")

    def wait(self) -> None:
        """Until the checkpoint under way, if any, is on the disk. Raises what kept it from there."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, step: int, copy: Mapping[str, Any], copied: torch.cuda.Event | None) -> Path:
        if copied is not None:
            copied.synchronize()
        return save_checkpoint(self._folder, step, copy, self._keep_last)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.wait()
        except UserError as failure:
            if error is None:
                raise
            # The error that ends the run must not hide this one, nor this one that.
            self._announce(str(failure))
        finally:
            self._thread.shutdown()


class HostCopy:
    """Copies of nested tensors in host memory, each in the place of the one before.

    Tensors that share memory share it in the copy too, and strides are kept: what `torch.save` writes of it is the same.
    """

    def __init__(self) -> None:
        self._pieces: list[Tensor] = []
        self._pinned = False

    def reserve(self, num_bytes: int, *, pinned: bool) -> None:
        """Room for tensors of so many bytes in all, and a tenth for what stays free at the end of each piece."""
        self._pinned = pinned
        while sum(map(len, self._pieces)) < 1.1 * num_bytes:
            # Filled, so that the system gives the memory now.
            self._pieces.append(torch.zeros(PIECE_BYTES, dtype=torch.uint8, pin_memory=pinned))

    def take(self, state: Any) -> tuple[Any, torch.cuda.Event | None]:
        """The copy, and what to wait for before it is read (None: nothing). state: dicts, lists and tuples of dense tensors and plain values.

        From CUDA the copies are queued on the current stream, where later kernels that change the state come after them.
        """
        tensors: list[Tensor] = []
        _find_tensors(state, tensors)
        on_cuda = [tensor for tensor in tensors if tensor.is_cuda]
        if bool(on_cuda) != self._pinned:
            self._pieces, self._pinned = [], bool(on_cuda)
        places: dict[int, Tensor] = {}
        piece, used = 0, 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata in places:
                continue
            size = storage.nbytes()
            while piece < len(self._pieces) and used + size > len(self._pieces[piece]):
                piece, used = piece + 1, 0
            if piece == len(self._pieces):
                self._pieces.append(torch.empty(max(size, PIECE_BYTES), dtype=torch.uint8, pin_memory=self._pinned))
            room = self._pieces[piece].numpy()[used : used + size]
            # By way of numpy the slice is a storage of its own: torch.save writes storages whole.
            place = places[storage._cdata] = torch.from_numpy(room)
            source = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            if tensor.is_cuda:
                place.copy_(source, non_blocking=True)
            else:
                # Not with torch's threads, which would wait for one another at each of some hundred tensors.
                np.copyto(room, source.numpy())
            used += -(-size // ALIGNMENT) * ALIGNMENT
        copied = None
        if on_cuda:
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(on_cuda[0].device))
        return _rebuild(state, places), copied


def _find_tensors(value: Any, found: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, Mapping):
        for entry in value.values():
            _find_tensors(entry, found)
    elif isinstance(value, list | tuple):
        for entry in value:
            _find_tensors(entry, found)


def _rebuild(value: Any, places: Mapping[int, Tensor]) -> Any:
    """The same tree with each tensor on the host storage that stands in `places` for its own."""
    if isinstance(value, Tensor):
        storage = places[value.untyped_storage()._cdata].untyped_storage()
        return torch.empty(0, dtype=value.dtype).set_(storage, value.storage_offset(), value.size(), value.stride())
    if isinstance(value, Mapping):
        return {key: _rebuild(entry, places) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_rebuild(entry, places) for entry in value)
    return value
