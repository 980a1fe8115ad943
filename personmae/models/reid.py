"""The encoder of a re-identification model: from person crops to the features that tell people apart.

A VisionTransformer with what re-identification adds: another image size, overlapping patches, camera embeddings, stochastic depth, and features of
parts (He et al., "TransReID: Transformer-based Object Re-Identification", 2021; MALE for parts lem).
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Literal

import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from personmae.configs import UserError
from personmae.models.drop_path import DropPathKind, draw_factors, draw_subsets, drop_rates
from personmae.models.part_features import NUM_PARTS, JigsawParts, LocalityMap
from personmae.models.positions import PositionResizing, resized_positions, sin_cos_positions
from personmae.models.vit import Residual, VisionTransformer, matrix_dtype
from personmae_kernels import patch_rows
from personmae_kernels.checks import wide


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReidConfig:
    """What the re-identification model adds to an encoder."""

    image_size: tuple[int, int] = (256, 128)  # height, width in pixels
    stride_px: int = 16  # from patch to patch; less than the patch (TransReID: 12): they overlap
    feature: Literal["class", "mean", "class+mean"] = "class"  # class token, mean of the patch tokens, or both in one
    parts: Literal["none", "jpm", "lem"] = "none"
    camera_weight: float = 0.0  # of the camera embeddings, TransReID's SIE coefficient, there 3.0; 0: none
    drop_path: float = 0.1
    drop_path_by: DropPathKind = "sample"
    neck: Literal["bn", "none"] = "bn"  # BNNeck before the classifier
    learned_positions: bool | None = None  # trained with the rest; None: if those of the initial weights are no sines and cosines
    position_resizing: PositionResizing = "bilinear"  # of learned positions, to another grid

    def __post_init__(self) -> None:
        if self.stride_px < 1:
            raise UserError(f"stride_px is {self.stride_px}; patches are at least 1 pixel apart")
        if not 0.0 <= self.drop_path < 1.0:
            raise UserError(f"drop_path is {self.drop_path}; it is a share, from 0 to below 1")
        if self.camera_weight < 0:
            raise UserError(f"camera_weight is {self.camera_weight}; it is 0 (no camera embeddings) or more")


class ReidEncoder(nn.Module):
    """Features of person crops, float32."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, encoder: VisionTransformer, config: ReidConfig, num_cameras: int = 0, seed: int = 0) -> None:
        """encoder: the initial weights, which are copied. num_cameras: those of the training set; not needed without camera_weight. seed: of the
        initial weights of what is new. Raises UserError for sizes that do not fit."""
        super().__init__()
        patch_px, width = encoder.config.patch_px, encoder.config.width
        if config.stride_px > patch_px:
            raise UserError(f"stride_px is {config.stride_px}, more than a patch: at most {patch_px}")
        if min(config.image_size) < patch_px or config.image_size[0] % patch_px or config.image_size[1] % patch_px:
            raise UserError(f"image_size {config.image_size} does not divide into patches of {patch_px} pixels")
        if config.camera_weight > 0 and num_cameras < 2:
            raise UserError(f"camera_weight {config.camera_weight} needs at least 2 cameras, and there are {num_cameras}; set camera_weight 0")
        self.overlapping = config.stride_px < patch_px
        self.grid = (1 + (config.image_size[0] - patch_px) // config.stride_px, 1 + (config.image_size[1] - patch_px) // config.stride_px)
        if self.overlapping:
            for name in ("mean", "std"):
                self.register_buffer(f"pixel_{name}", torch.tensor(getattr(encoder.config, name)), persistent=False)
        self.encoder = copy.deepcopy(encoder)
        learned = self._adapt_positions(config)
        self.config = dataclasses.replace(config, learned_positions=learned)
        generator = torch.Generator().manual_seed(seed)
        self.num_cameras = num_cameras if config.camera_weight > 0 else 0
        if self.num_cameras:
            self.camera_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(num_cameras, width), std=0.02, generator=generator))
        if config.parts == "jpm":
            self.parts = JigsawParts(self.encoder, self.grid[0] * self.grid[1])
        elif config.parts == "lem":
            self.locality = LocalityMap(width, self.grid, generator)
        kind, num_parts = config.drop_path_by, NUM_PARTS if config.parts == "jpm" else 0
        self._drop_rates = drop_rates(config.drop_path, encoder.config.depth, num_parts, kind)

    def _adapt_positions(self, config: ReidConfig) -> bool:
        """Brings the positions to the grid, and the encoder to the image size; returns whether the positions are learned."""
        old, encoder = self.encoder.config, self.encoder
        fixed = encoder.pos_embed.new_zeros(encoder.pos_embed.shape)
        fixed[0, 1:] = sin_cos_positions(old.grid, old.width)
        are_fixed = torch.allclose(encoder.pos_embed, fixed, atol=1e-5)
        if are_fixed:
            # Not interpolated: sines and cosines of the places themselves are exact.
            cells = sin_cos_positions(self.grid, old.width, config.stride_px / old.patch_px)
            positions = torch.cat([fixed[:, :1], cells[None].to(fixed)], dim=1)
        else:
            positions = resized_positions(encoder.pos_embed, old.grid, self.grid, config.position_resizing)
        learned = config.learned_positions if config.learned_positions is not None else not are_fixed
        encoder.set_positions(positions, learned=learned)
        encoder.config = dataclasses.replace(old, image_size=config.image_size)
        return learned

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each feature that `forward` gives."""
        width = self.encoder.embed_dim
        own = 2 * width if self.config.feature == "class+mean" else width
        return (own, *{"none": (), "jpm": (own,) * NUM_PARTS, "lem": (2 * width,)}[self.config.parts])

    @property
    def num_tokens(self) -> int:
        """Of the longest sequence that attention sees."""
        return 1 + self.grid[0] * self.grid[1]

    def draw_drop_paths(self, seed: int, epoch: int, samples: npt.ArrayLike) -> Tensor | None:
        """The draws of stochastic depth for one batch, on the CPU, None where there is none to draw; see `personmae.models.drop_path`.

        samples: int [B], different numbers within the epoch.
        """
        if self.config.drop_path == 0:
            return None
        if self.config.drop_path_by == "subset":
            return draw_subsets(self.config.drop_path, len(self._drop_rates), seed, epoch, samples)
        return draw_factors(self._drop_rates, seed, epoch, samples)

    def forward(self, images: Tensor, cameras: Tensor | None = None, drop_paths: Tensor | None = None) -> tuple[Tensor, ...]:
        """The features of a batch, float32 [B, D_i] with D_i of `widths`: that of the whole, then jpm's four or lem's one.

        images: uint8 [B, H, W, 3] RGB. cameras: int64 [B], numbers of the training set's cameras, -1 for one that is not of it, which gets the
        mean of the embeddings; ignored without camera_weight. drop_paths: of `draw_drop_paths`, on the device; ignored in eval mode. Raises
        ValueError for images of another size, and where cameras or, in training, drop_paths are needed and None.
        """
        if not self.training:
            drop_paths = None
        elif drop_paths is None and self.config.drop_path > 0:
            raise ValueError(f"drop_path is {self.config.drop_path}, so a training step needs drop_paths: give those of draw_drop_paths")
        blocks, norm = self.encoder.blocks, self.encoder.norm
        depth = len(blocks)
        before = blocks.run(Residual(self._tokens(images, cameras)), drop_paths=drop_paths, stop=depth - 1)
        if self.config.parts == "jpm":
            before = Residual(before.add())
        tokens = blocks.run(before, drop_paths=drop_paths, start=depth - 1).add()
        # The norm of the class token alone is cheaper, where nothing else is asked for.
        features = [norm(wide(tokens[:, 0])) if self.config.feature == "class" else self._pool(norm(wide(tokens)))]
        if self.config.parts == "jpm":
            parts = self.parts(before.stream, None if drop_paths is None else drop_paths[2 * depth :])
            features.extend(self._pool(parts).unbind(0))
        elif self.config.parts == "lem":
            features.append(self.locality(tokens[:, 1:]))
        return tuple(features)

    def describe(self, images: Tensor, cameras: Tensor | None = None) -> dict[str, Tensor]:
        """uint8 images [B, H, W, 3] -> {"feature": float32 [B, sum of widths]}, what is compared at the test: before the neck, jpm's parts divided by
        their number (TransReID), lem's map as it is (MALE). cameras: as in `forward`. Of a model in eval mode."""
        first, *others = self(images, cameras)
        if self.config.parts == "jpm":
            others = [part / NUM_PARTS for part in others]
        return {"feature": torch.cat([first, *others], dim=1)}

    def _pool(self, normed: Tensor) -> Tensor:  # [..., 1 + L, D] -> [..., D or 2 D]
        if self.config.feature == "class":
            return normed[..., 0, :]
        mean = normed[..., 1:, :].mean(-2)
        return mean if self.config.feature == "mean" else torch.cat([normed[..., 0, :], mean], dim=-1)

    def _tokens(self, images: Tensor, cameras: Tensor | None) -> Tensor:  # -> [B, 1 + L, D] in the dtype of the products
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != (*self.config.image_size, 3):
            height, width_px = self.config.image_size
            raise ValueError(f"images must be uint8 [B, {height}, {width_px}, 3], not {images.dtype} {list(images.shape)}")
        encoder, vit = self.encoder, self.encoder.config
        if self.overlapping:
            patches = self._overlapping_patches(images)
        else:
            patches = encoder.patch_embed(patch_rows(images, None, vit.patch_px, vit.mean, vit.std, matrix_dtype(images.device)))
        x = patches + encoder.pos_embed[:, 1:].to(patches.dtype)
        token = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([token.to(x.dtype), x], dim=1)
        if self.num_cameras:
            if cameras is None:
                raise ValueError("this model has camera embeddings: give the cameras, -1 for one that is not of the training set")
            # The last row is that of camera -1.
            table = torch.cat([self.camera_embed, self.camera_embed.mean(0, keepdim=True)])
            x = x + (self.config.camera_weight * table[cameras])[:, None].to(x.dtype)
        return x

    def _overlapping_patches(self, images: Tensor) -> Tensor:  # uint8 [B, H, W, 3] -> [B, L, D]
        projection = self.encoder.patch_embed.proj
        pixels = ((images / 255.0 - self.pixel_mean) / self.pixel_std).permute(0, 3, 1, 2)
        return F.conv2d(pixels, projection.weight, projection.bias, stride=self.config.stride_px).flatten(2).transpose(1, 2)


def plain_encoder(model: ReidEncoder) -> VisionTransformer | None:
    """The encoder by itself, in timm's terms; None where it is none of timm's: with overlapping patches or camera embeddings. Its class token is the
    model's first feature, or a half of it; parts stay behind."""
    return None if model.overlapping or model.num_cameras else model.encoder
