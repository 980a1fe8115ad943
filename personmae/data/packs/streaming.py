"""Opening a pack behind an address: its index comes to this machine, its shards stay where they are until training needs them."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from personmae.configs import UserError
from personmae.data.image_index import ImageIndex, user_cache
from personmae.data.packs.manifest import MANIFEST_FILE, MAX_MANIFEST_BYTES, Manifest, PackedFile, parse_manifest
from personmae.data.packs.opening import COLUMN_FILES, map_pack
from personmae.data.remote import Store, StoreError, retried
from personmae.data.shard_cache import ShardCache, StreamConfig
from personmae.data.storage import ShardStorage
from personmae.data.streamed_storage import StreamedStorage
from personmae.whole_files import explained_write, whole_file

Result = TypeVar("Result")

_CURE = "copy the pack there again from where it was made"
_GIB = 1 << 30


def open_streamed_pack(
    address: str, config: StreamConfig, cache_dir: Path | None = None, *, window: int | None, announce: Callable[[str], object] = print
) -> ImageIndex:
    """The index of a pack behind an address, with the samples of the same pack on a disk in the same order.

    cache_dir: where its index is kept; by default a folder for this address and manifest in the user's cache. window: shards that are read at a time,
    see `WindowOrder`; None = all. announce: receives a line.

    The columns of the index are checked by length and SHA-256 each time, shards by length now and by SHA-256 when they arrive. Raises UserError
    naming each file that is missing, truncated or altered, a store that does not answer, or a `config.gib` that is too small, with the cure.
    """
    store = Store(address)
    content = _explained(lambda: _read_manifest(store), config)
    manifest = parse_manifest(content, f"{store.label}/{MANIFEST_FILE}")
    _check_shards(store, manifest, config)
    folder = (config.folder or user_cache() / "shards").expanduser().absolute()
    _check_room(manifest, config, window)
    cache_dir = (cache_dir or _index_folder(store, content)).expanduser().absolute()
    _bring_columns(store, manifest, cache_dir, config)
    index = map_pack(cache_dir, manifest)
    assert isinstance(index.storage, ShardStorage)
    announce(
        f"pack {store.label}: {manifest.num_images} images in {len(manifest.shards)} shards, lengths checked, SHA-256 when they arrive; "
        f"streamed through {folder} ({config.gib:g} GiB)"
    )
    storage = StreamedStorage(
        store,
        ShardCache(folder, store, config.max_bytes, config.retries, config.retry_seconds),
        manifest.shards,
        index.storage.shard_numbers,
        index.storage.positions,
        index.storage.lengths,
        config.fetches,
    )
    return replace(index, storage=storage, rejected=[], rejected_file=None)


def needed_bytes(shards: tuple[PackedFile, ...], window: int | None) -> int:
    """Room that a stream needs for these shards: for any two windows, one that is read and the next one; or for all shards."""
    lengths = sorted((shard.num_bytes for shard in shards), reverse=True)
    return sum(lengths if window is None else lengths[: 2 * window])


def _check_room(manifest: Manifest, config: StreamConfig, window: int | None) -> None:
    needed = needed_bytes(manifest.shards, window)
    if needed > config.max_bytes:
        # Rounded up, so that what is asked for is enough.
        wanted = -(-needed * 100 // _GIB) / 100
        what, other = ("all shards", "the order windows") if window is None else (f"two windows of {window} shards", "a smaller --data.order-window")
        raise UserError(f"stream.gib is {config.gib:g}, and {what} take {wanted:g} GiB: give --data.stream.gib {wanted:g} or more, or {other}")


def _check_shards(store: Store, manifest: Manifest, config: StreamConfig) -> None:
    sizes = _explained(lambda: store.sizes(shard.name for shard in manifest.shards), config)
    problems = []
    for shard in manifest.shards:
        size = sizes.get(shard.name, -1)
        if size == -1:
            problems.append(f"{store.label}/{shard.name} is not there, {_CURE}")
        elif size is not None and size != shard.num_bytes:
            word = "truncated" if size < shard.num_bytes else "altered"
            problems.append(f"{store.label}/{shard.name} is {word}: {size} bytes, {shard.num_bytes} when it was packed; {_CURE}")
    if problems:
        raise UserError("; ".join(problems[:5]) + (f" (and {len(problems) - 5} more files)" if len(problems) > 5 else ""))


def _read_manifest(store: Store) -> bytes:
    content = b""
    for block in store.blocks(MANIFEST_FILE):
        content += block
        if len(content) > MAX_MANIFEST_BYTES:
            raise UserError(f"{store.label}/{MANIFEST_FILE} is larger than {MAX_MANIFEST_BYTES} bytes, no manifest of a pack: {_CURE}")
    return content


def _index_folder(store: Store, manifest: bytes) -> Path:
    key = hashlib.sha256(store.label.encode() + hashlib.sha256(manifest).digest()).hexdigest()[:12]
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", store.label.rpartition("/")[2])[:60].lstrip(".") or "pack"
    return user_cache() / "indexes" / f"{name}-{key}"


def _bring_columns(store: Store, manifest: Manifest, folder: Path, config: StreamConfig) -> None:
    with explained_write(folder, "choose another --data.index-dir"):
        (folder / "index").mkdir(parents=True, exist_ok=True)
    for column in manifest.columns:
        # What a pack of this version does not need stays where it is, whatever its manifest says.
        if column.name in COLUMN_FILES:
            _explained(partial(_bring, store, column, folder / column.name), config)


def _bring(store: Store, file: PackedFile, path: Path) -> None:
    """Have a file of the pack here, as the manifest says it is."""
    with contextlib.suppress(OSError), open(path, "rb") as here:
        if hashlib.file_digest(here, "sha256").hexdigest() == file.sha256:
            return
    digest, length = hashlib.sha256(), 0
    with whole_file(path) as copy:
        for block in store.blocks(file.name):
            length += len(block)
            if length > file.num_bytes:
                break
            digest.update(block)
            copy.write(block)
        if length != file.num_bytes or digest.hexdigest() != file.sha256:
            word = "truncated" if length < file.num_bytes else "altered"
            raise StoreError(f"{store.label}/{file.name} is {word}: it is not what was packed (length and SHA-256); {_CURE}")


def _explained(attempt: Callable[[], Result], config: StreamConfig) -> Result:
    """What `attempt()` gives, with the retries of the config and their last error as one for the user."""
    try:
        return retried(attempt, config.retries, config.retry_seconds)
    except StoreError as error:
        raise UserError(str(error)) from None
