"""The index of a source of images: which files can be read, their dimensions and checksums. Built once, in parallel,
and reused.

A source is a folder (JPEG, PNG, WebP, BMP, TIFF at any depth), a text list (one path a line), or a pack (written by
`personmae pack`), which brings its index with it. Every file of the first two is read and decoded once, strictly; what
is unreadable, empty, truncated, tiny or absurdly large is left out and listed with its reason in `rejected.tsv`. Sample
number = position in the index = rank of the path among the readable ones, so a run draws the same samples on any
machine, from the files or from a pack of them.

The paths of millions of files take one bytes object and one array of offsets; no file is held open.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from personmae.configs import UserError
from personmae.data.images import UInt8Array, UnreadableImage, decode, read_bytes, read_header
from personmae.data.packs.manifest import Verify, is_pack
from personmae.data.sources import Listing, list_source
from personmae.data.storage import FileStorage, Storage
from personmae.data.verdicts import MAX_PIXELS, MAX_SIDE_PX, MIN_SIDE_PX, Limits, check_image
from personmae.whole_files import whole_path

# Changes when the file layout or what counts as readable does: older indexes are then built anew.
_FORMAT = 2
_FILES_PER_TASK = 32


@dataclass(frozen=True)
class ImageIndex:
    """The readable images of a source, in the order of their paths.

    storage: where their contents lie. heights, widths: int32 [N], pixels as stored. num_bytes: int64 [N],
    lengths of the contents. checksums: uint32 [N], CRC-32 of the contents. plain: bool [N], an ordinary RGB or grey JPEG (see
    `ImageHeader`). rejected: (path, reason) of each file left out; rejected_file: where that list stands, None if it
    could not be written. names: the paths, one after the other, bytes or uint8; offsets: int64 [N + 1], where each begins.
    The columns of a pack are mapped from its files, 36 bytes an image and its name.
    """

    storage: Storage
    heights: npt.NDArray[np.int32]
    widths: npt.NDArray[np.int32]
    num_bytes: npt.NDArray[np.int64]
    checksums: npt.NDArray[np.uint32]
    plain: npt.NDArray[np.bool_]
    rejected: list[tuple[str, str]]
    rejected_file: Path | None
    names: bytes | UInt8Array = field(repr=False)
    offsets: npt.NDArray[np.int64] = field(repr=False)

    def __len__(self) -> int:
        return len(self.heights)

    @property
    def root(self) -> Path:
        """The folder that holds the images."""
        return self.storage.root

    def name(self, sample: int) -> str:
        """The path of a sample as the source has it: relative to `root`, or absolute if a list says so."""
        return os.fsdecode(bytes(self.names[self.offsets[sample] : self.offsets[sample + 1]]))

    def path(self, sample: int) -> Path | str:
        """Where a sample lies, for people; of a pack, the shard and the name (a text, of one behind an address): see `read` and `image`."""
        return self.storage.path(sample, self.name(sample))

    def readable(self, samples: Sequence[int]) -> dict[int, UInt8Array]:
        """Sample -> its pixels, uint8 [H, W, 3], but of those that have gone bad since they were indexed: a loader reports such files."""
        images = {}
        for sample in samples:
            with contextlib.suppress(UnreadableImage):
                images[sample] = self.image(sample)
        return images

    def is_there(self, sample: int) -> bool:
        """Whether the file that holds a sample still exists."""
        return self.storage.is_there(sample, self.name(sample))

    def read(self, sample: int) -> bytes:
        """The content of a sample, known to decode since it is what was indexed. Raises UnreadableImage if it is
        gone or has changed."""
        data = self.storage.read(sample, self.name(sample))
        if len(data) != self.num_bytes[sample]:
            raise UnreadableImage(self.path(sample), f"changed since it was indexed: {self.num_bytes[sample]} bytes then, {len(data)} now")
        if zlib.crc32(data) != self.checksums[sample]:
            raise UnreadableImage(self.path(sample), "changed since it was indexed: other content of the same length")
        if not isinstance(self.storage, FileStorage):
            # Who wrote a pack wrote its checksums too: what it says of an image is looked at before anything is decoded.
            header = read_header(data, self.path(sample))
            if (header.height, header.width) != (self.heights[sample], self.widths[sample]):
                said = f"{self.widths[sample]} x {self.heights[sample]}"
                raise UnreadableImage(self.path(sample), f"is {header.width} x {header.height} pixels (w x h), and its pack says {said}")
        return data

    def image(self, sample: int) -> UInt8Array:  # -> [H, W, 3] RGB
        """The pixels of a sample, uint8. Raises UnreadableImage if it is gone or has changed."""
        return decode(self.read(sample), self.path(sample))

    def digest(self) -> str:
        """16 hexadecimal digits that change with any name, dimension or content: two runs with the same digest see the
        same images."""
        digest = hashlib.sha256(np.frombuffer(self.names, dtype=np.uint8).data)
        for column in (self.offsets, self.heights, self.widths, self.checksums):
            digest.update(np.ascontiguousarray(column).data)
        return digest.hexdigest()[:16]


def build_index(
    source: Path,
    cache_dir: Path | None = None,
    *,
    min_side_px: int = MIN_SIDE_PX,
    max_pixels: int = MAX_PIXELS,
    max_side_px: int = MAX_SIDE_PX,
    num_workers: int | None = None,
    progress: bool = True,
    announce: Callable[[str], object] = print,
    verify: Verify = "auto",
) -> ImageIndex:
    """The index of a folder or text list, from the cache if the source is unchanged (names, sizes, modification times).

    source: a folder, searched at any depth for files named .jpg .jpeg .jpe .jfif .png .webp .bmp .tif .tiff in any case;
    links are followed, hidden files and folders (.name) are not. Or a text file with one path a line, absolute or relative to the
    list's own folder; empty lines and repetitions are dropped. Or a pack, whose own index is taken after its shards were
    checked (verify: see `open_pack`; the limits do not apply). cache_dir: where the index is kept; by default a folder
    for this source in the user's cache (`XDG_CACHE_HOME`, or ~/.cache). If it cannot be written the index works, but is
    not kept. min_side_px, max_side_px, max_pixels: limits to a readable image's dimensions, checked before any pixel is
    decoded. num_workers: threads, by default one for each core this process may use. progress: a bar, where stderr is a
    terminal. announce: receives one or two lines: what was found, and where.

    When the source has changed, only new and changed files are read again, and those that the system refused to read
    before.

    Raises UserError if the source does not exist, holds no image, or none that is readable.
    """
    source = Path(source).expanduser()
    if is_pack(source):
        # It makes an ImageIndex, so it cannot be imported above.
        from personmae.data.packs.opening import open_pack

        return open_pack(source, cache_dir or default_cache_dir(source), verify=verify, num_workers=num_workers, announce=announce)
    limits = Limits(min_side_px, max_pixels, max_side_px)
    listing = list_source(source)
    folder = (cache_dir or default_cache_dir(source)).expanduser()
    table = _load(folder / "index.npz", listing, limits)
    todo = np.flatnonzero(table.state != _DONE)
    if len(todo):
        _examine(listing, table, todo, limits, num_workers or len(os.sched_getaffinity(0)), progress)
        problem = _save(folder, listing, table, limits)
    else:
        problem = None
    index = _to_index(listing, table, folder, problem)
    if len(todo) == 0:
        how = f"index of {source} reused, the source has not changed"
    elif len(todo) < len(table.state):
        how = f"index of {source} brought up to date, {len(todo)} new or changed files read"
    else:
        how = f"index of {source} built"
    where = f" ({len(index.rejected)} left out, listed in {index.rejected_file})" if index.rejected and index.rejected_file else ""
    if index.rejected and not index.rejected_file:
        where = f" ({len(index.rejected)} left out, first {index.rejected[0][0]}: {index.rejected[0][1]})"
    announce(f"{how}: {len(index)} images{where}")
    if problem:
        announce(f"the index could not be kept in {folder} ({problem}); it will be built again next time")
    if len(index) == 0:
        first, reason = index.rejected[0]
        raise UserError(f"none of the {len(index.rejected)} images of {source} can be used; the first is {first}: {reason}")
    return index


def user_cache() -> Path:
    """The folder of this program in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")) / "personmae"


def default_cache_dir(source: Path) -> Path:
    """The folder of the user's cache that keeps the index of this source."""
    resolved = source.resolve()
    key = hashlib.sha256(os.fsencode(resolved)).hexdigest()[:12]
    return user_cache() / "indexes" / f"{resolved.name or 'root'}-{key}"


def as_files(index: ImageIndex, samples: Sequence[int], folder: Path) -> list[Path]:
    """Paths of samples as files: their own, or of a pack copies that are written into `folder`. Raises UserError naming one that cannot be read."""
    if isinstance(index.storage, FileStorage):
        return [index.storage.path(sample, index.name(sample)) for sample in samples]
    paths = []
    for sample in samples:
        try:
            content = index.read(sample)
        except UnreadableImage as error:
            raise UserError(str(error)) from error
        paths.append(folder / f"{sample:09d}.jpg")
        paths[-1].write_bytes(content)
    return paths


# States of a file in the table: not examined yet; examined; the system could not read it, to be tried again next time.
_NEW, _DONE, _REFUSED = 0, 1, 2


@dataclass(frozen=True)
class _Table:
    """What is known of each file of a listing. reasons: row -> why it is left out."""

    state: npt.NDArray[np.uint8]
    heights: npt.NDArray[np.int32]
    widths: npt.NDArray[np.int32]
    checksums: npt.NDArray[np.uint32]
    plain: npt.NDArray[np.bool_]
    reasons: dict[int, str]


class _Verdict(NamedTuple):
    height: int
    width: int
    checksum: int
    plain: bool
    reason: str
    by_system: bool


def _examine(listing: Listing, table: _Table, rows: npt.NDArray[np.intp], limits: Limits, num_workers: int, progress: bool) -> None:
    """Fills in the table's `rows`, with threads: decoding releases Python's lock."""

    def examine_some(some: npt.NDArray[np.intp]) -> list[_Verdict]:
        paths = (listing.root / os.fsdecode(listing.names[row]) for row in some)
        return [_examine_file(path, int(size), limits) for path, size in zip(paths, listing.num_bytes[some], strict=True)]

    def finish(some: npt.NDArray[np.intp], future: Future[list[_Verdict]]) -> None:
        for row, verdict in zip(some.tolist(), future.result(), strict=True):
            table.heights[row], table.widths[row] = verdict.height, verdict.width
            table.checksums[row], table.plain[row] = verdict.checksum, verdict.plain
            table.state[row] = _REFUSED if verdict.by_system else _DONE
            table.reasons.pop(row, None)
            if verdict.reason:
                table.reasons[row] = verdict.reason
        bar.update(len(some))
        bar.set_postfix_str(f"{len(table.reasons)} left out", refresh=False)

    bar = tqdm(total=len(rows), unit="img", desc="index", disable=None if progress else True)
    with bar, ThreadPoolExecutor(num_workers, thread_name_prefix="index") as pool:
        try:
            # A bounded window of tasks: millions of waiting futures would take gigabytes.
            waiting: list[tuple[npt.NDArray[np.intp], Future[list[_Verdict]]]] = []
            for first in range(0, len(rows), _FILES_PER_TASK):
                some = rows[first : first + _FILES_PER_TASK]
                waiting.append((some, pool.submit(examine_some, some)))
                if len(waiting) >= 4 * num_workers:
                    finish(*waiting.pop(0))
            for task in waiting:
                finish(*task)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _examine_file(path: Path, num_bytes: int, limits: Limits) -> _Verdict:
    try:
        data = read_bytes(path, max_bytes=limits.max_bytes)
        if len(data) != num_bytes:
            raise UnreadableImage(path, "changed while it was being indexed", by_system=True)
        header = check_image(data, path, limits).header
    except UnreadableImage as error:
        return _Verdict(0, 0, 0, False, error.reason, error.by_system)
    return _Verdict(header.height, header.width, zlib.crc32(data), header.plain, "", False)


def _load(file: Path, listing: Listing, limits: Limits) -> _Table:
    """What the cache knows of the files of a listing: a file of the same name, length and modification time has not
    changed."""
    size = len(listing.names)
    table = _Table(
        state=np.full(size, _NEW, np.uint8),
        heights=np.zeros(size, np.int32),
        widths=np.zeros(size, np.int32),
        checksums=np.zeros(size, np.uint32),
        plain=np.zeros(size, np.bool_),
        reasons={},
    )
    try:
        with np.load(file, allow_pickle=False) as saved:
            if saved["format"].tolist() != [_FORMAT, *limits]:
                return table
            offsets, blob = saved["offsets"], saved["names"].tobytes()
            old_bytes, old_modified, old_state = saved["num_bytes"], saved["modified_ns"], saved["state"]
            reasons = {int(row): reason for row, reason in json.loads(saved["reasons"].tobytes()).items()}
            columns = [saved[name] for name in ("heights", "widths", "checksums", "plain")]
    except FileNotFoundError:
        return table
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        # A broken cache is as good as none: it is written anew.
        return table
    old_rows, new_rows = _same_names(blob, offsets, listing.names)
    same = (old_bytes[old_rows] == listing.num_bytes[new_rows]) & (old_modified[old_rows] == listing.modified_ns[new_rows])
    same &= old_state[old_rows] == _DONE
    old_rows, new_rows = old_rows[same], new_rows[same]
    table.state[new_rows] = _DONE
    for column, ours in zip(columns, (table.heights, table.widths, table.checksums, table.plain), strict=True):
        ours[new_rows] = column[old_rows]
    position = np.full(len(old_state), -1)
    position[old_rows] = new_rows
    table.reasons.update({int(position[old]): reason for old, reason in reasons.items() if position[old] >= 0})
    return table


def _same_names(blob: bytes, offsets: npt.NDArray[np.int64], names: Sequence[bytes]) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Positions in the old and in the new sorted names of the names that both have."""
    if np.array_equal(offsets, _offsets(names)) and blob == b"".join(names):
        everything = np.arange(len(names))
        return everything, everything
    ends = offsets.tolist()
    positions = {blob[ends[row] : ends[row + 1]]: row for row in range(len(ends) - 1)}
    pairs = [(positions[name], row) for row, name in enumerate(names) if name in positions]
    both = np.array(pairs, dtype=np.intp).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def _save(folder: Path, listing: Listing, table: _Table, limits: Limits) -> str | None:
    """Writes index.npz and rejected.tsv, whole or not at all. Returns why it could not, or None."""
    rejected = "".join(f"{_field(listing.root / os.fsdecode(listing.names[row]))}\t{reason}\n" for row, reason in sorted(table.reasons.items()))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The list gets its name first: the index says that both are there.
        with whole_path(folder / "index.npz") as partial, whole_path(folder / "rejected.tsv") as partial_list, open(partial, "wb") as file:
            partial_list.write_text("path\treason\n" + rejected, encoding="utf-8", errors="surrogateescape")
            np.savez(
                file,
                format=np.array([_FORMAT, *limits]),
                names=np.frombuffer(b"".join(listing.names), dtype=np.uint8),
                offsets=_offsets(listing.names),
                num_bytes=listing.num_bytes,
                modified_ns=listing.modified_ns,
                state=table.state,
                heights=table.heights,
                widths=table.widths,
                checksums=table.checksums,
                plain=table.plain,
                reasons=np.frombuffer(json.dumps(table.reasons).encode(), dtype=np.uint8),
            )
    except OSError as error:
        return error.strerror or str(error)
    return None


def _to_index(listing: Listing, table: _Table, folder: Path, problem: str | None) -> ImageIndex:
    readable = np.ones(len(listing.names), dtype=bool)
    readable[list(table.reasons)] = False
    names = [listing.names[row] for row in np.flatnonzero(readable).tolist()]
    return ImageIndex(
        storage=FileStorage(listing.root),
        heights=table.heights[readable],
        widths=table.widths[readable],
        num_bytes=listing.num_bytes[readable],
        checksums=table.checksums[readable],
        plain=table.plain[readable],
        rejected=[(str(listing.root / os.fsdecode(listing.names[row])), reason) for row, reason in sorted(table.reasons.items())],
        rejected_file=None if problem else folder / "rejected.tsv",
        names=b"".join(names),
        offsets=_offsets(names),
    )


def _offsets(names: Sequence[bytes]) -> npt.NDArray[np.int64]:
    return np.fromiter(accumulate(map(len, names), initial=0), dtype=np.int64, count=len(names) + 1)


def _field(path: Path) -> str:
    """A path as one field of a tab-separated line."""
    return str(path).replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")
