"""What the sparse Jaccard distance is measured against: the same on full matrices, image by image, as clustering and re-ranking codes have it.

Peak memory is that of three N x N float32 matrices, as there. Neighbours come from a flat index of faiss, or from torch where it is missing.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


def dense_labels(features: FloatArray, k1: int, k2: int, eps: float, min_samples: int) -> IntArray:
    """Pseudo-labels of unit features [N, D]: the full Jaccard matrix, then scikit-learn's DBSCAN on it."""
    from sklearn.cluster import DBSCAN

    jaccard = dense_jaccard(features, k1, k2)
    return DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed", n_jobs=-1).fit_predict(jaccard)


def dense_jaccard(features: FloatArray, k1: int, k2: int) -> FloatArray:
    """Jaccard distances [N, N] of unit features [N, D], by the definition `fast-reid` of personmae.evaluation.reciprocal."""
    num = len(features)
    ranks = nearest(features, k1)
    tensor = torch.from_numpy(features)
    near = [mutual(ranks, i, k1) for i in range(num)]
    nearer = [mutual(ranks, i, min(k1, int(np.around(k1 / 2)) + 1)) for i in range(num)]
    weights = np.zeros((num, num), np.float32)
    for i in range(num):
        parts = [near[i]]
        for j in near[i]:
            if len(np.intersect1d(nearer[j], near[i])) > 2 / 3 * len(nearer[j]):
                parts.append(nearer[j])
        members = np.unique(np.concatenate(parts))
        squared = 2 - 2 * (tensor[i : i + 1] @ tensor[members].T)
        weights[i, members] = torch.softmax(-squared, dim=1)[0].numpy()
    if k2 > 1:
        expanded = np.zeros_like(weights)
        for i in range(num):
            expanded[i] = weights[ranks[i, :k2]].mean(axis=0)
        weights = expanded
        del expanded
    holders = [np.flatnonzero(weights[:, column]) for column in range(num)]
    jaccard = np.zeros((num, num), np.float32)
    for i in range(num):
        shared = np.zeros(num, np.float32)
        for column in np.flatnonzero(weights[i]):
            rows = holders[column]
            shared[rows] += np.minimum(weights[i, column], weights[rows, column])
        jaccard[i] = 1 - shared / (2 - shared)
    np.maximum(jaccard, 0, out=jaccard)
    return jaccard


def mutual(ranks: IntArray, i: int, count: int) -> IntArray:
    """Those of the first `count` neighbours of image i that have it among theirs."""
    found = ranks[i, :count]
    return found[(ranks[found, :count] == i).any(axis=1)]


def nearest(features: FloatArray, k: int) -> IntArray:  # [N, D] -> [N, k]
    try:
        import faiss
    except ImportError:
        tensor = torch.from_numpy(features)
        return np.concatenate([(part @ tensor.T).topk(k).indices.numpy() for part in tensor.split(1024)])
    index = faiss.IndexFlatL2(features.shape[1])
    index.add(features)
    return index.search(features, k)[1]
