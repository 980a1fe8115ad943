"""Weights to begin with: ours, or those of other projects, as one of our encoders, with a report of every key.

A file is read without running code in it, its ViT is found by its names, mapped to ours, and brought to the wanted image size. What our encoder has
no place for is listed with its reason; what is missing, left over or of another shape is an error.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from personmae.configs import UserError, from_plain
from personmae.interop.key_maps import MappedKeys, map_keys
from personmae.interop.networks import Network, Part, explain_other, find_networks, select_network
from personmae.interop.positions import Grid, fit_positions
from personmae.interop.weight_files import read_weights
from personmae.models.positions import PositionResizing
from personmae.models.vit import IMAGENET_MEAN, IMAGENET_STD, VisionTransformer, VitConfig
from personmae.models.weights import ENCODER, REID, is_reid_file, load_encoder, load_reid

Normalisation = Literal["imagenet", "half"]
Stride = int | Literal["patch"]

TIMM = "timm:"
CARD = "personmae-export"  # of the entry in which our exports say what they are: in the header, or beside "state_dict"
DEFAULT_SIZE = (256, 128)  # height, width in pixels
# Mean and std of RGB on the scale [0, 1]. "half" is what TransReID and BootMAE train with.
NORMALISATIONS: dict[Normalisation, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
HALF_FAMILIES = ("TransReID with its jigsaw branch", "a fine-tuned ReID model (TransReID, Cluster Contrast)", "BEiT or BootMAE")
OWN = "PersonMAE"  # the family of our own files
OURS = {"student": "encoder.safetensors", "teacher": "teacher.safetensors"}


@dataclasses.dataclass(frozen=True)
class KeyReport:
    """What became of every tensor of a file."""

    family: str  # what the names are like
    place: str  # of the network in the file; empty if it is all there is
    used: dict[str, str]  # name of ours -> names in the file
    changed: dict[str, str]  # name of ours -> what was done to it
    left_out: dict[str, str]  # name in the file -> why

    def __str__(self) -> str:
        lines = [f"{self.family}{f', {self.place}' if self.place else ''}: {len(self.used)} tensors taken, {len(self.left_out)} left out"]
        for what, names in (("changed", self.changed), ("left out", self.left_out)):
            reasons: dict[str, list[str]] = {}
            for name, reason in names.items():
                reasons.setdefault(reason, []).append(name)
            for reason, found in reasons.items():
                lines.append(f"  {what}: {some_of(found)}: {reason}")
        return "\n".join(lines)


def some_of(names: list[str], most: int = 3) -> str:
    """The first names, and how many more there are, as a part of a sentence."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class FittedState(NamedTuple):
    """The tensors of an encoder, brought to an image size and a stride."""

    tensors: dict[str, Tensor]  # float32 in our encoder's names, which are timm's; pos_embed [1, 1 + L, D], the class token's first
    config: VitConfig  # mean and std are those of the images that it was trained on
    stride_px: int
    learned_positions: bool  # they are no sines and cosines
    report: KeyReport
    origin: str
    told_pixels: bool  # the file itself tells mean and std: it is ours; else they are those usual in its family
    notes: dict[str, str]  # of our own files: what their header says of the run

    @property
    def grid(self) -> Grid:
        """Rows and columns of patches."""
        return patch_grid(self.config.image_size, self.config.patch_px, self.stride_px)


class InitialWeights(NamedTuple):
    """An encoder to begin with; its config has mean and std of the images that it was trained on."""

    encoder: VisionTransformer
    report: KeyReport
    origin: str


def patch_grid(image_size: tuple[int, int], patch_px: int, stride_px: int) -> Grid:
    """Rows and columns of patches, `stride_px` from one to the next, that fit into an image."""
    return (image_size[0] - patch_px) // stride_px + 1, (image_size[1] - patch_px) // stride_px + 1


def load_initial(
    source: str | Path,
    part: Part | None = None,
    *,
    image_size: tuple[int, int] | None = (256, 128),
    grid: Grid | None = None,
    resize: PositionResizing = "bilinear",
    num_heads: int | None = None,
    normalisation: Normalisation | None = None,
) -> InitialWeights:
    """An encoder in eval mode with patches side by side; see `load_state`."""
    state = load_state(
        source, part, image_size=image_size, stride_px="patch", grid=grid, resize=resize, num_heads=num_heads, normalisation=normalisation
    )
    return InitialWeights(encoder_of(state), state.report, state.origin)


def encoder_of(state: FittedState) -> VisionTransformer:
    """The encoder with these tensors, in eval mode; of overlapping patches it has the positions only, see `ReidEncoder`."""
    encoder = VisionTransformer(state.config)
    encoder.set_positions(state.tensors["pos_embed"], learned=state.learned_positions)
    encoder.load_state_dict(state.tensors)
    encoder.requires_grad_(True)
    return encoder.eval()


def load_state(
    source: str | Path,
    part: Part | None = None,
    *,
    image_size: tuple[int, int] | None = None,
    stride_px: Stride | None = None,
    grid: Grid | None = None,
    resize: PositionResizing = "bilinear",
    num_heads: int | None = None,
    normalisation: Normalisation | None = None,
) -> FittedState:
    """The tensors of a run folder or file of ours, a file of another project (safetensors, or written by torch.save), or `timm:NAME`, the published
    weights of a model of timm.

    part: of a file that holds two networks; None for the only one, and for the student where the file is ours. image_size: (H, W) in pixels, to which
    positions are brought: sines and cosines computed anew, learned ones resized; None for that of a file of ours, else (256, 128). stride_px: from
    patch to patch, or "patch" for as much; None for that of a fine-tuned model or an export of ours, else the patch. grid: (rows, columns) of the
    file's positions where their number leaves that open. num_heads: where the width does not tell. normalisation: of the pixels, where the family's
    is not the file's. Raises UserError naming the file and what does not fit.
    """
    text = str(source)
    if text.startswith(TIMM):
        return _load_timm(text, image_size or DEFAULT_SIZE, stride_px, resize)
    path = Path(text).expanduser()
    if path.is_dir():
        path = path / OURS[part or "student"]
        part = None
    content, headers = read_weights(path)
    if ENCODER in headers or REID in headers:
        notes = {name: note for name, note in headers.items() if name not in ("format", ENCODER, REID)}
        return _load_ours(path, notes, image_size, stride_px, resize)
    networks = find_networks(content)
    if not networks:
        raise UserError(f"{path} holds no Vision Transformer that can be used here: {explain_other(content)}")
    network = select_network(networks, part, str(path), own={"model", "optimiser", "config"} <= content.keys())
    mapped = map_keys(network, str(path))
    card = _read_card(content, headers, str(path))
    if card is not None:
        return _load_exported(mapped, card, network, str(path), image_size, stride_px, resize)
    mean, std = NORMALISATIONS[normalisation or ("half" if mapped.family in HALF_FAMILIES else "imagenet")]
    config = _config_of(mapped, str(path), image_size or DEFAULT_SIZE, num_heads, mean, std)
    return _fit(mapped, config, network, str(path), resize, _checked_stride(stride_px, config, str(path)), given=grid)


class _Card(NamedTuple):
    """What our own export has written into a file."""

    config: VitConfig
    stride_px: int
    notes: dict[str, str]


def _read_card(content: Mapping[Any, Any], headers: Mapping[str, str], source: str) -> _Card | None:
    """None for a file of somebody else."""
    try:
        card = json.loads(headers[CARD]) if CARD in headers else content.get(CARD)
    except ValueError:
        card = "no JSON"
    if card is None:
        return None
    if not isinstance(card, Mapping) or not isinstance(card.get("config"), Mapping) or not isinstance(card.get("stride_px"), int):
        raise UserError(f"{source} has an entry {CARD} that no export of ours wrote; export the weights again")
    notes = card.get("notes")
    told = {str(name): str(note) for name, note in notes.items()} if isinstance(notes, Mapping) else {}
    return _Card(from_plain(VitConfig, card["config"]), card["stride_px"], told)


def _load_exported(
    mapped: MappedKeys,
    card: _Card,
    network: Network,
    source: str,
    image_size: tuple[int, int] | None,
    stride_px: Stride | None,
    resize: PositionResizing,
) -> FittedState:
    """A file of our own export: its normalisation, heads, grid and stride are told in it."""
    told = card.config
    # Width and depth are those of the tensors, whatever the card says.
    own = _config_of(mapped, source, told.image_size, told.num_heads, told.mean, told.std)
    own_stride = _checked_stride(card.stride_px, own, source)
    config = dataclasses.replace(own, image_size=_checked_size(image_size or own.image_size, own.patch_px, source))
    stride_px = _checked_stride(own_stride if stride_px is None else stride_px, config, source)
    known = patch_grid(own.image_size, own.patch_px, own_stride)
    mapped = mapped._replace(family=OWN)
    state = _fit(mapped, config, network, source, resize, stride_px, known=known, own_step=own_stride / own.patch_px)
    return state._replace(notes=card.notes)


def _load_ours(
    path: Path, notes: dict[str, str], image_size: tuple[int, int] | None, stride_px: Stride | None, resize: PositionResizing
) -> FittedState:
    """An encoder, or that of a fine-tuned model, with its overlapping patches; the neck, the parts and the camera embeddings stay behind."""
    left_out = {}
    if is_reid_file(path):
        reid = load_reid(path).encoder
        encoder, own_stride, known = reid.encoder, reid.config.stride_px, reid.grid
        left_out = {name: "of the fine-tuned model, beside its encoder" for name in reid.state_dict() if not name.startswith("encoder.")}
    else:
        encoder = load_encoder(path)
        own_stride, known = encoder.config.patch_px, encoder.config.grid
    network = Network("", "", dict(encoder.state_dict()), ())
    mapped = map_keys(network, str(path))._replace(family=OWN, left_out=left_out)
    size = _checked_size(image_size or encoder.config.image_size, encoder.config.patch_px, str(path))
    config = dataclasses.replace(encoder.config, image_size=size)
    stride_px = _checked_stride(own_stride if stride_px is None else stride_px, config, str(path))
    state = _fit(mapped, config, network, str(path), resize, stride_px, known=known, own_step=own_stride / config.patch_px)
    return state._replace(notes=notes)


def _load_timm(source: str, image_size: tuple[int, int], stride_px: Stride | None, resize: PositionResizing) -> FittedState:
    import timm

    name = source.removeprefix(TIMM)
    if not timm.list_models(name.split(".")[0]):
        raise UserError(f"timm has no model {name!r}; timm.list_models('vit_*') lists those it has")
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0)
    # What the hub's client raises, httpx's errors and its own, derives from these.
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UserError(f"{source} cannot be had: {reason}; is the network there? A downloaded file can be given by its path instead") from error
    network = Network("", "", model.state_dict(), ())
    mapped = map_keys(network, source)
    if not isinstance(model, timm.models.VisionTransformer):
        raise UserError(f"{source} is a {type(model).__name__}; a VisionTransformer is wanted")
    # timm's attributes are typed loosely.
    blocks: Any = model.blocks
    cfg: Any = model.pretrained_cfg
    grid: Any = model.patch_embed.grid_size
    config = _config_of(mapped, source, image_size, blocks[0].attn.num_heads, tuple(cfg["mean"]), tuple(cfg["std"]))
    return _fit(mapped, config, network, source, resize, _checked_stride(stride_px, config, source), given=grid)


def _checked_stride(stride_px: Stride | None, config: VitConfig, source: str) -> int:
    if stride_px is None or stride_px == "patch":
        return config.patch_px
    if not 1 <= stride_px <= config.patch_px:
        raise UserError(f"a stride of {stride_px} pixels does not fit the patches of {source}: at least 1, and at most {config.patch_px}")
    return stride_px


def _checked_size(image_size: tuple[int, int], patch_px: int, source: str) -> tuple[int, int]:
    if min(image_size) < patch_px or image_size[0] % patch_px or image_size[1] % patch_px:
        raise UserError(f"image_size {image_size} does not divide into the patches of {source}, {patch_px} pixels")
    return image_size


def _config_of(
    mapped: MappedKeys,
    source: str,
    image_size: tuple[int, int],
    num_heads: int | None,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> VitConfig:
    """The size of an encoder by the shapes of its tensors."""
    tensors = mapped.tensors
    projection = tensors.get("patch_embed.proj.weight")
    fc1 = tensors.get("blocks.0.mlp.fc1.weight")
    if projection is None or fc1 is None or projection.ndim != 4 or projection.shape[2] != projection.shape[3] or projection.shape[1] != 3:
        raise UserError(f"{source} has no patch embedding of square patches in three colours, or no MLP in its blocks; its ViT cannot be used here")
    width, patch_px = projection.shape[0], projection.shape[2]
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    if num_heads is None:
        # Of 64 channels, but for ViT-H (80) and TransReID's own small ViT (96).
        num_heads = {(768, 8): 8, (1280, 32): 16}.get((width, depth), width // 64)
        if num_heads == 0 or width % num_heads or (width % 64 and width != 1280):
            raise UserError(f"{source} is {width} wide, from which the number of its heads cannot be told; give --foreign.num-heads")
    size = _checked_size(image_size, patch_px, source)
    return VitConfig(
        image_size=size, patch_px=patch_px, width=width, depth=depth, num_heads=num_heads, mlp_ratio=fc1.shape[0] / width, mean=mean, std=std
    )


def _fit(
    mapped: MappedKeys,
    config: VitConfig,
    network: Network,
    source: str,
    resize: PositionResizing,
    stride_px: int,
    *,
    given: Grid | None = None,
    known: Grid | None = None,
    own_step: float = 1.0,
) -> FittedState:
    """These tensors, each found to be in its place, with positions on the wanted grid."""
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in VisionTransformer(config).state_dict().items() if name != "pos_embed"}
    if mapped.positions is None:
        raise UserError(f"{source} has no positions (pos_embed) of one image; its ViT cannot be used here")
    wanted, step = patch_grid(config.image_size, config.patch_px, stride_px), stride_px / config.patch_px
    try:
        fitted = fit_positions(mapped.positions, wanted, given=given, known=known, resize=resize, step=step, own_step=own_step)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    unexpected = [*mapped.unexpected, *(mapped.sources[name] for name in mapped.tensors if name not in expected)]
    missing = [name for name in expected if name not in mapped.tensors]
    if missing or unexpected:
        both = (("missing", missing), ("of no known use", unexpected))
        said = "; ".join(f"{what}: {some_of(names, 5)}" for what, names in both if names)
        raise UserError(f"{source} does not fit our encoder ({mapped.family}); {said}")
    for name, shape in expected.items():
        tensor = mapped.tensors[name]
        if name == "cls_token" and tensor.numel() == config.width:
            tensor = mapped.tensors[name] = tensor.reshape(shape)
        if tensor.shape != shape:
            raise UserError(f"{source}: {mapped.sources[name]} is {list(tensor.shape)}, and {list(shape)} is wanted in a ViT of width {config.width}")
    tensors = {**mapped.tensors, "pos_embed": fitted.pos_embed}
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise UserError(f"{source} holds numbers that are not finite; fetch it again, or take an earlier checkpoint")
    changed = {**mapped.changed, **({"pos_embed": fitted.how} if fitted.how else {})}
    used = {name: mapped.sources[name] for name in (*expected, "pos_embed")}
    report = KeyReport(mapped.family, network.place, used, changed, mapped.left_out)
    return FittedState(tensors, config, stride_px, fitted.order is None, report, source, mapped.family == OWN, {})
