"""Features of person images: any describer over image files, read in the background, kept on disk by content.

A describer maps uint8 RGB images [B, H, W, 3] to named features, each float [B, D]: a backbone's `describe`, or any
module through `normalised`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from personmae.configs import UserError
from personmae.data.images import UnreadableImage, decode, read_bytes, resize
from personmae.data.records import PersonImage
from personmae.evaluation.feature_cache import FeatureCache, KnownFeatures, content_digest, function_identity, module_identity
from personmae.evaluation.progress import Progress

Describe = Callable[[Tensor], Mapping[str, Tensor]]
FeatureArray = npt.NDArray[np.float32]
# auto: bf16 on a CUDA device that has it, else fp32.
Precision = Literal["auto", "fp32", "bf16"]
# Of an image and its mirror image: their mean; or, as layumi's code, their sum at unit length. By cosine both rank alike.
FlipTest = Literal["none", "mean", "unit-sum"]

# New features are kept whenever there are so many: an extraction that was stopped goes on where it was.
SEGMENT_IMAGES = 16_384


def extract_features(
    describe: Describe,
    images: Sequence[PersonImage] | Sequence[Path],
    *,
    size: tuple[int, int],
    batch_size: int = 64,
    num_threads: int = 2,
    device: torch.device | str = "cpu",
    precision: Precision = "auto",
    flip_test: FlipTest = "none",
    cache: FeatureCache | None = None,
    identity: str | None = None,
    progress: bool = True,
    announce: Callable[[str], object] = print,
) -> dict[str, FeatureArray]:
    """The features of all images, in their order.

    size: (H, W) in pixels that images are resized to. num_threads: reading threads, two batches ahead. device: where
    `describe` gets its images. precision: of matrix products, by autocast. flip_test: what becomes of the features of
    the mirror image. cache: where features are kept and looked for; None keeps nothing. identity: the describer's name
    in the cache, which must change whenever its features do; by default what `describer_identity` finds. progress: a
    bar, or lines, on stderr. announce: is told, in a sentence, why features could not be kept.

    Returns name -> float32 [N, D]. Raises UserError if there is no image or one cannot be read, ValueError if
    `describe` gives something other than finite [B, D] features (the message names the image).
    """
    if not images:
        raise UserError("there is no image to extract features from")
    if batch_size < 1 or num_threads < 1:
        raise ValueError(f"batch_size and num_threads must be at least 1, not {batch_size} and {num_threads}")
    device = torch.device(device)
    dtype = choose_precision(precision, device)
    if flip_test not in ("none", "mean", "unit-sum"):
        raise ValueError(f"flip_test is {flip_test!r}; allowed: none, mean, unit-sum")
    paths = [image.path if isinstance(image, PersonImage) else image for image in images]
    keep = _Keeper(None, "", announce)
    if cache is not None:
        identity = identity if identity is not None else describer_identity(describe)
        if identity is None:
            announce("features are not kept: what this describer computes cannot be told from outside; give it an identity")
        else:
            preparation = {"size": list(size), "flip_test": flip_test, "dtype": str(dtype), "device": device.type}
            keep = _Keeper(cache, cache.key(identity, preparation), announce)
    known = keep.open()
    table = _Table(len(paths), known.names)
    described: _Described | None = None
    found: list[tuple[int, bytes]] = []
    bar = Progress(len(paths), "features", shown=progress)
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="evaluation")
    try:
        with bar:
            for batch in _read_batches(pool, paths, size, batch_size, known.rows if keep.cache else None, found, bar):
                features = describe_batch(describe, torch.from_numpy(batch.pixels).to(device), dtype, flip_test)
                # One batch late, so that the device computes while the next one is gathered.
                if described is not None:
                    keep.take(described, table.put(described, paths))
                bar.advance(len(batch.rows))
                described = _Described(batch.rows, batch.digests, features)
            if described is not None:
                keep.take(described, table.put(described, paths))
        if found:
            known.gather([digest for _, digest in found], table.array, [row for row, _ in found])
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        keep.flush()
        known.close()
    return table.arrays


def choose_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """The number format of matrix products on a device. Raises ValueError for a word that is none of `Precision`."""
    if precision not in ("auto", "fp32", "bf16"):
        raise ValueError(f"precision is {precision!r}; allowed: auto, fp32, bf16")
    if precision == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if has_bf16 else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


@dataclass(frozen=True)
class Normalised:
    """A describer made of a module; see `normalised`."""

    module: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str

    def __call__(self, images: Tensor) -> Mapping[str, Tensor]:  # uint8 [B, H, W, 3] -> name: float [B, D]
        if self.module.training:
            raise ValueError("the module is in training mode; call .eval() on it before extracting features")
        shift = torch.tensor(self.mean, device=images.device)
        scale = torch.tensor(self.std, device=images.device)
        output = self.module(((images.float() / 255 - shift) / scale).permute(0, 3, 1, 2).contiguous())
        return output if isinstance(output, Mapping) else {self.name: output}


def normalised(module: nn.Module, mean: Sequence[float], std: Sequence[float], name: str = "feature") -> Describe:
    """A describer from a module that takes float [B, 3, H, W] images.

    mean, std: per RGB channel, for values in [0, 1]. name: what a single output [B, D] is called; a module may also
    return a mapping of them. The describer raises ValueError if the module is in training mode: dropout and batch
    statistics would make features a matter of chance.
    """
    return Normalised(module, tuple(mean), tuple(std), name)


def describer_identity(describe: Describe) -> str | None:
    """A digest of all that decides a describer's features, which takes a second for a large network; None where it cannot be told.

    It can be told of a module's method (weights, settings, source), of `normalised`, and of this project's own functions.
    """
    if isinstance(describe, Normalised):
        inner = module_identity(describe.module)
        return None if inner is None else f"normalised {describe.mean} {describe.std} {describe.name} {inner}"
    owner = describe if isinstance(describe, nn.Module) else getattr(describe, "__self__", None)
    if isinstance(owner, nn.Module):
        inner = module_identity(owner)
        return None if inner is None else f"{getattr(describe, '__name__', 'forward')} of {inner}"
    return function_identity(describe)


class _Read(NamedTuple):
    digest: bytes
    pixels: npt.NDArray[np.uint8] | None  # [H, W, 3]; None: the features are known


class _Batch(NamedTuple):
    rows: list[int]
    digests: list[bytes]
    pixels: npt.NDArray[np.uint8]  # [B, H, W, 3]


class _Described(NamedTuple):
    rows: list[int]
    digests: list[bytes]
    features: Mapping[str, Tensor]


class _Table:
    """The features of all images, filled in as they come."""

    def __init__(self, num_images: int, cached_names: Sequence[str]) -> None:
        self.num_images, self.cached_names = num_images, list(cached_names)
        self.arrays: dict[str, FeatureArray] = {}

    def put(self, described: _Described, paths: Sequence[Path]) -> dict[str, FeatureArray]:
        part = {name: _checked(name, feature, [paths[row] for row in described.rows]) for name, feature in described.features.items()}
        if self.arrays and part.keys() != self.arrays.keys():
            raise ValueError(f"describe gave features {sorted(part)} after {sorted(self.arrays)}")
        if self.cached_names and sorted(part) != self.cached_names:
            raise ValueError(f"describe gave features {sorted(part)}, but {self.cached_names} are kept under its identity: give it another identity")
        for name, feature in part.items():
            self.array(name, feature.shape[1])[described.rows] = feature
        return part

    def array(self, name: str, width: int) -> FeatureArray:
        array = self.arrays.get(name)
        if array is None:
            array = self.arrays[name] = np.empty((self.num_images, width), np.float32)
        if array.shape[1] != width:
            raise ValueError(f"feature {name!r} has {width} dimensions after {array.shape[1]}")
        return array


@dataclass
class _Keeper:
    """Gives new features to the cache, some thousand at a time; without a cache it does nothing."""

    cache: FeatureCache | None
    key: str
    announce: Callable[[str], object]

    def __post_init__(self) -> None:
        self.digests: list[bytes] = []
        self.parts: list[dict[str, FeatureArray]] = []

    def open(self) -> KnownFeatures:
        return self.cache.open(self.key) if self.cache is not None else KnownFeatures()

    def take(self, described: _Described, part: dict[str, FeatureArray]) -> None:
        if self.cache is None:
            return
        self.digests += described.digests
        self.parts.append(part)
        if len(self.digests) >= SEGMENT_IMAGES:
            self.flush()

    def flush(self) -> None:
        if self.cache is None or not self.parts:
            return
        features = {name: np.concatenate([part[name] for part in self.parts]) for name in self.parts[0]}
        problem = self.cache.add(self.key, self.digests, features)
        self.digests, self.parts = [], []
        if problem:
            self.cache = None
            self.announce(f"features are not kept: {problem}")


def describe_batch(describe: Describe, images: Tensor, dtype: torch.dtype, flip_test: FlipTest) -> Mapping[str, Tensor]:
    """The features of a batch that is on the describer's device: uint8 [B, H, W, 3] -> name: float [B, D]. dtype: of matrix products. flip_test: what
    becomes of the features of the mirror images."""
    # A copy, made before the describer sees the images: whatever it does to them, the mirror image is whole.
    mirrored = images.flip(2) if flip_test != "none" else None
    with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        features = describe(images)
        if mirrored is None:
            return features
        others = describe(mirrored)
    if features.keys() != others.keys():
        raise ValueError(f"describe gave features {sorted(others)} after {sorted(features)}")
    sums = {name: features[name].float() + others[name].float() for name in features}
    if flip_test == "mean":
        return {name: total / 2 for name, total in sums.items()}
    return {name: F.normalize(total, dim=-1, eps=1e-30) for name, total in sums.items()}


def _read_batches(
    pool: ThreadPoolExecutor,
    paths: Sequence[Path],
    size: tuple[int, int],
    batch_size: int,
    known: Container[bytes] | None,
    found: list[tuple[int, bytes]],
    bar: Progress,
) -> Iterator[_Batch]:
    """Batches of the images that are not known, in order, the last one smaller; the others go into `found`. At most two batches of images wait.

    known: content digests whose features are held; None: nothing is, and nothing need be digested."""
    waiting: deque[Future[_Read]] = deque()
    rows: list[int] = []
    images: list[_Read] = []
    submitted = 0
    for row in range(len(paths)):
        while submitted < min(row + 2 * batch_size, len(paths)):
            waiting.append(pool.submit(_read, paths[submitted], size, known))
            submitted += 1
        image = waiting.popleft().result()
        if image.pixels is None:
            found.append((row, image.digest))
            bar.advance(1)
            continue
        rows.append(row)
        images.append(image)
        if len(rows) == batch_size or row == len(paths) - 1:
            yield _batch(rows, images)
            rows, images = [], []
    if rows:
        yield _batch(rows, images)


def _batch(rows: list[int], images: Sequence[_Read]) -> _Batch:
    return _Batch(rows, [image.digest for image in images], np.stack([image.pixels for image in images if image.pixels is not None]))


def _read(path: Path, size: tuple[int, int], known: Container[bytes] | None) -> _Read:
    try:
        data = read_bytes(path)
        digest = content_digest(data) if known is not None else b""
        # The bytes that were digested are those that are decoded: a file that changes meanwhile does no harm.
        return _Read(digest, None if known is not None and digest in known else resize(decode(data, path), size))
    except UnreadableImage as error:
        raise UserError(
            f"{error}; every image of a query or gallery is needed: replace the file, or remove it from the set"
        ) from error


def _checked(name: str, feature: Tensor, paths: Sequence[Path]) -> FeatureArray:
    if feature.ndim != 2 or len(feature) != len(paths):
        raise ValueError(f"feature {name!r} has shape {tuple(feature.shape)}; [{len(paths)}, D] is wanted")
    array = feature.detach().float().cpu().numpy()
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if len(bad):
        raise ValueError(
            f"feature {name!r} of {paths[bad[0]]} is not finite ({len(bad)} of {len(paths)} images of this batch)"
        )
    return array
