"""Weights as files: safetensors, the configuration in the header. Encoders are in timm's names; re-identification models hold their head too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from personmae.configs import UserError, from_plain, to_plain
from personmae.models.identity_head import IdentityHead, IdentityHeadConfig, NeckedEncoder
from personmae.models.reid import ReidConfig, ReidEncoder
from personmae.models.vit import VisionTransformer, VitConfig
from personmae.whole_files import write_whole

ENCODER, REID = "personmae", "personmae-reid"  # names of the header's entry
REID_FILE = "reid.safetensors"  # of a fine-tuning run, the weights of its last epoch
AFTER_NECK = "after-neck"  # name of a note: the features that are compared are those after the neck


def save_encoder(path: Path, encoder: VisionTransformer, notes: Mapping[str, str]) -> None:
    """Write the encoder's weights, float32, whole or not at all. notes: strings kept in the header (run, step).

    Raises UserError naming the file if the disk refuses."""
    _write(path, encoder.state_dict(), ENCODER, to_plain(encoder.config), notes)


def is_encoder_file(path: Path) -> bool:
    """Whether this is a file that `save_encoder` wrote. Raises nothing: of a file that is missing or damaged it says no."""
    return _has_entry(path, ENCODER)


def load_encoder(path: Path) -> VisionTransformer:
    """The encoder of such a file, in eval mode. Raises UserError naming the file if it is missing, damaged or not ours."""
    tensors, headers = _read(path)
    if REID in headers:
        raise UserError(f"{path} holds a re-identification model, not an encoder; give the encoder.safetensors beside it")
    encoder = VisionTransformer(from_plain(VitConfig, _header(path, headers, ENCODER)))
    _fill(path, encoder, tensors)
    return encoder.eval()


class ReidModel(NamedTuple):
    """A re-identification model as read from a file."""

    encoder: ReidEncoder
    head: IdentityHead | None
    notes: dict[str, str]  # of `save_reid`

    @property
    def scored(self) -> ReidEncoder | NeckedEncoder:
        """What is compared at the test: the encoder, or what was trained by its features after the neck (see `AFTER_NECK`) with that neck."""
        return NeckedEncoder(self.encoder, self.head).eval() if self.head is not None and AFTER_NECK in self.notes else self.encoder


def is_reid_file(path: Path) -> bool:
    """Whether this is a file that `save_reid` wrote. Raises nothing: of a file that is missing or damaged it says no."""
    return _has_entry(path, REID)


def save_reid(path: Path, encoder: ReidEncoder, head: IdentityHead | None, notes: Mapping[str, str]) -> None:
    """Write a re-identification model, float32, under a temporary name first. notes: strings kept in the header (run, step).

    `save_encoder(..., plain_encoder(encoder), ...)` writes what timm can read of it. Raises UserError naming the file if the disk refuses."""
    header = {
        "encoder": to_plain(encoder.encoder.config),
        "reid": to_plain(encoder.config),
        "num_cameras": encoder.num_cameras,
        "head": None if head is None else to_plain(head.config),
    }
    tensors = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    if head is not None:
        tensors |= {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
    _write(path, tensors, REID, header, notes)


def load_reid(path: Path) -> ReidModel:
    """The model of such a file, in eval mode. Raises UserError naming the file if it is missing, damaged or not ours."""
    tensors, headers = _read(path)
    header = _header(path, headers, REID)
    encoder = ReidEncoder(VisionTransformer(from_plain(VitConfig, header["encoder"])), from_plain(ReidConfig, header["reid"]), header["num_cameras"])
    head = None if header["head"] is None else IdentityHead(from_plain(IdentityHeadConfig, header["head"]))
    _fill(path, nn.ModuleDict({"encoder": encoder} if head is None else {"encoder": encoder, "head": head}), tensors)
    notes = {name: text for name, text in headers.items() if name not in ("format", REID)}
    return ReidModel(encoder.eval(), None if head is None else head.eval(), notes)


def _has_entry(path: Path, entry: str) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return entry in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def _write(path: Path, tensors: Mapping[str, Tensor], entry: str, header: Any, notes: Mapping[str, str]) -> None:
    plain = {name: (tensor.float() if tensor.is_floating_point() else tensor).detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(path, save(plain, metadata={"format": "pt", entry: json.dumps(header), **notes}))


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header entries."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118  (the file is no mapping)
    except FileNotFoundError as error:
        raise UserError(f"no weights at {path}; give the encoder.safetensors of a run") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({error}); give the encoder.safetensors of a run, copied whole") from error


def _header(path: Path, headers: Mapping[str, str], entry: str) -> Any:
    if entry not in headers:
        raise UserError(f"{path} has no {entry} header; it was not written by this project, or is another kind of its files")
    return json.loads(headers[entry])


def _fill(path: Path, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{path} does not hold the weights its header describes: {error}") from error
