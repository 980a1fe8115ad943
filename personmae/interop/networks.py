"""Finds the Vision Transformers inside a file of weights, whatever containers and prefixes are around them, and says what else a file is.

A ViT is where the names `patch_embed.` and `blocks.0.` follow the same prefix, in any of the nested dicts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from torch import Tensor

from personmae.configs import UserError

Part = Literal["student", "teacher"]

MAX_DEPTH = 5
# Words in a container's name or a prefix: DINO, iBOT, PASS (teacher), MoCo v3 (momentum_encoder), MoCo (encoder_k), MSN (target_encoder), timm (ema).
TEACHER = re.compile(r"teacher|momentum|target_encoder|encoder_k$|(^|_)ema(_|$)")
STUDENT = re.compile(r"student|base_encoder|encoder_q$")

# What else people have: (a name in it, what it is).
OTHER_KINDS = (
    (re.compile(r"(^|\.)(layers|stages)\.\d+\.(blocks\.)?\d*\.?.*relative_position_bias_table"), "a Swin Transformer (SOLIDER's are such)"),
    (re.compile(r"(^|\.)layer1\.0\.conv1\.weight"), "a ResNet"),
    (re.compile(r"(^|\.)class_embedding$"), "a CLIP image tower, whose blocks compute something else (QuickGELU, a norm before them)"),
    (re.compile(r"(^|\.)embeddings\.patch_embeddings\.projection\.weight"), "a ViT in the names of Hugging Face; take it from timm: timm:NAME"),
    (re.compile(r"conv_dw|dwconv|downsample_layers|token_mixer"), "a convolutional network (ConvNeXt, FastViT, RepViT or the like)"),
    (re.compile(r"(^|\.)network\.\d+\.\d+\.attn|outlook"), "a VOLO"),
)


class Network(NamedTuple):
    """A ViT in a file."""

    place: str  # containers and prefix, for people
    prefix: str  # of its keys
    tensors: Mapping[str, Tensor]  # all of the state dict that it is in, other networks and heads too
    neighbours: tuple[str, ...]  # prefixes of the other ViTs in that state dict


def find_networks(content: Mapping[Any, Any]) -> list[Network]:
    """The ViTs in the nested dicts of a file, in their order."""
    found = []
    for containers, tensors in _state_dicts(content, ()):
        prefixes = [prefix for prefix in _prefixes(tensors) if any(name.startswith(f"{prefix}blocks.0.") for name in tensors)]
        for prefix in prefixes:
            place = " / ".join(part for part in (*containers, prefix.rstrip(".")) if part)
            found.append(Network(place, prefix, tensors, tuple(other for other in prefixes if other != prefix)))
    return found


def select_network(networks: list[Network], part: Part | None, source: str, own: bool = False) -> Network:
    """The network that is meant. part: None for the only one. own: the file is a checkpoint of this project, where None means the student.

    Raises UserError naming the networks if there are several, or if the asked one is not there.
    """
    teachers = [network for network in networks if TEACHER.search(_words(network)) or (len(networks) == 1 and "teacher" in source.rsplit("/")[-1])]
    students = [network for network in networks if network not in teachers]
    if part is None and own:
        part = "student"
    chosen = {None: networks, "student": students, "teacher": teachers}[part]
    if len(chosen) == 1:
        return chosen[0]
    places = ", ".join(network.place or "one without a name" for network in networks)
    if not chosen:
        other = "leave --foreign.part out" if len(networks) == 1 else f"give --foreign.part {'teacher' if part == 'student' else 'student'}"
        raise UserError(f"{source} has no {part}, only: {places}; {other}")
    told_apart = part is None and teachers and len(students) == 1
    cure = "tell which one with --foreign.part student or --foreign.part teacher" if told_apart else "save the one you want alone"
    raise UserError(f"{source} has several networks: {places}; {cure}")


def is_named_student(network: Network) -> bool:
    """Whether the file calls it a student (or MoCo's word for it)."""
    return bool(STUDENT.search(_words(network)))


def explain_other(content: Mapping[Any, Any]) -> str:
    """What a file without a ViT of ours is, as the end of a sentence."""
    names = [name for _, tensors in _state_dicts(content, ()) for name in tensors]
    for pattern, what in OTHER_KINDS:
        if any(pattern.search(name) for name in names):
            return f"it is {what}"
    if not names:
        return "there are no named tensors in it"
    return f"its {len(names)} tensors begin with {', '.join(names[:3])}"


def _words(network: Network) -> str:
    # One name after the other: the patterns end at a name's end.
    return re.sub(r" / |\.", "\n", network.place) if "\n" not in network.place else network.place


def _state_dicts(content: Mapping[Any, Any], containers: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Every dict that has named tensors right in it, with the names of the dicts around it."""
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if tensors:
        yield containers, tensors
    if len(containers) < MAX_DEPTH:
        for name, value in content.items():
            if isinstance(value, Mapping):
                yield from _state_dicts(value, (*containers, str(name)))


def _prefixes(tensors: Mapping[str, Tensor]) -> list[str]:
    found = (re.match(r"(.*?)patch_embed\.", name) for name in tensors)
    return list(dict.fromkeys(match[1] for match in found if match))
