"""Our transformer blocks as other code calls them: a tensor in, a tensor out, stochastic depth and attention chosen by themselves."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from personmae.models.attention import Attention, AttentionChoice, AttentionKind, choose_attention, set_attention
from personmae.models.vit import Block, Residual


class ChosenAttention(Attention):
    """Self-attention in the implementation that is best where its input lies; chosen at the first call, and again on another device or dtype."""

    def __init__(self, width: int, num_heads: int, asked: AttentionKind = "auto") -> None:
        super().__init__(width, num_heads)
        self.asked: AttentionKind = asked
        self.chosen_for: tuple[torch.device, torch.dtype] | None = None

    def forward(self, x: Tensor) -> Tensor:  # [B, N, D] -> [B, N, D]
        kind = x.device.type
        place = x.device, torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        if place != self.chosen_for:
            set_attention(self, _announced_choice(self.asked, *place))
            self.chosen_for = place
        return super().forward(x)


@functools.cache
def _announced_choice(asked: AttentionKind, device: torch.device, dtype: torch.dtype) -> AttentionChoice:
    """The choice, told once for each device and dtype."""
    choice = choose_attention(asked, device, "bf16" if dtype in (torch.bfloat16, torch.float16) else "fp32")
    print(f"personmae: attention {choice.kind} on {device} in {str(dtype).removeprefix('torch.')} ({choice.reason})")
    return choice


class PlainBlock(Block):
    """A `Block` that is given a tensor and gives one, as in `for block in blocks: x = block(x)`; given a `Residual` it gives one, and two passes over
    the stream are saved. In training mode it drops its branches for each sample with its own rate, drawn by torch's generator, as timm does."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, drop_rate: float = 0.0, attention: AttentionKind = "auto") -> None:
        super().__init__(width, num_heads, mlp_ratio)
        self.attn = ChosenAttention(width, num_heads, attention)
        self.drop_rate = drop_rate

    def forward(self, x: Any, drop_path: Tensor | None = None) -> Any:
        """Tensor [B, N, D] -> Tensor [B, N, D], or Residual -> Residual. drop_path: see `Block`; None to draw it here."""
        stream = x if isinstance(x, Tensor) else x.stream
        if drop_path is None and self.training and self.drop_rate > 0:
            kept = 1.0 - self.drop_rate
            drop_path = torch.empty(2, len(stream), device=stream.device).bernoulli_(kept).div_(kept)
        if isinstance(x, Tensor):
            return super().forward(Residual(x), drop_path).add()
        return super().forward(x, drop_path)
