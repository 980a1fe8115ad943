"""Stochastic depth (Huang et al., "Deep Networks with Stochastic Depth", 2016): which branches of which samples a training step drops.

    sample   each sample draws for each branch whether it is dropped; the branch is computed all the same and multiplied by 0, or by 1 / share kept
    subset   each branch is computed on a fixed share of the batch only and scaled by B / K, which saves its time (Oquab et al., DINOv2, 2023)

The model draws nothing itself: it is given the draws, which are a pure function of seed, epoch and sample, so that a run is the same on any number of
processes and after a restart. A subset is drawn among the samples of one process, so there the number of processes does tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from personmae_kernels.sample_random import Stream, draws, sample_seeds, uniforms

DropPathKind = Literal["sample", "subset"]


def drop_rates(rate: float, depth: int, num_parts: int = 0, kind: DropPathKind = "sample") -> list[float]:
    """The rate of each branch: two for each block, then two for each run of the part block, which are the last block's.

    sample: from 0 at the first block linearly to `rate` at the last (timm, TransReID). subset: `rate` everywhere (DINOv2's uniform rates), so that
    all blocks have one size and compile once; half the rate drops as much.
    """
    last = 0.0 if depth == 1 and kind == "sample" else rate
    blocks = [rate if kind == "subset" else rate * number / max(1, depth - 1) for number in range(depth)]
    return [own for own in [*blocks, *[last] * num_parts] for _ in range(2)]


def draw_factors(rates: Sequence[float], seed: int, epoch: int, samples: npt.ArrayLike) -> Tensor:
    """Factors of branches, for kind sample: float32 [len(rates), B] on the CPU, 0 with the branch's rate, else 1 / (1 - rate).

    samples: int [B], numbers that are different within an epoch, such as places in its order: an image that comes twice then draws twice.
    """
    words = draws(sample_seeds(seed, epoch, samples, Stream.DROP_PATH), len(rates))
    kept = 1.0 - np.asarray(rates)
    return torch.from_numpy(np.where(uniforms(words) < kept, 1.0 / kept, 0.0).T.astype(np.float32))


def draw_subsets(rate: float, num_branches: int, seed: int, epoch: int, samples: npt.ArrayLike) -> Tensor:
    """Samples whose branch is computed, for kind subset: int64 [num_branches, K] on the CPU, ascending places in the batch, K = B * (1 - rate)
    rounded down, at least 1. samples: as in `draw_factors`, of the batch of this process."""
    words = draws(sample_seeds(seed, epoch, samples, Stream.DROP_PATH), num_branches).T
    num_kept = max(1, int(words.shape[1] * (1.0 - rate) + 1e-9))
    order = np.argsort(words, axis=1, kind="stable")[:, :num_kept]
    return torch.from_numpy(np.sort(order, axis=1).astype(np.int64))
