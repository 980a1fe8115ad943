"""Holds an export against the code it is for: the real class of a checkout takes the file, and its features are compared with ours.

The checkout's code runs in a process of its own (checkout_child.py), for its packages have names like `model`, `config` and `utils`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from personmae.configs import UserError
from personmae.interop.drop_in import DropInVit
from personmae.interop.exports import encoder_name, export_state, write_export
from personmae.interop.initial_weights import NORMALISATIONS, FittedState, Normalisation
from personmae.interop.targets import TARGETS, TargetName
from personmae.models.zoo import ENCODERS

# Those whose class is built; of timm no checkout is needed. Paths that a checkout must have, below it or below a folder that it may be in.
CHECKABLE: dict[TargetName, tuple[str, tuple[str, ...]]] = {
    "transreid": ("model/backbones/vit_pytorch.py", ("",)),
    "transreid-ssl": ("model/backbones/vit_pytorch.py", ("transreid_pytorch", "")),
    "cluster-contrast": ("clustercontrast/models/vision_transformer.py", ("cluster-contrast-reid", "")),
    "fast-reid": ("fastreid/modeling/backbones/vision_transformer.py", ("",)),
    "torchreid": ("torchreid/models/__init__.py", ("",)),
    "timm": ("", ("",)),
}
NUM_IMAGES = 4
TIMEOUT_SECONDS = 900


class Comparison(NamedTuple):
    """Features of a code base beside ours."""

    difference: float  # the largest of any channel, absolute
    size: float  # root mean square of our features
    kind: str  # the class that was built, and with which file
    tokens: str  # grid of patches


def checkout_root(target: TargetName, repo: Path | None) -> Path | None:
    """The folder of a checkout that holds the code of this target; None for timm. Raises UserError if there is none, or no check of this target."""
    if target not in CHECKABLE:
        raise UserError(f"there is no check of {target}, only of: {', '.join(CHECKABLE)}; its module was tried on a stand-in")
    needed, folders = CHECKABLE[target]
    if not needed:
        return None
    if repo is None:
        raise UserError(f"to check {target}, give --repo FOLDER, a checkout of its code")
    for folder in folders:
        if (repo / folder / needed).is_file():
            return (repo / folder).resolve()
    where = " or ".join(str(Path(folder) / needed) for folder in folders)
    hint = "; the ViTs of Cluster Contrast are in TransReID-SSL's copy of it" if target == "cluster-contrast" else ""
    raise UserError(f"{repo} is no checkout of {target}: it has no {where}{hint}")


def compare_with_checkout(state: FittedState, target: TargetName, repo: Path | None, normalisation: Normalisation | None = None) -> Comparison:
    """Export, let the code base load the file, and compare the features of random images, float32 on the CPU.

    Ours are those of the weights as they are, with the normalisation they were trained with; theirs are of the file, with their own normalisation. Of
    Cluster Contrast the features after its untrained BNNeck, of length 1. Raises UserError if the checkout is none, or with what its code said.
    """
    root = checkout_root(target, repo)
    pixels = torch.from_numpy(np.random.default_rng(0).random((NUM_IMAGES, 3, *state.config.image_size), dtype=np.float32))
    expected = our_features(state, pixels)
    with tempfile.TemporaryDirectory(prefix="personmae-") as folder:
        file, inputs, outputs = (Path(folder) / name for name in ("weights.pth", "images.npy", "features.npy"))
        write_export(file, export_state(state, target, normalisation))
        np.save(inputs, _normalised(pixels, *NORMALISATIONS[normalisation or TARGETS[target].normalisation]).numpy())
        request: dict[str, object] = {
            "target": target,
            "root": None if root is None else str(root),
            "file": str(file),
            "images": str(inputs),
            "features": str(outputs),
            "image_size": list(state.config.image_size),
            "stride": state.stride_px,
            "encoder": encoder_name(state),
        }
        kind = _run_child(request, target)
        found = np.load(outputs)
    if target == "cluster-contrast":
        expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    if found.shape != expected.shape:
        raise UserError(f"{target} gives features {found.shape}, ours are {expected.shape}; is the checkout changed?")
    rows, columns = state.grid
    return Comparison(float(np.abs(found - expected).max()), float(np.sqrt((expected**2).mean())), kind, f"{rows}x{columns}")


def our_features(state: FittedState, pixels: torch.Tensor) -> npt.NDArray[np.float32]:
    """Class tokens after the final norm, float32 [B, D], of RGB images [B, 3, H, W] in [0, 1]. Raises UserError for an encoder of no known size."""
    name = encoder_name(state)
    if name not in ENCODERS:
        raise UserError(f"{state.origin} is a {name}, which no code base builds by name")
    config = state.config
    model = DropInVit(name, pixels=(config.mean, config.std), image_size=config.image_size, stride=state.stride_px).eval()
    model.take(state, fold=False)
    with torch.inference_mode():
        return model.class_token(_normalised(pixels, config.mean, config.std)).numpy()


def _normalised(pixels: torch.Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> torch.Tensor:
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def _run_child(request: dict[str, object], target: str) -> str:
    """Runs the checkout's code; returns what it says it has built."""
    command = [sys.executable, "-m", "personmae.interop.checkout_child", json.dumps(request)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"the code of {target} has not ended after {TIMEOUT_SECONDS} s") from error
    if result.returncode:
        said = (result.stdout + result.stderr).strip()
        if missing := re.search(r"No module named '([\w.]+)'", said):
            raise UserError(f"the code of {target} needs {missing[1]}, which is not installed here: pip install {missing[1].split('.')[0]}")
        last = "\n".join(said.splitlines()[-15:])
        raise UserError(f"the code of {target} does not build or does not take the file; it says:\n{last}")
    return result.stdout.strip().splitlines()[-1]
