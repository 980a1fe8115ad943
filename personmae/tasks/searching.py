"""Finds the pictures of a gallery that show who a query shows. The features of the gallery are kept: a second search reads only what is new.

personmae search QUERY.jpg GALLERY --checkpoint runs/small
personmae search QUERIES GALLERY --checkpoint runs/small --top 20 --json found.json --page found.html
personmae search QUERY.jpg GALLERY --checkpoint runs/small --kind ivf-pq          millions of pictures, by faiss
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from personmae.configs import UserError
from personmae.data.image_index import ImageIndex, build_index
from personmae.data.storage import FileStorage
from personmae.evaluation.gallery_index import GalleryIndex, new_gallery, open_gallery, stamp_of
from personmae.extraction import FeatureExtractor
from personmae.recipes.programs import GalleryConfig, SearchConfig, ServeConfig
from personmae.tasks.extracting import open_extractor
from personmae.visuals.contact_sheet import SheetRow, write_contact_sheet
from personmae.whole_files import write_whole

Say = Callable[[str], object]
# Pictures whose features are kept before the next ones are read: a stopped indexing goes on from there.
SEGMENT = 20_000


def main(config: SearchConfig, say: Say = print) -> list[dict[str, Any]]:
    """Index what is new, search, print the table, write what is asked for; returns a dict for each query, as in the JSON.

    Raises UserError for paths that do not hold what they should, and for an index of other weights."""
    extractor = open_extractor(config)
    gallery = build_gallery(config, extractor, say)
    queries = _queries(config.query, say)
    features = extractor([path for _, path in queries]).numpy()
    # One more: the query itself may be in the gallery.
    hits = gallery.search(features, config.top + 1)
    results: list[dict[str, Any]] = []
    for (name, path), names, similarities in zip(queries, hits.names, hits.similarities, strict=True):
        pairs = [(found, value) for found, value in zip(names, similarities, strict=True) if _place(gallery, found) != path.resolve()]
        results.append({"query": name, "found": [{"name": found, "similarity": round(value, 6)} for found, value in pairs[: config.top]]})
    if not config.quiet:
        say(_table(results))
    if config.json is not None:
        write_whole(config.json, json.dumps(results, indent=1).encode())
        say(f"{config.json}: {len(results)} queries")
    if config.page is not None:
        rows = [
            SheetRow(path, [(_place(gallery, hit["name"]), hit["name"], hit["similarity"]) for hit in result["found"]])
            for (_, path), result in zip(queries, results, strict=True)
        ]
        note = f"{len(gallery):,} pictures of {gallery.root}; cosine similarity. A likeness is no proof of who somebody is."
        say(f"{write_contact_sheet(config.page, rows, 'Search results', note)}: {len(rows)} queries")
    return results


def build_gallery(config: SearchConfig | ServeConfig, extractor: FeatureExtractor, say: Say = print) -> GalleryIndex:
    """The gallery's index, with what has come since it was written, and without what is gone. Raises UserError for one of other weights or another
    folder, and for a kind that is not the index's."""
    source = build_index(config.gallery, announce=say)
    root = Path(source.root).resolve()
    folder = config.index or config.gallery.resolve().with_name(f"{config.gallery.resolve().name}-index")
    index = open_gallery(folder)
    if index is not None:
        _check_same(index, folder, root, extractor, config)
    else:
        index = new_gallery(folder, extractor.identity, root, config.kind or "flat", extractor.feature_dim)
    if not isinstance(source.storage, FileStorage):
        raise UserError(f"{config.gallery} is a pack; a gallery is a folder of files, by whose times it is seen what is new")
    samples = {source.name(sample): sample for sample in range(len(source))}
    try:
        stamps = {name: stamp_of(root / name) for name in samples}
    except OSError as error:
        raise UserError(f"{error.filename} has gone while the gallery was read ({error.strerror}); start it again") from error
    added, gone = index.changes(stamps)
    step = SEGMENT if index.kind == "flat" or index.lists is not None else max(1, len(added))
    for start in range(0, len(added), step):
        part = added[start : start + step]
        rows = extractor.of_index(source, [samples[name] for name in part])
        index.update([(name, stamps[name]) for name in part], rows, gone)
        gone = []
        index.save()
    if gone:
        index.update([], extractor.of_index(source, []), gone)
        index.save()
    say(f"{folder}: {len(index):,} pictures, {len(added):,} new or changed; {index.kind}")
    return index


def _check_same(index: GalleryIndex, folder: Path, root: Path, extractor: FeatureExtractor, config: GalleryConfig) -> None:
    if index.identity != extractor.identity:
        raise UserError(f"{folder} was made with other weights or settings (image size, flip, precision); name another with --index, or delete it")
    if index.root != str(root):
        raise UserError(f"{folder} is of {index.root}, not of {root}; name another with --index")
    if config.kind is not None and config.kind != index.kind:
        raise UserError(f"{folder} is {index.kind}, not {config.kind}; name another with --index, or delete it")


def _queries(source: Path, say: Say) -> list[tuple[str, Path]]:
    """Names and files of the queries: one file, or those of a folder."""
    if source.is_file() and source.suffix.lower() not in (".txt", ".lst"):
        return [(source.name, source)]
    index: ImageIndex = build_index(source, announce=say)
    return [(index.name(sample), Path(index.path(sample))) for sample in range(len(index))]


def _place(gallery: GalleryIndex, name: str) -> Path:
    return Path(gallery.root) / name


def _table(results: Sequence[dict[str, Any]]) -> str:
    lines = []
    for result in results:
        lines.append(result["query"])
        lines += [f"  {rank:3}  {hit['similarity']:7.4f}  {hit['name']}" for rank, hit in enumerate(result["found"], 1)]
    return "\n".join(lines)
