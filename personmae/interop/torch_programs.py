"""Programs that PyTorch runs without this project: torch.export's, and AOTInductor's, which is compiled and runs from C++ too.

Inputs and outputs: see pixel_features.py. `torch.export.load(FILE).module()(images)`, `torch._inductor.aoti_load_package(FILE)(images)`.
"""

from __future__ import annotations

import io
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from personmae.configs import UserError
from personmae.interop.initial_weights import FittedState
from personmae.interop.pixel_features import PixelFeatures, example_images
from personmae.whole_files import write_whole

MAX_BATCH = 4096


def write_program(path: Path, state: FittedState, compiled: bool) -> None:
    """Write a .pt2 file, whole or not at all, for batches of 1 to 4096. compiled: by AOTInductor, for this machine's kind of processor, which
    needs a C++ compiler. Raises UserError where there is none, for another suffix, or if the disk refuses."""
    if path.suffix != ".pt2":
        raise UserError(f"{path}: programs of torch are written as .pt2; give such a name")
    content = io.BytesIO()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
            images = torch.from_numpy(example_images(state, 2))
            program = torch.export.export(PixelFeatures(state).eval(), (images,), dynamic_shapes={"images": {0: batch}})
            if compiled:
                torch._inductor.aoti_compile_and_package(program, package_path=content)
            else:
                torch.export.save(program, content)
    except (OSError, subprocess.CalledProcessError, torch._inductor.exc.InductorError) as error:
        raise UserError(f"cannot write {path} ({str(error).splitlines()[0]}); AOTInductor needs a C++ compiler (g++)") from error
    write_whole(path, content.getvalue(), parents=True)


def open_program(path: Path, compiled: bool) -> Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]:
    """A function from images to features, on the CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run: Any = torch._inductor.aoti_load_package(str(path)) if compiled else torch.export.load(path).module()

    def features(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        with torch.no_grad():
            return run(torch.from_numpy(images)).numpy()

    return features
