"""Configs to JSON and back, and flags over presets."""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import pytest

from personmae.configs import UserError, differences, from_plain, parse_flags, to_plain, with_home


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    size: tuple[int, int] = (256, 128)
    kind: Literal["a", "b"] = "a"
    rate: float = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner = Inner()
    path: Path | None = None
    count: int = 3
    on: bool = False


def test_round_trip_through_json():
    config = Outer(inner=Inner(size=(96, 48), kind="b", rate=2.0), path=Path("x/y"), count=7, on=True)
    assert from_plain(Outer, json.loads(json.dumps(to_plain(config)))) == config


def test_missing_keys_take_defaults_and_whole_numbers_become_floats():
    config = from_plain(Outer, {"inner": {"rate": 1}})
    assert config == Outer(inner=Inner(rate=1.0))
    assert isinstance(config.inner.rate, float)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"inner": {"sise": 1}}, "inner.sise"),
        ({"inner": {"kind": "c"}}, "inner.kind"),
        ({"inner": {"size": [1, 2, 3]}}, "inner.size"),
        ({"count": "many"}, "count"),
    ],
)
def test_a_wrong_setting_is_named(values, named):
    with pytest.raises(UserError, match=named):
        from_plain(Outer, values)


def test_differences_name_the_setting():
    assert differences(Outer(), Outer()) == []
    assert differences(Outer(), Outer(inner=Inner(rate=2.0), on=True)) == ["inner.rate: 0.5 -> 2.0", "on: False -> True"]


PRESETS = {"small": ("a small one", Outer()), "large": ("a large one", Outer(count=30))}


def test_flags_over_a_preset():
    config = parse_flags(PRESETS, ["large", "--inner.size", "12", "6", "--path", "here", "--on"], "prog", "text")
    assert config == Outer(inner=Inner(size=(12, 6)), path=Path("here"), count=30, on=True)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["medium"], "small"),
        (["small", "--cuont", "3"], "--cuont"),
        (["small", "--inner.kind", "c"], "--inner.kind"),
        (["small", "--count", "x"], "--count"),
        ([], "small"),
    ],
)
def test_unknown_presets_and_flags_exit_with_2(arguments, named, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse_flags(PRESETS, arguments, "prog", "text")
    assert exit_.value.code == 2
    assert named in "".join(capsys.readouterr())


def test_the_users_home_in_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")

    @dataclasses.dataclass(frozen=True)
    class Inner:
        folder: Path | None = None
        name: str = "~/kept"

    @dataclasses.dataclass(frozen=True)
    class Outer:
        inner: Inner = Inner()
        folders: tuple[Path, ...] = ()
        size: int = 3

    config = Outer(Inner(Path("~/crops")), (Path("~"), Path("a/~/b")))
    found = with_home(config)
    assert found == Outer(Inner(Path("/home/somebody/crops")), (Path("/home/somebody"), Path("a/~/b")))
    assert with_home(Outer()) == Outer()
