"""The memory of Cluster Contrast: one unit vector for each cluster, which features are told apart by (Dai et al., "Cluster Contrast for Unsupervised
Person Re-Identification", ACCV 2022).

    loss     cross-entropy over the cosines of a feature and all vectors, divided by the temperature
    update   after the step, each batch sample in its order: vector <- momentum * vector + (1 - momentum) * feature, to unit length
             hard   with the batch sample of the cluster alone that is least like its vector
             mean   with the mean of the cluster's batch samples, once

The usual code updates in a Python loop, sample by sample. Here all clusters move at once, the first sample of each, then the second of each, and so
on: the same result, in as many operations as a cluster has samples in the batch.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from personmae.configs import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """How features are compared with the memory, and how it follows them."""

    temperature: float = 0.05
    momentum: float = 0.1  # share of the old vector that is kept
    update: Literal["all", "hard", "mean"] = "all"

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise UserError(f"memory.temperature is {self.temperature}; it must be more than 0")
        if not 0 <= self.momentum < 1:
            raise UserError(f"memory.momentum is {self.momentum}; it is the share of the old vector that is kept, from 0 to below 1")


def cluster_means(features: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> Tensor:
    """The mean of each cluster's features, to unit length: float32 [num_clusters, D], on the CPU. features: float32 [N, D]. labels: int64 [N], -1 for
    an outlier, which counts nowhere; each cluster from 0 on has one at least."""
    kept = torch.from_numpy(labels >= 0)
    own = torch.from_numpy(labels)[kept]
    rows = torch.from_numpy(features)[kept].double()
    sums = torch.zeros(int(own.max()) + 1, rows.shape[1], dtype=torch.float64).index_add_(0, own, rows)
    means = sums / torch.bincount(own)[:, None]
    return F.normalize(means, dim=1).float()


class ClusterMemory(nn.Module):
    """The vectors, a buffer float32 [num_clusters, D]."""

    vectors: Tensor

    def __init__(self, vectors: Tensor, config: MemoryConfig) -> None:
        """vectors: float32 [num_clusters, D] of unit length, which are copied."""
        super().__init__()
        self.config = config
        self.register_buffer("vectors", vectors.detach().clone())

    def forward(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss [] and the share of samples whose own cluster is the nearest [], float32. features: float [B, D] of unit length. labels: int64
        [B], clusters. In float32 also under autocast; no gradient reaches the memory."""
        with torch.autocast(features.device.type, enabled=False):
            logits = features.float() @ self.vectors.t() / self.config.temperature
            return F.cross_entropy(logits, labels), (logits.detach().argmax(1) == labels).float().mean()

    @torch.no_grad()
    def update(self, features: Tensor, labels: npt.NDArray[np.int64]) -> None:
        """Follow a batch, after its loss. features: float [B, D] of unit length, on the device. labels: int64 [B], on the host: nothing is read back.

        Raises ValueError for a label that is no cluster.
        """
        if labels.size and not 0 <= labels.min() <= labels.max() < len(self.vectors):
            raise ValueError(f"labels run from {labels.min()} to {labels.max()}; there are {len(self.vectors)} clusters, and outliers do not count")
        features = features.detach().float()
        order = np.argsort(labels, kind="stable")
        clusters, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
        if self.config.update == "all":
            for place in range(int(counts.max(initial=0))):
                has = counts > place
                self._move(clusters[has], features[self._there(order[starts[has] + place])])
            return
        # [clusters, most of one], rows of the batch; who has fewer repeats the last.
        places = np.minimum(np.arange(counts.max(initial=1))[None], counts[:, None] - 1)
        rows = features[self._there(order[starts[:, None] + places])]  # [C, K, D]
        own = self._there(clusters)
        if self.config.update == "hard":
            least = (rows @ self.vectors[own][..., None])[..., 0].argmin(1)
            self._move(clusters, rows.gather(1, least[:, None, None].expand(-1, 1, rows.shape[2]))[:, 0])
        else:
            mask = self._there(np.arange(counts.max(initial=1))[None] < counts[:, None])
            means = torch.where(mask[..., None], rows, 0.0).sum(1) / mask.sum(1, keepdim=True)
            self._move(clusters, means)

    def _move(self, clusters: npt.NDArray[np.int64], features: Tensor) -> None:
        own = self._there(clusters)
        moved = self.config.momentum * self.vectors[own] + (1.0 - self.config.momentum) * features
        self.vectors[own] = F.normalize(moved, dim=1)

    def _there(self, values: npt.NDArray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.vectors.device, non_blocking=True)
