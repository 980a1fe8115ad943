"""ONNX: the encoder for any runtime, images in, features out, in batches of any size. The only file that imports onnx and onnxruntime.

The graph is that of timm's own network, which has no operators of ours; the normalisation of the pixels is inside.

    images     uint8 [batch, height, width, 3] RGB
    features   float32 [batch, D], class token after the final norm; for cosine distances divide by the length
"""

from __future__ import annotations

import importlib.util
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from personmae.configs import UserError
from personmae.interop.initial_weights import CARD, FittedState

OPSET = 18
BATCHES = (1, 3)  # that a file is checked with


class PixelFeatures(nn.Module):
    """Features of uint8 images, by timm's own VisionTransformer."""

    mean: Tensor
    std: Tensor

    def __init__(self, state: FittedState) -> None:
        super().__init__()
        from timm.models.vision_transformer import VisionTransformer

        config = state.config
        self.vit = VisionTransformer(
            img_size=config.image_size,
            patch_size=config.patch_px,
            embed_dim=config.width,
            depth=config.depth,
            num_heads=config.num_heads,
            mlp_ratio=config.mlp_ratio,
            num_classes=0,
        )
        # Overlapping patches, which timm has not: the same convolution in smaller steps.
        patches: Any = self.vit.patch_embed
        patches.proj.stride = (state.stride_px, state.stride_px)
        self.vit.pos_embed = nn.Parameter(torch.empty_like(state.tensors["pos_embed"]))
        self.vit.load_state_dict(state.tensors)
        self.register_buffer("mean", torch.tensor(config.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(config.std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:  # uint8 [B, H, W, 3] -> float32 [B, D]
        pixels = images.permute(0, 3, 1, 2).float() / 255
        return self.vit((pixels - self.mean) / self.std)


def write_onnx(path: Path, state: FittedState, card: Mapping[str, Any]) -> None:
    """Write the encoder as one ONNX file, under a temporary name first; the card is in its metadata. Raises UserError where onnx is missing."""
    _require("onnx", "onnxscript")
    import onnx

    height, width = state.config.image_size
    example = torch.zeros(2, height, width, 3, dtype=torch.uint8)
    with warnings.catch_warnings():
        # The exporter warns of its own internals.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            PixelFeatures(state).eval(),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    onnx.helper.set_model_props(model, {CARD: json.dumps(dict(card))})
    onnx.checker.check_model(model)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(model.SerializeToString())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error}); make room or give write permission there") from error
    finally:
        temporary.unlink(missing_ok=True)


def compare_onnx(path: Path, state: FittedState) -> float:
    """The largest difference between onnxruntime's features of random images and PyTorch's, in several sizes of batch, on the CPU.

    Raises UserError where onnxruntime is missing."""
    _require("onnxruntime")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    model = PixelFeatures(state).eval()
    worst = 0.0
    for batch in BATCHES:
        images = np.random.default_rng(batch).integers(0, 256, (batch, *state.config.image_size, 3), dtype=np.uint8)
        with torch.inference_mode():
            expected = model(torch.from_numpy(images)).numpy()
        (found,) = session.run(["features"], {"images": images})
        worst = max(worst, float(np.abs(found - expected).max()))
    return worst


def _require(*packages: str) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"{' and '.join(missing)} is not installed: pip install -c constraints.txt -e '.[onnx]'")
