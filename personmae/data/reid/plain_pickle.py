"""Pickles of plain values, read without running what they name: containers, text, numbers, and arrays of numbers or text.

A pickle may name any function and call it. Here a name is looked up in a short table and nowhere else, and even numpy's own restoring functions,
which trust the sizes and flags that a file gives them, are replaced by ones that check.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from personmae.configs import UserError


def read_plain_pickle(file: Path) -> Any:
    """What a pickle holds; arrays as numpy arrays where they are an entry of a dict or the whole, numpy scalars as Python's.

    Raises UserError if the file cannot be read, is damaged, or asks for anything but plain values.
    """
    try:
        with open(file, "rb") as stream:
            content = _PlainUnpickler(stream).load()
    except pickle.UnpicklingError as error:
        raise UserError(f"{file} is not read: {error}") from error
    # What a damaged pickle raises, whatever its bytes happen to say.
    except (OSError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError, MemoryError, OverflowError, RecursionError) as error:
        raise UserError(f"{file} is no pickle of plain values: {type(error).__name__}: {error}") from error
    if isinstance(content, dict):
        return {key: _restored(value) for key, value in content.items()}
    return _restored(content)


class _Dtype:
    """numpy.dtype of numbers, text or objects: its name and byte order, and none of the flags of the file."""

    def __init__(self, name: str, *_: object) -> None:
        if not re.fullmatch(r"b1|[iuf][1248]|[SU][0-9]{1,6}|O8?", name):
            raise pickle.UnpicklingError(f"it holds an array of {name!r}, neither numbers nor text")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError("it holds a structured array, neither numbers nor text")
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """numpy.ndarray under construction: `value` is set once its state has come."""

    value: Any = None

    def __init__(self, *_: object) -> None:
        """What numpy is told of an array before its content comes says nothing."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, is_fortran, data = state
        if kind.dtype == object:
            self.value = list(data)
        else:
            self.value = np.frombuffer(data, kind.dtype).reshape(shape, order="F" if is_fortran else "C")


def _array_of_buffer(data: Any, kind: _Dtype, shape: tuple[int, ...], order: str) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, kind, order == "F", data))
    return array


def _scalar(kind: _Dtype, data: Any) -> Any:
    return np.frombuffer(data, kind.dtype)[0].item()


def _latin1(text: str, encoding: str) -> bytes:
    # How protocols 0 to 2 write bytes.
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"it holds bytes in {encoding!r}")
    return text.encode("latin1")


_PLAIN: dict[tuple[str, str], Callable[..., Any]] = {
    **{(module, kind.__name__): kind for module in ("builtins", "__builtin__") for kind in (list, tuple, dict, set, frozenset)},
    ("collections", "OrderedDict"): dict,
    ("_codecs", "encode"): _latin1,
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _array_of_buffer for core in ("core", "_core")},
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PLAIN:
            text = "which plain values do not need; a pickle can run any program: do not trust it"
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, {text}")
        return _PLAIN[module, name]


def _restored(value: Any) -> Any:
    return value.value if isinstance(value, _Array) else value
