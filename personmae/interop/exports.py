"""Weights as files that other code bases read as they are: encoder tensors alone, positions on the exact grid, pixels normalised as they do it."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from safetensors.torch import save
from torch import Tensor

from personmae import __version__
from personmae.configs import UserError, to_plain
from personmae.interop.initial_weights import CARD, NORMALISATIONS, FittedState, Normalisation
from personmae.interop.targets import TARGETS, TargetName
from personmae.models.zoo import ENCODERS
from personmae.whole_files import write_whole

GraphName = Literal["onnx", "torch-export", "aotinductor"]  # files that are no weights, but a graph from pixels to features
# All of them look into it, torchreid into no other.
CONTAINER = "state_dict"
# Loaders look for these in names of tensors, and one of them in the file's path, and then treat the file as another kind.
MISREAD = ("distilled", "head", "dist")


Pixels = tuple[tuple[float, float, float], tuple[float, float, float]]  # mean and std of RGB on the scale [0, 1]


class Export(NamedTuple):
    """What a file for another code base holds."""

    target: TargetName
    tensors: dict[str, Tensor]  # float32 in timm's names
    card: dict[str, Any]  # JSON-ready: configuration, grid, normalisation, and where the weights come from


def fold_normalisation(weight: Tensor, bias: Tensor, old: Pixels, new: Pixels) -> tuple[Tensor, Tensor]:
    """A patch convolution for pixels normalised by other means and deviations, with the same outputs.

    weight: [D, 3, P, P], bias: [D], any float dtype, which is kept; the products are made in float64. old, new: what the convolution was trained
    with, and what it will be given.
    """
    (old_mean, old_std), (new_mean, new_std) = (tuple(torch.tensor(values, dtype=torch.float64) for values in pair) for pair in (old, new))
    wide = weight.double()
    shift = ((new_mean - old_mean) / old_std)[:, None, None]
    folded = wide * (new_std / old_std)[:, None, None]
    return folded.to(weight.dtype), (bias.double() + (wide * shift).sum((1, 2, 3))).to(bias.dtype)


def export_state(state: FittedState, target: TargetName, normalisation: Normalisation | None = None, commit: str = "unknown") -> Export:
    """The tensors of an encoder as a code base wants them. normalisation: of the pixels it will be given; None for what the code base does.

    commit: of this project's checkout, for the card. Raises UserError for a stride that the code base does not have.
    """
    config, kind = state.config, TARGETS[target]
    if state.stride_px < config.patch_px and not kind.strides:
        raise UserError(f"{target} has no overlapping patches: a stride of {state.stride_px} pixels does not fit; leave --stride out")
    wanted = NORMALISATIONS[normalisation or kind.normalisation]
    tensors = dict(state.tensors)
    projection = "patch_embed.proj"
    tensors[f"{projection}.weight"], tensors[f"{projection}.bias"] = fold_normalisation(
        tensors[f"{projection}.weight"], tensors[f"{projection}.bias"], (config.mean, config.std), wanted
    )
    card = describe_state(state, target, wanted, commit)
    return Export(target, tensors, card)


def describe_state(state: FittedState, target: str, pixels: Pixels, commit: str) -> dict[str, Any]:
    """The card of an exported file: JSON-ready. target: a `TargetName` or a `GraphName`. pixels: mean and std of what the network is given."""
    config = state.config
    return {
        "target": target,
        "encoder": encoder_name(state),
        "config": to_plain(config) | {"mean": list(pixels[0]), "std": list(pixels[1])},
        "stride_px": state.stride_px,
        "grid": list(state.grid),
        "trained_with": {"mean": list(config.mean), "std": list(config.std)},
        "learned_positions": state.learned_positions,
        "family": state.report.family,
        "source": Path(state.origin).name,
        "notes": state.notes,
        "left_out": sorted(state.report.left_out),
        "personmae": __version__,
        "commit": commit,
    }


def encoder_name(state: FittedState) -> str:
    """vit-small and so on, or its numbers where it is none of those."""
    config = state.config
    for name, known in ENCODERS.items():
        if (known.width, known.depth, known.num_heads, known.mlp_ratio) == (config.width, config.depth, config.num_heads, config.mlp_ratio):
            return name
    return f"vit {config.width} wide, {config.depth} deep, {config.num_heads} heads"


def write_export(path: Path, export: Export) -> None:
    """Write the file, whole or not at all: safetensors by its suffix, else as torch.save does, {CONTAINER: tensors, CARD: card}.

    Raises UserError for a name that loaders take for another kind of file, and naming the file if the disk refuses.
    """
    if "distilled" in str(path):
        raise UserError(f"{path} has 'distilled' in its name, by which TransReID, its successors and fast-reid cut a token out; name it otherwise")
    wrong = [name for name in export.tensors if any(word in name for word in MISREAD)]
    assert not wrong, f"tensors that loaders skip: {wrong}"
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in export.tensors.items()}
    if path.suffix == ".safetensors":
        content = save(tensors, metadata={"format": "pt", CARD: json.dumps(export.card)})
    else:
        buffer = io.BytesIO()
        torch.save({CONTAINER: tensors, CARD: export.card}, buffer)
        content = buffer.getvalue()
    write_whole(path, content, parents=True)


def how_to_load(path: Path, card: Mapping[str, Any]) -> list[str]:
    """The lines that a user of the code base needs, for this file: settings of its configuration, or code to paste."""
    height, width = card["config"]["image_size"]
    if card["target"] in get_args(GraphName):
        call = {
            "onnx": f'onnxruntime.InferenceSession({str(path)!r}).run(["features"], {{"images": images}})[0]',
            "torch-export": f"torch.export.load({str(path)!r}).module()(images)",
            "aotinductor": f"torch._inductor.aoti_load_package({str(path)!r})(images)",
        }[card["target"]]
        return [f"features = {call}     # images: uint8 [batch, {height}, {width}, 3] RGB"]
    kind = str(card["encoder"]).replace("-", "_")
    values = {
        "file": str(path),
        "encoder": card["encoder"],
        "kind": kind,
        # TransReID's own small ViT is another network; its deit_small is the one of 384 channels.
        "transreid_kind": f"{'deit_small' if kind == 'vit_small' else kind}_patch16_224_TransReID",
        "stride": card["stride_px"],
        "height": height,
        "width": width,
    }
    target: TargetName = card["target"]
    return [line.format(**values) for line in TARGETS[target].use]
