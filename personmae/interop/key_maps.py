"""The names and shapes of other projects' ViTs, mapped to our encoder's, which are timm's.

Known: timm, DeiT, MAE, MALE, HAP, DINO, iBOT, TransReID-SSL, PersonViT, PASS, MoCo v3, BEiT and BootMAE without relative positions, DINOv2,
fine-tuned TransReID with and without its jigsaw branch, and our own. What of a model our encoder lacks is listed with its reason; what would
compute something else is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from personmae.configs import UserError
from personmae.interop.networks import TEACHER, Network, is_named_student
from personmae.interop.positions import SourcePositions

# Blocks that compute something that our encoder does not: (a name in the ViT, what it is).
REFUSED = (
    (r"patch_embed\.conv\.", "it has a convolutional stem with IBN (ICS models of TransReID-SSL and PASS, ViTs of CION); take one without ICS"),
    (r"patch_embed\.proj\.\d", "it has a convolutional stem (MoCo v3's vit_conv models); take a model with plain patches"),
    (r"patch_embed\.(?!proj\.(weight|bias)$)", "its patch embedding is more than one convolution (a hybrid or a normalised one)"),
    (r"patch_embed(?!\.)", "it has more than one patch embedding; a half of it would be another model"),
    (r".*(relative_position_(bias_table|index)|rel_pos)", "it has relative position biases (BEiT), which ours lacks; take one with absolute ones"),
    (r"blocks\..*\.mlp\.(w12|w1|w2|w3|fc1_g|fc1_x)\b", "its MLP is gated (SwiGLU); take a smaller model of that family, which has a plain one"),
    (r"blocks\..*\.attn\.(q_norm|k_norm|inner_attn_ln|norm)\.", "it normalises inside attention, which ours does not"),
    (r"(norm_pre|ln_pre)\.", "it has a norm before the blocks (CLIP), which ours lacks"),
    (r"(rope|rope_embed)\b", "its positions are rotary (DINOv3, EVA-02), ours are added"),
    (r"fc_norm\.", "it was fine-tuned on the mean of the patches, with the last norm after the mean; take the weights before that fine-tuning"),
)
# What of another model our encoder lacks: (how its name begins, why it is left out).
LEFT_OUT = (
    (r"(fc|heads?|head_dist|last_layer|classifier\w*|fcneck|pre_logits|conv_head|conv_fc(_norm)?|conv_bn|bn)\.", "classifier or projection head"),
    (r"(projector|predictor)\.", "classifier or projection head"),
    (r"(bottleneck\w*|necks?)\.", "neck of a ReID model"),
    (r"gem\.", "pooling of a ReID model"),
    (r"b2\.", "local branch of TransReID's jigsaw module"),
    (r"sie_embed$", "embedding of the cameras of its training set (SIE)"),
    (r"part_token\d$|part\d_pos$", "part token of PASS, or its position"),
    (r"dist_token$", "distillation token of DeiT"),
    (r"(register_tokens|reg_token)$", "register tokens"),
    (r"(pixel_decoder|feature_decoder)\.|decoder_|decode_|down(_1)?\.|lm_head(_1)?\.|de_pos_embed$", "decoder of masked pre-training"),
    (r"(mask_token(_1)?|masked_embed)$", "token for masked patches"),
    (r"(pixel_mean|pixel_std|queue|queue_ptr|logit_scale|center)$", "no weight"),
)
JIGSAW = "b1.0.norm1.weight"
UNTRAINED = "never trained in TransReID with its jigsaw branch, whose copy (b1) is taken"
# Scales of the branches: LayerScale in timm and DINOv2, and in BEiT; with the linear layer that each follows.
SCALES = {"ls1.gamma": "attn.proj", "gamma_1": "attn.proj", "ls2.gamma": "mlp.fc2", "gamma_2": "mlp.fc2"}


class MappedKeys(NamedTuple):
    """A foreign ViT in our encoder's names."""

    family: str
    tensors: dict[str, Tensor]  # float32, without positions
    positions: SourcePositions | None  # None: the file has none
    sources: dict[str, str]  # our name -> the names in the file
    changed: dict[str, str]  # our name -> what was done to it
    left_out: dict[str, str]  # name in the file -> why
    unexpected: list[str]  # names in the file


def map_keys(network: Network, source: str) -> MappedKeys:
    """Map a network's names. source: the file, for messages. Raises UserError where the ViT computes something that our encoder does not."""
    inside, outside = _split(network)
    for pattern, reason in REFUSED:
        name = next((name for name in inside if re.match(pattern, name)), None)
        if name is not None:
            raise UserError(f"{source} is not loaded: {reason} ({network.prefix}{name})")
    family = _family(network, inside, outside)
    left_out = {name: "another network of the file" for name in network.tensors if name.startswith(network.neighbours)}
    if f"blocks.{_depth(inside) - 1}.norm1.weight" in inside and JIGSAW in outside:
        inside, replaced = _take_jigsaw(inside, outside, network.prefix)
        left_out |= replaced
    names = {name: origin for name, origin in inside.items() if not _reason(name)}
    left_out |= {origin: why for name, origin in inside.items() if (why := _reason(name))}
    unexpected = []
    for name, origin in outside.items():
        if origin in left_out or origin in inside.values():
            continue
        if why := _reason(name):
            left_out[origin] = why
        else:
            unexpected.append(origin)
    # float16 and bfloat16 files become float32, as all our masters.
    tensors = {name: network.tensors[origin].float() for name, origin in names.items()}
    mapped = MappedKeys(family, tensors, None, dict(names), {}, left_out, unexpected)
    _join_biases(mapped)
    _fold_scales(mapped)
    return mapped._replace(positions=_take_positions(mapped, set(inside)))


def _split(network: Network) -> tuple[dict[str, str], dict[str, str]]:
    """Names inside the ViT without its prefix, and those outside without wrappers; both -> the name in the file."""
    inside, outside = {}, {}
    for origin in network.tensors:
        if origin.startswith(network.prefix) and not origin.startswith(network.neighbours):
            # DINOv2 trains with its blocks in chunks: blocks.CHUNK.BLOCK.
            inside[re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", origin[len(network.prefix) :])] = origin
        else:
            outside[re.sub(r"^((module|model|_orig_mod)\.)+", "", origin)] = origin
    # What a wrapper of the ViT holds beside it where the ViT itself has no prefix of its own: necks and heads are known by their names.
    beside = {name: origin for name, origin in inside.items() if re.match(r"(b1|b2|bottleneck)", name)}
    return inside, outside | beside


def _reason(name: str) -> str | None:
    return next((reason for pattern, reason in LEFT_OUT if re.match(pattern, name.removeprefix("backbone."))), None)


def _depth(names: Mapping[str, str]) -> int:
    return 1 + max(int(match[1]) for name in names if (match := re.match(r"blocks\.(\d+)\.", name)))


def _family(network: Network, inside: Mapping[str, str], outside: Mapping[str, str]) -> str:
    def has(pattern: str) -> bool:
        return any(re.match(pattern, name) for name in (*inside, *outside))

    if has(r"(pixel|feature)_decoder\."):
        return "PersonMAE"
    if re.search(r"base_encoder|momentum_encoder", network.prefix):
        return "MoCo v3"
    if has(r"part_token\d"):
        return "PASS"
    if has(r"b1\.0\.norm1"):
        return "TransReID with its jigsaw branch"
    if has(r"bottleneck"):
        return "a fine-tuned ReID model (TransReID, Cluster Contrast)"
    if has(r"blocks\.\d+\.attn\.q_bias"):
        return "BEiT or BootMAE"
    if has(r"register_tokens|reg_token|blocks\.\d+\.ls1"):
        return "DINOv2, or timm with LayerScale"
    if has(r"decoder_blocks\."):
        return "MAE, MALE or HAP"
    if has(r"dist_token"):
        return "DeiT, distilled"
    if has(r"head\.(mlp|last_layer)") or TEACHER.search(network.place) or is_named_student(network):
        return "DINO, iBOT, TransReID-SSL or PersonViT"
    if has(r"(head|fc|pre_logits)\."):
        return "a classifier in timm's names"
    return "a ViT in timm's names"


def _take_jigsaw(inside: dict[str, str], outside: Mapping[str, str], prefix: str) -> tuple[dict[str, str], dict[str, str]]:
    """With the jigsaw branch the last block and norm of the base are run by nobody: the global feature comes from their trained copy b1."""
    last = f"blocks.{_depth(inside) - 1}."
    replaced = {origin: UNTRAINED for name, origin in inside.items() if name.startswith((last, "norm."))}
    taken = {name: origin for name, origin in inside.items() if origin not in replaced and not name.startswith("b1.")}
    for name, origin in outside.items():
        if name.startswith("b1.0."):
            taken[last + name.removeprefix("b1.0.")] = origin
        elif name.startswith("b1.1."):
            taken["norm." + name.removeprefix("b1.1.")] = origin
    return taken, replaced


def _join_biases(mapped: MappedKeys) -> None:
    """BEiT has biases of queries and values only, and old ViTs none: zeros stand for the missing ones."""
    tensors, sources = mapped.tensors, mapped.sources
    for name in [name for name in tensors if name.endswith(".attn.qkv.weight")]:
        attn = name.removesuffix("qkv.weight")
        if f"{attn}qkv.bias" in tensors:
            continue
        if f"{attn}q_bias" in tensors and f"{attn}v_bias" in tensors:
            q, v = tensors.pop(f"{attn}q_bias"), tensors.pop(f"{attn}v_bias")
            tensors[f"{attn}qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
            sources[f"{attn}qkv.bias"] = f"{sources.pop(f'{attn}q_bias')}, {sources.pop(f'{attn}v_bias')}"
            mapped.changed[f"{attn}qkv.bias"] = "biases of queries and values joined, zeros for the keys"
        elif not any(other.endswith(("qkv.bias", "q_bias", "v_bias")) for other in tensors if not other.startswith(attn)):
            tensors[f"{attn}qkv.bias"] = torch.zeros(len(tensors[name]))
            mapped.changed[f"{attn}qkv.bias"] = "zeros: the model has no such bias"


def _fold_scales(mapped: MappedKeys) -> None:
    """gamma * (W x + b) = (gamma W) x + gamma b: exact but for the rounding of one product."""
    for name in [name for name in mapped.tensors if re.fullmatch(r"blocks\.\d+\.(ls[12]\.gamma|gamma_[12])", name)]:
        block, scale = re.match(r"(blocks\.\d+\.)(.*)", name).groups()  # type: ignore[union-attr]
        linear = block + SCALES[scale]
        gamma = mapped.tensors[name]
        bias = mapped.tensors.get(f"{linear}.bias")
        if f"{linear}.weight" not in mapped.tensors or bias is None or gamma.shape != bias.shape:
            continue  # Left for the report, as unexpected.
        del mapped.tensors[name]
        origin = mapped.sources.pop(name)
        for part in (f"{linear}.weight", f"{linear}.bias"):
            tensor = mapped.tensors[part]
            mapped.tensors[part] = tensor * gamma.reshape(-1, *[1] * (tensor.ndim - 1))
            mapped.sources[part] += f", {origin}"
            mapped.changed[part] = "scale of the branch (LayerScale) folded in"


def _take_positions(mapped: MappedKeys, names: set[str]) -> SourcePositions | None:
    table = mapped.tensors.get("pos_embed")
    if table is None or table.ndim != 3 or len(table) != 1:
        return None
    del mapped.tensors["pos_embed"]
    if "cls_pos" in mapped.tensors:
        mapped.sources["pos_embed"] += f", {mapped.sources.pop('cls_pos')}"
        return SourcePositions(table[0], (0,), mapped.tensors.pop("cls_pos").flatten())
    if "dist_token" in names:
        return SourcePositions(table[0], (2,))
    registers = next((origin for origin in ("register_tokens", "reg_token") if origin in names), None)
    return SourcePositions(table[0], (1, 0) if registers is None else (1, 0, 5))
