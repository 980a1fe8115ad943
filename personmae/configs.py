"""Typed configurations: frozen dataclasses to and from JSON, and command-line flags over named presets.

A part's own config sits at the top of that part's file; whole runs compose them in `recipes/`. This module knows none of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import os
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

Config = TypeVar("Config")


class UserError(ValueError):
    """A mistake that the user can mend: a path, a flag, a file. The message names the value and the cure; programs print it and exit with 2."""


class ToldElsewhere(UserError):
    """A mistake that another process of the run has met and tells."""


@contextlib.contextmanager
def user_errors_exit() -> Iterator[None]:
    """Around a program: a UserError is printed on one line, by the process that met it, and the program exits with 2."""
    try:
        yield
    except UserError as error:
        if not isinstance(error, ToldElsewhere):
            rank = os.environ.get("RANK", "0")
            print(f"error: {error}" if rank == "0" else f"error in process {rank}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def require_positive(config: object, *names: str) -> None:
    """Raises UserError naming the first of these settings that is less than 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise UserError(f"{name} is {getattr(config, name)}; it must be at least 1")


def to_plain(config: object) -> Any:
    """A config as JSON-ready values: dataclasses become dicts, tuples lists, paths strings, enums their values."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: to_plain(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(key): to_plain(value) for key, value in config.items()}
    if isinstance(config, tuple | list):
        return [to_plain(value) for value in config]
    if isinstance(config, Path):
        return str(config)
    if isinstance(config, enum.Enum):
        return config.value
    return config


def from_plain(kind: type[Config], values: Mapping[str, Any], where: str = "") -> Config:
    """A config of dataclass type `kind` from what `to_plain` gave.

    Raises UserError naming a key that `kind` does not have or a value of the wrong type. Missing keys take their defaults.
    """
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            raise UserError(f"unknown setting {where + key!r}; {kind.__name__} has: {', '.join(names)}")
    return kind(**{key: _convert(hints[key], value, where + key) for key, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_plain(typing.cast(type, hint), value, where + ".")
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(argument for argument in arguments if argument is not type(None)), value, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise UserError(f"{where} is {value!r}; allowed: {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        inner = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(inner) != len(value):
            raise UserError(f"{where} has {len(value)} values, {len(inner)} are wanted")
        return tuple(_convert(kind, item, where) for kind, item in zip(inner, value, strict=True))
    if hint is Path:
        return Path(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and not isinstance(value, hint):
        raise UserError(f"{where} is {value!r}; a value of type {hint.__name__} is wanted")
    return value


def differences(old: object, new: object, where: str = "") -> list[str]:
    """Settings in which two configs differ, one line `name: old -> new` each."""
    a, b = to_plain(old), to_plain(new)
    if isinstance(a, dict) and isinstance(b, dict):
        keys = list(a) + [key for key in b if key not in a]
        return [line for key in keys for line in differences(a.get(key), b.get(key), f"{where}.{key}".lstrip("."))]
    return [] if a == b else [f"{where}: {a} -> {b}"]


def parse_flags(presets: Mapping[str, tuple[str, Config]], arguments: Sequence[str] | None, program: str, description: str) -> Config:
    """The config of the preset named first on the command line, with flags over it.

    presets: name -> (one line that says what it is for, config). arguments: without the program's name; None = sys.argv. An unknown preset or flag
    prints what is allowed and exits with 2 (tyro).
    """
    import tyro

    chosen = tyro.extras.overridable_config_cli(
        {name: (text, config) for name, (text, config) in presets.items()},
        prog=program,
        description=description,
        args=arguments,
        config=(tyro.conf.AvoidSubcommands,),
    )
    return with_home(chosen)  # type: ignore[return-value]


def with_home(value: Any) -> Any:
    """A config with the user's home in place of `~` in its paths, which a shell leaves alone behind `--flag=`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        changed = {name: new for name, old in fields.items() if (new := with_home(old)) is not old}
        return dataclasses.replace(value, **changed) if changed else value
    if isinstance(value, tuple):
        items = tuple(map(with_home, value))
        return value if all(new is old for new, old in zip(items, value, strict=True)) else items
    if isinstance(value, Path) and str(value).startswith("~"):
        return value.expanduser()
    return value
