"""One program of `painting_processes`: draws what it is asked for until its socket is closed or the parent dies.

Its arguments are numbers of what it inherits: the socket, and the memory it draws into.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection

import cv2
import numpy as np

from personmae.configs import UserError
from personmae.data.delivery import LoaderConfig, fetch_with_retries
from personmae.data.images import UInt8Array, UnreadableImage
from personmae.data.painting_processes import Drawn, Setup, restore_images
from personmae.data.plan import BatchPlan
from personmae.data.row_painter import draw_row


def main() -> None:
    """Draw."""
    cv2.setNumThreads(1)
    connection = Connection(int(sys.argv[1]))
    try:
        setup: Setup = connection.recv()
        scratch = np.frombuffer(mmap.mmap(int(sys.argv[2]), int(np.prod(setup.scratch))), dtype=np.uint8).reshape(setup.scratch)
        image = restore_images(setup).image
        while True:
            planned = connection.recv()
            try:
                answer = Drawn(paint(image, planned, setup.config, setup.repeats, scratch))
            except UserError as error:
                answer = Drawn([], problem=str(error))
            connection.send(answer)
    # The parent is gone.
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def paint(image: Callable[[int], UInt8Array], planned: BatchPlan, config: LoaderConfig, repeats: int, pixels: UInt8Array) -> list[int]:
    """Draws all rows of a plan into pixels, uint8 [R, at least B, H, W, 3]; the first rows of images that cannot be read."""
    failed = []
    erase_boxes = planned.erase_boxes((pixels.shape[2], pixels.shape[3]))
    for first in range(0, len(planned), repeats):
        try:
            content = fetch_with_retries(image, int(planned.samples[first]), config)
        except UnreadableImage:
            failed.append(first)
            continue
        for row in range(first, first + repeats):
            draw_row(content, planned, erase_boxes, row, pixels[:, row])
    return failed


if __name__ == "__main__":
    main()
