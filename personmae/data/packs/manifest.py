"""manifest.json of a pack: what it holds, how it was made, and the length and SHA-256 of each of its files.

It is written last, so a folder with a manifest is a whole pack. It names no folder of the machine and no date: the same source packed alike gives the
same bytes.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from personmae.configs import UserError, from_plain, to_plain

# How shards are checked when a pack is opened: "auto" by SHA-256, remembered while length and modification time stay; "always" by SHA-256 each time;
# "no" by length alone.
Verify = Literal["auto", "always", "no"]

MANIFEST_FILE = "manifest.json"
WORK_FOLDER = "work"
FORMAT = "personmae-pack"
VERSION = 1
MAX_MANIFEST_BYTES = 256 << 20
SHARD_NAME = re.compile(r"shard-\d{6,}\.tar")
COLUMN_NAME = re.compile(r"index/[a-z_]+\.npy")
_CURE = "copy it again from where the pack was made, or pack again into a new folder"
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class PackedFile:
    """A file of a pack. name: relative to the pack's folder. num_images: in it; 0 for a column of the index."""

    name: str
    num_bytes: int
    sha256: str
    num_images: int = 0


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What manifest.json says. counts and statistics are for people; settings: those that the bytes depend on."""

    format: str = FORMAT
    version: int = VERSION
    num_images: int
    counts: dict[str, Any]
    statistics: dict[str, Any]
    settings: dict[str, Any]
    source: dict[str, Any]
    shards: tuple[PackedFile, ...]
    columns: tuple[PackedFile, ...]


def is_pack(folder: Path) -> bool:
    """Whether a folder is a pack, or the beginning of one. A manifest.json of something else does not make it one."""
    if is_unfinished(folder):
        return True
    try:
        with open(folder / MANIFEST_FILE, "rb") as file:
            return f'"{FORMAT}"'.encode() in file.read(256)
    except OSError:
        return False


def is_unfinished(folder: Path) -> bool:
    """Whether packing into a folder has begun and not ended."""
    return (folder / WORK_FOLDER / "plan.json").is_file() and not (folder / MANIFEST_FILE).exists()


def manifest_bytes(manifest: Manifest) -> bytes:
    """The file's content."""
    return (json.dumps(to_plain(manifest), indent=1) + "\n").encode()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a pack. Raises UserError naming the folder if it is unfinished, damaged or of another format.

    It is not trusted: names of files must be those that packing gives, so that none leads out of the folder.
    """
    if is_unfinished(folder):
        raise UserError(f"{folder} is a pack that is not finished: start the personmae pack command again, it goes on where it stopped")
    file = folder / MANIFEST_FILE
    try:
        if file.stat().st_size > MAX_MANIFEST_BYTES:
            raise UserError(f"{file} is larger than {MAX_MANIFEST_BYTES} bytes, no manifest of a pack: {_CURE}")
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from error
    return parse_manifest(data, str(file))


def parse_manifest(data: bytes, file: str) -> Manifest:
    """The manifest in a file's content. file: its name for messages. Raises UserError as `read_manifest` does."""
    try:
        content = json.loads(data)
    # Deep nesting exhausts the parser's stack.
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error}): {_CURE}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{file} is not the manifest of a pack")
    if content.get("version") != VERSION:
        raise UserError(f"{file} has format version {content.get('version')!r}, this program reads {VERSION}: pack the source again")
    try:
        manifest = from_plain(Manifest, content)
    except (UserError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({error}): {_CURE}") from error
    problem = _problem(manifest)
    if problem:
        raise UserError(f"{file} is damaged ({problem}): {_CURE}")
    return manifest


def _problem(manifest: Manifest) -> str | None:
    for name in ("counts", "statistics", "settings", "source"):
        if not isinstance(getattr(manifest, name), dict):
            return f"{name} is no object"
    for files, pattern in ((manifest.shards, SHARD_NAME), (manifest.columns, COLUMN_NAME)):
        for file in files:
            if not pattern.fullmatch(file.name):
                return f"{file.name!r} is no name of a file of a pack"
            if file.num_bytes < 0 or file.num_images < 0 or not _SHA256.fullmatch(file.sha256):
                return f"impossible entry for {file.name}"
    names = [file.name for file in (*manifest.shards, *manifest.columns)]
    if len(set(names)) != len(names):
        return "a file is named twice"
    if sum(shard.num_images for shard in manifest.shards) != manifest.num_images:
        return f"its shards do not hold {manifest.num_images} images together"
    return None
