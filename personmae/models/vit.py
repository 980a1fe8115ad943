"""The Vision Transformer encoder, with timm's parameter names, on any rectangular grid.

Pre-norm, LayerNorm eps 1e-6, biases on qkv, exact GELU, fixed sine-cosine positions, class token with a zero position: the encoder of MAE
(He et al., 2022) in timm's names, so that `timm.create_model("vit_small_patch16_224", img_size=(256, 128), num_classes=0)` takes the weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from personmae.configs import UserError
from personmae.models.attention import Attention
from personmae.models.fusing import worth_fusing
from personmae.models.positions import sin_cos_positions
from personmae_kernels import AddedNorm, add_layer_norm, patch_rows
from personmae_kernels.checks import wide

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VitConfig:
    """Size of an encoder."""

    image_size: tuple[int, int] = (256, 128)  # height, width in pixels
    patch_px: int = 16
    width: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0
    mean: tuple[float, float, float] = IMAGENET_MEAN  # of RGB on the scale [0, 1]
    std: tuple[float, float, float] = IMAGENET_STD

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size[0] // self.patch_px, self.image_size[1] // self.patch_px


def matrix_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which matrix products run on this device just now: that of autocast where it is on, else float32."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:  # [B, N, D] -> [B, N, D]
        return self.fc2(F.gelu(self.fc1(x)))


class Residual(NamedTuple):
    """A residual stream and the branch that is still to be added to it: the addition is made together with the next LayerNorm.

    With stochastic depth the branch has a factor for each sample, or is that of some samples only; see `personmae.models.drop_path`.
    """

    stream: Tensor  # [B, N, D]
    branch: Tensor | None = None  # [B, N, D], or [K, N, D] of the samples `kept`
    factors: Tensor | None = None  # float32 [B], 0 where the branch is dropped
    kept: Tensor | None = None  # int64 [K], ascending

    def add_and_norm(self, norm: nn.LayerNorm, fused: bool = True) -> AddedNorm:
        """The stream with its branch added, and the LayerNorm of that; fused: in one pass."""
        if self.branch is None or self.kept is not None or not fused:
            stream = self.add()
            return AddedNorm(stream, norm(stream))
        return add_layer_norm(self.stream, self.branch, norm.weight, norm.bias, row_scale=self.factors, eps=norm.eps)

    def add(self) -> Tensor:
        """The stream with its branch added."""
        if self.branch is None:
            return self.stream
        if self.kept is not None:
            # As if each sample had its branch with the probability K / B.
            scale = len(self.stream) / len(self.kept)
            return self.stream.index_add(0, self.kept, self.branch.to(self.stream.dtype), alpha=scale)
        if self.factors is not None:
            return (self.stream + self.factors[:, None, None] * self.branch).to(self.stream.dtype)
        return self.stream + self.branch


class Block(nn.Module):
    """Pre-norm transformer block."""

    # Triton's kernels compute small inputs too; see `set_fusing`.
    fuse_small = False

    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, x: Residual, drop_path: Tensor | None = None) -> Residual:
        """drop_path: of the two branches, None for no stochastic depth: float32 [2, B], factors of the samples, or int64 [2, K], the samples whose
        branch is computed at all."""
        if drop_path is not None and not drop_path.is_floating_point():
            for norm, branch, kept in ((self.norm1, self.attn, drop_path[0]), (self.norm2, self.mlp, drop_path[1])):
                stream = x.add()
                x = Residual(stream, branch(norm(stream.index_select(0, kept))), kept=kept)
            return x
        first, second = (None, None) if drop_path is None else (drop_path[0], drop_path[1])
        fused = self.fuse_small or worth_fusing(x.stream)
        stream, normed = x.add_and_norm(self.norm1, fused)
        stream, normed = Residual(stream, self.attn(normed), first).add_and_norm(self.norm2, fused)
        return Residual(stream, self.mlp(normed), second)


def set_fusing(module: nn.Module, *, small: bool) -> None:
    """Whether blocks and attention inside `module` give small inputs to Triton's kernels too; see `personmae.models.fusing`."""
    for part in module.modules():
        if isinstance(part, Block | Attention):
            part.fuse_small = small


class Blocks(nn.ModuleList):
    """Blocks that run one after the other on a residual stream."""

    # Drop what a block computes inside, and compute it again in the backward pass: less memory for more time.
    checkpointing = False

    def run(
        self,
        x: Residual,
        *context: Tensor,
        after_first: Callable[[Residual], None] | None = None,
        drop_paths: Tensor | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> Residual:
        """x through the blocks from `start` to before `stop` (None: all), each of which gets the context too.

        after_first: is shown what the first of them gives. drop_paths: [2 * number of blocks, ...], two rows for each block, see `Block`.
        """
        for number in range(len(self))[start:stop]:
            own = () if drop_paths is None else (drop_paths[2 * number : 2 * number + 2],)
            dropped = self.checkpointing and torch.is_grad_enabled()
            block = self[number]
            x = checkpoint(block, x, *context, *own, use_reentrant=False) if dropped else block(x, *context, *own)
            if number == start and after_first is not None:
                after_first(x)
        return x


class PatchEmbed(nn.Module):
    """The patch projection, kept as a convolution for timm's parameter name and shape."""

    def __init__(self, patch_px: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_px, patch_px)

    def forward(self, rows: Tensor) -> Tensor:  # [B, V, 3 * patch**2] -> [B, V, D]
        return F.linear(rows, self.proj.weight.flatten(1), self.proj.bias)


class Encoded(NamedTuple):
    """What the encoder gives."""

    tokens: Tensor  # [B, (1 +) V, D], after the last block, before the final norm
    normed: Tensor  # the same after the final norm
    first: Tensor | None  # [B, (1 +) V, D], after the first block, where asked for


class VisionTransformer(nn.Module):
    """ViT encoder for uint8 person crops."""

    pos_embed: Tensor

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        height, width_px = config.image_size
        if height % config.patch_px or width_px % config.patch_px:
            raise UserError(f"image size {height}x{width_px} does not divide into patches of {config.patch_px} pixels")
        self.config = config
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.patch_embed = PatchEmbed(config.patch_px, config.width)
        positions = torch.cat([torch.zeros(1, config.width), sin_cos_positions(config.grid, config.width)])
        self.register_buffer("pos_embed", positions[None])
        self.blocks = Blocks(Block(config.width, config.num_heads, config.mlp_ratio) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)

    def set_positions(self, positions: Tensor, *, learned: bool) -> None:
        """Replace the position codes by [1, 1 + L, D], class token first. learned: they are a parameter, else they stay as they are."""
        del self.pos_embed
        if learned:
            self.pos_embed = nn.Parameter(positions.detach().clone())
        else:
            self.register_buffer("pos_embed", positions.detach().clone())

    @property
    def embed_dim(self) -> int:
        """Width of a token (timm's name)."""
        return self.config.width

    def encode(self, images: Tensor, visible: Tensor | None = None, with_class: bool = True, keep_first: bool = False) -> Encoded:
        """Encode whole images, or only their visible patches.

        images: uint8 [B, H, W, 3] RGB. visible: int [B, V] patch numbers, or None for all. with_class: prepend the class token. keep_first: give
        the tokens after the first block too.
        Token i of the result is the class token (i = 0, if asked for), then the patches in the order of `visible`.
        """
        config = self.config
        if tuple(images.shape[1:]) != (*config.image_size, 3):
            raise ValueError(f"images must be uint8 [B, {config.image_size[0]}, {config.image_size[1]}, 3], not {tuple(images.shape)}")
        x = self.patch_embed(patch_rows(images, visible, config.patch_px, config.mean, config.std, matrix_dtype(images.device)))
        positions = self.pos_embed[0, 1:]
        # In the dtype of the products: under bf16 autocast the residual stream is bf16 too, and every pass over it half as long.
        x = x + (positions if visible is None else F.embedding(visible, positions)).to(x.dtype)
        return self._run_blocks(x, with_class, keep_first)

    def _run_blocks(self, x: Tensor, with_class: bool, keep_first: bool = False) -> Encoded:
        if with_class:
            x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1).to(x.dtype), x], dim=1)
        first: list[Tensor] = []
        residual = self.blocks.run(Residual(x), after_first=(lambda x: first.append(x.add())) if keep_first else None)
        # Once in a pass, so apart: the features are float32, also under autocast.
        tokens = residual.add()
        return Encoded(tokens, self.norm(wide(tokens)), first[0] if first else None)

    def forward_features(self, pixels: Tensor) -> Tensor:
        """timm's entry: normalised float pixels [B, 3, H, W] -> tokens after the final norm [B, 1 + L, D], class token first."""
        x = self.patch_embed.proj(pixels).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
        return self._run_blocks(x, with_class=True).normed

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised float pixels [B, 3, H, W] -> class token after the final norm [B, D]."""
        return self.forward_features(pixels)[:, 0]

    def describe(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 images [B, H, W, 3] -> features [B, D]: "class" token and "mean" of the patch tokens, both after the final norm."""
        tokens = self.encode(images).normed
        return {"class": tokens[:, 0], "mean": tokens[:, 1:].mean(dim=1)}


def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """MAE's initialisation: xavier uniform for linear layers (the patch projection taken as linear), zero biases, unit norms, normal(0.02) for
    tokens. Drawn on the CPU from `generator`, in the order of the modules."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(part.weight.data.flatten(1), generator=generator)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
    for name, parameter in module.named_parameters():
        if name.rsplit(".", 1)[-1] in ("cls_token", "mask_token"):
            nn.init.normal_(parameter, std=0.02, generator=generator)
