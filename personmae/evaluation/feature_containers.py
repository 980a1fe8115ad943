"""The variables of a `.npz`, `.mat` or `.pt` file as numpy arrays, each read when it is asked for, and nothing unpickled.

What a file claims to hold is compared with its length, or with this machine's memory, before anything is allocated.
"""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from personmae.configs import UserError
from personmae.evaluation import matlab_to_npz

Variables = dict[str, Callable[[], npt.NDArray[Any]]]

# What the readers raise on broken files, as fuzzing has found.
_DAMAGED = (
    OSError,
    ValueError,
    LookupError,
    EOFError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    MemoryError,
    RuntimeError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


def read_npz(path: Path) -> Variables:
    """The arrays of a `.npz`. Raises UserError naming the file, and the array as it is read, if it is damaged or holds Python objects."""
    try:
        with zipfile.ZipFile(path) as file:
            lengths = {entry.filename.removesuffix(".npy"): entry.file_size for entry in file.infolist()}
    except _DAMAGED as error:
        raise UserError(f"{path} cannot be read as .npz: {error}") from error

    def read(name: str) -> npt.NDArray[Any]:
        check_memory(path, name, lengths[name])
        try:
            with zipfile.ZipFile(path) as file, file.open(f"{name}.npy") as entry:
                _check_claim(path, name, entry, lengths[name])
            with np.load(path, allow_pickle=False) as arrays:
                return np.asarray(arrays[name])
        except UserError:
            raise
        except _DAMAGED as error:
            raise UserError(f"{path}: {name} cannot be read: {error}") from error

    return {name: lambda name=name: read(name) for name in lengths}  # type: ignore[misc]


def read_mat(path: Path) -> Variables:
    """The variables of a MATLAB file up to version 7. Raises UserError naming the file if it is damaged or of version 7.3 (an HDF5 file)."""
    with tempfile.TemporaryDirectory(prefix="personmae-") as folder:
        converted = Path(folder) / "converted.npz"
        program = str(Path(matlab_to_npz.__file__).resolve())
        # In a process of its own, which a damaged file may crash. -P: the folder of the program hides no package from it.
        command = [sys.executable, "-P", program, str(path.resolve()), str(converted)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        if ended.returncode == matlab_to_npz.REFUSED:
            raise UserError(f"{path}: {ended.stdout.strip()}")
        if ended.returncode:
            how = ended.stderr.strip().splitlines()[-1] if ended.returncode > 0 and ended.stderr.strip() else "its reader crashed"
            raise UserError(f"{path} cannot be read as a MATLAB file: {how}")
        arrays = {name: read() for name, read in read_npz(converted).items()}
    return {name: lambda array=array: array for name, array in arrays.items()}  # type: ignore[misc]


def read_torch(path: Path) -> Variables:
    """The tensors, numbers and lists of a dict that `torch.save` wrote. Raises UserError naming the file if it holds anything else."""
    check_memory(path, "the file", path.stat().st_size)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = "it is damaged, or holds Python objects that are not tensors, numbers or text (numpy arrays are such), which could run any code"
        raise UserError(f"{path} is not read: {reason}; save a dict of tensors, or an .npz") from error
    except _DAMAGED as error:
        raise UserError(f"{path} cannot be read as a file of torch.save: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; a dict of tensors is wanted")

    def read(name: str) -> npt.NDArray[Any]:
        value = content[name]
        if isinstance(value, torch.Tensor):
            value = value.detach()
            return (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).numpy()
        try:
            return np.asarray(value)
        except ValueError as error:
            raise UserError(f"{path}: {name} is no array: {error}") from error

    return {name: lambda name=name: read(name) for name in content if isinstance(name, str)}  # type: ignore[misc]


def check_memory(path: Path, name: str, num_bytes: int) -> None:
    """Raises UserError with the estimate if an array of so many bytes is more than this machine has memory."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if num_bytes > available:
        raise UserError(f"{path}: {name} takes {num_bytes / 2**30:,.1f} GiB; this machine has {available / 2**30:,.1f} GiB of memory")


def _check_claim(path: Path, name: str, entry: Any, length: int) -> None:
    """Compare what an array's header says with the bytes that follow it."""
    version = np.lib.format.read_magic(entry)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(entry)
    if dtype.hasobject:
        raise UserError(f"{path}: {name} holds Python objects, which are never unpickled; save it as numbers or text")
    claimed = int(np.prod([int(side) for side in shape], dtype=object)) * dtype.itemsize
    if claimed > length:
        raise UserError(f"{path}: {name} says it is {list(shape)} {dtype}, {claimed / 2**30:,.2f} GiB, but {length:,} bytes are there")
