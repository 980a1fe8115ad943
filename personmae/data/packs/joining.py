"""The end of packing: the records of all shards become the index, the lists of what is left out, and the manifest."""

from __future__ import annotations

import hashlib
import os
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from personmae.configs import UserError
from personmae.data.packs.duplicates import Duplicates
from personmae.data.packs.entries import Entries, compressed_identity
from personmae.data.packs.examining import PackSettings
from personmae.data.packs.jobs import ShardRecord
from personmae.data.packs.manifest import MANIFEST_FILE, Manifest, PackedFile, manifest_bytes
from personmae.data.packs.shards import shard_name
from personmae.data.packs.transcoding import Change
from personmae.whole_files import whole_file, write_whole

REJECTED_FILE = "rejected.tsv"
DUPLICATES_FILE = "duplicates.tsv"
INDEX_FOLDER = "index"
ASPECT_EDGES = np.round(np.arange(0, 2.01, 0.05), 2)
SIDE_EDGES_PX = np.array([0, 32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024, 1536, 2048, 4096, 16_384])


def join_shards(
    source: Path, folder: Path, entries: Entries, records: list[ShardRecord], duplicates: Duplicates | None, settings: PackSettings
) -> Manifest:
    """Write the index, the lists and, last, the manifest. Raises UserError if there is no image, or if the disk refuses."""
    reasons = {row: reason for record in records for row, reason in record.rejected.items()}
    rejected = [(os.fsdecode(entries.names[row]), reasons[row]) for row in sorted(reasons)] + entries.refused
    write_whole(folder / REJECTED_FILE, _table(["path", "reason"], rejected))
    written = [(number, record) for number, record in enumerate(records) if record.num_bytes]
    if not written:
        first, reason = rejected[0]
        raise UserError(f"none of the {len(rejected)} images of {source} can be used; the first is {first}: {reason}")
    if duplicates is not None:
        write_whole(folder / DUPLICATES_FILE, _table(["path", "same as", "bits that differ"], _duplicate_lines(entries, duplicates)))

    def joined(name: str) -> npt.NDArray[Any]:
        return np.concatenate([record.columns[name] for _, record in written])

    rows = joined("rows")
    order = np.argsort(rows)
    # Samples are numbered by the rank of their names, as in an index of files.
    names = [entries.names[row] for row in rows[order].tolist()]
    changes = joined("changes")
    heights, widths = joined("heights")[order], joined("widths")[order]
    shard_numbers = np.repeat(np.arange(len(written), dtype=np.int32), [len(record.columns["rows"]) for _, record in written])
    columns = {
        "shards": shard_numbers[order],
        "positions": joined("positions")[order],
        "lengths": joined("lengths")[order],
        "heights": heights,
        "widths": widths,
        "checksums": joined("checksums")[order],
        "names": np.frombuffer(b"".join(names), dtype=np.uint8),
        "offsets": np.fromiter(accumulate(map(len, names), initial=0), dtype=np.int64, count=len(names) + 1),
    }
    counts = {
        "listed": len(entries) + len(entries.refused),
        "packed": len(names),
        "rejected": len(rejected),
        "duplicates_exact": 0 if duplicates is None else int((duplicates.bits < 0).sum()),
        "duplicates_near": 0 if duplicates is None else int((duplicates.bits >= 0).sum()),
        **{change.name.lower(): int((changes == change).sum()) for change in Change},
    }
    manifest = Manifest(
        num_images=len(names),
        counts=counts,
        statistics=_statistics([record for _, record in written], heights, widths, columns["lengths"]),
        settings=settings.describe(),
        source={
            "name": source.name,
            "kind": entries.kind,
            "listing": entries.listing,
            **({"compressed": compressed_identity(source)} if entries.kind == "tar.gz" else {}),
        },
        shards=tuple(PackedFile(shard_name(number), record.num_bytes, record.sha256, len(record.columns["rows"])) for number, record in written),
        columns=tuple(write_column(folder, name, column) for name, column in columns.items()),
    )
    write_whole(folder / MANIFEST_FILE, manifest_bytes(manifest))
    return manifest


def _statistics(
    records: list[ShardRecord], heights: npt.NDArray[np.int32], widths: npt.NDArray[np.int32], lengths: npt.NDArray[np.int64]
) -> dict[str, Any]:
    """Mean and standard deviation of R, G, B over all pixels, as fractions of 255; quantiles and histograms of the sizes."""
    num_pixels = sum(record.num_pixels for record in records)
    mean = np.sum([record.sums for record in records], axis=0) / num_pixels
    variance = np.sum([record.squares for record in records], axis=0) / num_pixels - mean**2
    aspects = widths / heights

    def quantiles(values: npt.NDArray[Any]) -> list[float]:
        return [round(float(value), 4) for value in np.quantile(values, [0, 0.05, 0.5, 0.95, 1])]

    def histogram(values: npt.NDArray[Any], edges: npt.NDArray[Any]) -> dict[str, list[Any]]:
        return {"edges": edges.tolist(), "counts": np.histogram(np.minimum(values, edges[-1]), edges)[0].tolist()}

    return {
        "mean": [round(float(value) / 255, 6) for value in mean],
        "std": [round(float(value) / 255, 6) for value in np.sqrt(np.maximum(variance, 0))],
        "quantiles": "0, 5, 50, 95, 100 %",
        "heights_px": quantiles(heights),
        "widths_px": quantiles(widths),
        "aspects": quantiles(aspects),
        "image_bytes": quantiles(lengths),
        "total_bytes": int(lengths.sum()),
        "aspect_histogram": histogram(aspects, ASPECT_EDGES),
        "height_histogram": histogram(heights, SIDE_EDGES_PX),
        "width_histogram": histogram(widths, SIDE_EDGES_PX),
    }


class _HashingFile:
    """Takes what is written to a file into account."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.hash = hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        self.num_bytes += len(data)
        return self._file.write(data)


def write_column(folder: Path, name: str, column: npt.NDArray[Any]) -> PackedFile:
    """Write a column of the index of a pack."""
    file_name = f"{INDEX_FOLDER}/{name}.npy"
    (folder / INDEX_FOLDER).mkdir(exist_ok=True)
    with whole_file(folder / file_name) as file:
        hashing = _HashingFile(file)
        np.lib.format.write_array(hashing, column, allow_pickle=False)  # type: ignore[arg-type]
    return PackedFile(file_name, hashing.num_bytes, hashing.hash.hexdigest())


def _duplicate_lines(entries: Entries, duplicates: Duplicates) -> list[tuple[str, ...]]:
    pairs = zip(duplicates.rows.tolist(), duplicates.originals.tolist(), duplicates.bits.tolist(), strict=True)

    def name(row: int) -> str:
        return os.fsdecode(entries.names[row])

    return [(name(row), name(original), "same content" if bits < 0 else str(bits)) for row, original, bits in pairs]


def _table(header: list[str], lines: list[tuple[str, str]] | list[tuple[str, ...]]) -> bytes:
    """Tab-separated lines; tabs and ends of lines within a field are written as backslash sequences."""

    def field(text: str) -> str:
        return text.replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")

    text = "".join("\t".join(map(field, line)) + "\n" for line in [tuple(header), *lines])
    return text.encode("utf-8", "surrogateescape")
