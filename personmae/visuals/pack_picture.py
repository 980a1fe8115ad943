"""The picture of a pack: how large its images are, their shapes, and a sheet of them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from personmae.data.images import resize
from personmae.whole_files import write_whole

_BLUE, _INK, _FAINT = "#0072B2", "#3a3f47", "#dfe3e8"
_COLUMNS = 16
_CELL = (96, 48)


def draw_pack(path: Path, num_images: int, counts: Mapping[str, int], statistics: Mapping[str, Any], images: Sequence[npt.NDArray[np.uint8]]) -> None:
    """Write a PNG. counts, statistics: of the manifest. images: uint8 [H, W, 3], of any sizes. Raises UserError if the disk refuses."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot: it keeps figures, and asks for a display.
    figure = Figure(figsize=(11, 7.5), dpi=100, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    above, below = np.asarray(figure.subfigures(2, 1, height_ratios=(1, 1.35))).tolist()
    mean, std = (", ".join(f"{value:.3f}" for value in statistics[name]) for name in ("mean", "std"))
    above.suptitle(
        f"{num_images:,} images, {statistics['total_bytes'] / 2**30:,.2f} GiB, {counts['rejected']:,} left out. "
        f"R, G, B: mean {mean}; standard deviation {std}",
        fontsize=10,
        color=_INK,
    )
    panels = above.subplots(1, 3)
    for axes, key, title in zip(
        panels,
        ("height_histogram", "width_histogram", "aspect_histogram"),
        ("height (pixels)", "width (pixels)", "width / height"),
        strict=True,
    ):
        edges, numbers = np.asarray(statistics[key]["edges"], dtype=float), np.asarray(statistics[key]["counts"], dtype=float)
        used = np.flatnonzero(numbers)
        first, last = used[0], used[-1] + 1
        axes.bar(edges[first:last], numbers[first:last] / num_images * 100, np.diff(edges)[first:last], align="edge", color=_BLUE, edgecolor="white")
        axes.set_xlabel(title, color=_INK, fontsize=9)
        axes.set_ylabel("% of the images", color=_INK, fontsize=9)
        axes.tick_params(labelsize=8, colors=_INK)
        axes.grid(axis="y", color=_FAINT)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    sheet = below.subplots()
    sheet.imshow(contact_sheet(images))
    sheet.set_axis_off()
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    write_whole(path, drawn.getvalue())


def contact_sheet(images: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.uint8]:
    """The images in rows of 16, each shrunk to fit a cell of 96 x 48 pixels, in its shape: uint8 [H, W, 3]."""
    height, width = _CELL
    num_rows = max(1, -(-len(images) // _COLUMNS))
    sheet = np.full((num_rows * (height + 4), _COLUMNS * (width + 4), 3), 255, dtype=np.uint8)
    for number, image in enumerate(images):
        scale = min(height / image.shape[0], width / image.shape[1])
        shown = (max(1, round(image.shape[0] * scale)), max(1, round(image.shape[1] * scale)))
        row, column = divmod(number, _COLUMNS)
        top, left = row * (height + 4) + (height - shown[0]) // 2, column * (width + 4) + (width - shown[1]) // 2
        sheet[top : top + shown[0], left : left + shown[1]] = resize(image, shown)
    return sheet
