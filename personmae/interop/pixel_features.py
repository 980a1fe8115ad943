"""The encoder as one module from pixels to features, without our operators: what graphs for other runtimes are made of.

    images     uint8 [batch, height, width, 3] RGB
    features   float32 [batch, D], class token after the final norm; for cosine distances divide by the length

The network is timm's own; the normalisation of the pixels is inside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from personmae.interop.initial_weights import FittedState
from personmae.models.vit import VitConfig

BATCHES = (1, 3)  # that a graph is checked with


class PixelFeatures(nn.Module):
    """Features of uint8 images, by timm's own VisionTransformer."""

    mean: Tensor
    std: Tensor

    def __init__(self, state: FittedState) -> None:
        super().__init__()
        config = state.config
        self.vit = timm_network(config, state.stride_px, state.tensors)
        self.register_buffer("mean", torch.tensor(config.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(config.std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:  # uint8 [B, H, W, 3] -> float32 [B, D]
        pixels = images.permute(0, 3, 1, 2).float() / 255
        return self.vit((pixels - self.mean) / self.std)


def timm_network(config: VitConfig, stride_px: int, tensors: Mapping[str, Tensor]) -> nn.Module:
    """timm's VisionTransformer of this size with these weights, in its names; normalised pixels [B, 3, H, W] -> class token after the final norm."""
    from timm.models.vision_transformer import VisionTransformer

    vit = VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_px,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_ratio,
        num_classes=0,
    )
    # Overlapping patches, which timm has not: the same convolution in smaller steps.
    patches: Any = vit.patch_embed
    patches.proj.stride = (stride_px, stride_px)
    vit.pos_embed = nn.Parameter(torch.empty_like(tensors["pos_embed"]))
    vit.load_state_dict(tensors)
    return vit


def example_images(state: FittedState, batch: int) -> npt.NDArray[np.uint8]:
    """Random images of the encoder's size: uint8 [batch, H, W, 3]."""
    return np.random.default_rng(batch).integers(0, 256, (batch, *state.config.image_size, 3), dtype=np.uint8)


def largest_difference(state: FittedState, run: Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]) -> float:
    """Of a graph's features of random images to PyTorch's, absolute, over batches of several sizes, on the CPU."""
    model = PixelFeatures(state).eval()
    worst = 0.0
    for batch in BATCHES:
        images = example_images(state, batch)
        with torch.inference_mode():
            expected = model(torch.from_numpy(images)).numpy()
        worst = max(worst, float(np.abs(run(images) - expected).max()))
    return worst
