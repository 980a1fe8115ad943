"""Where an encoder looks: the attention of its blocks, computed again from their own weights, and maps over the patches made of it.

The fast attention never holds its probabilities, so they are computed beside it, in float32, from what each block's
attention layer is given while the encoder runs as always.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from personmae.models.attention import Attention
from personmae.models.vit import VisionTransformer

# rollout: through all blocks; last: the last block's alone.
MapKind = Literal["rollout", "last"]
# Whose attention: the class token's, or the mean over the patches, which is what the "mean" feature is made of.
MapToken = Literal["class", "mean"]


def attention_probabilities(layer: Attention, x: Tensor) -> Tensor:  # [B, N, D] -> [B, H, N, N]
    """softmax(q k^T / sqrt(d)) of an attention layer for its input, float32: row i says how much token i takes of each; rows sum to 1."""
    B, N, _ = x.shape
    with torch.autocast(x.device.type, enabled=False):
        qkv = nn.functional.linear(x.float(), layer.qkv.weight.float(), layer.qkv.bias.float())
        q, k, _ = qkv.view(B, N, 3, layer.num_heads, layer.head_size).permute(2, 0, 3, 1, 4)
        return (q @ k.transpose(2, 3) * layer.head_size**-0.5).softmax(dim=3)


def attention_layers(encoder: VisionTransformer) -> list[Attention]:
    """The self-attention of each block, first block first."""
    return [part for part in encoder.blocks.modules() if isinstance(part, Attention)]


@torch.no_grad()
def each_attention(encoder: VisionTransformer, images: Tensor, take: Callable[[int, Tensor], None]) -> None:
    """Run the encoder on whole images, uint8 [B, H, W, 3], and show `take` each block's number and attention [B, H, N, N], first block first.

    N: the class token and all patches. One block's attention is in memory at a time. Raises ValueError if the blocks do not
    run as they stand (an encoder that torch.compile has taken in whole).
    """
    seen: list[int] = []
    layers = attention_layers(encoder)

    def show(number: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def before(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert isinstance(layer, Attention)
            seen.append(number)
            with torch.autocast(inputs[0].device.type, enabled=False):
                take(number, attention_probabilities(layer, inputs[0]))

        return before

    handles = [layer.register_forward_pre_hook(show(number)) for number, layer in enumerate(layers)]
    try:
        encoder.encode(images)
    finally:
        for handle in handles:
            handle.remove()
    if seen != list(range(len(layers))):
        raise ValueError(f"of {len(layers)} blocks, those that showed their attention are {seen}; give an encoder that is not compiled")


def block_attentions(encoder: VisionTransformer, images: Tensor) -> Tensor:  # uint8 [B, H, W, 3] -> [depth, B, H, N, N]
    """The attention of every block and head, float32."""
    kept: list[Tensor] = []
    each_attention(encoder, images, lambda _, attention: kept.append(attention))
    return torch.stack(kept)


def roll_on(rolled: Tensor | None, attention: Tensor) -> Tensor:  # [B, N, N], [B, H, N, N] -> [B, N, N]
    """One step of attention rollout: (A + I) / 2 times what came before, A the mean over the heads; None before the first block.

    The identity stands for the residual connection, which carries a token on as it is (Abnar & Zuidema, "Quantifying
    attention flow in transformers", ACL 2020). Row i of the result says how much of each input token is in token i; rows sum to 1.
    """
    mean = attention.mean(dim=1)
    step = (mean + torch.eye(mean.shape[1], device=mean.device, dtype=mean.dtype)) / 2
    return step if rolled is None else step @ rolled


def attention_maps(encoder: VisionTransformer, images: Tensor, kind: MapKind = "rollout", token: MapToken = "class") -> Tensor:
    """Maps over the patches, [B, rows, columns] float32: the share that each patch has of what the token takes from patches; each sums to 1.

    images: uint8 [B, H, W, 3] of the encoder's size, on its device. Raises ValueError for a kind or token that is not known.
    """
    if kind not in ("rollout", "last") or token not in ("class", "mean"):
        raise ValueError(f"attention map {kind!r} of {token!r}; allowed: rollout or last, of class or mean")
    latest: Tensor | None = None

    def take(_: int, attention: Tensor) -> None:
        nonlocal latest
        latest = roll_on(latest, attention) if kind == "rollout" else attention.mean(dim=1)

    each_attention(encoder, images, take)
    assert latest is not None
    rows = latest[:, :1] if token == "class" else latest[:, 1:]
    shares = rows[:, :, 1:].mean(dim=1)
    return (shares / shares.sum(dim=1, keepdim=True)).view(len(images), *encoder.config.grid)
