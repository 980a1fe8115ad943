"""The results of `throughput.py` as bars: images per second of each way, and on a GPU the memory that it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks._throughput_ways import WAYS

LABELS = {"eager": "plain eager", "sdpa": "eager, SDPA", "compile": "torch.compile", "ours": "PersonMAE"}
OURS, OTHERS = "#1f5fa8", "#b4bac2"


def draw_chart(path: Path, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a PNG: a line of panels for each preset and input. rows: results with at least one timed; a way that failed has its place and no bar.
    Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    groups: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["preset"], row["input"]), {})[row["way"]] = row
    with_memory = any(row.get("peak_bytes_per_image") for row in rows)
    heights = [0.4 * len(ways) + 0.8 for ways in groups.values()]
    figure = Figure(figsize=(12 if with_memory else 9, sum(heights) + 0.6), layout="constrained")
    axes = figure.subplots(len(groups), 2 if with_memory else 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    for panels, ((preset, source), found) in zip(axes, groups.items(), strict=True):
        ways = [way for way in WAYS if way in found]
        speeds = [found[way].get("images_per_second") for way in ways]
        spans = [(speed.low, speed.median, speed.high) if speed else (0.0, 0.0, 0.0) for speed in speeds]
        texts = [
            f"{row['images_per_second'].median:,.0f} ({row['share_of_matmul']:.0%} of the matrix ceiling)"
            if row.get("images_per_second")
            else "failed or left out"
            for row in map(found.__getitem__, ways)
        ]
        _bars(panels[0], ways, spans, texts)
        panels[0].set_title(f"{preset}, {source} input: images/s", fontsize=10, loc="left")
        if with_memory:
            memory = [(found[way].get("peak_bytes_per_image") or 0) / 2**20 for way in ways]
            _bars(panels[1], ways, [(value,) * 3 for value in memory], [f"{value:,.1f}" if value else "not measured" for value in memory])
            panels[1].set_title("peak memory above what stays, MiB an image", fontsize=10, loc="left")
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    figure.savefig(path, dpi=110)


def _bars(panel: Any, ways: Sequence[str], spans: Sequence[tuple[float, float, float]], texts: Sequence[str]) -> None:
    """spans: (10 %, median, 90 %) of each bar."""
    panel.barh(range(len(ways)), [median for _, median, _ in spans], color=[OURS if way == "ours" else OTHERS for way in ways], height=0.7)
    widest = max(max(high for _, _, high in spans), 1e-9)
    for place, ((low, _, high), text) in enumerate(zip(spans, texts, strict=True)):
        if high > low:
            panel.plot([low, high], [place, place], color="black", linewidth=1)
        panel.text(high + 0.01 * widest, place, text, va="center", fontsize=9)
    panel.set_yticks(range(len(ways)), [LABELS[way] for way in ways])
    panel.set_ylim(len(ways) - 0.5, -0.5)
    panel.set_xlim(0, 1.6 * widest)
    panel.spines[["top", "right"]].set_visible(False)
