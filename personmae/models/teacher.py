"""The teacher: whose features of the target region the student predicts.

By default a moving average of the student's encoder (updated by `training/ema.py`); or a frozen encoder: a file of our own weights, or any timm
model with one token per patch.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from personmae.configs import UserError
from personmae.models.vit import VisionTransformer, set_fusing
from personmae.models.weights import load_encoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Which teacher, and what of it is the target."""

    kind: Literal["ema", "frozen", "timm"] = "ema"
    weights: Path | None = None  # frozen: our own encoder file; timm: a checkpoint file (None: the model's published weights, from its hub)
    timm_name: str = "vit_small_patch16_dinov3.lvd1689m"
    with_class: bool = False  # the class token takes part in the teacher's attention (it is never a target)


class Teacher(nn.Module):
    """Target features of uint8 images; never trained by gradient, always in eval mode."""

    def __init__(self, encoder: nn.Module, width: int, with_class: bool) -> None:
        super().__init__()
        self.encoder, self.width, self.with_class = encoder, width, with_class
        self.requires_grad_(False)
        self.eval()
        # As the student's.
        set_fusing(self, small=True)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] -> [B, L, E], patch tokens after the last block, before the final norm."""
        tokens = self.encoder.encode(images, with_class=self.with_class).tokens  # type: ignore[operator]
        return tokens[:, 1:] if self.with_class else tokens

    def train(self, mode: bool = True) -> Teacher:
        """Stays in eval mode whatever is asked."""
        return super().train(False)


class TimmEncoder(nn.Module):
    """A frozen timm model behind our encoder's `encode`."""

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, image_size: tuple[int, int], num_cells: int, weights: Path | None) -> None:
        super().__init__()
        import timm

        options = {"checkpoint_path": str(weights)} if weights else {"pretrained": True}
        try:
            model: Any = timm.create_model(name, img_size=image_size, num_classes=0, **options)
        except (RuntimeError, OSError, TypeError, ValueError) as error:
            raise UserError(f"timm model {name!r} cannot be a teacher at {image_size[0]}x{image_size[1]}: {error}") from error
        grid_tokens = model.patch_embed.num_patches
        if grid_tokens != num_cells:
            raise UserError(f"teacher {name!r} gives {grid_tokens} patch tokens, the student predicts {num_cells}; choose one of the same patch size")
        cfg = model.pretrained_cfg
        self.register_buffer("mean", torch.tensor(cfg["mean"]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(cfg["std"]).view(1, 3, 1, 1))
        self.model = model
        self.num_prefix: int = model.num_prefix_tokens
        self.width: int = model.num_features

    def forward(self, images: Tensor) -> Tensor:  # uint8 [B, H, W, 3] -> [B, L, E]
        pixels = (images.permute(0, 3, 1, 2).float() / 255.0 - self.mean) / self.std
        return self.model.forward_features(pixels)[:, self.num_prefix :]


class FrozenTimmTeacher(Teacher):
    """Target features of a frozen timm model."""

    def __init__(self, encoder: TimmEncoder) -> None:
        super().__init__(encoder, encoder.width, with_class=True)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] -> [B, L, E], the model's patch tokens after its final norm."""
        return self.encoder(images)


def build_teacher(config: TeacherConfig, student: VisionTransformer) -> Teacher:
    """The teacher of a run. Raises UserError where a frozen one is asked for without weights that fit."""
    if config.kind == "ema":
        return Teacher(copy.deepcopy(student), student.embed_dim, config.with_class)
    size, grid = student.config.image_size, student.config.grid
    if config.kind == "timm":
        return FrozenTimmTeacher(TimmEncoder(config.timm_name, size, grid[0] * grid[1], config.weights))
    if config.weights is None:
        raise UserError("teacher.kind frozen needs teacher.weights, the path of an encoder.safetensors")
    encoder = load_encoder(config.weights)
    if encoder.config.image_size != size or encoder.config.grid != grid:
        raise UserError(f"{config.weights} is for {encoder.config.image_size} pixels in a grid {encoder.config.grid}; the student has {size}, {grid}")
    return Teacher(encoder, encoder.embed_dim, config.with_class)
