"""Checkpoints of a run: written whole or not at all, checked by a checksum, holding tensors and plain values only.

A file is what `torch.save` writes (so `torch.load(path, weights_only=True)` reads it anywhere) followed by one line
with the SHA-256 of everything before it. It is written under a temporary name in the same folder, synced to the disk
and renamed: a process that is killed at any moment leaves the previous checkpoint as it was.
"""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from personmae.configs import UserError
from personmae.whole_files import PARTIAL_SUFFIX, flush_folder, whole_path

FORMAT_VERSION = 1
FILE_NAME = re.compile(r"step_(\d{7,})\.pt")
ASIDE_SUFFIX = ".aside"
CHECKSUM_MARK = b"\npersonmae-sha256 "
CHECKSUM_BYTES = len(CHECKSUM_MARK) + 64 + 1
PLAIN_TYPES = (type(None), bool, int, float, str, bytes)


class BrokenCheckpoint(UserError):
    """A checkpoint file that is truncated, altered, or no checkpoint at all; an older one may still be good."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read: step = optimiser steps done; state = the nested tensors (on the CPU) and plain values that
    were saved.
    """

    path: Path
    step: int
    state: dict[str, Any]


def save_checkpoint(folder: Path, step: int, state: Mapping[str, object], keep_last: int) -> Path:
    """Write folder/step_0001000.pt atomically, then remove all but the newest `keep_last` checkpoints up to this step.

    state: nested mappings (keys str or int), lists and tuples of dense tensors and None, bool, int, float, str, bytes.
    A file of a later step belongs to a continuation that was given up (or is broken): it is set aside under the name
    step_0002000.pt.aside, neither removed nor found by `load_newest`.

    Raises TypeError naming the place of a value that is neither tensor nor plain; UserError if the disk refuses (full,
    no permission): the earlier checkpoints are then untouched and no temporary file stays behind.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last is {keep_last}; a run has to keep at least 1 checkpoint")
    if step < 0:
        raise ValueError(f"step is {step}; it counts the optimiser steps done, from 0")
    content = {"format": "personmae", "version": FORMAT_VERSION, "step": step, "state": plain_state(state)}
    path = folder / f"step_{step:07d}.pt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("step_*.pt" + PARTIAL_SUFFIX):
            stale.unlink(missing_ok=True)
        # Flushed before a later checkpoint is set aside: until then nothing is lost if the disk refuses.
        with whole_path(path, flush=False, shared=False) as partial:
            _write_checked(partial, content)
            for later_step, later in list_checkpoints(folder):
                if later_step > step:
                    later.rename(later.with_name(later.name + ASIDE_SUFFIX))
        flush_folder(folder)
        for _, old in list_checkpoints(folder)[:-keep_last]:
            old.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(_explain_write(error, path, content)) from error
    return path


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify one checkpoint; tensors come to the CPU, and no code in the file is run.

    Raises BrokenCheckpoint (a UserError) if the file is truncated, altered or of another kind; UserError if it
    cannot be opened or was written by a newer version of the project.
    """
    try:
        with open(path, "rb") as file:
            _verify_checksum(file, path)
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"there is no checkpoint {path}; give the path of a step_*.pt file") from error
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror or error}") from error
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise BrokenCheckpoint(
            f"the checkpoint {path} holds more than tensors and plain values, or this torch cannot read it; "
            "it was not loaded: take one that this project wrote"
        ) from error
    if not isinstance(content, dict) or content.get("format") != "personmae":
        raise BrokenCheckpoint(f"{path} is no checkpoint of PersonMAE; give the path of a step_*.pt file from a run's checkpoints folder")
    if content["version"] != FORMAT_VERSION:
        raise UserError(
            f"the checkpoint {path} has format {content['version']}, this PersonMAE reads format {FORMAT_VERSION}; "
            "update PersonMAE: pip install --upgrade personmae"
        )
    return Checkpoint(path=path, step=content["step"], state=content["state"])


def load_newest(folder: Path, announce: Callable[[str], object]) -> Checkpoint | None:
    """The newest checkpoint of a folder that is good, read; None if the folder has none at all (or does not exist).

    A broken one is passed over for the one before it, and `announce` gets the sentence that says so. Raises UserError
    if there are checkpoints and all are broken: to start again from nothing must be the user's decision.
    """
    found = list_checkpoints(folder)
    for _, path in reversed(found):
        try:
            return load_checkpoint(path)
        except BrokenCheckpoint as error:
            announce(f"passing over a broken checkpoint: {error}")
    if found:
        raise UserError(f"none of the {len(found)} checkpoints in {folder} can be read; move the folder away to start from the beginning")
    return None


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the folder's checkpoint files, ascending by step, unread; empty if there is no such folder."""
    if not folder.is_dir():
        return []
    matches = ((FILE_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match.group(1)), path) for match, path in matches if match)


def restore_module(module: nn.Module, saved: Mapping[str, Tensor], *, part: str, source: Path, saved_preset: str, preset: str) -> None:
    """Load `saved` into `module`, all names, shapes and dtypes equal.

    part: what to call it in a message ("model", "teacher"). source: the file, for the message. saved_preset, preset:
    the names of the checkpoint's preset and of this run's. Raises UserError naming both presets and the first tensor
    that differs; the module is then unchanged.
    """
    difference = first_difference(saved, module.state_dict())
    if difference:
        raise UserError(_explain_mismatch(source, part, difference, saved_preset, preset))
    module.load_state_dict(saved)


def restore_optimiser(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], *, source: Path, saved_preset: str, preset: str) -> None:
    """Load an optimiser's state, checked first: torch itself accepts moments of another shape and fails steps later.

    Raises UserError naming the first parameter group or moment that differs; the optimiser is then unchanged.
    """
    difference = _optimiser_difference(optimizer, saved)
    if difference:
        raise UserError(_explain_mismatch(source, "optimiser", difference, saved_preset, preset))
    optimizer.load_state_dict(dict(saved))


def first_difference(saved: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> str | None:
    """The first name, shape or dtype in which two sets of named tensors differ, in words; None if they agree."""
    for name, tensor in here.items():
        if name not in saved:
            return f"the tensor {name} {list(tensor.shape)} of this run is not in the checkpoint"
        if saved[name].shape != tensor.shape:
            return f"the tensor {name} is {list(saved[name].shape)} in the checkpoint and {list(tensor.shape)} in this run"
        if saved[name].dtype != tensor.dtype:
            return f"the tensor {name} is {saved[name].dtype} in the checkpoint and {tensor.dtype} in this run"
    for name, tensor in saved.items():
        if name not in here:
            return f"the tensor {name} {list(tensor.shape)} of the checkpoint is not in this run"
    return None


def _optimiser_difference(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> str | None:
    groups, saved_groups = optimizer.param_groups, saved["param_groups"]
    if len(groups) != len(saved_groups):
        return f"there are {len(saved_groups)} parameter groups in the checkpoint and {len(groups)} in this run"
    for number, (group, saved_group) in enumerate(zip(groups, saved_groups, strict=True)):
        num_here, num_saved = len(group["params"]), len(saved_group["params"])
        if num_here != num_saved:
            return f"group {number} has {num_saved} parameters in the checkpoint and {num_here} in this run"
        for parameter, index in zip(group["params"], saved_group["params"], strict=True):
            for name, value in saved["state"].get(index, {}).items():
                # A 0-dimensional value is a step counter, everything else a moment of its parameter's shape.
                if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                    shapes = f"{list(value.shape)} in the checkpoint and {list(parameter.shape)} in this run"
                    return f"{name} of parameter {index} is {shapes}"
    return None


def _explain_mismatch(source: Path, part: str, difference: str, saved_preset: str, preset: str) -> str:
    if saved_preset != preset:
        return (
            f"the checkpoint {source} is of preset {saved_preset}, this run is of preset {preset} "
            f"({part}: {difference}); start with {saved_preset} to go on with it, or choose another run folder"
        )
    return (
        f"the checkpoint {source} does not fit this run, though both are of preset {preset} ({part}: {difference}); "
        "go on with the options that it was started with, or choose another run folder"
    )


def plain_state(state: Mapping[str, object]) -> Any:
    """What `save_checkpoint` saves of a state: dicts, lists and tuples of detached tensors, none a view of a larger one, and plain values.

    Raises TypeError naming the place of a value of another kind.
    """
    return _to_plain(state, "state")


def _to_plain(value: object, place: str) -> object:
    """The same tree of dict, list, tuple, detached tensors, plain values; TypeError naming the place of another."""
    if type(value) in PLAIN_TYPES:
        return value
    if type(value) in (Tensor, nn.Parameter) and isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_meta:
            kind = "meta" if value.is_meta else value.layout
            raise TypeError(f"{place} is a {kind} tensor; a checkpoint holds dense tensors with data")
        tensor = value.detach()
        # torch.save writes the whole storage behind a view: a slice of a large buffer would be saved as the buffer.
        is_view = tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()
        return tensor.clone() if is_view else tensor
    if isinstance(value, Mapping):
        for key in value:
            if type(key) not in (str, int):
                raise TypeError(f"{place} has the key {key!r} of type {_type_name(key)}; keys of a checkpoint are str or int")
        return {key: _to_plain(entry, f"{place}[{key!r}]") for key, entry in value.items()}
    if type(value) in (list, tuple) and isinstance(value, (list, tuple)):
        return type(value)(_to_plain(entry, f"{place}[{index}]") for index, entry in enumerate(value))
    raise TypeError(
        f"{place} is a {_type_name(value)}; a checkpoint holds only dict, list and tuple of tensors, None, bool, int, float, str and bytes"
    )


def _type_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


class _HashedFile:
    """A file for torch.save to write to, which takes the checksum on the way and remembers the error that torch hides
    in a RuntimeError.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _write_checked(path: Path, content: object) -> None:
    with open(path, "wb") as file:
        hashed = _HashedFile(file)
        try:
            torch.save(content, hashed)  # type: ignore[arg-type]
        except RuntimeError as error:
            if hashed.error is None:
                raise
            raise hashed.error from error
        file.write(CHECKSUM_MARK + hashed.digest.hexdigest().encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _verify_checksum(file: BinaryIO, path: Path) -> None:
    size = file.seek(0, os.SEEK_END)
    body = max(size - CHECKSUM_BYTES, 0)
    file.seek(body)
    line = file.read()
    if len(line) != CHECKSUM_BYTES or not line.startswith(CHECKSUM_MARK):
        raise BrokenCheckpoint(
            f"the checkpoint {path} is cut off or not of this project (no checksum at its end, {size} bytes); remove it to go on from the one before"
        )
    digest = hashlib.sha256()
    file.seek(0)
    for block in _blocks(file, body):
        digest.update(block)
    if line != CHECKSUM_MARK + digest.hexdigest().encode() + b"\n":
        raise BrokenCheckpoint(f"the checkpoint {path} is damaged (its checksum does not match); remove it to go on from the one before")


def _blocks(file: BinaryIO, num_bytes: int) -> Iterator[bytes]:
    while num_bytes:
        block = file.read(min(num_bytes, 1 << 22))
        if not block:
            return
        num_bytes -= len(block)
        yield block


def _explain_write(error: OSError, path: Path, content: object) -> str:
    needed = f"{_num_bytes(content) / 2**20:.1f} MiB"
    make_room = f"free more than {needed} there, keep fewer checkpoints, or choose another run folder"
    cures = {
        errno.ENOSPC: f"the disk is full; {make_room}",
        errno.EDQUOT: f"your quota is used up; {make_room}",
        errno.EFBIG: f"its {needed} are more than the file size limit (ulimit -f, or the file system's); raise it",
    }
    cure = cures.get(error.errno or 0, f"{error.strerror or error}; make the folder writable, or choose another run folder")
    return f"cannot write the checkpoint {path}: {cure}. The earlier checkpoints are untouched"


def _num_bytes(value: object) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(_num_bytes(entry) for entry in value.values())
    if isinstance(value, (list, tuple)):
        return sum(_num_bytes(entry) for entry in value)
    return 0
