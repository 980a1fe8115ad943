"""Features and ids as other code bases hand them over, checked and made into arrays; what is wrong is named with its row and the cure."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from personmae.data.records import GALLERY_CAMERA, JUNK_PERSON, QUERY_CAMERA
from personmae.data.reid import ReidSet
from personmae.evaluation.ranking import IntArray, Labels, labels_of

Junk = Literal["refuse", "drop"]



def feature_tensor(part: str, features: Any) -> Tensor:
    """Features as a float32 or float64 tensor [N, D], from numpy, lists, or torch, which stays on its device. Nothing is copied that need not be.

    Smaller types become float32 where that is exact, else float64. part: "query" or "gallery", for messages. Raises ValueError or TypeError for
    another shape, no image, no dimension, values that are no real numbers or not finite (the rows are named).
    """
    if not isinstance(features, Tensor):
        try:
            array = np.asarray(features)
        except ValueError as error:
            raise ValueError(f"{part} features are no array: {error}") from error
        if array.dtype.kind not in "fiu":
            raise TypeError(f"{part} features have dtype {array.dtype}; real numbers are wanted")
        array = np.ascontiguousarray(array, np.float32 if np.can_cast(array.dtype, np.float32) else np.float64)
        with warnings.catch_warnings():
            # An array that must not be written to is fine here: nothing writes.
            warnings.simplefilter("ignore", UserWarning)
            features = torch.from_numpy(array)
    if features.layout != torch.strided:
        raise TypeError(f"{part} features are a tensor of layout {features.layout}; a dense one is wanted: call .to_dense()")
    if features.is_complex() or features.dtype == torch.bool:
        raise TypeError(f"{part} features have dtype {features.dtype}; real numbers are wanted")
    small = features.dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int16, torch.int8, torch.uint8)
    tensor = features.detach().to(torch.float32 if small else torch.float64).contiguous()
    if tensor.ndim != 2:
        raise ValueError(f"{part} features have shape {tuple(tensor.shape)}; [N, D] is wanted: one row for each image")
    if len(tensor) == 0:
        raise ValueError(f"the {part} is empty: features of at least one image are wanted")
    if tensor.shape[1] == 0:
        raise ValueError(f"{part} features have no dimension: shape {tuple(tensor.shape)}")
    # The sum is finite only if all values are; only where it is not, which may be by overflow, are they looked at.
    if not torch.isfinite(tensor.sum(dim=1)).all():
        bad = (~torch.isfinite(tensor).all(dim=1)).nonzero()[:, 0].tolist()
        if bad:
            raise ValueError(f"{part} features hold NaN or infinity in {len(bad)} of {len(tensor)} rows: {_listed(bad)}")
    return tensor


def id_array(what: str, ids: Any, num_images: int) -> IntArray:
    """Ids as int64 [N], from numpy, torch or lists; a row or column [1, N], [N, 1], as Matlab files have them, is taken too.

    Whole numbers held as floating point are taken where none can have been rounded. what: "query people", for messages. Raises ValueError or
    TypeError for another length, strings, truth values, fractions, NaN and numbers beyond 63 bits.
    """
    if isinstance(ids, Tensor):
        ids = ids.detach().cpu().numpy()
    array = np.asarray(ids)
    if array.ndim == 2 and 1 in array.shape:
        array = array.reshape(-1)
    if array.ndim != 1 or len(array) != num_images:
        raise ValueError(f"{what}: shape {array.shape}, but there are features of {num_images} images; one number for each is wanted")
    if array.dtype.kind == "f":
        # Beyond this neighbouring whole numbers are no longer told apart.
        limit = 2.0 ** (np.finfo(array.dtype).nmant + 1)
        bad = np.flatnonzero(~(np.abs(array) < limit) | (array != np.round(array)))
        if len(bad):
            raise ValueError(f"{what}: {array[bad[0]]} in row {bad[0]} is no whole number that {array.dtype} can hold; give integers")
    elif array.dtype.kind == "u":
        bad = np.flatnonzero(array > np.iinfo(np.int64).max)
        if len(bad):
            raise ValueError(f"{what}: {array[bad[0]]} in row {bad[0]} is beyond 63 bits; number them with numpy.unique(ids, return_inverse=True)")
    elif array.dtype.kind == "O":
        raise TypeError(f"{what}: no array of 64-bit integers; number them with numpy.unique(ids, return_inverse=True)")
    elif array.dtype.kind != "i":
        raise TypeError(f"{what} have dtype {array.dtype}; integers are wanted: number them with numpy.unique(ids, return_inverse=True)")
    return array.astype(np.int64)


def labels_from(
    query_people: Any, gallery_people: Any, query_cameras: Any, gallery_cameras: Any, num_images: tuple[int, int], junk: Junk = "refuse"
) -> tuple[Labels, Labels, npt.NDArray[np.bool_]]:
    """Labels of query and gallery, and which gallery images [G] they are of: all but junk (person -1), whose features are to be dropped as well.

    Cameras None, both of them: the set has none, and no image is left out. Raises ValueError for junk that is not to be dropped, junk among the
    queries, other negative people, a gallery of junk only, and cameras of one part only.
    """
    if junk not in ("refuse", "drop"):
        raise ValueError(f"junk is {junk!r}; allowed: refuse, drop")
    people = id_array("query people", query_people, num_images[0]), id_array("gallery people", gallery_people, num_images[1])
    if (query_cameras is None) != (gallery_cameras is None):
        raise ValueError("cameras are given of one part only; give both, or neither for a set without cameras")
    if query_cameras is None:
        cameras = np.full(num_images[0], QUERY_CAMERA, np.int64), np.full(num_images[1], GALLERY_CAMERA, np.int64)
    else:
        cameras = id_array("query cameras", query_cameras, num_images[0]), id_array("gallery cameras", gallery_cameras, num_images[1])
    for part, ids, lowest in (("query", people[0], 0), ("gallery", people[1], JUNK_PERSON)):
        bad = np.flatnonzero(ids < lowest)
        if len(bad):
            advice = "a query cannot be junk: leave it out" if ids[bad[0]] == JUNK_PERSON else "people are numbered from 0; -1 is junk"
            raise ValueError(f"{part} image {bad[0]} is of person {ids[bad[0]]} ({len(bad)} such images): {advice}")
    kept = people[1] != JUNK_PERSON
    num_junk = int((~kept).sum())
    if num_junk and junk == "refuse":
        raise ValueError(
            f"{num_junk} gallery images are of person -1, first image {int(np.flatnonzero(~kept)[0])}: in Market-1501 these are junk, which "
            "is not ranked. Drop them from the gallery, or say junk='drop'"
        )
    if not kept.any():
        raise ValueError(f"all {num_junk} gallery images are junk (person -1)")
    return Labels(people[0], cameras[0]), Labels(people[1][kept], cameras[1][kept]), kept


def labels_of_set(reid_set: ReidSet) -> tuple[Labels, Labels]:
    """Labels of query and gallery; of a set that has no cameras as if all queries were from one and the whole gallery from another, so that nothing
    is left out."""
    query, gallery = labels_of(reid_set.query), labels_of(reid_set.gallery)
    return (query, gallery) if reid_set.has_cameras else without_cameras(query, gallery)


def without_cameras(query: Labels, gallery: Labels) -> tuple[Labels, Labels]:
    """The labels of a set that has no cameras: all queries from one, the whole gallery from another, so that nothing is left out."""
    return (
        Labels(query.people, np.full(len(query), QUERY_CAMERA, np.int64)),
        Labels(gallery.people, np.full(len(gallery), GALLERY_CAMERA, np.int64)),
    )


def count_zero_rows(features: Tensor) -> int:
    """How many features have length zero: without a direction, at cosine distance 1 from everything."""
    return int((~features.any(dim=1)).sum())


def _listed(rows: Sequence[int], at_most: int = 5) -> str:
    return ", ".join(str(row) for row in rows[:at_most]) + (", ..." if len(rows) > at_most else "")
