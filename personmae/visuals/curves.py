"""Curves of a run from its metrics.jsonl: losses, schedules, speed, collapse monitors, as SVG for light and dark."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Theme = Literal["light", "dark"]
Row = Mapping[str, Any]

MAX_POINTS = 500


@dataclass(frozen=True)
class Metrics:
    """rows: one mapping for each logged step, in order; problems: what was wrong with the file, one sentence each."""

    rows: list[dict[str, Any]]
    problems: list[str]


@dataclass(frozen=True)
class Series:
    """One line of a panel: key of metrics.jsonl, its label, and what its values are multiplied by."""

    key: str
    label: str
    factor: float = 1


@dataclass(frozen=True)
class Panel:
    """One small chart. unit: label of the vertical axis. smooth: draw a moving mean over what was logged."""

    title: str
    unit: str
    series: tuple[Series, ...]
    smooth: bool = True


@dataclass(frozen=True)
class Curve:
    """A drawn panel: its title, the SVG text, and a sentence that says in words what it shows."""

    title: str
    svg: str
    description: str


def _split(key: str, baseline: str) -> tuple[Series, ...]:
    """A loss by where the predicted patch of B lies, and the loss of the best constant prediction."""
    kinds = (("seen", "seen in A"), ("hidden", "hidden in A"), ("outside", "outside A"))
    return (*(Series(f"{key}_{kind}", label) for kind, label in kinds), Series(baseline, "mean"))


PANELS = (
    Panel(
        "Losses",
        "loss",
        (Series("loss", "total"), Series("loss_pixels", "pixels"), Series("loss_features", "features")),
    ),
    Panel("Losses by kind", "loss", (Series("loss_id", "identity"), Series("loss_triplet", "triplet"))),
    Panel("Accuracy of the classifier", "% of the batch", (Series("accuracy", "accuracy", 100),)),
    Panel("Clusters", "clusters", (Series("clusters", "clusters"),), smooth=False),
    Panel("Outliers", "% of the images", (Series("outlier_ratio", "outliers", 100),), smooth=False),
    Panel("Distances of the hardest pairs", "distance", (Series("distance_positive", "same person"), Series("distance_negative", "another"))),
    Panel("Score by which the best epoch is chosen", "mAP in %", (Series("judged_map", "mAP", 100),), smooth=False),
    Panel("Pixel loss by kind of patch", "loss", _split("loss_pixels", "mean_patch_loss")),
    Panel("Feature loss by kind of patch", "loss", _split("loss_features", "mean_feature_loss")),
    Panel("Learning rate", "learning rate", (Series("learning_rate", "learning rate"),), smooth=False),
    Panel("Teacher momentum", "share kept per step", (Series("ema_momentum", "momentum"),), smooth=False),
    Panel("Weight of the feature loss", "factor", (Series("feature_weight", "weight"),), smooth=False),
    Panel("Gradient", "norm before clipping", (Series("gradient_norm", "norm"),)),
    Panel("Speed", "images/s", (Series("images_per_second", "images/s"),)),
    Panel("Waiting for data", "% of the time", (Series("data_wait_ratio", "waiting", 100),)),
    Panel("Spread of the teacher's tokens", "standard deviation", (Series("teacher_std", "deviation"),)),
    Panel("Likeness of the teacher's tokens", "mean pairwise cosine", (Series("teacher_cosine", "cosine"),)),
    Panel("Effective rank of the teacher's tokens", "dimensions", (Series("teacher_rank", "rank"),)),
)

# Okabe & Ito's colours, told apart with any colour vision, in the shades that stand out on white and on near black;
# dashes for those who print in grey.
_COLOURS: Mapping[Theme, tuple[str, ...]] = {
    "light": ("#0072B2", "#C65102", "#00805C", "#7a828d"),
    "dark": ("#56B4E9", "#E69F00", "#2FC79A", "#8d96a3"),
}
_INK: Mapping[Theme, str] = {"light": "#3a3f47", "dark": "#c9ced6"}
_GRID: Mapping[Theme, str] = {"light": "#dfe3e8", "dark": "#343a43"}
_DASHES = ("solid", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1, 1.5)))


def read_metrics(path: Path) -> Metrics:
    """The rows of a metrics.jsonl; a missing file has none.

    A last line that was cut off (the run was killed as it wrote) is left out, and so are lines that are no JSON object
    with a step; both are reported. After a resume some steps stand twice: the later row counts.
    """
    if not path.is_file():
        return Metrics([], [f"there is no {path.name}"])
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows: dict[float, dict[str, Any]] = {}
    problems, unreadable = [], 0
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        row = _parsed(line)
        if row is not None:
            rows[row["step"]] = row
        elif number == len(lines) - 1:
            problems.append(f"the last line of {path.name} is cut off and was left out")
        else:
            unreadable += 1
    if unreadable:
        problems.append(f"{unreadable} lines of {path.name} could not be read and were left out")
    return Metrics([rows[step] for step in sorted(rows)], problems)


def draw_curves(rows: Sequence[Row], theme: Theme = "light") -> list[Curve]:
    """All panels for which there is a number, as SVG with a transparent background.

    The thin line is what was logged, the thick one its moving mean (from 40 logged values on). Raises ValueError for an
    unknown theme.
    """
    if theme not in _COLOURS:
        raise ValueError(f"theme is {theme!r}; allowed: {', '.join(_COLOURS)}")
    curves = []
    for panel in PANELS:
        drawn = {series: values for series in panel.series if np.isfinite(values := _values(rows, series)).any()}
        if drawn:
            steps = np.array([row["step"] for row in rows], np.float64)
            curves.append(Curve(panel.title, _draw(panel, steps, drawn, theme), _in_words(panel, drawn)))
    return curves


def keys_not_drawn(rows: Sequence[Row]) -> list[str]:
    """Keys of the rows that no panel shows, sorted."""
    shown = {series.key for panel in PANELS for series in panel.series} | {"step", "epoch"}
    return sorted({key for row in rows for key in row} - shown)


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int | float) or not math.isfinite(row["step"]):
        return None
    return row


def _values(rows: Sequence[Row], series: Series) -> npt.NDArray[np.float64]:
    """The series' value in each row; NaN where there is no number."""
    found = (row.get(series.key) for row in rows)
    numbers = [float(value) if isinstance(value, int | float) else math.nan for value in found]
    return np.array(numbers, np.float64) * series.factor


def _draw(
    panel: Panel, steps: npt.NDArray[np.float64], drawn: Mapping[Series, npt.NDArray[np.float64]], theme: Theme
) -> str:
    # matplotlib takes half a second to import and is wanted for pictures only; Figure objects keep no state between
    # threads, as pyplot does.
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    ink = _INK[theme]
    figure = Figure(figsize=(4.3, 2.7), layout="constrained")
    figure.patch.set_alpha(0)
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    for series, colour, dashes in zip(drawn, _COLOURS[theme], _DASHES, strict=False):
        known = np.isfinite(drawn[series])
        x, y = _thinned(steps[known], drawn[series][known])
        mean = _moving_mean(y) if panel.smooth else None
        marker = "o" if len(x) == 1 else ""
        if mean is None:
            axes.plot(x, y, color=colour, linestyle=dashes, linewidth=1.6, label=series.label, marker=marker)
        else:
            axes.plot(x, y, color=colour, linewidth=0.7, alpha=0.35)
            axes.plot(x, mean, color=colour, linestyle=dashes, linewidth=1.8, label=series.label)
    axes.set_xlabel("step", color=ink)
    axes.set_ylabel(panel.unit, color=ink)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.tick_params(colors=ink, which="both", length=3)
    axes.grid(color=_GRID[theme], linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_GRID[theme])
    if len(drawn) > 1:
        # Above the axes, where it hides nothing; four names need two rows.
        num_columns = 2 if len(drawn) > 3 else len(drawn)
        figure.legend(loc="outside upper left", ncols=num_columns, frameon=False, labelcolor=ink, fontsize=9)
    text = io.StringIO()
    # A fixed salt and no date: the same numbers give the same file.
    with matplotlib.rc_context({"svg.hashsalt": panel.title}):
        figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
    return text.getvalue()


def _thinned(
    x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """At most MAX_POINTS points, each the mean of as many neighbours."""
    if len(x) <= MAX_POINTS:
        return x, y
    parts = np.array_split(np.arange(len(x)), MAX_POINTS)
    return np.array([x[part].mean() for part in parts]), np.array([y[part].mean() for part in parts])


def _moving_mean(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64] | None:
    if len(values) < 40:
        return None
    half = max(2, len(values) // 50)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _in_words(panel: Panel, drawn: Mapping[Series, npt.NDArray[np.float64]]) -> str:
    parts = []
    for series, values in drawn.items():
        known = values[np.isfinite(values)]
        parts.append(f"{series.label} from {known[0]:.4g} to {known[-1]:.4g}")
    return f"{panel.title} ({panel.unit}) over steps: {'; '.join(parts)}"
