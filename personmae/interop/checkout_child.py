"""Runs the code of a checkout on a file: builds its real class, loads by its own loader, writes features. Started by checkouts.py.

    python -m personmae.interop.checkout_child '{"target": "transreid", "root": CHECKOUT, ...}'

Old code needs names that Python and torch no longer have; they are given back here, for this process alone.
"""

from __future__ import annotations

import collections
import collections.abc
import importlib
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn


def give_back_old_names() -> None:
    """torch._six (TransReID and its successors) and collections.Mapping (fast-reid)."""
    six = types.ModuleType("torch._six")
    six.container_abcs = collections.abc  # type: ignore[attr-defined]
    six.string_classes = str  # type: ignore[attr-defined]
    sys.modules.setdefault("torch._six", six)
    for name in ("Mapping", "MutableMapping", "Sequence", "Iterable"):
        if not hasattr(collections, name):
            setattr(collections, name, getattr(collections.abc, name))


def use_checkout(root: str | Path) -> None:
    """Put a checkout first on the path, with the old names."""
    give_back_old_names()
    sys.path.insert(0, str(root))


def build_transreid(request: dict[str, Any]) -> nn.Module:
    """Its backbone, loaded as with PRETRAIN_CHOICE imagenet."""
    module = importlib.import_module("model.backbones.vit_pytorch")
    ssl = request["target"] == "transreid-ssl"
    small = "vit_small" if ssl else "deit_small"
    name = {"vit-base": "vit_base", "vit-small": small}.get(request["encoder"])
    if name is None:
        raise SystemExit(f"it has no {request['encoder']}, only vit-small and vit-base")
    base = getattr(module, f"{name}_patch16_224_TransReID")(img_size=request["image_size"], stride_size=request["stride"], drop_path_rate=0.0)
    # A file on the exact grid must pass with either ratio.
    arguments = {"hw_ratio": 2} if ssl else {}
    base.load_param(request["file"], **arguments)
    return base


def build_cluster_contrast(request: dict[str, Any]) -> nn.Module:
    """Its model, whose constructor loads."""
    models = importlib.import_module("clustercontrast.models")
    name = request["encoder"].replace("-", "_")
    return models.create(name, img_size=request["image_size"], drop_path_rate=0.0, pretrained_path=request["file"], hw_ratio=2, conv_stem=False)


def build_fast_reid(request: dict[str, Any]) -> nn.Module:
    """Its ViT-B by its own builder; it has no modern ViT-S, so other sizes are its class, filled as its builder does."""
    config = importlib.import_module("fastreid.config").get_cfg()
    backbones = importlib.import_module("fastreid.modeling.backbones.vision_transformer")
    config.INPUT.SIZE_TRAIN = request["image_size"]
    settings = config.MODEL.BACKBONE
    settings.NAME, settings.DEPTH, settings.PRETRAIN, settings.PRETRAIN_PATH = "build_vit_backbone", "base", True, request["file"]
    settings.STRIDE_SIZE, settings.DROP_PATH_RATIO = (request["stride"],) * 2, 0.0
    if request["encoder"] == "vit-base":
        return _Flat(backbones.build_vit_backbone(config))
    from personmae.models.zoo import ENCODERS

    sizes = ENCODERS[request["encoder"]]
    model = backbones.VisionTransformer(
        img_size=request["image_size"],
        stride_size=request["stride"],
        embed_dim=sizes.width,
        depth=sizes.depth,
        num_heads=sizes.num_heads,
        qkv_bias=True,
    )
    found = model.load_state_dict(torch.load(request["file"], weights_only=True)["state_dict"], strict=False)
    assert not found.missing_keys, found
    return _Flat(model)


class _Flat(nn.Module):
    """[B, D, 1, 1] -> [B, D]."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: torch.Tensor) -> torch.Tensor:  # [B, 3, H, W] -> [B, D]
        return self.inner(images).flatten(1)


def build_torchreid(request: dict[str, Any]) -> nn.Module:
    """Our model from its factory, filled by its own loader."""
    models = importlib.import_module("torchreid.models")
    loader = importlib.import_module("torchreid.utils").load_pretrained_weights
    from personmae.interop.torchreid import register

    register(tuple(request["image_size"]), request["stride"])
    model = models.build_model(f"personmae_{request['encoder'].replace('-', '_')}", num_classes=7, loss="triplet", pretrained=False)
    loader(model, request["file"])
    return model


def build_timm(request: dict[str, Any]) -> nn.Module:
    """timm's own network, loaded by its own loader."""
    import timm

    name = request["encoder"].replace("-", "_") + "_patch16_224"
    return timm.create_model(name, img_size=tuple(request["image_size"]), num_classes=0, checkpoint_path=request["file"])


BUILDERS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "transreid": build_transreid,
    "transreid-ssl": build_transreid,
    "cluster-contrast": build_cluster_contrast,
    "fast-reid": build_fast_reid,
    "torchreid": build_torchreid,
    "timm": build_timm,
}


def main(request: dict[str, Any]) -> None:
    """Build, load, run, write; the last line printed says what was built."""
    if request["root"] is not None:
        use_checkout(request["root"])
    model = BUILDERS[request["target"]](request).eval()
    with torch.inference_mode():
        features = model(torch.from_numpy(np.load(request["images"])))
    np.save(request["features"], features.float().numpy())
    inner = model.inner if isinstance(model, _Flat) else model
    print(f"{type(inner).__module__}.{type(inner).__name__}")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
