"""DBSCAN on sparse Jaccard distances: pseudo-labels for images without labels, the same as scikit-learn finds on the dense matrix.

The only file that imports scikit-learn. One graph up to the largest eps serves for all smaller ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array, csr_array

# Farther than any Jaccard distance.
_APART = 2.0


@dataclass(frozen=True)
class Clusters:
    """labels int64 [N]: the cluster of each image from 0 on, -1 for an outlier, numbered as scikit-learn does, by their first core image."""

    labels: npt.NDArray[np.int64]
    eps: float
    min_samples: int

    @property
    def num_clusters(self) -> int:
        """Clusters, outliers not counted."""
        return int(self.labels.max(initial=-1)) + 1

    @property
    def num_outliers(self) -> int:
        """Images in no cluster."""
        return int((self.labels < 0).sum())

    def __str__(self) -> str:
        return f"eps {self.eps:g}: {self.num_clusters:,} clusters, {self.num_outliers:,} of {len(self.labels):,} images outliers"


def cluster(distances: csr_array, *, eps: float, min_samples: int = 4) -> Clusters:
    """DBSCAN (Ester et al., KDD 1996) on the pairs [N, N] of `jaccard_distances`, whose cut has to be eps at least.

    min_samples: images within eps that make a core, itself among them. Raises ValueError for an eps that is not positive or a min_samples below 1.
    """
    return cluster_each(distances, [eps], min_samples=min_samples)[0]


def cluster_each(distances: csr_array, eps: Sequence[float], *, min_samples: int = 4) -> list[Clusters]:
    """`cluster` at several eps, on one graph whose cut is the largest of them at least."""
    from sklearn.cluster import DBSCAN
    from sklearn.neighbors import sort_graph_by_row_values

    if distances.ndim != 2 or distances.shape[0] != distances.shape[1] or distances.shape[0] == 0:
        raise ValueError(f"distances have shape {distances.shape}; [N, N] of at least one image is wanted")
    if min_samples < 1:
        raise ValueError(f"min_samples is {min_samples}; at least 1 is wanted")
    for value in eps:
        if not value > 0:
            raise ValueError(f"eps is {value}; more than 0 is wanted")
    graph = sort_graph_by_row_values(_with_diagonal(distances), copy=True, warn_when_not_sorted=False)
    found = []
    for value in eps:
        with warnings.catch_warnings():
            # What scikit-learn says of the diagonal that it rewrites.
            warnings.filterwarnings("ignore", category=UserWarning, module="sklearn")
            labels = DBSCAN(eps=value, min_samples=min_samples, metric="precomputed").fit(graph).labels_
        found.append(Clusters(labels.astype(np.int64), float(value), min_samples))
    return found


def agreement(labels: npt.NDArray[np.int64], people: npt.NDArray[np.int64]) -> tuple[float, float]:
    """Normalised mutual information (arithmetic mean) and adjusted Rand index of two labellings, int64 [N] each."""
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    return float(normalized_mutual_info_score(people, labels)), float(adjusted_rand_score(people, labels))


def _with_diagonal(distances: csr_array) -> csr_array:
    """Every diagonal entry stored: scikit-learn takes one that is missing for a 0, and here it is a distance beyond the cut."""
    row = np.repeat(np.arange(distances.shape[0]), np.diff(distances.indptr))
    missing = np.ones(distances.shape[0], np.bool_)
    missing[row[distances.indices == row]] = False
    if not missing.any():
        return distances
    (alone,) = np.nonzero(missing)
    data = np.concatenate([distances.data, np.full(len(alone), _APART, distances.dtype)])
    return coo_array((data, (np.concatenate([row, alone]), np.concatenate([distances.indices, alone]))), shape=distances.shape).tocsr()
