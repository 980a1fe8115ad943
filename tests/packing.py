"""Packs for tests."""

import hashlib
from pathlib import Path
from typing import Any

from personmae.data.packs.examining import PackSettings
from personmae.data.packs.making import Share, make_pack
from personmae.data.packs.manifest import Manifest


def ignore(message: str) -> None:
    del message


def pack(source: Path, folder: Path, *, share: Share | None = None, say: Any = ignore, **settings: Any) -> Manifest | None:
    """Packs in this process, 8 images a shard."""
    return make_pack(source, folder, PackSettings(**{"images_per_shard": 8, **settings}), share or Share(), say=say, progress=False)


def fingerprint(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of every file of a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()
    }
