"""PCA whitening of features, fitted on images without labels.

The features of a network that was never told who is who lie mostly along a few directions (light, background);
whitening gives each direction the same say before cosine similarity is taken (Jégou & Chum, "Negative evidences and
co-occurrences in image retrieval", ECCV 2012).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Whitening:
    """mean [D]; components [K, D] in rows, strongest first; eigenvalues [K] of the covariance; floor added to each.

    All float64.
    """

    mean: FloatArray
    components: FloatArray
    eigenvalues: FloatArray
    floor: float

    def apply(self, features: npt.ArrayLike) -> FloatArray:  # [N, D] -> [N, K]
        """Whitened features, float64. Raises ValueError if the features have another number of dimensions."""
        array = np.asarray(features, np.float64)
        if array.ndim != 2 or array.shape[1] != len(self.mean):
            raise ValueError(
                f"features have shape {array.shape}; this whitening was fitted on {len(self.mean)} dimensions"
            )
        scale = np.sqrt(self.eigenvalues + self.floor)
        # Features that do not vary at all stay at zero.
        return (array - self.mean) @ self.components.T / np.where(scale == 0, 1, scale)


def fit_whitening(
    features: npt.ArrayLike, *, num_components: int | None = None, regularisation: float = 1e-3
) -> Whitening:
    """Whitening fitted on features [N, D] in float64; the same features give the same whitening on one machine.

    num_components: the strongest directions to keep; all by default. regularisation: as a share of the mean eigenvalue,
    added to each eigenvalue, so that directions in which there is only noise (or, with N <= D, nothing) are not blown
    up.

    Raises ValueError for fewer than two rows, values that are not finite (naming the row), and a number of components
    not in 1..D.
    """
    array = np.asarray(features, np.float64)
    if array.ndim != 2 or array.shape[0] < 2 or array.shape[1] < 1:
        raise ValueError(f"features have shape {array.shape}; whitening is fitted on [N, D] with at least 2 rows")
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if len(bad):
        raise ValueError(f"features for whitening: row {bad[0]} is not finite ({len(bad)} such rows of {len(array)})")
    num_dimensions = array.shape[1]
    num_kept = num_dimensions if num_components is None else num_components
    if not 1 <= num_kept <= num_dimensions:
        raise ValueError(f"num_components is {num_components}; 1 to {num_dimensions} are possible")
    if regularisation < 0:
        raise ValueError(f"regularisation is {regularisation}; it cannot be negative")
    mean = array.mean(axis=0)
    centred = array - mean
    eigenvalues, vectors = np.linalg.eigh(centred.T @ centred / (len(array) - 1))
    eigenvalues, components = np.maximum(eigenvalues[::-1], 0), vectors.T[::-1]
    # What rounding alone leaves of a direction without variance is no variance.
    eigenvalues = np.where(eigenvalues <= 1e-20 * (array**2).mean(), 0, eigenvalues)
    # The sign of an eigenvector is a matter of the library; the largest entry is made positive.
    largest = np.abs(components).argmax(axis=1)
    signs = np.where(components[np.arange(num_dimensions), largest] < 0, -1.0, 1.0)
    components = components * signs[:, None]
    return Whitening(mean, components[:num_kept], eigenvalues[:num_kept], float(regularisation * eigenvalues.mean()))


def whitened(
    query: Mapping[str, npt.ArrayLike], gallery: Mapping[str, npt.ArrayLike], unlabelled: Mapping[str, npt.ArrayLike]
) -> tuple[dict[str, FloatArray], dict[str, FloatArray]]:
    """Query and gallery features by name, whitened with what was fitted on the unlabelled features of that name."""
    fitted = {name: fit_whitening(unlabelled[name]) for name in query}
    white_query = {name: fitted[name].apply(query[name]) for name in query}
    white_gallery = {name: fitted[name].apply(gallery[name]) for name in query}
    return white_query, white_gallery
