"""A page to browse ranked lists: worst queries first, by camera and person, each query with its nearest gallery images.

A folder with `index.html` and thumbnails beside it, which works from the disk (file://) and asks nothing of any network.
The page draws a few queries at a time, so that the 11,659 of MSMT17 are no burden to a browser.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from personmae.configs import UserError
from personmae.data.images import UnreadableImage, read_image, resize
from personmae.data.records import PersonImage
from personmae.evaluation.distances import FloatArray, Metric, open_space
from personmae.evaluation.measures import QueryMeasures, measure_queries
from personmae.evaluation.ranking import IntArray, Labels, match_ranks, nearest_gallery
from personmae.visuals.attention_maps import colour_levels
from personmae.visuals.ranked_page_parts import page

PAGE_NAME = "index.html"
# A folder that is written over has to hold a page of ours.
_OURS = 'content="personmae ranked lists"'
MAX_MIB = 512.0
MAX_LISTED_MATCHES = 12
_JPEG_QUALITY = 80
_QUERIES_AT_ONCE = 64
_COLOURS = 32

MapsOfFiles = Callable[[Sequence[Path]], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class RankedLists:
    """What the page shows of Q queries.

    nearest: int [Q, K], gallery indices by distance, -1 where there are no more; images that the protocol leaves out may be
    among them, and are told by person and camera. distance: [Q, K]. average_precision: [Q], NaN where not scored.
    first_match: int [Q], rank of the first match from 0, or -1. match_ranks: for each query the ranks of its matches from
    1, ascending, or None where that is not known.
    """

    nearest: IntArray
    distance: FloatArray
    average_precision: FloatArray
    first_match: IntArray
    match_ranks: Sequence[IntArray] | None = None


def rank_queries(
    query_features: npt.ArrayLike,
    gallery_features: npt.ArrayLike,
    query: Labels,
    gallery: Labels,
    *,
    metric: Metric = "cosine",
    num_nearest: int = 10,
    measures: QueryMeasures | None = None,
) -> RankedLists:
    """The lists of features [Q, D] and [G, D] by the evaluation's own distances and ranks; with what is left out, so that the page can show it.

    measures: average precision and first match as they were scored, by whatever rules; by default those of the lists.
    """
    ranks = match_ranks(query_features, gallery_features, query, gallery, metric)
    measures = measures or measure_queries(ranks)
    # As many more as are left out: then the wanted ones are among them.
    num_looked_at = num_nearest + int((len(gallery) - ranks.num_kept).max())
    nearest = nearest_gallery(query_features, gallery_features, query, gallery, num_looked_at, metric, leave_out="nothing")
    is_own = (gallery.people[nearest] == query.people[:, None]) & (gallery.cameras[nearest] == query.cameras[:, None])
    is_counted = (nearest >= 0) & ~is_own
    nearest[np.cumsum(is_counted, axis=1) - is_counted >= num_nearest] = -1
    nearest = nearest[:, (nearest >= 0).any(axis=0)]
    row, column = np.nonzero(nearest >= 0)
    distance = np.zeros(nearest.shape)
    pairs = torch.from_numpy(row), torch.from_numpy(nearest[row, column])
    distance[row, column] = open_space(query_features, gallery_features, metric).pair_distances(*pairs).numpy()
    listed = np.split(ranks.rank, ranks.offsets[1:-1])
    return RankedLists(nearest, distance, measures.average_precision, measures.first_match, listed)


def write_ranked_page(
    folder: Path,
    query: Sequence[PersonImage],
    gallery: Sequence[PersonImage],
    lists: RankedLists,
    *,
    title: str,
    subtitle: str = "",
    notes: Sequence[str] = (),
    num_shown: int = 10,
    size: tuple[int, int] = (160, 80),
    maps: MapsOfFiles | None = None,
    max_mib: float = MAX_MIB,
    num_threads: int = 2,
) -> Path:
    """Write the page and its thumbnails into a folder, whole or not at all, and return the page's path.

    folder: new, empty, or with an older page, which is replaced. num_shown: images in a list, beside those left out. size:
    (height, width) in pixels of a thumbnail. maps: the attention maps of image files, each [rows, columns] with the sum 1, as
    `functools.partial(maps_of_files, encoder)` gives them; the page can then lay them over the images. max_mib: the size
    of the whole folder; where it does not suffice the queries of best average precision are left off, and the page says so.

    Raises UserError if the folder holds something else or cannot be written, or an image cannot be read; ValueError for
    lists that do not fit the images.
    """
    _check(query, gallery, lists)
    folder = folder.expanduser().resolve()
    _check_folder(folder)
    partial, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{kind}") for kind in ("partial", "old"))
    with ThreadPoolExecutor(num_threads, thread_name_prefix="thumbnails") as pool:
        try:
            album = _Album(partial / "images", size, maps, _common_root([*query, *gallery]), pool)
            rows = _fill(album, query, gallery, lists, num_shown, max_mib * 2**20 - len(page(title, subtitle, notes, "")))
            if len(rows) < len(query):
                cut = f"{len(query) - len(rows):,} of {len(query):,} queries, those of best average precision, are not on this page"
                notes = [*notes, f"{cut}: its size was limited to {max_mib:g} MiB."]
            content = {"width": size[1], "height": size[0], "shown": num_shown, "images": album.entries, "queries": rows, "maps": album.maps_entry()}
            data = json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
            # What a path or a title may hold that is no Unicode is spelled out.
            (partial / PAGE_NAME).write_text(page(title, subtitle, notes, data), encoding="utf-8", errors="backslashreplace")
            if folder.exists():
                folder.rename(old)
            partial.rename(folder)
        except OSError as error:
            raise UserError(f"cannot write {folder}: {error.strerror or error}; make room or give write permission there") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            for leftover in (partial, old):
                shutil.rmtree(leftover, ignore_errors=True)
    return folder / PAGE_NAME


class _Entry(NamedTuple):
    """An image of the page before it is written."""

    jpeg: bytes
    peak: float  # the largest multiple of an even share in its map
    shares: bytes  # uint8 [rows * columns], 255 at the peak


class _Album:
    """The images of the page: thumbnails in a folder, numbered as they come, and what the page says of each."""

    def __init__(self, folder: Path, size: tuple[int, int], maps: MapsOfFiles | None, root: str, pool: ThreadPoolExecutor) -> None:
        self.folder, self.size, self.maps, self.root, self.pool = folder, size, maps, root, pool
        self.numbers: dict[PersonImage, int] = {}
        self.entries: list[list[Any]] = []  # [name, person, camera]
        self._peaks: list[float] = []
        self._shares: list[bytes] = []
        self._grid = (0, 0)

    def prepare(self, images: Sequence[PersonImage]) -> dict[PersonImage, _Entry]:
        """Thumbnails and maps of those images that are not in the album yet."""
        new = [image for image in dict.fromkeys(images) if image not in self.numbers]
        jpegs = list(self.pool.map(lambda image: _thumbnail(image.path, self.size), new))
        if self.maps is None or not new:
            return {image: _Entry(jpeg, 0.0, b"") for image, jpeg in zip(new, jpegs, strict=True)}
        found = self.maps([image.path for image in new])
        if found.ndim != 3 or len(found) != len(new) or not np.isfinite(found).all() or found.min() < 0:
            raise ValueError(f"maps of {len(new)} images have shape {found.shape}; [{len(new)}, rows, columns], finite and not negative, is wanted")
        self._grid = (found.shape[1], found.shape[2])
        peaks = found.max(axis=(1, 2))
        levels = (found / np.maximum(peaks, 1e-30)[:, None, None] * 255).round().astype(np.uint8)
        multiples = (peaks * found[0].size).tolist()
        entries = [_Entry(jpeg, round(multiple, 2), level.tobytes()) for jpeg, multiple, level in zip(jpegs, multiples, levels, strict=True)]
        return dict(zip(new, entries, strict=True))

    def describe(self, image: PersonImage) -> list[Any]:
        return [os.path.relpath(image.path.absolute(), self.root), image.person, image.camera]

    def add(self, image: PersonImage, entry: _Entry) -> None:
        number = self.numbers[image] = len(self.entries)
        self.entries.append(self.describe(image))
        self._peaks.append(entry.peak)
        self._shares.append(entry.shares)
        # A thousand to a folder: some file managers choke on more.
        path = self.folder / f"{number // 1000:03d}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(entry.jpeg)

    def maps_entry(self) -> dict[str, Any] | None:
        if self.maps is None:
            return None
        # The few that stand out most do not make all others dark.
        full = max(1.0, round(float(np.quantile(self._peaks, 0.99)), 2))
        shares = base64.b64encode(b"".join(self._shares)).decode("ascii")
        colours = colour_levels(_COLOURS).tolist()
        return {"rows": self._grid[0], "columns": self._grid[1], "full": full, "colours": colours, "peaks": self._peaks, "values": shares}


def _fill(
    album: _Album, query: Sequence[PersonImage], gallery: Sequence[PersonImage], lists: RankedLists, num_shown: int, budget: float
) -> list[list[Any]]:
    """Put queries and their lists into the album, worst first, until the bytes of the budget are spent; the page's rows, in the order of the set."""
    order = np.argsort(lists.average_precision, kind="stable").tolist()
    rows: dict[int, list[Any]] = {}
    for start in range(0, len(order), _QUERIES_AT_ONCE):
        some = {number: _listed(number, query[number], gallery, lists, num_shown) for number in order[start : start + _QUERIES_AT_ONCE]}
        ready = album.prepare([image for number, places in some.items() for image in (query[number], *(gallery[i] for i in places.values()))])
        for number, places in some.items():
            images = [query[number], *(gallery[index] for index in places.values())]
            new = [image for image in dict.fromkeys(images) if image not in album.numbers]
            # Base64 makes four bytes of three; a peak takes six at most.
            budget -= sum(len(ready[image].jpeg) + len(json.dumps(album.describe(image))) + len(ready[image].shares) * 4 / 3 + 9 for image in new)
            row = _row(number, list(places), lists)
            budget -= len(json.dumps(row)) + 8 * len(images)
            if budget < 0:
                if not rows:
                    raise UserError("the size that the page of ranked lists may have does not suffice for one query; raise max_mib")
                return [rows[number] for number in sorted(rows)]
            for image in new:
                album.add(image, ready[image])
            numbers = [album.numbers[image] for image in images]
            rows[number] = [numbers[0], *row[:2], numbers[1:], *row[2:]]
    return [rows[number] for number in sorted(rows)]


def _listed(number: int, query: PersonImage, gallery: Sequence[PersonImage], lists: RankedLists, num_shown: int) -> dict[int, int]:
    """Place in the list -> gallery index, up to the last one that is shown."""
    places: dict[int, int] = {}
    num_ranked = 0
    for place, index in enumerate(lists.nearest[number].tolist()):
        if index < 0 or num_ranked == num_shown:
            break
        places[place] = index
        num_ranked += (gallery[index].person, gallery[index].camera) != (query.person, query.camera)
    return places


def _row(number: int, places: Sequence[int], lists: RankedLists) -> list[Any]:
    """What the page gets of a query beside its images: [AP or null, rank of the first match or 0, distances, ranks of matches, how many]."""
    precision = float(lists.average_precision[number])
    matches: Sequence[int] = np.asarray(lists.match_ranks[number]).tolist() if lists.match_ranks is not None else []
    return [
        None if np.isnan(precision) else round(precision, 5),
        int(lists.first_match[number]) + 1,
        [round(float(value), 5) for value in lists.distance[number, list(places)]],
        matches[:MAX_LISTED_MATCHES],
        len(matches),
    ]


def _thumbnail(path: Path, size: tuple[int, int]) -> bytes:
    try:
        pixels = resize(read_image(path), size)
    except UnreadableImage as error:
        raise UserError(f"{error}; replace the file, or remove it from the set") from error
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "jpeg", quality=_JPEG_QUALITY)
    return content.getvalue()


def _common_root(images: Sequence[PersonImage]) -> str:
    return os.path.commonpath({os.path.dirname(image.path.absolute()) for image in images})


def _check(query: Sequence[PersonImage], gallery: Sequence[PersonImage], lists: RankedLists) -> None:
    num_queries, nearest = len(query), np.asarray(lists.nearest)
    if not num_queries or not len(gallery):
        raise UserError("there is no query or no gallery image to make a page of")
    if nearest.ndim != 2 or len(nearest) != num_queries or nearest.shape != np.shape(lists.distance):
        raise ValueError(f"nearest {nearest.shape} and distance {np.shape(lists.distance)} must both be [{num_queries}, K]")
    if nearest.size and (nearest.min() < -1 or nearest.max() >= len(gallery)):
        raise ValueError(f"nearest holds indices {nearest.min()} to {nearest.max()}; -1 to {len(gallery) - 1} are possible")
    if not np.isfinite(np.where(nearest >= 0, lists.distance, 0)).all():
        raise ValueError("distance holds values that are not finite")
    columns = {"average_precision": lists.average_precision, "first_match": lists.first_match, "match_ranks": lists.match_ranks}
    for name, column in columns.items():
        if column is not None and len(column) != num_queries:
            raise ValueError(f"{name} has {len(column)} entries for {num_queries} queries")


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give the path of a folder for the page")
    if folder.is_dir() and any(folder.iterdir()):
        old = folder / PAGE_NAME
        if not old.is_file() or _OURS not in old.read_text(encoding="utf-8", errors="replace")[:4000]:
            raise UserError(f"{folder} holds something else than a page of ranked lists; give a new or empty folder")
