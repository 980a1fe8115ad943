"""Occlusion augmentation: boxes of training images covered by what people stand behind, so that a model learns to do with the part that is left.

    others   the same box of another person's image of the batch: a second person, or what stood around one
    noise    normal noise of the images' mean and spread ("pixel" mode of random erasing)

Drawn from (seed, epoch, sample); done on the device, whatever loader the images came from.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from personmae.configs import UserError
from personmae_kernels.sample_random import Stream, draws, sample_seeds, uniforms


@dataclasses.dataclass(frozen=True, kw_only=True)
class OcclusionConfig:
    """Which images are covered, and with what."""

    prob: float = 0.0  # share of the images
    scale: tuple[float, float] = (0.1, 0.4)  # (least, most) covered share of the image's area
    aspect: tuple[float, float] = (0.3, 1 / 0.3)  # (least, most) height / width of the box, log-uniform
    border_prob: float = 0.5  # share of the boxes that reach the lower border or a side, as obstacles do
    fill: Literal["others", "noise"] = "others"

    def __post_init__(self) -> None:
        for name in ("prob", "border_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"occlusion.{name} is {getattr(self, name)}; it must lie between 0 and 1")
        for name, most in (("scale", 1.0), ("aspect", 100.0)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= most:
                raise UserError(f"occlusion.{name} is {(low, high)}; it must be (least, most) with 0 < least <= most <= {most:g}")


def draw_occlusions(
    config: OcclusionConfig, size: tuple[int, int], seed: int, epoch: int, samples: npt.ArrayLike
) -> npt.NDArray[np.int32]:  # -> [B, 4]
    """The covered boxes of images of (height, width): int32 [B, 4], (y0, x0, y1, x1) pixels, all 0 where nothing is covered.

    samples: integers [B], different numbers within the epoch.
    """
    values = uniforms(draws(sample_seeds(seed, epoch, samples, Stream.OCCLUSIONS), 6))
    least, most = config.scale
    area = least + values[:, 1] * (most - least)
    lowest, highest = np.log(config.aspect)
    shape = np.exp(lowest + values[:, 2] * (highest - lowest))
    # As shares of the image's sides.
    shape *= size[1] / size[0]
    heights, widths = np.minimum(np.sqrt(area * shape), 1.0), np.minimum(np.sqrt(area / shape), 1.0)
    top, left = values[:, 3] * (1 - heights), values[:, 4] * (1 - widths)
    # One draw chooses the border: none, below, left or right.
    side = values[:, 5] / config.border_prob if config.border_prob else np.full(len(values), np.inf)
    top = np.where(side < 1 / 3, 1 - heights, top)
    left = np.where((side >= 1 / 3) & (side < 2 / 3), 0.0, np.where((side >= 2 / 3) & (side < 1), 1 - widths, left))
    shares = np.stack([top, left, top + heights, left + widths], axis=1)
    shares[values[:, 0] >= config.prob] = 0
    return np.rint(shares * np.array([*size, *size])).astype(np.int32)


def cover(images: Tensor, boxes: Tensor, filling: Tensor) -> Tensor:
    """Images with their boxes covered: `filling` inside, `images` outside. images, filling: uint8 [B, H, W, 3]. boxes: int32 [B, 4], (y0, x0, y1,
    x1). Returns uint8 [B, H, W, 3]."""
    rows = torch.arange(images.shape[1], device=images.device)[None, :, None]
    columns = torch.arange(images.shape[2], device=images.device)[None, None, :]
    y0, x0, y1, x1 = (edge[:, None, None] for edge in boxes.unbind(1))
    inside = (rows >= y0) & (rows < y1) & (columns >= x0) & (columns < x1)
    return torch.where(inside[..., None], filling, images)


def others(images: Tensor, images_each: int) -> Tensor:
    """The images of the next person: uint8 [B, H, W, 3] -> the same. images_each: images of a person, which stand side by side."""
    return images.roll(images_each, 0)


def noise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...], seed: int) -> Tensor:
    """Images of normal noise. images: uint8 [B, H, W, 3], whose shape and device it has. mean, std: of the noise, levels from 0 to 1, three each.
    seed: the same one gives the same noise on the same device."""
    generator = torch.Generator(images.device).manual_seed(seed)
    drawn = torch.randn(images.shape, generator=generator, device=images.device)
    levels = (drawn * torch.tensor(std, device=images.device) + torch.tensor(mean, device=images.device)) * 255.0
    return levels.round_().clamp_(0, 255).to(torch.uint8)
