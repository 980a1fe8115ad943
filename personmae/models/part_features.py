"""Features of parts of a person, beside the one of the whole.

    jpm   jigsaw patch module (He et al., "TransReID", 2021): the patches, shifted and shuffled, make four groups that each hold something of the
          whole body; a copy of the encoder's last block reads each group with the class token
    lem   locality enhanced module (MALE, github.com/YanzuoLu/MALE): three ResNet bottlenecks on the map of patches, pooled
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from personmae.configs import UserError
from personmae.models.vit import Blocks, Residual, VisionTransformer
from personmae_kernels.checks import wide

# TransReID's defaults: its shift of 5 counts the class token.
SHIFT = 4
SHUFFLE_GROUPS = 2
NUM_PARTS = 4


def jigsaw_order(num_patches: int) -> list[int]:
    """Patch numbers of the four parts, one part after the other, each of num_patches // 4 (rounded down: up to three patches are in none).

    The patches are rolled by 4, then their first and second half are dealt alternately, like cards. Of an odd number the one before the last is taken
    twice, as TransReID does.
    """
    rolled = [(number + SHIFT) % num_patches for number in range(num_patches)]
    if num_patches % SHUFFLE_GROUPS:
        rolled.append(rolled[-2])
    half = len(rolled) // SHUFFLE_GROUPS
    dealt = [rolled[group * half + place] for place in range(half) for group in range(SHUFFLE_GROUPS)]
    return dealt[: num_patches // NUM_PARTS * NUM_PARTS]


class JigsawParts(nn.Module):
    """Tokens of the four parts, from the tokens before the encoder's last block."""

    order: Tensor

    def __init__(self, encoder: VisionTransformer, num_patches: int) -> None:
        """Starts as a copy of the encoder's last block and final norm. Raises UserError for fewer than 8 patches."""
        super().__init__()
        if num_patches < 2 * NUM_PARTS:
            raise UserError(f"parts jpm makes {NUM_PARTS} groups of patches, and there are only {num_patches}; give larger images")
        self.blocks = Blocks([copy.deepcopy(encoder.blocks[-1])])
        self.norm = copy.deepcopy(encoder.norm)
        self.register_buffer("order", torch.tensor(jigsaw_order(num_patches)), persistent=False)

    def forward(self, tokens: Tensor, drop_paths: Tensor | None = None) -> Tensor:
        """tokens: [B, 1 + L, D], class token first. drop_paths: [8, B] or [8, K], two rows for each part. Returns the normed tokens
        [4, B, 1 + L // 4, D] float32, class token first."""
        B, _, D = tokens.shape
        parts = tokens[:, 1:].index_select(1, self.order).view(B, NUM_PARTS, -1, D).transpose(0, 1)
        # One batch of four times the size: the part block runs once.
        x = torch.cat([tokens[:, :1].expand(NUM_PARTS, B, 1, D), parts], dim=2).flatten(0, 1)
        if drop_paths is not None:
            drop_paths = drop_paths.unflatten(0, (NUM_PARTS, 2)).transpose(0, 1)
            if not drop_paths.is_floating_point():
                drop_paths = drop_paths + B * torch.arange(NUM_PARTS, device=drop_paths.device)[:, None]
            drop_paths = drop_paths.flatten(1)
        out = self.blocks.run(Residual(x), drop_paths=drop_paths).add()
        return self.norm(wide(out)).unflatten(0, (NUM_PARTS, B))


class LocalityMap(nn.Module):
    """One feature of twice the encoder's width, from its map of patches."""

    def __init__(self, width: int, grid: tuple[int, int], generator: torch.Generator) -> None:
        """grid: rows and columns of patches. The convolutions start as PyTorch's do, drawn from `generator`, as in MALE."""
        super().__init__()
        from timm.models.resnet import Bottleneck, downsample_conv

        if width % 2:
            raise UserError(f"parts lem halves the width of the encoder, which is {width}")
        self.grid = grid
        shorten = downsample_conv(width, 2 * width, kernel_size=1, stride=2)
        self.bottlenecks = nn.Sequential(
            Bottleneck(width, width // 2, stride=2, downsample=shorten),
            Bottleneck(2 * width, width // 2),
            Bottleneck(2 * width, width // 2),
        )
        self.norm = nn.LayerNorm(2 * width, eps=1e-6)
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_uniform_(part.weight, a=math.sqrt(5), generator=generator)

    def forward(self, patches: Tensor) -> Tensor:
        """[B, L, D] after the last block, before the final norm -> [B, 2 D] float32."""
        image = patches.transpose(1, 2).unflatten(2, self.grid)
        return self.norm(wide(self.bottlenecks(image)).mean((2, 3)))
