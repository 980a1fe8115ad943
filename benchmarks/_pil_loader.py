"""The program of PersonMAE with pixels from Pillow: decoded by it, and regions cut by its antialiased resize, as public code does. The plan is ours.

python benchmarks/_pil_loader.py pretrain ...; with --data.loader.kind threads, whose images these are.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image

# A program's own folder is on the path, the root is not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from personmae.__main__ import main
from personmae.data import row_painter
from personmae.data.image_index import ImageIndex
from personmae.data.images import UInt8Array


def decode_with_pillow(index: ImageIndex, sample: int) -> UInt8Array:
    """In the place of `ImageIndex.image`."""
    with Image.open(io.BytesIO(index.read(sample))) as file:
        return np.array(file.convert("RGB"))


def resize_with_pillow(image: UInt8Array, box: tuple[int, int, int, int], flip: bool, size: tuple[int, int], out: UInt8Array) -> UInt8Array:
    """In the place of `sample_box`."""
    y0, x0, y1, x1 = box
    region = Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR, box=(x0, y0, x1, y1))
    out[:] = np.asarray(region)[:, ::-1] if flip else np.asarray(region)
    return out


if __name__ == "__main__":
    ImageIndex.image = decode_with_pillow  # type: ignore[method-assign, assignment]
    row_painter.sample_box = resize_with_pillow  # type: ignore[assignment]
    main()
