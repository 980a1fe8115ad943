"""A contact sheet of clusters: a row for each, and, where people are known, who in it is not who most are."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from personmae.data.images import resize
from personmae.visuals.ranked_lists import BORDER_PX, GAP_PX, INK, PAPER, RIGHT, WRONG

_CELL = (96, 48)
_LABEL_PX = 150
_PER_ROW = 12


def choose_clusters(labels: npt.NDArray[np.int64], num_clusters: int) -> list[int]:
    """Clusters spread evenly over the quantiles of their size, largest first: a fair sample, not hand-picked. labels: int64 [N], -1 for outliers."""
    sizes = np.bincount(labels[labels >= 0])
    order = np.argsort(-sizes, kind="stable")
    num_chosen = min(num_clusters, len(order))
    return [int(order[(2 * number + 1) * len(order) // (2 * num_chosen)]) for number in range(num_chosen)]


def cluster_sheet(
    image: Callable[[int], npt.NDArray[np.uint8]], labels: npt.NDArray[np.int64], people: npt.NDArray[np.int64] | None, num_clusters: int
) -> Image.Image | None:
    """A picture of some clusters, up to 12 images of each, spread over it; None where there is no cluster.

    image: sample -> uint8 [H, W, 3]. labels: int64 [N], -1 for outliers. people: int64 [N], the true ones; then each row says its purity, and images
    of another person than most have a vermilion frame and a cross, the others a green one.
    """
    chosen = choose_clusters(labels, num_clusters)
    if not chosen:
        return None
    height, width = _CELL
    step = (height + 2 * BORDER_PX + GAP_PX, width + 2 * BORDER_PX + GAP_PX)
    sheet = Image.new("RGB", (_LABEL_PX + _PER_ROW * step[1], len(chosen) * step[0] + GAP_PX), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for row, cluster in enumerate(chosen):
        samples = np.flatnonzero(labels == cluster)
        top = GAP_PX + row * step[0]
        words = f"cluster {cluster}\n{len(samples):,} images"
        most = None
        if people is not None:
            names, counts = np.unique(people[samples], return_counts=True)
            most = names[counts.argmax()]
            words += f"\npurity {counts.max() / len(samples):.0%}"
        draw.text((GAP_PX, top), words, fill=INK, font=font)
        shown = samples[np.unique(np.linspace(0, len(samples) - 1, min(_PER_ROW, len(samples))).round().astype(int))]
        for column, sample in enumerate(shown.tolist()):
            left = _LABEL_PX + column * step[1]
            is_right = people is None or people[sample] == most
            if people is not None:
                draw.rectangle((left, top, left + width + 2 * BORDER_PX - 1, top + height + 2 * BORDER_PX - 1), fill=RIGHT if is_right else WRONG)
            sheet.paste(Image.fromarray(resize(image(sample), _CELL)), (left + BORDER_PX, top + BORDER_PX))
            if not is_right:
                draw.line((left + BORDER_PX, top + BORDER_PX, left + BORDER_PX + 12, top + BORDER_PX + 12), fill=WRONG, width=3)
                draw.line((left + BORDER_PX + 12, top + BORDER_PX, left + BORDER_PX, top + BORDER_PX + 12), fill=WRONG, width=3)
    return sheet
