"""The same model, written as public MAE code writes it: what `throughput.py` compares ours with.

Parameters have the names of ours, so that the weights can be loaded, and the loss is equal. What differs is how it is computed, after the description
of that code's sequence of operations (He et al., 2022; none of it is copied): images normalised and embedded whole and the visible tokens gathered
by an int64 index repeated over the channels, a residual stream in float32 under autocast, patchify by einsum, targets in several passes, attention
as two matrix products with a softmax between (or as F.scaled_dot_product_attention). Relative codes are made for each cell, as Siamese Image Modeling
does (Tao et al., 2023), and decoder blocks are those of BootMAE (Dong et al., 2022).
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from personmae.configs import UserError
from personmae.models.decoders import DecoderConfig
from personmae.models.masked import MaskedConfig
from personmae.models.masking import visible_count
from personmae.models.positions import sin_cos_positions
from personmae.models.vit import VitConfig
from personmae_kernels.reference import region_codes


def attend(q: Tensor, k: Tensor, v: Tensor, with_sdpa: bool) -> Tensor:
    """softmax(q k^T / sqrt(d)) v. q: [B, H, N, d], k, v: [B, H, M, d] -> [B, N, H * d]."""
    if with_sdpa:
        mixed = F.scaled_dot_product_attention(q, k, v)
    else:
        shares = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        mixed = shares @ v
    return mixed.transpose(1, 2).flatten(2)


def heads_of(x: Tensor, num_parts: int, num_heads: int) -> Tensor:  # [B, N, parts * D] -> [parts, B, H, N, d]
    return x.reshape(*x.shape[:2], num_parts, num_heads, -1).permute(2, 0, 3, 1, 4)


class PlainAttention(nn.Module):
    """Self-attention."""

    def __init__(self, width: int, num_heads: int, with_sdpa: bool) -> None:
        super().__init__()
        self.num_heads, self.with_sdpa = num_heads, with_sdpa
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # [B, N, D] -> [B, N, D]
        qkv = heads_of(self.qkv(x), 3, self.num_heads)
        return self.proj(attend(qkv[0], qkv[1], qkv[2], self.with_sdpa))


class PlainCrossAttention(nn.Module):
    """Attention of queries to a context."""

    def __init__(self, width: int, num_heads: int, with_sdpa: bool) -> None:
        super().__init__()
        self.num_heads, self.with_sdpa = num_heads, with_sdpa
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:  # [B, N, D], [B, M, D] -> [B, N, D]
        q, kv = heads_of(self.q(x), 1, self.num_heads), heads_of(self.kv(context), 2, self.num_heads)
        return self.proj(attend(q[0], kv[0], kv[1], self.with_sdpa))


class PlainMlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class PlainBlock(nn.Module):
    """Pre-norm transformer block; with_context: cross-attention between self-attention and MLP."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, with_sdpa: bool, with_context: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = PlainAttention(width, num_heads, with_sdpa)
        if with_context:
            self.norm_cross = nn.LayerNorm(width, eps=1e-6)
            self.norm_context = nn.LayerNorm(width, eps=1e-6)
            self.cross_attn = PlainCrossAttention(width, num_heads, with_sdpa)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = PlainMlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:  # [B, N, D], [B, M, D] -> [B, N, D]
        x = x + self.attn(self.norm1(x))
        if context is not None:
            x = x + self.cross_attn(self.norm_cross(x), self.norm_context(context))
        return x + self.mlp(self.norm2(x))


def gather_tokens(x: Tensor, order: Tensor) -> Tensor:  # [B, N, D], int64 [B, M] -> [B, M, D]
    return torch.gather(x, 1, order.unsqueeze(-1).repeat(1, 1, x.shape[-1]))


class PlainEncoder(nn.Module):
    """ViT encoder of normalised images."""

    pos_embed: Tensor

    def __init__(self, config: VitConfig, with_sdpa: bool) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, config.width, config.patch_px, config.patch_px)})
        self.register_buffer("pos_embed", torch.zeros(1, 1 + config.grid[0] * config.grid[1], config.width))
        self.blocks = nn.ModuleList(PlainBlock(config.width, config.num_heads, config.mlp_ratio, with_sdpa) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)

    def forward(self, pixels: Tensor, kept: Tensor | None = None) -> Tensor:
        """Normalised [B, 3, H, W]. With `kept`, int64 [B, V]: the class token and these patches' tokens after the final norm, [B, 1 + V, D]; without,
        as a teacher: all patches' tokens after the last block, [B, L, D]."""
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
        if kept is not None:
            first = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
            x = torch.cat([first, gather_tokens(x, kept)], dim=1)
        for block in self.blocks:
            x = block(x)
        return x if kept is None else self.norm(x)


class PlainDecoder(nn.Module):
    """Decoder of form cross or mae."""

    positions: Tensor

    def __init__(self, config: DecoderConfig, context_width: int, out_width: int, grid: tuple[int, int], with_sdpa: bool) -> None:
        super().__init__()
        width = config.width
        self.config, self.grid = config, grid
        self.embed = nn.Linear(context_width, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.register_buffer("positions", sin_cos_positions(grid, width), persistent=False)
        cross = config.form == "cross"
        if cross:
            self.code = nn.Linear(2 * width, width)
        self.blocks = nn.ModuleList(PlainBlock(width, config.num_heads, config.mlp_ratio, with_sdpa, cross) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, out_width)

    def forward(self, encoded: Tensor, restore: Tensor, boxes: Tensor, flips: Tensor) -> Tensor:
        """encoded: [B, 1 + V, E]. restore: int64 [B, L], where each cell of A stands among the shuffled ones. Returns [B, L, out_width]."""
        context = self.embed(encoded)
        if self.config.form == "cross":
            x = self.mask_token + self.code(self._codes(boxes, flips))
            for block in self.blocks:
                x = block(x, context)
            return self.head(self.norm(x))
        num_masked = restore.shape[1] + 1 - context.shape[1]
        masked = self.mask_token.expand(1, 1, -1).repeat(len(context), num_masked, 1)
        grid = gather_tokens(torch.cat([context[:, 1:], masked.to(context.dtype)], dim=1), restore)
        x = torch.cat([context[:, :1], grid], dim=1) + F.pad(self.positions, (0, 0, 1, 0))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))[:, 1:]

    def _codes(self, boxes: Tensor, flips: Tensor) -> Tensor:  # -> [B, L, 2 * D]
        codes = region_codes(boxes, flips, self.grid, self.config.width)
        shape = (len(boxes), *self.grid, -1)
        parts = [codes.rows[:, :, None].expand(shape), codes.columns[:, None].expand(shape), codes.scale[:, None, None].expand(shape)]
        return torch.cat(parts, dim=-1).flatten(1, 2)


class PlainMAE(nn.Module):
    """Student, teacher and losses."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: MaskedConfig, state: dict[str, Tensor], with_sdpa: bool) -> None:
        """state: of a PersonMAE of this config, whose encoder is the teacher's beginning too. Raises UserError for what no preset of ours asks of
        the model and public code does not have."""
        super().__init__()
        check_config(config)
        vit = config.encoder
        self.config, self.num_visible = config, visible_count(config.masking, vit.grid)
        self.encoder = PlainEncoder(vit, with_sdpa)
        if config.losses != "features":
            self.pixel_decoder = PlainDecoder(config.pixel_decoder, vit.width, 3 * vit.patch_px**2, vit.grid, with_sdpa)
        if config.losses != "pixels":
            self.feature_decoder = PlainDecoder(config.feature_decoder, vit.width, vit.width, vit.grid, with_sdpa)
        self.load_state_dict(state)
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False) if config.losses != "pixels" else None
        for name, values in (("mean", vit.mean), ("std", vit.std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, region_a: Tensor, region_b: Tensor, boxes: Tensor, flips: Tensor, noise: Tensor) -> Tensor:
        """The loss, [] float32. region_a, region_b: uint8 [B, H, W, 3]. boxes: int [B, 2, 4], flips: bool [B, 2]. noise: float [B, L]: the patches
        of A with the least are visible."""
        a = self._normalise(region_a)
        own = self.config.target_region == "A"
        b = a if own else self._normalise(region_b)
        if own:
            boxes, flips = boxes[:, :1].expand(-1, 2, -1), flips[:, :1].expand(-1, 2)
        shuffle = torch.argsort(noise, dim=1)
        restore = torch.argsort(shuffle, dim=1)
        mask = torch.ones_like(noise)
        mask[:, : self.num_visible] = 0
        mask = torch.gather(mask, 1, restore) if self.config.predict == "masked" else torch.ones_like(noise)
        encoded = self.encoder(a, shuffle[:, : self.num_visible])
        loss = torch.zeros((), device=a.device)
        if self.config.losses != "features":
            target = self._patchify(b)
            average, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
            target = (target - average) / (variance + 1e-6) ** 0.5
            error = ((self.pixel_decoder(encoded, restore, boxes, flips) - target) ** 2).mean(-1)
            loss = loss + self.config.pixel_weight * (error * mask).sum() / mask.sum()
        if self.teacher is not None:
            with torch.no_grad():
                target = self.teacher(b)
                target = F.layer_norm(target, target.shape[-1:], eps=1e-6)
            predicted = self.feature_decoder(encoded, restore, boxes, flips)
            error = ((F.layer_norm(predicted, predicted.shape[-1:], eps=1e-6) - target) ** 2).mean(-1)
            loss = loss + self.config.feature_weight * (error * mask).sum() / mask.sum()
        return loss

    def _normalise(self, images: Tensor) -> Tensor:  # uint8 [B, H, W, 3] -> float32 [B, 3, H, W]
        return (images.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std

    def _patchify(self, pixels: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, L, 3 * patch**2], in the element order of our decoder's head
        patch = self.config.encoder.patch_px
        rows, columns = self.config.encoder.grid
        cut = pixels.reshape(len(pixels), 3, rows, patch, columns, patch)
        return torch.einsum("nchpwq->nhwcpq", cut).reshape(len(pixels), rows * columns, -1)


def check_config(config: MaskedConfig) -> None:
    """Raises UserError for settings that the peers do not have."""
    uses = {"both": ("pixel", "feature"), "pixels": ("pixel",), "features": ("feature",)}[config.losses]
    decoders = [getattr(config, f"{name}_decoder") for name in uses]
    wrong = {
        "decoder.form joint": any(decoder.form == "joint" for decoder in decoders),
        "decoder.codes own": any(decoder.form == "cross" and decoder.codes == "own" for decoder in decoders),
        "predict unseen": config.predict == "unseen",
        "feature_loss": config.feature_loss != "mse" and config.losses != "pixels",
        "low_level_injection": config.low_level_injection,
        "per_channel_pixels": config.per_channel_pixels,
    }
    if found := [name for name, is_set in wrong.items() if is_set]:
        raise UserError(f"the peers do not have {', '.join(found)}; time this model with --ways ours")
