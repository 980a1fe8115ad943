"""Features of person crops in three lines, from a checkpoint of any kind.

    from personmae import FeatureExtractor

    extractor = FeatureExtractor("runs/small")             # a run folder, an encoder or fine-tuned model, an export, another project's ViT
    features = extractor(["a.jpg", "b.jpg"])               # [2, D], float32, unit length: features @ features.T are cosine similarities
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from personmae.configs import UserError
from personmae.data.image_index import ImageIndex, build_index
from personmae.data.images import UnreadableImage, read_image, resize
from personmae.evaluation.feature_cache import module_identity
from personmae.evaluation.features import Describe, Precision, choose_precision, describe_batch
from personmae.evaluation.progress import Progress
from personmae.interop.initial_weights import encoder_of, load_initial, load_state
from personmae.models.attention import choose_attention, set_attention
from personmae.models.identity_head import describe_of_camera
from personmae.models.reid import ReidConfig, ReidEncoder
from personmae.models.weights import REID_FILE, is_reid_file, load_reid
from personmae.training.processes import choose_device

UInt8Array = npt.NDArray[np.uint8]
# One image: a file, an array or tensor (uint8 [H, W, 3], or a float tensor [3, H, W] in [0, 1]), or a PIL image.
OneImage = Any
UNKNOWN_CAMERA = -1


class FolderFeatures(NamedTuple):
    """The features of a folder."""

    names: list[str]  # relative to the folder, in its order
    features: npt.NDArray[np.float32]  # [N, D], unit length
    rejected: list[tuple[str, str]]  # paths of files that are no usable images, and why


class FeatureExtractor:
    """Images in, features out; batches, threads that read, the device and its number format are seen to."""

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        image_size: tuple[int, int] | None = None,
        device: str = "auto",
        precision: Precision = "auto",
        batch_size: int = 64,
        num_threads: int = 2,
        feature: Literal["class", "mean"] = "class",
        flip: bool = False,
    ) -> None:
        """checkpoint: a run folder (its fine-tuned model where there is one, else its encoder), a file of ours, an export, or the file of another
        project's ViT. image_size: (height, width) in pixels that images are resized to; None for the checkpoint's own. device: auto, cpu, cuda or
        cuda:N. precision: auto is bf16 on a CUDA device that has it, else fp32. feature: of an encoder, the class token or the mean of the patches;
        a fine-tuned model has its own. flip: the mean with the features of the mirror image. Raises ValueError for what does not fit."""
        if batch_size < 1 or num_threads < 1:
            raise UserError(f"batch_size and num_threads must be at least 1, not {batch_size} and {num_threads}")
        self.device = choose_device(device, local_rank=None)
        self.batch_size, self.num_threads, self.flip = batch_size, num_threads, flip
        self.dtype = choose_precision(precision, self.device)
        self._model, self._name, self._describe, self.image_size = _open(Path(checkpoint).expanduser(), image_size, feature, self.device, self.dtype)
        probe = describe_batch(self._describe, torch.zeros(1, *self.image_size, 3, dtype=torch.uint8, device=self.device), self.dtype, "none")
        self.feature_dim = probe[self._name].shape[1]

    def __call__(self, images: OneImage | Sequence[OneImage]) -> Tensor:
        """Features of unit length, float32 [N, D] on the CPU; a single image gives [1, D].

        images: a path; a uint8 array or tensor RGB [H, W, 3] or [N, H, W, 3]; a float tensor [3, H, W] or [N, 3, H, W] with values in [0, 1]; a PIL
        image; or a sequence of these. Raises ValueError naming a file that cannot be read, or an image of another kind.
        """
        items = _items(images)
        if not items:
            return torch.empty(0, self.feature_dim)
        return torch.cat([features for features, _ in self._batches(items, self._load)])

    def folder(self, folder: str | Path, progress: bool = True, say: Callable[[str], object] = print) -> FolderFeatures:
        """Features of all images of a folder at any depth, a list of paths, or a pack; see `build_index`. Broken files are left out and told.

        progress: a bar. Raises ValueError if there is no usable image, or one goes bad meanwhile."""
        index = build_index(Path(folder).expanduser(), progress=progress, announce=say)
        rows = self.of_index(index, range(len(index)), progress)
        return FolderFeatures([index.name(sample) for sample in range(len(index))], rows, list(index.rejected))

    def of_index(self, index: ImageIndex, samples: Sequence[int], progress: bool = True) -> npt.NDArray[np.float32]:
        """Features of some images of an index, float32 [N, D] of unit length. Raises ValueError if one has gone bad since it was indexed."""
        features = np.empty((len(samples), self.feature_dim), np.float32)
        done = 0
        with Progress(len(samples), "features", shown=progress) as bar:
            for part, count in self._batches(samples, lambda sample: resize(index.image(sample), self.image_size)):
                features[done : done + count] = part.numpy()
                done += count
                bar.advance(count)
        return features

    @functools.cached_property
    def identity(self) -> str:
        """A text that is the same for extractors that give the same features: of the weights, the size of the images and the flip."""
        return f"{module_identity(self._model)} {self._name} {self.image_size} {self.flip} {self.dtype}"

    def _batches(self, items: Sequence[Any], load: Callable[[Any], UInt8Array]) -> Iterator[tuple[Tensor, int]]:
        """Features of the items, batch by batch; the next batch is read while one is computed."""
        size = self.batch_size
        with ThreadPoolExecutor(self.num_threads, thread_name_prefix="features") as pool:
            waiting: list[Future[UInt8Array]] = [pool.submit(load, item) for item in items[:size]]
            for start in range(0, len(items), size):
                ahead = [pool.submit(load, item) for item in items[start + size : start + 2 * size]]
                try:
                    pixels = np.stack([future.result() for future in waiting])
                except UnreadableImage as error:
                    pool.shutdown(cancel_futures=True)
                    raise UserError(f"{error}; replace the file, or leave it out") from error
                yield self._features(pixels), len(pixels)
                waiting = ahead

    def _features(self, pixels: UInt8Array) -> Tensor:
        batch = torch.from_numpy(pixels).to(self.device)
        found = describe_batch(self._describe, batch, self.dtype, "mean" if self.flip else "none")[self._name]
        return F.normalize(found.float(), dim=1).cpu()

    def _load(self, item: OneImage) -> UInt8Array:
        return resize(read_image(Path(item).expanduser()) if isinstance(item, str | Path) else _pixels(item), self.image_size)


def _open(
    checkpoint: Path, image_size: tuple[int, int] | None, feature: Literal["class", "mean"], device: torch.device, dtype: torch.dtype
) -> tuple[nn.Module, str, Describe, tuple[int, int]]:
    """The model on its device, the name of the feature, its describer, and the size of its images."""
    tuned = checkpoint / REID_FILE if checkpoint.is_dir() else checkpoint
    model: nn.Module
    if is_reid_file(tuned):
        scored = load_reid(tuned).scored
        if image_size not in (None, scored.config.image_size):
            raise UserError(f"{tuned} was fine-tuned on images of {scored.config.image_size} pixels; leave image_size out")
        model, name, size = scored, "feature", scored.config.image_size
        describe: Describe = functools.partial(describe_of_camera, scored, UNKNOWN_CAMERA) if scored.num_cameras else scored.describe
    else:
        if feature not in ("class", "mean"):
            raise UserError(f"feature is {feature!r}; an encoder has class and mean")
        state = load_state(checkpoint, image_size=image_size)
        size = state.config.image_size
        if state.stride_px < state.config.patch_px:
            # An export for overlapping patches, with positions of its own.
            config = ReidConfig(image_size=size, stride_px=state.stride_px, feature=feature, drop_path=0.0)
            model = ReidEncoder(load_initial(checkpoint, image_size=size).encoder, config)
            model.encoder.set_positions(state.tensors["pos_embed"], learned=state.learned_positions)
            name, describe = "feature", model.describe
        else:
            encoder = encoder_of(state)
            model, name, describe = encoder, feature, encoder.describe
    model.to(device).eval()
    set_attention(model, choose_attention("auto", device, "bf16" if dtype == torch.bfloat16 else "fp32"))
    return model, name, describe, size


def _items(images: OneImage | Sequence[OneImage]) -> Sequence[OneImage]:
    """A single image as a list of it, a batch as its images."""
    if isinstance(images, np.ndarray | Tensor):
        if images.ndim not in (3, 4):
            raise UserError(f"an array of images is [H, W, 3] or [N, H, W, 3], not {list(images.shape)}")
        return list(images) if images.ndim == 4 else [images]
    if isinstance(images, Path | str) and Path(images).expanduser().is_dir():
        raise UserError(f"{images} is a folder: give it to extractor.folder(...), which tells the names of its images")
    return list(images) if isinstance(images, Sequence) and not isinstance(images, str) else [images]


def _pixels(image: OneImage) -> UInt8Array:
    """An image in memory as uint8 [H, W, 3]. Raises UserError for anything else."""
    if isinstance(image, Tensor) and image.is_floating_point():
        if image.ndim != 3 or image.shape[0] != 3:
            raise UserError(f"a float image is a tensor [3, H, W], not {list(image.shape)}")
        low, high = float(image.min()), float(image.max())
        if not (low >= 0.0 and high <= 1.0):
            raise UserError(f"a float image has values in [0, 1], not from {low:g} to {high:g}: give it before it is normalised, or as uint8")
        return np.ascontiguousarray((image.detach().float().cpu() * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
    if hasattr(image, "convert"):
        return np.asarray(image.convert("RGB"))
    array = image.detach().cpu().numpy() if isinstance(image, Tensor) else image
    if not isinstance(array, np.ndarray):
        raise UserError(f"an image is a path, an array, a tensor or a PIL image, not {type(image).__name__}")
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or array.size == 0:
        raise UserError(f"an image in memory is uint8 RGB [H, W, 3], not {array.dtype} {list(array.shape)}")
    return np.ascontiguousarray(array)
