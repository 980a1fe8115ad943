"""The oracle of the re-ranking tests: k-reciprocal encoding on full matrices in float64, image by image with sets, from the definitions in words."""

from __future__ import annotations

import numpy as np


def dense_distances(features: np.ndarray, metric: str = "cosine") -> np.ndarray:
    """[N, N]: 1 - cos (1 with a zero vector), or squared Euclidean; of the float32 vectors, rounded to float32 at the end."""
    rows = np.asarray(features, np.float64)
    zero = np.zeros(len(rows), bool)
    if metric == "cosine":
        norms = np.sqrt((rows**2).sum(axis=1))
        zero = norms == 0
        rows = rows / np.where(zero, 1, norms)[:, None]
    rows = rows.astype(np.float32).astype(np.float64)
    squared = np.stack([((rows - row) ** 2).sum(axis=1) for row in rows])
    if metric == "cosine":
        squared = np.where(zero[:, None] | zero[None, :], 1, squared / 2)
    return squared.astype(np.float32).astype(np.float64)


def dense_vectors(distance: np.ndarray, k1: int, k2: int, definition: str, *, metric: str = "cosine", resquare: bool = False) -> np.ndarray:
    """V [N, N] after query expansion."""
    num = len(distance)
    order = np.argsort(distance, axis=1, kind="stable")
    if definition == "classic":
        num_near, farness = k1 + 1, normalised(distance, resquare)
    else:
        num_near, farness = k1, 2 * distance if metric == "cosine" else distance
    num_half = min(int(np.around(k1 / 2)) + 1, num_near)
    near = [row[:num_near].tolist() for row in order]
    nearer = [row[:num_half].tolist() for row in order]
    reciprocal = [{j for j in near[i] if i in near[j]} for i in range(num)]
    half = [{j for j in nearer[i] if i in nearer[j]} for i in range(num)]
    vectors = np.zeros((num, num))
    for i in range(num):
        wide = set(reciprocal[i])
        for j in reciprocal[i]:
            if len(half[j] & reciprocal[i]) > 2 / 3 * len(half[j]):
                wide |= half[j]
        members = sorted(wide)
        weights = np.exp(-farness[i, members])
        vectors[i, members] = weights / weights.sum()
    return np.stack([vectors[row[: min(k2, num_near)]].mean(axis=0) for row in order])


def normalised(distance: np.ndarray, resquare: bool = False) -> np.ndarray:
    """Each row divided by its largest; of rows that are all zero, zero."""
    largest = distance.max(axis=1, keepdims=True)
    quotient = distance / np.where(largest == 0, 1, largest)
    return quotient**2 if resquare else quotient


def dense_jaccard(vectors: np.ndarray) -> np.ndarray:
    """[N, N]: 1 - S / (2 - S), not below 0."""
    sums = np.stack([np.minimum(row, vectors).sum(axis=1) for row in vectors])
    return np.maximum(0, 1 - sums / (2 - sums))


def dense_reranked(
    query: np.ndarray, gallery: np.ndarray, k1: int, k2: int, weight: float, definition: str, metric: str, resquare: bool = False
) -> np.ndarray:
    """[Q, G], the final distances."""
    distance = dense_distances(np.concatenate([query, gallery]), metric)
    jaccard = dense_jaccard(dense_vectors(distance, k1, k2, definition, metric=metric, resquare=resquare))
    original = normalised(distance, resquare) if definition == "classic" else distance
    return ((1 - weight) * jaccard + weight * original)[: len(query), len(query) :]
