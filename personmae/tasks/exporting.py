"""Weights for other code bases, each with a model card beside it.

personmae export RUN --to transreid --size 384 128 --stride 12         a run folder, for TransReID with overlapping patches
personmae export encoder.safetensors --to timm                         timm.create_model(..., checkpoint_path=FILE)
personmae verify-export RUN --to fast-reid --repo FASTREID             builds fast-reid's own class from a checkout, and compares features
personmae inspect FILE                                                 what each code base would do with this file
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from personmae.configs import UserError
from personmae.interop.checkouts import compare_with_checkout
from personmae.interop.exports import GraphName, describe_state, encoder_name, export_state, how_to_load, write_export
from personmae.interop.initial_weights import FittedState, load_state
from personmae.interop.inspection import inspect_file
from personmae.interop.model_cards import write_model_card
from personmae.interop.onnx_files import open_onnx, write_onnx
from personmae.interop.pixel_features import BATCHES, largest_difference
from personmae.interop.targets import TARGETS, TargetName
from personmae.interop.torch_programs import open_program, write_program
from personmae.recipes.programs import ExportConfig, InspectConfig, VerifyConfig
from personmae.training.environment import commit

Say = Callable[[str], object]


def main(config: ExportConfig, say: Say = print) -> Path:
    """Write the file and its card; returns the file's path. Raises UserError for a checkpoint that does not serve, and for a file that is there."""
    state = _state_of(config)
    path = config.output or _default_path(state, config.to)
    if path.exists() and not config.overwrite:
        raise UserError(f"{path} is there already; name another with --output, or give --overwrite")
    if config.int8 and config.to != "onnx":
        raise UserError(f"--int8 is for onnx, not for {config.to}")
    if config.to in ("onnx", "torch-export", "aotinductor"):
        card = _write_graph(config, path, state, say)
    else:
        export = export_state(state, cast(TargetName, config.to), config.norm, commit())
        write_export(path, export)
        card = export.card
    say(f"{path}: {card['encoder']}, {state.grid[0]} x {state.grid[1]} patches; card: {write_model_card(path, card)}")
    if state.report.left_out:
        say(f"left out: {len(state.report.left_out)} tensors beside the encoder")
    say("\n".join(how_to_load(path, card)))
    return path


def verify(config: VerifyConfig, say: Say = print) -> float:
    """Compare, and say how; returns the largest difference. Raises UserError if it is beyond the tolerance, or if the checkout is none."""
    state = _state_of(config)
    found = compare_with_checkout(state, config.to, config.repo, config.norm)
    height, width = state.config.image_size
    where = f"{found.kind}, {height} x {width} pixels, stride {state.stride_px}, {found.tokens} patches"
    if found.difference > config.tolerance:
        raise UserError(f"{where}: the features differ by {found.difference:.1e} (theirs are about {found.size:.2f}), more than {config.tolerance:g}")
    say(f"{where}: equal, the largest difference is {found.difference:.1e} (features are about {found.size:.2f})")
    return found.difference


def inspect(config: InspectConfig, say: Say = print) -> None:
    """Say what the file is, and a line for each code base."""
    found = inspect_file(config.file, config.size, config.stride)
    say("\n".join([str(config.file), *(f"  {line}" for line in found.about), ""]))
    say(f"at {config.size[0]} x {config.size[1]} pixels, stride {config.stride}:")
    say("\n".join(f"  {verdict}" for verdict in found.verdicts))


def _state_of(config: ExportConfig | VerifyConfig) -> FittedState:
    foreign = config.foreign
    return load_state(
        config.checkpoint,
        foreign.part,
        image_size=config.size,
        stride_px=config.stride,
        grid=foreign.grid,
        num_heads=foreign.num_heads,
        normalisation=foreign.normalisation,
    )


def _write_graph(config: ExportConfig, path: Path, state: FittedState, say: Say) -> dict[str, Any]:
    """Writes a graph, and says how far its features are from PyTorch's; returns its card."""
    if config.norm is not None:
        raise UserError(f"{config.to} normalises its images inside; leave --norm out")
    card = describe_state(state, config.to, (state.config.mean, state.config.std), commit()) | {"int8": config.int8}
    if config.to == "onnx":
        write_onnx(path, state, card, config.int8)
        run = open_onnx(path)
    else:
        write_program(path, state, compiled=config.to == "aotinductor")
        run = open_program(path, compiled=config.to == "aotinductor")
    say(f"its features differ by at most {largest_difference(state, run):.1e} from PyTorch's, in batches of {BATCHES[0]} and {BATCHES[1]}")
    return card


def _default_path(state: FittedState, to: TargetName | GraphName) -> Path:
    height, width = state.config.image_size
    stride = "" if state.stride_px == state.config.patch_px else f"-stride{state.stride_px}"
    suffix = TARGETS[to].suffix if to in TARGETS else ".onnx" if to == "onnx" else ".pt2"
    return Path(f"{encoder_name(state).replace(' ', '-').replace(',', '')}-{to}-{height}x{width}{stride}{suffix}")
