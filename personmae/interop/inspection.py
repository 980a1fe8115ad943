"""What each code base would do with a file of weights: take it, drop a part of it, or end with an error, and why."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from personmae.configs import UserError
from personmae.interop.initial_weights import NORMALISATIONS, FittedState, load_state, patch_grid, some_of
from personmae.interop.networks import find_networks
from personmae.interop.targets import TARGETS, Target, TargetName
from personmae.interop.weight_files import Placeholder, read_weights
from personmae.models.vit import VisionTransformer, VitConfig

# What is mended by an export, which all reasons end with.
PATCH_PX = 16  # of all their networks
CURE = "personmae export FILE --to {target}"


class Verdict(NamedTuple):
    """What a code base would do with a file."""

    target: TargetName
    loads: bool  # all that its network needs, without an error
    reasons: list[str]  # what it drops, leaves at random, or stumbles over, and what to do

    def __str__(self) -> str:
        return f"{self.target:17} {'loads' if self.loads else 'NO':6} {'; '.join(self.reasons)}".rstrip()


class Inspection(NamedTuple):
    """A file of weights, and what would become of it."""

    about: list[str]  # what the file is
    verdicts: list[Verdict]


def inspect_file(path: Path, image_size: tuple[int, int] = (256, 128), stride_px: int = 16) -> Inspection:
    """What each code base would do with this file, in networks for images of this size (height, width) and this stride, in pixels.

    Raises UserError if the file is missing, damaged or no weights at all; see `read_weights`.
    """
    content, headers = read_weights(path)
    about, state = _describe(path, image_size)
    safe = bool(headers) or path.suffix == ".safetensors"
    verdicts = [_judge(name, target, content, safe, image_size, stride_px) for name, target in TARGETS.items()]
    return Inspection(about, [_with_pixels(verdict, state) if verdict.loads else verdict for verdict in verdicts])


def _describe(path: Path, image_size: tuple[int, int]) -> tuple[list[str], FittedState | None]:
    """What we would take of it ourselves."""
    try:
        state = load_state(path, image_size=image_size)
    except UserError as error:
        return [f"as initial weights of ours: no: {error}"], None
    config = state.config
    about = f"a ViT {config.width} wide, {config.depth} deep, {config.num_heads} heads, patches of {config.patch_px} pixels"
    return [about, *str(state.report).splitlines(), *(f"{name}: {note}" for name, note in state.notes.items())], state


def _with_pixels(verdict: Verdict, state: FittedState | None) -> Verdict:
    """Adds what no loader can see: that the code base normalises pixels otherwise than the file wants them."""
    target = TARGETS[verdict.target]
    if state is None or not state.told_pixels or target.suffix == ".safetensors":
        return verdict
    mean, std = NORMALISATIONS[target.normalisation]
    if (state.config.mean, state.config.std) == (mean, std):
        return verdict
    wanted, given = (", ".join(f"{value:g}" for value in values) for values in (state.config.mean, mean))
    cure = CURE.format(target=verdict.target)
    reason = f"but its features are wrong: the file is for pixels of mean {wanted}, and it normalises by {given}: {cure}"
    return verdict._replace(loads=False, reasons=[*verdict.reasons, reason])


def _judge(name: TargetName, target: Target, content: Mapping[Any, Any], safe: bool, image_size: tuple[int, int], stride_px: int) -> Verdict:
    cure = CURE.format(target=name)
    if not target.plain_vit:
        return Verdict(name, False, [f"its own networks are no plain ViT; through our module, with a file of `{cure}`"])
    if safe and not target.reads_safetensors:
        return Verdict(name, False, [f"it reads files of torch.save, and this is safetensors: {cure}"])
    if not safe and target.suffix == ".safetensors":
        return Verdict(name, False, [f"the file is no safetensors: {cure}"])
    if target.weights_only and _holds_objects(content):
        return Verdict(name, False, [f"torch.load refuses it since torch 2.6: it holds objects beside tensors (as argparse's Namespace): {cure}"])
    tensors = _unwrapped(content, target)
    if not tensors:
        return Verdict(name, False, [f"there are no tensors where it looks for them ({', '.join((*target.unwraps, 'the top'))}): {cure}"])
    return _judge_tensors(name, target, tensors, image_size, stride_px, cure)


def _judge_tensors(
    name: TargetName, target: Target, tensors: dict[str, Tensor], image_size: tuple[int, int], stride_px: int, cure: str
) -> Verdict:
    kept = {}
    dropped = []
    for key, tensor in tensors.items():
        for prefix in target.dropped_prefixes:
            key = key.removeprefix(prefix)
        if any(word in key for word in target.skipped):
            dropped.append(key)
        else:
            kept[key] = tensor
    expected = _expected(kept, tensors)
    if expected is None:
        return Verdict(name, False, [f"it finds no blocks.0.attn.qkv.weight under its names (a prefix in front of all names?): {cure}"])
    reasons = [f"drops {some_of(dropped)}"] if dropped else []
    loads = True
    unknown = [key for key in kept if key not in expected and not key.startswith(("fc.", "head.", "sie_embed"))]
    missing = [key for key in expected if key not in kept]
    if unknown:
        loads = not target.strict_keys
        what = "ends with an error at" if target.strict_keys else "drops"
        reasons.append(f"{what} {some_of(unknown)}, which its network lacks: {cure}")
    if missing:
        loads = False
        reasons.append(f"leaves at random, without a word: {some_of(missing)}" if not target.strict_keys else f"lacks {some_of(missing)}")
    wrong = [key for key, shape in expected.items() if key in kept and kept[key].shape != shape and key != "pos_embed"]
    if wrong:
        loads = False
        reasons.append(f"of another shape than its network's: {some_of(wrong)}")
    problem, note = _positions(kept.get("pos_embed"), target, image_size, stride_px, cure)
    if problem:
        loads = False
        reasons.append(problem)
    if note:
        reasons.append(note)
    if any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in kept.values()):
        reasons.append("the tensors are of 16 bits; they become float32")
    return Verdict(name, loads, reasons)


def _positions(
    table: Tensor | None, target: Target, image_size: tuple[int, int], stride_px: int, cure: str
) -> tuple[str | None, str | None]:
    """Why the positions do not load, and what is to be set."""
    if table is None or table.ndim != 3:
        return None, None
    stride_px = stride_px if target.strides else PATCH_PX
    rows, columns = patch_grid(image_size, PATCH_PX, stride_px)
    here, wanted = table.shape[1] - 1, rows * columns
    size = f"{image_size[0]}x{image_size[1]}, stride {stride_px}"
    if here == wanted:
        return None, None
    exact = f"{cure} --size {image_size[0]} {image_size[1]}" + (f" --stride {stride_px}" if target.strides else "")
    if target.positions == "none":
        return f"{here} positions, and {wanted} are wanted at {size}: {exact}", None
    side = math.isqrt(here)
    if side * side == here:
        note = f"it resizes the {here} positions ({side}x{side}) to {rows}x{columns}"
        if target.positions == "ratio":
            note += ", with the hw ratio 1; 2 ends with an error"
        return None, note
    tall = math.isqrt(2 * here)
    if target.positions == "ratio" and tall * tall == 2 * here and tall % 2 == 0:
        return None, f"set its hw ratio to 2 (PRETRAIN_HW_RATIO, --hw-ratio): it then resizes {tall}x{tall // 2} positions; 1 ends with an error"
    return f"it takes the {here} positions for a square grid, which they are not, and ends with an error at {size}: {exact}", None


def _holds_objects(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_objects, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds_objects, value))
    return isinstance(value, Placeholder)


def _unwrapped(content: Mapping[Any, Any], target: Target) -> dict[str, Tensor]:
    """The tensors that it finds, by its own order of containers."""
    current: Any = content
    if "teacher" in target.unwraps:
        for name in ("model", "state_dict"):
            current = current[name] if isinstance(current.get(name), Mapping) else current
        teacher = current.get("teacher")
        if isinstance(teacher, Mapping):
            names = ((str(key).removeprefix("module."), value) for key, value in teacher.items())
            current = {key.removeprefix("backbone."): value for key, value in names if key.startswith("backbone.")}
    elif "model_ema" in target.unwraps:
        # timm takes the first that is there.
        current = next((current[name] for name in target.unwraps if isinstance(current.get(name), Mapping)), current)
    else:
        for name in target.unwraps:
            current = current[name] if isinstance(current.get(name), Mapping) else current
    return {str(key): value for key, value in current.items() if isinstance(value, Tensor)}


def _expected(kept: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, torch.Size] | None:
    """Names and shapes of a plain ViT of this width and depth; None where there is none under these names."""
    qkv = kept.get("blocks.0.attn.qkv.weight")
    if qkv is None or qkv.ndim != 2 or not find_networks(dict(tensors)):
        return None
    width, depth = qkv.shape[1], 1 + max(int(key.split(".")[1]) for key in kept if key.startswith("blocks.") and key.split(".")[1].isdigit())
    if width % 4:
        return None
    with torch.device("meta"):
        return {key: tensor.shape for key, tensor in VisionTransformer(VitConfig(width=width, depth=depth, num_heads=1)).state_dict().items()}
