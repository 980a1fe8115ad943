"""Curves: what is read from a metrics.jsonl, damaged or not, and what the drawings hold."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from personmae.visuals.curves import MAX_POINTS, PANELS, draw_curves, keys_not_drawn, read_metrics


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines))
    return path


def test_rows_are_read_in_order_and_a_later_row_of_a_step_counts(tmp_path: Path) -> None:
    rows = [{"step": 10, "loss": 1.0}, {"step": 30, "loss": 0.9}, {"step": 20, "loss": 0.8}, {"step": 30, "loss": 0.7}]
    metrics = read_metrics(write(tmp_path / "metrics.jsonl", *map(json.dumps, rows), ""))
    assert metrics.rows == [rows[0], rows[2], rows[3]]
    assert metrics.problems == []


def test_damage_is_left_out_and_reported(tmp_path: Path) -> None:
    lines = [
        '{"step": 1, "loss": 2}',
        "garbage",
        '["step", 2]',
        '{"loss": 3}',
        '{"step": "4"}',
        "",
        '{"step": 5, "loss": 1',
    ]
    metrics = read_metrics(write(tmp_path / "metrics.jsonl", *lines))
    assert metrics.rows == [{"step": 1, "loss": 2}]
    assert metrics.problems == [
        "the last line of metrics.jsonl is cut off and was left out",
        "4 lines of metrics.jsonl could not be read and were left out",
    ]
    missing = read_metrics(tmp_path / "nothing.jsonl")
    assert (missing.rows, missing.problems) == ([], ["there is no nothing.jsonl"])
    (tmp_path / "bytes.jsonl").write_bytes(b'{"step": 1}\n\xff\xfe')
    assert read_metrics(tmp_path / "bytes.jsonl").rows == [{"step": 1}]


def test_only_panels_with_numbers_are_drawn() -> None:
    rows = [
        {"step": step, "loss": 1 / step, "learning_rate": None, "images_per_second": "fast"} for step in range(1, 9)
    ]
    curves = draw_curves(rows)
    assert [curve.title for curve in curves] == ["Losses"]
    assert "total from 1 to 0.125" in curves[0].description
    assert "features" not in curves[0].description
    assert draw_curves([{"step": 1, "loss": math.nan}]) == []
    assert draw_curves([]) == []


def test_all_panels_are_svg_that_parses_asks_for_nothing_and_is_the_same_twice() -> None:
    keys = [series.key for panel in PANELS for series in panel.series]
    rows = [
        {"step": step} | {key: step * 0.01 + number for number, key in enumerate(keys)} for step in range(0, 3000, 50)
    ]
    rows[7] = {"step": rows[7]["step"]}
    drawings = {theme: draw_curves(rows, theme) for theme in ("light", "dark")}
    for curves in drawings.values():
        assert [curve.title for curve in curves] == [panel.title for panel in PANELS]
        for curve in curves:
            assert ElementTree.fromstring(curve.svg).tag.endswith("svg")
            assert not re.search(r'(?:href|src)="(?!#)', curve.svg)
    assert drawings["light"][0].svg != drawings["dark"][0].svg
    assert draw_curves(rows) == drawings["light"]
    with pytest.raises(ValueError, match="theme is 'sepia'"):
        draw_curves(rows, "sepia")  # type: ignore[arg-type]


def points(svg: str) -> int:
    """Number of corners of the longest path."""
    return max(len(re.findall(r"[ML] ", path)) for path in re.findall(r' d="([^"]*)"', svg))


def test_long_runs_are_thinned() -> None:
    noise = np.random.default_rng(0).normal(size=20_000)
    rows = [{"step": step, "gradient_norm": 2 + float(noise[step])} for step in range(20_000)]
    drawn = draw_curves(rows)[0]
    assert 100 < points(drawn.svg) <= MAX_POINTS
    assert f"to {2 + noise[-1]:.4g}" in drawn.description


def test_keys_that_no_panel_shows_are_named() -> None:
    assert keys_not_drawn([{"step": 1, "epoch": 0, "loss": 2, "b": 1}, {"a": 1}]) == ["a", "b"]
