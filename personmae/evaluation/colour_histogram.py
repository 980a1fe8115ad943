"""The baseline that sees colours only: histograms of six horizontal stripes, compared by the Bhattacharyya coefficient.

A person upright in a box has head, chest, belly, thighs, shins and feet in about the same stripes everywhere;
histograms by stripe were the common descriptor before learnt ones (Gray & Tao, "Viewpoint invariant pedestrian
recognition with an ensemble of localized features", ECCV 2008).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

NUM_STRIPES = 6
_LEVELS = 8  # of each of red, green and blue


def stripe_histograms(images: npt.NDArray[np.uint8], num_stripes: int = NUM_STRIPES) -> npt.NDArray[np.float32]:
    """Square roots of joint RGB histograms, 8 x 8 x 8 bins, of equal horizontal stripes, at unit length.

    images: uint8 [B, H, W, 3] RGB, H >= num_stripes. Returns float32 [B, num_stripes * 512]: the scalar product of two
    rows is the mean over the stripes of the Bhattacharyya coefficient of their histograms. Raises TypeError or
    ValueError on another dtype or shape.
    """
    if images.dtype != np.uint8:
        raise TypeError(f"images have dtype {images.dtype}; uint8 is wanted")
    if images.ndim != 4 or images.shape[3] != 3 or images.shape[1] < num_stripes or images.shape[2] == 0:
        raise ValueError(f"images have shape {images.shape}; [B, H, W, 3] with at least {num_stripes} rows is wanted")
    num_images, height, width, _ = images.shape
    num_bins = _LEVELS**3
    cells = images // (256 // _LEVELS)
    bins = (cells[..., 0].astype(np.int64) * _LEVELS + cells[..., 1]) * _LEVELS + cells[..., 2]
    edges = [height * k // num_stripes for k in range(num_stripes + 1)]
    stripe = np.repeat(np.arange(num_stripes), np.diff(edges))
    size = num_stripes * num_bins
    bins += stripe[None, :, None] * num_bins + np.arange(num_images)[:, None, None] * size
    counts = np.bincount(bins.ravel(), minlength=num_images * size).reshape(num_images, num_stripes, num_bins)
    shares = counts / (width * np.diff(edges))[None, :, None]
    return np.sqrt(shares / num_stripes).reshape(num_images, size).astype(np.float32)


def describe_colours(images: Tensor) -> Mapping[str, Tensor]:
    """The histogram as an evaluator's describing function. images: uint8 [B, H, W, 3]. Returns {"colour histogram": float32 [B, 3072]} on the CPU."""
    return {"colour histogram": torch.from_numpy(stripe_histograms(images.cpu().numpy()))}
