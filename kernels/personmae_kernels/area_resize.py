"""Shrinking a box of an image by averaging: OpenCV's INTER_AREA, to the bit, three times as fast (where the C++ operators are built)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from personmae_kernels import launching

UInt8Array = npt.NDArray[np.uint8]


def area_resize(image: UInt8Array, box: tuple[int, int, int, int], out: UInt8Array) -> bool:
    """Averages over the footprint of each output pixel, in float32, rounded to the nearest, halves to even.

    image: uint8 [H, W, 3]. box: (y0, x0, y1, x1) pixels of the image, inside it. out: uint8 [h, w, 3], written, not larger than the box along either
    axis. Both C-contiguous. Returns False, and writes nothing, where the caller has to ask OpenCV: the operator is not built or is not to be used,
    the image is read-only, or the box is a whole multiple of `out` along both axes, which OpenCV averages in another way. Raises RuntimeError for
    a box that is outside of the image or too small.
    """
    y0, x0, y1, x1 = box
    if not image.flags.writeable or ((y1 - y0) % out.shape[0] == 0 and (x1 - x0) % out.shape[1] == 0):
        return False
    target = torch.from_numpy(out)
    if not launching.runs_compiled(target):
        return False
    torch.ops.personmae.area_resize_(target, torch.from_numpy(image), y0, x0, y1, x1)
    return True
