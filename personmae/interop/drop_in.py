"""Our encoder as a backbone in other people's ReID code: normalised float images in, any stride, camera and view embeddings, their stochastic depth.

The modules of each code base (transreid, transreid_ssl, cluster_contrast, fast_reid, torchreid, openunreid, clip_reid, solider) are thin shells
around `DropInVit`, with the signature, attributes and outputs that their code asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from personmae.configs import UserError
from personmae.interop.exports import Pixels, fold_normalisation
from personmae.interop.initial_weights import NORMALISATIONS, FittedState, load_state, patch_grid
from personmae.interop.plain_blocks import PlainBlock
from personmae.models.attention import AttentionKind
from personmae.models.vit import Blocks, PatchEmbed, Residual
from personmae.models.zoo import ENCODERS
from personmae_kernels.checks import wide

HALF: Pixels = NORMALISATIONS["half"]
IMAGENET: Pixels = NORMALISATIONS["imagenet"]
INITIAL_STD = 0.02  # of all weights without a file, as in TransReID


class DropInVit(nn.Module):
    """A ViT in timm's names: cls_token, pos_embed, patch_embed.proj, blocks, norm; with sie_embed where there are cameras or views."""

    def __init__(
        self,
        encoder: str,
        *,
        pixels: Pixels,
        image_size: int | Sequence[int] = (256, 128),
        stride: int | Sequence[int] = 16,
        num_cameras: int = 0,
        num_views: int = 0,
        sie_weight: float = 1.5,
        drop_path_rate: float = 0.0,
        attention: AttentionKind = "auto",
    ) -> None:
        """encoder: a name of `personmae.models.zoo`, as vit-small. pixels: mean and std that the host normalises with. image_size: (height, width) in
        pixels. stride: from patch to patch, one number or two equal ones. num_cameras, num_views: 0 for no embeddings of them; a single one adds
        nothing and gets none. sie_weight: TransReID's SIE_COE. drop_path_rate: of the last block, linearly from 0 at the first. Weights are drawn by
        torch's generator. Raises ValueError for an unknown encoder and sizes that do not fit."""
        super().__init__()
        if encoder not in ENCODERS:
            raise UserError(f"there is no encoder {encoder!r}; there are: {', '.join(ENCODERS)}")
        config = ENCODERS[encoder]
        self.image_size, self.stride = _pair(image_size, "image_size"), _single(stride)
        if not 1 <= self.stride <= config.patch_px:
            raise UserError(f"a stride of {self.stride} pixels does not fit patches of {config.patch_px}: at least 1, and at most that")
        if min(self.image_size) < config.patch_px:
            raise UserError(f"images of {self.image_size} pixels are smaller than a patch, {config.patch_px}")
        self.pixels, self.grid = pixels, patch_grid(self.image_size, config.patch_px, self.stride)
        self.embed_dim = self.in_planes = config.width
        self.num_cameras, self.num_views, self.sie_weight = num_cameras, num_views, sie_weight
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.grid[0] * self.grid[1], config.width))
        self.patch_embed = PatchEmbed(config.patch_px, config.width)
        rates = [drop_path_rate * number / max(1, config.depth - 1) for number in range(config.depth)]
        self.blocks = Blocks(PlainBlock(config.width, config.num_heads, config.mlp_ratio, rate, attention) for rate in rates)
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        num_embeddings = max(1, num_cameras) * max(1, num_views)
        if num_embeddings > 1:
            self.sie_embed = nn.Parameter(torch.empty(num_embeddings, 1, config.width))
        self._initialise()

    def _initialise(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.trunc_normal_(parameter, std=INITIAL_STD)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def load_weights(self, path: str | Path) -> None:
        """Take the weights of a file: a run folder or file of ours, an export, or any ViT of this size; see `load_state`.

        Positions are brought to this grid. Of a file that tells how its pixels were normalised, the patch embedding is folded to the host's; others
        are taken as they are, as the host would. Raises ValueError for another size of network, naming the file.
        """
        state = load_state(path, image_size=self.image_size, stride_px=self.stride)
        self.take(state, fold=state.told_pixels)
        print(f"personmae: {path}: {state.report}")

    def take(self, state: FittedState, fold: bool) -> None:
        """Take the tensors of an encoder of this size, image size and stride. fold: the patch embedding, to the host's mean and std.

        Raises ValueError for another size of network."""
        tensors, config = dict(state.tensors), state.config
        own = {name: tensor for name, tensor in self.state_dict().items() if name in tensors}
        if own.keys() != tensors.keys() or any(own[name].shape != tensor.shape for name, tensor in tensors.items()):
            raise UserError(
                f"{state.origin} holds a ViT {config.width} wide and {config.depth} deep, this one is {self.embed_dim} wide and {len(self.blocks)} "
                "deep; build the one that the weights are of"
            )
        if fold:
            names = "patch_embed.proj.weight", "patch_embed.proj.bias"
            folded = fold_normalisation(tensors[names[0]], tensors[names[1]], (config.mean, config.std), self.pixels)
            tensors |= dict(zip(names, folded, strict=True))
        with torch.no_grad():
            for name, tensor in tensors.items():
                own[name].copy_(tensor)

    def stream(self, images: Tensor, added: Tensor | None = None, added_to_class: Tensor | None = None) -> Tensor:
        """Tokens before the first block. images: float [B, 3, H, W], normalised as the host does. added: [B or 1, 1, D], to all tokens.
        added_to_class: [B, D]. Returns [B, 1 + L, D]. Raises ValueError for images of another size."""
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, *self.image_size):
            height, width = self.image_size
            raise ValueError(f"images must be [B, 3, {height}, {width}], not {list(images.shape)}; build the backbone with img_size=(height, width)")
        projection = self.patch_embed.proj
        patches = F.conv2d(images, projection.weight, projection.bias, stride=self.stride).flatten(2).transpose(1, 2)
        token = self.cls_token.expand(len(images), -1, -1)
        if added_to_class is not None:
            token = token + added_to_class[:, None]
        tokens = torch.cat([token, patches.to(token.dtype)], dim=1) + self.pos_embed
        return tokens if added is None else tokens + added

    def embedding(self, cameras: Tensor | None, views: Tensor | None) -> Tensor | None:
        """What the cameras and views add to all tokens: [B, 1, D], or None. cameras, views: int64 [B]. Raises ValueError where they are needed."""
        if not hasattr(self, "sie_embed"):
            return None
        place: Tensor | int = 0
        for name, count, labels in (("cam_label", self.num_cameras, cameras), ("view_label", self.num_views, views)):
            if count > 1:
                if labels is None:
                    raise ValueError(f"the backbone has embeddings of {count} of them, so {name} is needed: int64 [B]")
                place = place * count + labels
        return self.sie_weight * self.sie_embed[place]

    def normed_tokens(self, images: Tensor, added: Tensor | None = None) -> Tensor:
        """[B, 3, H, W] -> [B, 1 + L, D] after the final norm, class token first."""
        return self.norm(wide(self.blocks.run(Residual(self.stream(images, added))).add()))

    def class_token(self, images: Tensor, added: Tensor | None = None) -> Tensor:
        """[B, 3, H, W] -> [B, D] after the final norm."""
        return self.norm(wide(self.blocks.run(Residual(self.stream(images, added))).add()[:, 0]))

    def as_map(self, tokens: Tensor) -> Tensor:
        """[B, 1 + L, D] -> the patches as a map [B, D, rows, columns]."""
        return tokens[:, 1:].transpose(1, 2).unflatten(2, self.grid)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Less memory for more time: activations are computed again in the backward pass (timm's name)."""
        self.blocks.checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names that optimisers of timm and TransReID leave without weight decay."""
        return {"cls_token", "pos_embed", "sie_embed"}


def refuse(where: str, **settings: float | bool | str | None) -> None:
    """Raises ValueError, naming the first setting that is not off: what our blocks do not have, so that nothing is dropped in silence."""
    for name, value in settings.items():
        if value:
            raise UserError(f"{where}: {name} is {value!r}, which our blocks do not have; set it to 0, False or None, or keep the original backbone")


def _pair(size: int | Sequence[int], name: str) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(int(value) for value in size)
    if len(pair) != 2:
        raise UserError(f"{name} is {size!r}; it is one number or (height, width)")
    return pair[0], pair[1]


def _single(stride: int | Sequence[int]) -> int:
    down, right = _pair(stride, "stride")
    if down != right:
        raise UserError(f"a stride of {down} pixels down and {right} to the right is not had here; give one number")
    return down
