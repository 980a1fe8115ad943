"""Encoder weights as a file: safetensors in timm's names, the configuration in the header."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from personmae.configs import UserError, from_plain, to_plain
from personmae.models.vit import VisionTransformer, VitConfig


def save_encoder(path: Path, encoder: VisionTransformer, notes: Mapping[str, str]) -> None:
    """Write the encoder's weights, float32, under a temporary name first. notes: strings kept in the header (run, step).

    Raises UserError naming the file if the disk refuses."""
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file(tensors, temporary, metadata={"format": "pt", "personmae": json.dumps(to_plain(encoder.config)), **notes})
        os.replace(temporary, path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot write {path} ({error}); make room or give write permission there") from error
    finally:
        temporary.unlink(missing_ok=True)


def load_encoder(path: Path) -> VisionTransformer:
    """The encoder of such a file, in eval mode. Raises UserError naming the file if it is missing, damaged or not ours."""
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("personmae")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (the file is no mapping)
    except FileNotFoundError as error:
        raise UserError(f"no weights at {path}; give the encoder.safetensors of a run") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({error}); give the encoder.safetensors of a run, copied whole") from error
    if header is None:
        raise UserError(f"{path} has no personmae header; it was not written by this project")
    encoder = VisionTransformer(from_plain(VitConfig, json.loads(header)))
    try:
        encoder.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{path} does not hold the weights its header describes: {error}") from error
    return encoder.eval()
