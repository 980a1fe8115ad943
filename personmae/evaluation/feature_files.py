"""Features of any code base from a file: `.npz`, MATLAB's `.mat`, or a `.pt` of plain tensors; and ours written as `.npz`.

Our own keys, in an `.npz`:

    query_features, gallery_features    float [Q, D], [G, D]
    query_people, gallery_people        integers [Q], [G]; person -1 is junk
    query_cameras, gallery_cameras      integers, or neither
    query_paths, gallery_paths          text, where known

Other names in use are known too (`ALIASES`), layumi's pytorch_result.mat among them, and the form in which queries and
gallery stand one after the other (`JOINED`). No file is unpickled: what would need it is refused.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from personmae.configs import UserError
from personmae.data.records import GALLERY_CAMERA, JUNK_PERSON, QUERY_CAMERA
from personmae.evaluation.feature_containers import Variables, read_mat, read_npz, read_torch
from personmae.evaluation.inputs import id_array
from personmae.evaluation.ranking import Labels
from personmae.whole_files import whole_file

FloatArray = npt.NDArray[np.floating[Any]]
IntArray = npt.NDArray[np.int64]

SUFFIXES = (".npz", ".mat", ".pt", ".pth")


def _of_part(part: str, letter: str) -> dict[str, tuple[str, ...]]:
    features = (f"{part}_feature", f"{part}_feat", f"{part}_feats", f"{part}_f", f"{letter}f", f"{letter}_f", f"{letter}_feat", f"{letter}_feats")
    people = (f"{part}_label", f"{part}_labels", f"{part}_pid", f"{part}_pids", f"{part}_id", f"{part}_ids", f"{letter}_pids", f"{letter}_pid")
    cameras = (f"{part}_cam", f"{part}_cams", f"{part}_camera", f"{part}_camid", f"{part}_camids", f"{letter}_camids", f"{letter}_camid")
    paths = (f"{part}_path", f"{part}_names", f"{part}_files", f"{part}_img_paths", f"{letter}_paths")
    return {f"{part}_features": features, f"{part}_people": people, f"{part}_cameras": cameras, f"{part}_paths": paths}


# Our key -> the other names of the same thing. Case and hyphens make no difference.
ALIASES = {**_of_part("query", "q"), **_of_part("gallery", "g")}
# Queries first, then the gallery, and how many queries there are.
JOINED = {
    "features": ("feature", "feats", "feat", "f"),
    "people": ("labels", "label", "pids", "pid"),
    "cameras": ("cams", "cam", "camids", "camid"),
    "paths": ("img_paths", "names"),
    "num_query": ("num_queries",),
}


@dataclass(frozen=True)
class FeatureFile:
    """query_features [Q, D], gallery_features [G, D]: float32 or float64. query, gallery: who and from which camera.

    query_paths, gallery_paths: as written, where known. num_junk: images of person -1 that were left out. has_cameras:
    False where the file names none. notes: sentences on what had to be made of the file.
    """

    query_features: FloatArray
    gallery_features: FloatArray
    query: Labels
    gallery: Labels
    query_paths: list[str] | None = None
    gallery_paths: list[str] | None = None
    num_junk: int = 0
    has_cameras: bool = True
    notes: tuple[str, ...] = ()


def read_feature_file(path: Path) -> FeatureFile:
    """The features and labels of a `.npz`, `.mat`, `.pt` or `.pth`; see the top of this file for its keys.

    Features may lie transposed, labels as [1, N] or as whole numbers in floats. Raises UserError naming the file and
    the key for what is missing, named twice, of a wrong kind or length, not finite, or does not fit into memory.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path}: features are read from {', '.join(SUFFIXES)}, not {path.suffix or 'a file without a suffix'}")
    if not path.is_file():
        raise UserError(f"no such file of features: {path}")
    content = _Content(path, {".npz": read_npz, ".mat": read_mat}.get(path.suffix.lower(), read_torch)(path))
    joined = content.find("features", JOINED["features"]) is not None and content.find("query_features", ALIASES["query_features"]) is None
    query, gallery = _joined_parts(content) if joined else (_part(content, ALIASES, "query_"), _part(content, ALIASES, "gallery_"))
    return _assemble(path, query, gallery)


def write_feature_file(path: Path, features: FeatureFile) -> None:
    """Write a `.npz` with our own keys, whole or not at all. Raises UserError naming the file if it is no `.npz` or the disk refuses."""
    if path.suffix.lower() != ".npz":
        raise UserError(f"{path}: features are written as .npz; give such a name")
    columns: dict[str, Any] = {}
    for part in ("query", "gallery"):
        labels: Labels = getattr(features, part)
        columns[f"{part}_features"] = getattr(features, f"{part}_features")
        columns[f"{part}_people"] = labels.people
        if features.has_cameras:
            columns[f"{part}_cameras"] = labels.cameras
        paths = getattr(features, f"{part}_paths")
        if paths is not None:
            columns[f"{part}_paths"] = np.array(paths, np.str_)
    with whole_file(path) as file:
        np.savez(file, **columns)


@dataclass(frozen=True)
class _Content:
    """A file's variables, read when they are asked for."""

    path: Path
    variables: Variables

    def find(self, key: str, others: Sequence[str]) -> str | None:
        """The name under which the file has it. Raises UserError if it has two."""
        names = [name for name in self.variables if name.lower().replace("-", "_") in (key, *others)]
        if len(names) > 1:
            raise UserError(f"{self.path}: {' and '.join(names)} both mean {key}; leave one of them")
        return names[0] if names else None

    def need(self, key: str, others: Sequence[str]) -> str:
        name = self.find(key, others)
        if name is None:
            has = ", ".join(self.variables) or "nothing"
            raise UserError(f"{self.path} has no {key} (also known as {', '.join(others)}); it has {has}")
        return name


@dataclass(frozen=True)
class _Part:
    """Queries or gallery, before the two are fitted to each other."""

    name: str  # of the features in the file
    features: FloatArray  # two axes, either way round
    people: IntArray
    cameras: IntArray | None
    paths: list[str] | None

    @property
    def is_turned(self) -> bool:
        return self.features.shape[0] != len(self.people) and self.features.shape[1] == len(self.people)


def _part(content: _Content, names: dict[str, tuple[str, ...]], prefix: str = "") -> _Part:
    """One part, or both of a file where they are joined."""
    feature_name, label_name = (content.need(prefix + key, names[prefix + key]) for key in ("features", "people"))
    camera_name, path_name = (content.find(prefix + key, names[prefix + key]) for key in ("cameras", "paths"))
    people = _whole_numbers(content, label_name)
    cameras = _whole_numbers(content, camera_name) if camera_name else None
    paths = _texts(content, path_name) if path_name else None
    for name, column in ((camera_name, cameras), (path_name, paths)):
        if column is not None and len(column) != len(people):
            raise UserError(f"{content.path}: {label_name} has {len(people)} entries, {name} {len(column)}; one for each image is wanted")
    return _Part(feature_name, _matrix(content, feature_name), people, cameras, paths)


def _joined_parts(content: _Content) -> tuple[_Part, _Part]:
    both = _part(content, JOINED)
    name = content.need("num_query", JOINED["num_query"])
    counts = _whole_numbers(content, name)
    if len(counts) != 1 or not 1 <= counts[0] < len(both.people):
        raise UserError(f"{content.path}: {name} is {counts.tolist()}; one number from 1 to {len(both.people) - 1} is wanted")
    features = both.features.T if both.is_turned else both.features
    _check_length(content.path, both, features)

    def rows(chosen: slice) -> _Part:
        cameras = None if both.cameras is None else both.cameras[chosen]
        return _Part(both.name, features[chosen], both.people[chosen], cameras, both.paths[chosen] if both.paths else None)

    return rows(slice(0, int(counts[0]))), rows(slice(int(counts[0]), None))


def _assemble(path: Path, query: _Part, gallery: _Part) -> FeatureFile:
    if (query.cameras is None) != (gallery.cameras is None):
        lacking = "queries" if query.cameras is None else "gallery"
        raise UserError(f"{path}: there are no cameras of the {lacking}, but of the others; give those of both, or of neither")
    notes = []
    if query.cameras is None:
        notes.append("the file names no cameras: no gallery image is left out")
    kept = []
    for part, other, camera in ((query, gallery, QUERY_CAMERA), (gallery, query, GALLERY_CAMERA)):
        # As many images as dimensions fits both ways; the other part then says which.
        is_turned = part.is_turned or (part.features.shape[0] == part.features.shape[1] and other.is_turned)
        if is_turned:
            notes.append(f"{part.name} is transposed, {list(part.features.shape)} in the file")
        kept.append(_people_of(path, part, part.features.T if is_turned else part.features, camera))
    (query_features, query_labels, query_paths), (gallery_features, gallery_labels, gallery_paths) = kept
    if query_features.shape[1] != gallery_features.shape[1]:
        raise UserError(f"{path}: {query.name} has {query_features.shape[1]} dimensions, {gallery.name} {gallery_features.shape[1]}")
    num_junk = len(query.people) + len(gallery.people) - len(query_labels) - len(gallery_labels)
    return FeatureFile(
        query_features, gallery_features, query_labels, gallery_labels, query_paths, gallery_paths, num_junk, query.cameras is not None, tuple(notes)
    )


def _people_of(path: Path, part: _Part, features: FloatArray, camera: int) -> tuple[FloatArray, Labels, list[str] | None]:
    """The images of a part that are not junk. camera: of all, where none is named."""
    _check_length(path, part, features)
    wrong = np.flatnonzero(part.people < JUNK_PERSON)
    if len(wrong):
        raise UserError(f"{path}: row {wrong[0]} beside {part.name} is of person {part.people[wrong[0]]}; 0 and up are people, -1 is junk")
    chosen = part.people != JUNK_PERSON
    if not chosen.any():
        raise UserError(f"{path}: {part.name} has no image of a person ({len(chosen)} of junk)")
    # Copied only where something is left out or lies the other way: a large gallery takes gigabytes.
    features = np.ascontiguousarray(features) if chosen.all() else features[chosen]
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        raise UserError(f"{path}: {part.name}: row {np.flatnonzero(chosen)[bad[0]]} is not finite ({len(bad)} such rows of {len(chosen)})")
    cameras = np.full(len(chosen), camera, np.int64) if part.cameras is None else part.cameras
    paths = None if part.paths is None else [name for name, keep in zip(part.paths, chosen.tolist(), strict=True) if keep]
    return features, Labels(part.people[chosen], cameras[chosen]), paths


def _check_length(path: Path, part: _Part, features: FloatArray) -> None:
    if len(features) != len(part.people):
        raise UserError(f"{path}: {part.name} has shape {list(part.features.shape)}, but there are labels of {len(part.people)} images")


def _matrix(content: _Content, name: str) -> FloatArray:
    array = content.variables[name]()
    if array.dtype.kind not in "fiu":
        raise UserError(f"{content.path}: {name} is of {array.dtype}; real numbers are wanted")
    if array.ndim != 2 or 0 in array.shape:
        raise UserError(f"{content.path}: {name} has shape {list(array.shape)}; [images, dimensions] is wanted, with at least one of each")
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float32 if array.dtype.itemsize <= 2 else np.float64)


def _whole_numbers(content: _Content, name: str) -> IntArray:
    """A column of whole numbers, whatever MATLAB or a text has made of them: [N], [1, N], [N, 1], floats, digits."""
    array = _column(content, name)
    if array.dtype.kind in "USO":
        try:
            return np.array([int(str(entry)) for entry in _texts(content, name)], np.int64)
        except (ValueError, OverflowError) as error:
            raise UserError(f"{content.path}: {name} holds text that is no whole number: {error}") from error
    if array.dtype.kind == "b":
        array = array.astype(np.int64)
    try:
        return id_array(f"{content.path}: {name}", array, len(array))
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error


def _texts(content: _Content, name: str) -> list[str]:
    array = _column(content, name)
    entries = array.tolist()
    if not all(isinstance(entry, str | bytes | int) for entry in entries):
        raise UserError(f"{content.path}: {name} holds something that is no text")
    return [os.fsdecode(entry) if isinstance(entry, str | bytes) else str(entry) for entry in entries]


def _column(content: _Content, name: str) -> npt.NDArray[Any]:
    array = content.variables[name]()
    if array.ndim > 2 or (array.ndim == 2 and 1 not in array.shape) or array.size == 0:
        raise UserError(f"{content.path}: {name} has shape {list(array.shape)}; one entry for each image is wanted")
    return array.reshape(-1)
