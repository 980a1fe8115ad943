"""A gallery on disk to be searched by features: added to as pictures come, exact for hundreds of thousands, compressed for millions.

    flat     the features themselves, searched exactly
    ivf-pq   faiss: inverted lists of product-quantised features find candidates, whose distances are then taken from the features themselves
             (Jegou et al., "Product Quantization for Nearest Neighbor Search", 2011); for 10,000 images and more

A folder holds gallery.json (what it is, and its pictures), features.f32 (rows of D float32 of unit length, those of
pictures that are gone too) and, for ivf-pq, lists.faiss. New features are appended first, and gallery.json is written last and whole: a stopped
addition leaves the old gallery, and what it has appended is written over.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from personmae.configs import UserError
from personmae.evaluation.neighbours import faiss_problem, nearest_neighbours
from personmae.whole_files import explained_write, write_whole

IndexKind = Literal["flat", "ivf-pq"]
FloatRows = npt.NDArray[np.float32]

TABLE, FEATURES, LISTS = "gallery.json", "features.f32", "lists.faiss"
FORMAT = 1
# faiss wants 39 points for each of the 256 centres of a sub-quantiser.
MIN_COMPRESSED = 10_000
BITS = 8
CHANNELS_EACH = 4  # channels that one byte of a compressed feature stands for
MAX_TRAINING = 200_000
# Of ivf-pq: lists that are looked into, at least, and candidates for each result.
MIN_PROBES = 16
CANDIDATES = 16


class Picture(NamedTuple):
    """A picture of the gallery."""

    name: str
    stamp: tuple[int, int]  # size in bytes and time of change (ns), by which a changed file is known
    row: int  # of the features


class Hits(NamedTuple):
    """What a search found; fewer than k where the gallery has fewer."""

    names: list[list[str]]  # for each query the nearest pictures, nearest first
    similarities: list[list[float]]  # cosine, from -1 to 1


@dataclasses.dataclass
class GalleryIndex:
    """A gallery; `open_gallery` reads it, `save` keeps what was taken in since. Its features stay on the disk."""

    folder: Path
    identity: str  # of what computes the features
    root: str  # folder that the names are relative to
    kind: IndexKind
    width: int
    pictures: list[Picture]
    features: FloatRows  # [rows, D], those of pictures that are gone too; mapped from the file
    lists: Any = None  # faiss.Index
    names: dict[int, str] = dataclasses.field(init=False)  # row -> picture

    def __post_init__(self) -> None:
        self.names = {picture.row: picture.name for picture in self.pictures}

    def __len__(self) -> int:
        return len(self.pictures)

    def changes(self, stamps: Mapping[str, tuple[int, int]]) -> tuple[list[str], list[str]]:
        """Names that are new or have changed, and names that are gone, for a gallery of these files (name -> size, time)."""
        known = {picture.name: picture.stamp for picture in self.pictures}
        return [name for name, stamp in stamps.items() if known.get(name) != stamp], [name for name in known if name not in stamps]

    def update(self, added: Sequence[tuple[str, tuple[int, int]]], features: FloatRows, gone: Sequence[str]) -> None:
        """Take in pictures (name, stamp) with features [N, D] of unit length, in place of older ones of the same name, and drop those that are gone.

        Raises ValueError for features of another width or number, UserError naming the file if the disk refuses."""
        if features.shape != (len(added), self.width):
            raise ValueError(f"features must be [{len(added)}, {self.width}], not {list(features.shape)}")
        dropped = {name for name, _ in added} | set(gone)
        first = len(self.features)
        self.pictures = [picture for picture in self.pictures if picture.name not in dropped]
        self.pictures += [Picture(name, stamp, first + number) for number, (name, stamp) in enumerate(added)]
        self.names = {picture.row: picture.name for picture in self.pictures}
        self._append(features)
        if self.kind == "ivf-pq":
            if self.lists is None:
                self.lists = _train(self._alive())
                self.lists.add_with_ids(self._alive(), np.array([picture.row for picture in self.pictures], np.int64))
            elif len(added):
                self.lists.add_with_ids(np.ascontiguousarray(features, dtype=np.float32), np.arange(first, len(self.features), dtype=np.int64))

    def search(self, queries: FloatRows, k: int) -> Hits:
        """The k nearest pictures of each query, features [Q, D] of unit length. Raises ValueError for k < 1 and an empty gallery."""
        if k < 1:
            raise ValueError(f"k is {k}; it must be at least 1")
        if not self.pictures:
            raise UserError(f"the gallery {self.folder} is empty")
        if self.kind == "flat":
            found = nearest_neighbours(queries, k, among=self._alive())
            names = [[self.pictures[column].name for column in row] for row in found.indices]
            return Hits(names, [[1.0 - float(distance) for distance in row] for row in found.distances])
        return self._search_lists(queries, k)

    def save(self) -> None:
        """Keep what was taken in. Raises UserError naming the file if the disk refuses."""
        if self.lists is not None:
            import faiss

            write_whole(self.folder / LISTS, faiss.serialize_index(self.lists).tobytes())
        table = {
            "format": FORMAT,
            "identity": self.identity,
            "root": self.root,
            "kind": self.kind,
            "width": self.width,
            "rows": len(self.features),
            "pictures": [[picture.name, *picture.stamp, picture.row] for picture in self.pictures],
        }
        write_whole(self.folder / TABLE, json.dumps(table).encode())

    def _append(self, features: FloatRows) -> None:
        path, rows = self.folder / FEATURES, len(self.features)
        with explained_write(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(path, "r+b" if path.exists() else "w+b") as file:
                file.truncate(4 * rows * self.width)
                file.seek(0, os.SEEK_END)
                file.write(np.ascontiguousarray(features, dtype=np.float32).data)
                file.flush()
                os.fsync(file.fileno())
        self.features = _mapped(path, rows + len(features), self.width)

    def _alive(self) -> FloatRows:
        """The features of the pictures, in their order [N, D]."""
        return self.features if len(self.pictures) == len(self.features) else self.features[[picture.row for picture in self.pictures]]

    def _search_lists(self, queries: FloatRows, k: int) -> Hits:
        self.lists.nprobe = max(MIN_PROBES, self.lists.nlist // 16)
        # Rows of pictures that are gone stay in the lists, so as many more candidates are asked for.
        gone = int(self.lists.ntotal) - len(self.names)
        wanted = min(int(self.lists.ntotal), CANDIDATES * k + gone)
        _, candidates = self.lists.search(np.ascontiguousarray(queries, dtype=np.float32), wanted)
        names, similarities = [], []
        for query, row in zip(queries, candidates, strict=True):
            # A row may stand twice in the lists, where an addition was stopped and made again.
            alive = np.array([number for number in np.unique(row) if number in self.names], np.int64)
            exact = self.features[alive] @ query
            order = np.lexsort((alive, -exact))[:k]
            names.append([self.names[int(alive[place])] for place in order])
            similarities.append([float(exact[place]) for place in order])
        return Hits(names, similarities)


def new_gallery(folder: Path, identity: str, root: Path, kind: IndexKind, width: int) -> GalleryIndex:
    """An empty gallery, not yet on the disk. Raises UserError where ivf-pq is asked for and faiss does not serve."""
    if kind == "ivf-pq" and (problem := faiss_problem()):
        raise UserError(f"{problem}; or use --kind flat")
    return GalleryIndex(folder, identity, str(root), kind, width, [], np.empty((0, width), np.float32))


def open_gallery(folder: Path) -> GalleryIndex | None:
    """The gallery of a folder; None if there is none yet. Raises UserError if it is damaged, or the folder holds something else."""
    path = folder / TABLE
    if not path.is_file():
        # What a first indexing leaves that was stopped before its end is written over.
        if folder.is_dir() and any(not entry.name.startswith((TABLE, FEATURES, LISTS)) for entry in folder.iterdir()):
            raise UserError(f"{folder} is no gallery index and not empty; name another folder with --index")
        return None
    try:
        table = json.loads(path.read_bytes())
        rows, width = table["rows"], table["width"]
        size = os.stat(folder / FEATURES).st_size
        pictures = [Picture(str(name), (int(num_bytes), int(time)), int(row)) for name, num_bytes, time, row in table["pictures"]]
        kind, identity, root, version = table["kind"], table["identity"], table["root"], table["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} holds a damaged gallery index ({error}); delete the folder and index again") from error
    if version != FORMAT or kind not in ("flat", "ivf-pq"):
        raise UserError(f"{folder} was written by another version (format {version}); delete the folder and index again")
    if size < 4 * rows * width or any(not 0 <= picture.row < rows for picture in pictures):
        raise UserError(f"{folder / FEATURES} is cut off or of another gallery; delete the folder and index again")
    index = GalleryIndex(folder, identity, root, kind, width, pictures, _mapped(folder / FEATURES, rows, width))
    if kind == "ivf-pq":
        index.lists = _read_lists(folder / LISTS, width)
    return index


def stamp_of(path: Path) -> tuple[int, int]:
    """Size in bytes and time of change in ns. Raises OSError if the file is not there."""
    state = os.stat(path)
    return state.st_size, state.st_mtime_ns


def _mapped(path: Path, rows: int, width: int) -> FloatRows:
    """The first rows of a file of features; an empty array where there are none, which cannot be mapped."""
    return np.memmap(path, np.float32, "r", shape=(rows, width)) if rows else np.empty((0, width), np.float32)


def _read_lists(path: Path, width: int) -> Any:
    if problem := faiss_problem():
        raise UserError(problem)
    import faiss

    try:
        lists = faiss.deserialize_index(np.fromfile(path, np.uint8))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} cannot be read ({str(error).splitlines()[0]}); delete the folder and index again") from error
    if lists.d != width:
        raise UserError(f"{path} is of another gallery than {TABLE} beside it; delete the folder and index again")
    return lists


def _train(features: FloatRows) -> Any:
    """An empty index of inverted lists, trained on these features. Raises UserError for too few of them."""
    import faiss

    count, width = features.shape
    if count < MIN_COMPRESSED:
        raise UserError(f"ivf-pq needs at least {MIN_COMPRESSED:,} pictures to begin with, and there are {count:,}; use --kind flat")
    chosen = np.random.default_rng(0).permutation(count)[:MAX_TRAINING]
    num_lists = int(np.clip(4 * np.sqrt(count), 64, len(chosen) // 39))
    pieces = max(piece for piece in range(1, max(1, width // CHANNELS_EACH) + 1) if width % piece == 0)
    lists = faiss.IndexIVFPQ(faiss.IndexFlatIP(width), width, num_lists, pieces, BITS, faiss.METRIC_INNER_PRODUCT)
    lists.train(np.ascontiguousarray(features[np.sort(chosen)]))
    return lists
