"""An index as a file of its run: the images that a run is over, whatever has become of them since.

What a step sees is a function of the index. So a run that goes on uses the index that it began with: a file that has gone bad or come new since then
must not make it another run (the loader replaces what it can no longer read).
"""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from personmae.configs import UserError
from personmae.data.image_index import ImageIndex
from personmae.data.storage import FileStorage, ShardStorage, Storage
from personmae.whole_files import whole_file

_COLUMNS = ("heights", "widths", "num_bytes", "checksums", "plain", "offsets")


@dataclass(frozen=True)
class KeptIndex:
    """What such a file holds."""

    source: Path  # absolute, the folder or list that was indexed
    index: ImageIndex


def keep_index(source: Path, index: ImageIndex, path: Path) -> None:
    """Write the index of a source, whole or not at all. Raises UserError naming the file if the disk refuses."""
    texts = {
        "source": os.fsencode(source.absolute()),
        "root": os.fsencode(index.root),
        "names": index.names,
        "rejected": json.dumps(index.rejected).encode(),
    }
    arrays: dict[str, Any] = {name: getattr(index, name) for name in _COLUMNS}
    arrays |= {name: np.frombuffer(text, dtype=np.uint8) for name, text in texts.items()}
    if isinstance(index.storage, ShardStorage):
        arrays["shards"] = np.frombuffer(json.dumps(index.storage.shards).encode(), dtype=np.uint8)
        arrays |= {"shard_numbers": index.storage.shard_numbers, "positions": index.storage.positions}
    with whole_file(path) as file:
        np.savez(file, **arrays)


def read_kept_index(path: Path) -> KeptIndex:
    """What such a file holds. Raises UserError naming it if it is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as saved:
            source, root, names, rejected = (saved[name].tobytes() for name in ("source", "root", "names", "rejected"))
            columns = {name: saved[name] for name in _COLUMNS}
            entries = [(str(file), str(reason)) for file, reason in json.loads(rejected)]
            folder = Path(os.fsdecode(root))
            storage: Storage = FileStorage(folder)
            if "shards" in saved:
                shards = tuple(str(name) for name in json.loads(saved["shards"].tobytes()))
                storage = ShardStorage(folder, shards, saved["shard_numbers"], saved["positions"], columns["num_bytes"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"the index of the run, {path}, cannot be read ({error}); restore it, or begin another run") from error
    index = ImageIndex(storage=storage, names=names, rejected=entries, rejected_file=None, **columns)
    return KeptIndex(Path(os.fsdecode(source)), index)
