"""The program of `painting_processes`: forks a process for each pair of its arguments, and ends with the first that ends in a way it should not.

A pair is two numbers of what it inherits: a socket, over which a process is asked until it is closed or the parent dies, and the memory it draws
into.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection

import cv2
import numpy as np

from personmae.configs import UserError
from personmae.data.delivery import LoaderConfig, fetch_with_retries
from personmae.data.images import UInt8Array, UnreadableImage
from personmae.data.painting_processes import SIGNALLED, Drawn, Setup, restore_images
from personmae.data.plan import BatchPlan
from personmae.data.row_painter import draw_row


def main() -> int:
    """Fork; the status to exit with."""
    numbers = [int(argument) for argument in sys.argv[1:]]
    pairs = list(zip(numbers[::2], numbers[1::2], strict=True))
    for pair in pairs:
        if os.fork() == 0:
            # Another's socket, held here, would hide that the other has died.
            for other in pairs:
                if other != pair:
                    os.close(other[0])
            answer(*pair)
            return 0
    for connection, _ in pairs:
        os.close(connection)
    for _ in pairs:
        _, status = os.wait()
        if status:
            return SIGNALLED + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    return 0


def answer(socket: int, memory: int) -> None:
    """What one process does."""
    cv2.setNumThreads(1)
    connection = Connection(socket)
    try:
        setup: Setup = connection.recv()
        scratch = np.frombuffer(mmap.mmap(memory, int(np.prod(setup.scratch))), dtype=np.uint8).reshape(setup.scratch)
        image = restore_images(setup).image
        while True:
            planned = connection.recv()
            try:
                drawn = Drawn(paint(image, planned, setup.config, setup.repeats, scratch))
            except UserError as error:
                drawn = Drawn([], problem=str(error))
            connection.send(drawn)
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
    raise SystemExit(main())
