"""Features of person images: any describer over image files, read in the background.

A describer maps uint8 RGB images [B, H, W, 3] to named features, each float [B, D]: a backbone's `describe`, or any
module through `normalised`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from personmae.configs import UserError
from personmae.data.images import UnreadableImage, read_image, resize
from personmae.data.records import PersonImage

Describe = Callable[[Tensor], Mapping[str, Tensor]]
FeatureArray = npt.NDArray[np.float32]


def extract_features(
    describe: Describe,
    images: Sequence[PersonImage] | Sequence[Path],
    *,
    size: tuple[int, int],
    batch_size: int = 64,
    num_threads: int = 2,
    device: torch.device | str = "cpu",
) -> dict[str, FeatureArray]:
    """The features of all images, in their order.

    size: (H, W) in pixels that images are resized to. num_threads: reading threads, two batches ahead. device: where
    `describe` gets its images.

    Returns name -> float32 [N, D]. Raises UserError if there is no image or one cannot be read, ValueError if
    `describe` gives something other than finite [B, D] features (the message names the image).
    """
    if not images:
        raise UserError("there is no image to extract features from")
    if batch_size < 1 or num_threads < 1:
        raise ValueError(f"batch_size and num_threads must be at least 1, not {batch_size} and {num_threads}")
    paths = [image.path if isinstance(image, PersonImage) else image for image in images]
    batches: dict[str, list[FeatureArray]] = {}
    start = 0
    for pixels in _read_batches(paths, size, batch_size, num_threads):
        with torch.no_grad():
            described = describe(torch.from_numpy(pixels).to(device))
        part = {
            name: _checked(name, feature, paths[start : start + len(pixels)]) for name, feature in described.items()
        }
        if start and part.keys() != batches.keys():
            raise ValueError(f"describe gave features {sorted(part)} after {sorted(batches)}")
        for name, feature in part.items():
            batches.setdefault(name, []).append(feature)
        start += len(pixels)
    return {name: np.concatenate(parts) for name, parts in batches.items()}


def normalised(module: nn.Module, mean: Sequence[float], std: Sequence[float], name: str = "feature") -> Describe:
    """A describer from a module that takes float [B, 3, H, W] images.

    mean, std: per RGB channel, for values in [0, 1]. name: what a single output [B, D] is called; a module may also
    return a mapping of them. The describer raises ValueError if the module is in training mode: dropout and batch
    statistics would make features a matter of chance.
    """

    def describe(images: Tensor) -> Mapping[str, Tensor]:  # uint8 [B, H, W, 3] -> name: float [B, D]
        if module.training:
            raise ValueError("the module is in training mode; call .eval() on it before extracting features")
        shift = torch.tensor(mean, device=images.device)
        scale = torch.tensor(std, device=images.device)
        output = module(((images.float() / 255 - shift) / scale).permute(0, 3, 1, 2).contiguous())
        return output if isinstance(output, Mapping) else {name: output}

    return describe


def _read_batches(
    paths: Sequence[Path], size: tuple[int, int], batch_size: int, num_threads: int
) -> Iterator[npt.NDArray[np.uint8]]:
    """Batches uint8 [B, H, W, 3] in order, the last one smaller; at most two batches of images wait in memory."""
    waiting: deque[Future[npt.NDArray[np.uint8]]] = deque()
    with ThreadPoolExecutor(num_threads, thread_name_prefix="evaluation") as pool:
        try:
            submitted = 0
            for start in range(0, len(paths), batch_size):
                while submitted < min(start + 2 * batch_size, len(paths)):
                    waiting.append(pool.submit(_read, paths[submitted], size))
                    submitted += 1
                yield np.stack([waiting.popleft().result() for _ in range(min(batch_size, len(paths) - start))])
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _read(path: Path, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    try:
        return resize(read_image(path), size)
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
