"""The decoders: from the visible tokens of region A to a prediction for each cell of region B.

Three forms, one output:
    cross   queries attend to one another, then to the encoder's tokens (Dong et al., BootMAE, 2022); the default
    joint   encoder tokens and queries in one sequence (Tao et al., Siamese Image Modeling, 2023)
    mae     the grid of A itself, visible tokens in their places (He et al., MAE, 2022); for target region A only
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor, nn

from personmae.models.attention import Attention, CrossAttention
from personmae.models.positions import sin_cos_positions
from personmae.models.vit import Block, Blocks, Mlp, Residual
from personmae_kernels import assemble_tokens, join_tokens, region_queries


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Size and form of a decoder."""

    form: Literal["cross", "joint", "mae"] = "cross"
    depth: int = 2
    width: int = 256
    num_heads: int = 8
    mlp_ratio: float = 4.0
    codes: Literal["relative", "own"] = "relative"  # own: B's cells by their own grid alone, blind to where B lies (an ablation)


class CrossBlock(nn.Module):
    """Self-attention among the queries, cross-attention to the context, MLP; pre-norm."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, num_heads)
        self.norm_cross = nn.LayerNorm(width, eps=1e-6)
        self.norm_context = nn.LayerNorm(width, eps=1e-6)
        self.cross_attn = CrossAttention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, x: Residual, context: Tensor) -> Residual:  # context: [B, M, D]
        stream, normed = x.add_and_norm(self.norm1)
        stream, normed = Residual(stream, self.attn(normed)).add_and_norm(self.norm_cross)
        stream, normed = Residual(stream, self.cross_attn(normed, self.norm_context(context))).add_and_norm(self.norm2)
        return Residual(stream, self.mlp(normed))


class Decoder(nn.Module):
    """Predicts one vector for each cell of region B."""

    positions: Tensor

    def __init__(self, config: DecoderConfig, context_width: int, out_width: int, grid: tuple[int, int]) -> None:
        super().__init__()
        width = config.width
        self.config, self.grid = config, grid
        self.embed = nn.Linear(context_width, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.register_buffer("positions", sin_cos_positions(grid, width), persistent=False)
        if config.form != "mae" and config.codes == "relative":
            self.code = nn.Linear(2 * width, width)
        make = CrossBlock if config.form == "cross" else Block
        self.blocks = Blocks(make(width, config.num_heads, config.mlp_ratio) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, out_width)

    def _queries(self, boxes: Tensor, flips: Tensor) -> Tensor:  # -> [B, L, D]
        if self.config.codes == "own":
            return (self.mask_token + self.positions).expand(len(boxes), -1, -1)
        return region_queries(boxes, flips, self.grid, self.mask_token, self.code.weight, self.code.bias)

    def forward(self, context: Tensor, visible: Tensor, boxes: Tensor, flips: Tensor) -> Tensor:
        """context: [B, 1 + V, E], the encoder's class and visible tokens. visible: int [B, V], their places on A's grid. boxes: int [B, 2, 4] and
        flips: bool [B, 2] of A and B. Returns [B, L, out_width], cells of B in row-major order."""
        context = self.embed(context)
        if self.config.form == "cross":
            x = self.blocks.run(Residual(self._queries(boxes, flips)), context)
        elif self.config.form == "joint":
            x = self.blocks.run(Residual(join_tokens(context, visible, self.positions, self._queries(boxes, flips))))
        else:
            x = self.blocks.run(Residual(assemble_tokens(context, visible, self.mask_token, self.positions)))
        return self.head(x.add_and_norm(self.norm).normed[:, -len(self.positions) :])
