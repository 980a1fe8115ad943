"""The regions of single images, drawn on the host as a plan says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from personmae.data.delivery import Failure, LoaderConfig, fetch_or_replace
from personmae.data.images import UInt8Array, recolour, sample_box
from personmae.data.plan import BatchPlan, Plan


@dataclass(frozen=True)
class RowPainter:
    """Draws the regions of single images on the host, replacing what cannot be read.

    image: sample -> uint8 [H', W', 3], or raises UnreadableImage. size: (H, W) of the regions.
    """

    plan: Plan
    config: LoaderConfig
    size: tuple[int, int]
    image: Callable[[int], UInt8Array]

    def paint(self, planned: BatchPlan, rows: range, pixels: UInt8Array, samples: npt.NDArray[np.int64]) -> list[Failure]:
        """Writes some rows of a batch into pixels, uint8 [R, B, H, W, 3], and the samples they show in the end into samples, int64 [B].

        rows: all copies of each sample among them, which are drawn from one decoded image.
        """
        failures: list[Failure] = []
        erase_boxes = planned.erase_boxes(self.size)
        repeats = self.plan.repeats
        for first in rows[::repeats]:
            copies = slice(first, first + repeats)
            fetched = fetch_or_replace(self.image, self.plan, planned.epoch, int(planned.samples[first]), self.config)
            drawn, erased, start = planned, erase_boxes, first
            if fetched.failures:
                failures += fetched.failures
                samples[copies] = fetched.sample
                drawn, start = self.plan.for_samples(planned.epoch, samples[copies], planned.copies[copies]), 0
                erased = drawn.erase_boxes(self.size)
            for copy in range(repeats):
                draw_row(fetched.content, drawn, erased, start + copy, pixels[:, first + copy])
        return failures


def draw_row(image: UInt8Array, plan: BatchPlan, erase_boxes: npt.NDArray[np.int32] | None, row: int, out: UInt8Array) -> None:
    """The regions of one row of a plan, cut from its image.

    image: uint8 [H', W', 3]. erase_boxes: int32 [B, R, 4] in output pixels, of the whole plan. out: written, uint8 [R, H, W, 3], each region
    C-contiguous.
    """
    for region in range(len(out)):
        y0, x0, y1, x1 = plan.boxes[row, region].tolist()
        sample_box(image, (y0, x0, y1, x1), bool(plan.flips[row, region]), (out.shape[1], out.shape[2]), out[region])
        recolour(
            out[region],
            None if plan.colour is None else plan.colour[row, region],
            0.0 if plan.blur_sigma is None else float(plan.blur_sigma[row, region]),
            None if plan.shifts is None else plan.shifts[row, region],
            None if erase_boxes is None else erase_boxes[row, region],
        )
