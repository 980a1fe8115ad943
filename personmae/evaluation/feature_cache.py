"""Features kept on disk by content, so that a second evaluation of the same images with the same weights only reads the files.

A feature is found again by the bytes of its image file, whatever the file's name and date, under a key made of all that
decides it: the describer (weights, code), the pre-processing and the versions of the libraries that decode and compute.
What differs in rounding alone (batch size, number of threads) is in no key.

A folder for each key holds segments, `.npz` files that are written beside their place, synced and renamed: processes
write segments of their own and never touch another's, and a file that is damaged all the same (checksums of its
content) counts as absent. All segments together stay below a stated size; those not used for longest go first.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import inspect
import json
import os
import time
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

import personmae_kernels
from personmae.data import images
from personmae.whole_files import whole_path

FeatureArray = npt.NDArray[np.float32]
MAX_GIB = 10.0

_FORMAT = 1
_DIGEST_BYTES = 16
_LIBRARIES = ("torch", "numpy", "opencv-python-headless", "simplejpeg", "pillow")
# Files that a writer left when it was killed.
_STALE_SECONDS = 24 * 3600
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError)


def default_folder() -> Path:
    """The folder of the user's cache that keeps features (`XDG_CACHE_HOME`, or ~/.cache)."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "personmae" / "features"


def content_digest(data: bytes) -> bytes:
    """16 bytes that tell one file's content from every other's."""
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()


@dataclass
class KnownFeatures:
    """What the cache holds under one key. rows: content digest -> (segment, row); names: of the features, empty if nothing is held."""

    rows: dict[bytes, tuple[int, int]] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    _segments: list[Any] = field(default_factory=list)

    def gather(self, digests: Sequence[bytes], out: Callable[[str, int], FeatureArray], places: Sequence[int]) -> None:
        """Copy the features of the digests, all of them in `rows`, to the places of `out(name, D)`, one segment in memory at a time."""
        found = np.array([self.rows[digest] for digest in digests], np.int64).reshape(-1, 2)
        targets = np.asarray(places, np.int64)
        for number in np.unique(found[:, 0]).tolist():
            chosen = found[:, 0] == number
            for place, name in enumerate(self.names):
                array = self._segments[number][f"feature_{place}"]
                out(name, array.shape[1])[targets[chosen]] = array[found[chosen, 1]]

    def close(self) -> None:
        for segment in self._segments:
            segment.close()


@dataclass(frozen=True)
class FeatureCache:
    """A folder of features. folder: by default in the user's cache. max_gib: of all that is kept there; the oldest is removed."""

    folder: Path = field(default_factory=default_folder)
    max_gib: float = MAX_GIB

    def key(self, identity: str, preparation: Mapping[str, Any]) -> str:
        """The name of the folder for a describer and what is done to its images: every part of it decides the features."""
        return hashlib.sha256(json.dumps([_FORMAT, identity, dict(preparation), _environment()], sort_keys=True).encode()).hexdigest()[:32]

    def open(self, key: str) -> KnownFeatures:
        """What is held under a key; damaged segments are removed. To be closed: it holds the files, so that nobody can take them away meanwhile."""
        known = KnownFeatures()
        for path in sorted((self.folder / key).glob("*.npz")):
            try:
                with zipfile.ZipFile(path) as file:
                    intact = file.testzip() is None
                segment = np.load(path, allow_pickle=False) if intact else None
                digests = segment["digests"] if segment is not None else np.zeros((0, _DIGEST_BYTES), np.uint8)
                names = tuple(json.loads(segment["names"].tobytes())) if segment is not None else ()
            except _DAMAGED:
                segment = None
            if segment is None or (known.names and names != known.names) or digests.shape[1:] != (_DIGEST_BYTES,):
                with contextlib.suppress(OSError):
                    path.unlink()
                continue
            known.names = names
            known.rows.update({digest.tobytes(): (len(known._segments), row) for row, digest in enumerate(digests)})
            known._segments.append(segment)
            # The date of a segment says when it was last of use.
            with contextlib.suppress(OSError):
                os.utime(path)
        return known

    def add(self, key: str, digests: Sequence[bytes], features: Mapping[str, FeatureArray]) -> str | None:
        """Keep features, each float32 [N, D], of N contents. Returns why that was not possible, or None."""
        names = sorted(features)
        columns: dict[str, Any] = {f"feature_{place}": features[name] for place, name in enumerate(names)}
        columns["names"] = np.frombuffer(json.dumps(names).encode(), np.uint8)
        columns["digests"] = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, _DIGEST_BYTES)
        num_bytes = sum(column.nbytes for column in columns.values())
        if num_bytes > self.max_gib * 2**30:
            return f"{num_bytes / 2**30:.2f} GiB of features are more than the {self.max_gib:g} GiB that the cache may take"
        final = self.folder / key / f"{uuid.uuid4().hex}.npz"
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            with whole_path(final) as partial, open(partial, "wb") as file:
                np.savez(file, **columns)
            self.remove_oldest()
        except OSError as error:
            return f"cannot write {final.parent}: {error.strerror or error}"
        return None

    def remove_oldest(self) -> None:
        """Remove the segments that were not used for longest until the rest fits, and what killed writers left."""
        segments = []
        for path in self.folder.glob("*/*"):
            # Another process may be removing the same ones.
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                if path.suffix == ".npz":
                    segments.append((status.st_mtime_ns, str(path), status.st_size))
                elif path.suffix == ".partial" and time.time() - status.st_mtime > _STALE_SECONDS:
                    path.unlink()
        excess = sum(size for _, _, size in segments) - self.max_gib * 2**30
        for _, name, size in sorted(segments):
            if excess <= 0:
                break
            excess -= size
            Path(name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                Path(name).parent.rmdir()


def module_identity(module: nn.Module) -> str | None:
    """A digest of all that decides what a module computes: parameters, buffers, settings, and the source files of its classes with those beside them.

    None where that cannot be told: hooks, attributes of unknown kind, a class without a source file (typed into a notebook).
    """
    module = getattr(module, "_orig_mod", module)  # what torch.compile has wrapped
    digest = hashlib.sha256()
    folders: set[Path] = set()
    for name, part in module.named_modules():
        if part._forward_hooks or part._forward_pre_hooks:
            return None
        ancestors = [kind for kind in type(part).__mro__ if kind.__module__.split(".")[0] not in ("torch", "builtins", "typing")]
        sources = [_source_file(kind) for kind in ancestors]
        settings: dict[str, Any] = {}
        for kind in reversed(ancestors):
            settings.update({key: value for key, value in vars(kind).items() if key[:2] != "__" and _said(value) is not None})
        settings.update({key: value for key, value in vars(part).items() if key not in _OF_EVERY_MODULE})
        said = [(key, _said(value)) for key, value in sorted(settings.items())]
        if None in sources or any(text is None for _, text in said):
            return None
        folders.update(Path(source).parent for source in sources if source is not None)
        digest.update(repr((name, part.training, type(part).__qualname__, part.extra_repr(), said)).encode())
    for name, tensor in sorted([*module.named_parameters(), *module.named_buffers()]):
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(_bytes_of(tensor))
    for path in sorted(path for folder in folders for path in folder.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def function_identity(function: object) -> str | None:
    """A digest of a function of this project that has no state; None for any other: what it refers to cannot be told."""
    name, home = getattr(function, "__qualname__", None), getattr(function, "__module__", None)
    if name is None or home is None or not home.startswith("personmae.") or "<" in name or getattr(function, "__closure__", None):
        return None
    source = _source_file(function)
    return None if source is None else hashlib.sha256(f"{home}.{name}".encode() + Path(source).read_bytes()).hexdigest()


def _source_file(thing: Any) -> str | None:
    try:
        return inspect.getsourcefile(thing)
    except (TypeError, OSError):
        return None


def _said(value: Any) -> str | None:
    """What a setting holds, in words that differ where it differs; None for a kind that is not known."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(_bytes_of(value)).hexdigest()}"
    if isinstance(value, list | tuple | set | frozenset | Mapping):
        said = [_said(entry) for entry in ([part for pair in value.items() for part in pair] if isinstance(value, Mapping) else value)]
        return None if None in said else f"{type(value).__name__} {said}"
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return repr(value)
    if is_dataclass(value) and not isinstance(value, type):
        return _said({part.name: getattr(value, part.name) for part in fields(value)})
    if inspect.isroutine(value) and getattr(value, "__closure__", None) is None and "<" not in value.__qualname__:
        return f"{value.__module__}.{value.__qualname__}"
    return None


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _environment() -> list[Any]:
    """Versions of what decodes and computes, and the sources that lie between a file and a describer."""
    files: Iterable[Path] = [Path(images.__file__), *sorted(Path(personmae_kernels.__file__).parent.glob("*.py"))]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    return [[library, _version(library)] for library in _LIBRARIES] + [digest]


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return ""
