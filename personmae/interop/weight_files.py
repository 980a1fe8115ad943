"""Reads files of weights that anybody may have written: safetensors and `torch.save`, with no code in them run.

What other projects store beside their tensors (argparse's Namespace, numpy's scalars) is not built either: a placeholder stands for it.
"""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from personmae.configs import UserError
from personmae.evaluation.feature_containers import check_memory

# The names outside torch's own list that checkpoints of MAE, DINO, iBOT and timm hold beside their tensors.
PLACEHELD = ("argparse.Namespace", "numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
# What torch's reader raises on broken files, as fuzzing has found.
DAMAGED = (
    *(OSError, ValueError, LookupError, EOFError, TypeError, AttributeError, ArithmeticError, AssertionError, MemoryError, RuntimeError),
    *(struct.error, zipfile.BadZipFile, zlib.error),
)
NOT_WEIGHTS = (
    (re.compile(rb"\s*<(!doctype|html|\?xml)", re.IGNORECASE), "a web page: the download asks for a click or a login; fetch the file itself"),
    (re.compile(rb"version https://git-lfs"), "a Git LFS pointer, not the file that it points to; run `git lfs pull` there"),
    (re.compile(rb"\x89HDF"), "an HDF5 file; weights are read from safetensors and from files of torch.save"),
    (re.compile(rb"\x1f\x8b|7z\xbc\xaf|Rar!"), "a packed archive; unpack it and give the file of weights in it"),
)


class WeightFile(NamedTuple):
    """What such a file holds."""

    content: dict[Any, Any]  # nested dicts of tensors (on the CPU), plain values, and `Placeholder` for everything else
    metadata: dict[str, str]  # the header of a safetensors file, else empty


class Placeholder:
    """Stands for an object that is not built: takes what a pickle says of it, and keeps nothing."""

    def __new__(cls, *_: object) -> Placeholder:
        return object.__new__(cls)

    def __init__(self, *_: object) -> None:
        """The arguments are dropped."""

    def __setstate__(self, state: object) -> None:
        """The state is dropped."""


def read_weights(path: Path) -> WeightFile:
    """The content of a file of weights, on the CPU.

    Raises UserError naming the file if it is missing, damaged (by the checksums inside), something else than weights, or holds Python code.
    """
    try:
        check_memory(path, "the file", path.stat().st_size)
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as error:
        raise UserError(f"the weights {path} cannot be read: {error.strerror or error}; give a file of weights or a run folder") from error
    if not start:
        raise UserError(f"{path} is empty; fetch it again")
    for pattern, what in NOT_WEIGHTS:
        if pattern.match(start):
            raise UserError(f"{path} is no file of weights but {what}")
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return _read_safetensors(path)
    return WeightFile(_read_torch(path), {})


def _read_safetensors(path: Path) -> WeightFile:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (the file is no mapping)
            return WeightFile(tensors, file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({error}); fetch it again, whole") from error


def _read_torch(path: Path) -> dict[Any, Any]:
    try:
        _check_archive(path)
        with torch.serialization.safe_globals([(Placeholder, name) for name in PLACEHELD]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(_explain_refusal(path, str(error))) from error
    except DAMAGED as error:
        if "TorchScript" in str(error):
            raise UserError(f"{path} is a TorchScript program, not weights; save the model's state_dict() instead") from error
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read as a file of torch.save ({reason}); fetch it again, whole") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; a state_dict, or a dict with one in it, is wanted")
    return content


def _check_archive(path: Path) -> None:
    """Of a zip archive (what torch.save writes since version 1.6): its checksums, and that it unpacks into memory."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.filename.endswith(".npy") for entry in entries):
            raise UserError(f"{path} holds numpy arrays (the published ViTs in JAX are such); take the same model from timm: timm:NAME")
        check_memory(path, "its content", sum(entry.file_size for entry in entries))
        damaged = archive.testzip()
    if damaged is not None:
        raise UserError(f"{path} is damaged: the checksum of {damaged} in it does not match; fetch it again")


def _explain_refusal(path: Path, message: str) -> str:
    found = re.search(r"GLOBAL ([\w.]+)", message)
    if not found:
        return f"{path} cannot be read as a file of torch.save: it is cut off, damaged, or no such file; fetch it again, whole"
    return (
        f"{path} is not loaded: reading it would run Python code ({found[1]}), and whoever wrote the file chose that code; "
        "ask for, or save, the state_dict alone: torch.save(model.state_dict(), ...)"
    )
