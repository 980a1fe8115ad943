"""Collapse monitors: numbers that show whether the teacher's features still tell tokens and images apart, and what a
loss is worth.

A layer norm on each token does not keep all tokens from becoming the same; these do show it. All are plain torch on
tokens [B, L, D] or patches [B, L, P], meant for every hundred steps or so (the rank needs a singular value
decomposition).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CollapseMonitors:
    """Zero-dimensional float32 tensors on the tokens' device. With collapsed (all equal) tokens: std 0, cosine 1, rank
    1, mean_token_loss 0.
    """

    std: Tensor
    cosine: Tensor
    rank: Tensor
    mean_token_loss: Tensor


@torch.no_grad()
def collapse_monitors(tokens: Tensor, max_tokens: int = 1024) -> CollapseMonitors:  # [B, L, D]
    """All monitors of teacher tokens, layer-normalised here without scale and shift, as the feature loss takes them.

    tokens: float [B, L, D] of any dtype. max_tokens: how many of the B * L tokens are looked at (a fixed choice, spread
    evenly over images and places). Raises ValueError unless tokens have three axes and there are at least two tokens.

    std is the standard deviation over tokens, mean over channels (1 for tokens that share nothing); cosine, rank and
    mean_token_loss are as in `mean_cosine`, `effective_rank` and `mean_token_loss`.
    """
    if tokens.ndim != 3 or tokens.shape[0] * tokens.shape[1] < 2:
        raise ValueError(f"tokens have shape {list(tokens.shape)}; expected [B, L, D] with at least two tokens")
    chosen = spread_tokens(tokens, max_tokens).float()
    normalised = torch.nn.functional.layer_norm(chosen, chosen.shape[-1:], eps=1e-6)
    return CollapseMonitors(
        std=normalised.std(dim=0, correction=0).mean(),
        cosine=mean_cosine(normalised),
        rank=effective_rank(normalised),
        mean_token_loss=mean_token_loss(normalised[None]),
    )


def spread_tokens(tokens: Tensor, max_tokens: int) -> Tensor:  # [B, L, D] -> [min(B * L, max_tokens), D]
    """At most `max_tokens` different tokens, always the same ones for a shape, spread over images and places.

    Token number i is i * stride modulo B * L, with the stride near the golden section and coprime to B * L: an even
    stride would pick the same column of every image.
    """
    flat = tokens.reshape(-1, tokens.shape[-1])
    total = flat.shape[0]
    if total <= max_tokens:
        return flat
    stride = int(total * (math.sqrt(5) - 1) / 2)
    while math.gcd(stride, total) != 1:
        stride -= 1
    return flat[torch.arange(max_tokens, device=tokens.device) * stride % total]


def mean_cosine(tokens: Tensor) -> Tensor:  # [N, D] -> []
    """Mean cosine over all pairs of different tokens: (|sum of unit vectors|^2 - N) / (N (N - 1)). Zero tokens count as
    cosine 0.
    """
    unit = torch.nn.functional.normalize(tokens, dim=1)
    num_tokens = unit.shape[0]
    return (unit.sum(dim=0).square().sum() - unit.square().sum()) / (num_tokens * (num_tokens - 1))


def effective_rank(tokens: Tensor) -> Tensor:  # [N, D] -> []
    """exp(-sum p_k ln p_k) with p_k = s_k / sum s, s the singular values of the token matrix, not centred.

    Between 1 (all tokens on one line) and min(N, D). Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007; used
    on features as RankMe by Garrido et al., ICML 2023. NaN for a matrix of zeros or one that is not finite.
    """
    # Of tokens that are not finite the decomposition would raise; the run has its own sentence for that.
    if not torch.isfinite(tokens).all():
        return torch.full((), math.nan, device=tokens.device)
    values = torch.linalg.svdvals(tokens)
    shares = values / values.sum()
    return torch.special.entr(shares).sum().exp()


@torch.no_grad()
def mean_token_loss(targets: Tensor, where: Tensor | None = None) -> Tensor:  # [B, L, D], [B, L] bool -> []
    """The squared error of the best constant prediction, one vector for all tokens: the variance of each channel, mean
    over channels.

    targets: float [B, L, D], features or patches in the form that the loss takes. where: bool [B, L], only these tokens
    count (default all). A loss above this has learned nothing about where and whose a token is. Returns float32; NaN if
    no token counts.
    """
    chosen = targets.flatten(0, 1).float() if where is None else targets[where].float()
    if chosen.shape[0] == 0:
        return torch.full((), math.nan, device=targets.device)
    return chosen.var(dim=0, correction=0).mean()
