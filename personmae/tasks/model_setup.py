"""What supervised and unsupervised training set up alike: the weights to begin with, the model on its device, a batch as the encoder takes it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from personmae.configs import UserError
from personmae.data.labelled import LabelledImages
from personmae.data.loaders import RegionBatch
from personmae.interop.initial_weights import load_initial
from personmae.models.attention import choose_attention, set_attention
from personmae.models.fusing import FUSED_FROM
from personmae.models.reid import ReidEncoder, plain_encoder
from personmae.models.vit import VisionTransformer, initialise, set_fusing
from personmae.models.weights import is_reid_file, load_reid
from personmae.models.zoo import ENCODERS
from personmae.recipes.finetuning import RANDOM, TrainConfig
from personmae.training.blocks import choose_compilation, set_blocks
from personmae.training.identity_step import MicroBatch
from personmae.training.occlusions import cover, draw_occlusions, noise, others
from personmae.training.processes import Processes
from personmae_kernels.launching import describe_operators, use_operators


def initial_encoder(config: TrainConfig) -> tuple[VisionTransformer, str]:
    """The encoder to begin with, and what became of each key of its file, in words."""
    assert config.init is not None
    if config.init.startswith(RANDOM):
        name = config.init.removeprefix(RANDOM)
        if name not in ENCODERS:
            raise UserError(f"there is no encoder {name!r} to begin from nothing; there are {', '.join(ENCODERS)}")
        encoder = VisionTransformer(replace(ENCODERS[name], image_size=config.model.image_size))
        initialise(encoder, torch.Generator().manual_seed(config.seed))
        return encoder, f"none, {name} from nothing (seed {config.seed})"
    if is_reid_file(Path(config.init)):
        plain = plain_encoder(load_reid(Path(config.init)).encoder)
        if plain is None:
            raise UserError(f"{config.init} has overlapping patches or camera embeddings, and cannot be begun with; give one with neither")
        return plain, f"{config.init}: the encoder of a fine-tuned model"
    foreign = config.foreign
    found = load_initial(
        Path(config.init) if Path(config.init).exists() else config.init,
        foreign.part,
        image_size=config.model.image_size,
        grid=foreign.grid,
        resize=config.model.position_resizing,
        num_heads=foreign.num_heads,
        normalisation=foreign.normalisation,
    )
    return found.encoder, f"{config.init}: {found.report}"


def place_model(model: nn.Module, encoder: ReidEncoder, config: TrainConfig, device: torch.device, precision: str) -> str:
    """Puts it on the device, with the attention, operators and compilation that serve there; returns what was chosen, and why."""
    attention = choose_attention(config.attention, device, precision, config.deterministic)
    use_operators(None if config.operators == "auto" else config.operators)
    model.to(device)
    set_attention(model, attention, encoder.num_tokens)
    compilation = choose_compilation(config.compile, device)
    set_blocks(model, compiled=compilation.compiled, checkpointing=config.checkpoint_activations)
    operators = describe_operators(device)
    # Of operators that were asked for nothing is left out.
    set_fusing(model, small=config.operators != "auto")
    if config.operators == "auto" and device.type == "cuda":
        operators += f"; blocks of fewer than {FUSED_FROM:,} elements by PyTorch's own"
    return f"attention: {attention.kind} ({attention.reason}); operators: {operators}; blocks: {compilation}"


def to_micro(
    batch: RegionBatch, micro: int, encoder: ReidEncoder, train: LabelledImages, config: TrainConfig, processes: Processes
) -> MicroBatch:
    """A loader's batch as the encoder takes it: occluded, with cameras and the draws of stochastic depth."""
    device, samples = processes.device, batch.samples.numpy()
    # An image may stand twice in a batch: places do not.
    first = (batch.step * config.accumulation + micro) * processes.world_size + processes.rank
    places = first * len(batch) + np.arange(len(batch))
    images = batch.region_a.to(device, non_blocking=True)
    if config.occlusion.prob > 0:
        boxes = torch.from_numpy(draw_occlusions(config.occlusion, config.model.image_size, config.seed, batch.epoch, places))
        vit = encoder.encoder.config
        filling = others(images, config.images_each) if config.occlusion.fill == "others" else noise(images, vit.mean, vit.std, config.seed + first)
        images = cover(images, boxes.to(device, non_blocking=True), filling)
    cameras = torch.from_numpy(train.cameras[samples]).to(device, non_blocking=True) if encoder.num_cameras else None
    drop_paths = encoder.draw_drop_paths(config.seed, batch.epoch, places)
    return MicroBatch(images, cameras, None if drop_paths is None else drop_paths.to(device, non_blocking=True))


def copy_buffers(target: nn.Module, source: nn.Module) -> None:
    """The running statistics, which an average of weights has no own ones of."""
    for own, theirs in zip(target.buffers(), source.buffers(), strict=True):
        own.copy_(theirs)


def silence(text: str) -> None:
    """What processes other than the main one say."""
