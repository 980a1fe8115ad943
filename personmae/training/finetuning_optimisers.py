"""The optimisers of fine-tuning: SGD as TransReID has it, AdamW with rates that fall from layer to layer as MALE has it.

Each parameter group carries `lr_scale`, its factor of the run's learning rate. The groups come from timm, whose layers are: 0 what stands before the
blocks, 1 the first block, and so on; the final norm, the head and what is new are the last layer, of scale 1. jpm's block is a copy of the encoder's
last and has its scale.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import nn

from personmae.configs import UserError
from personmae.models.reid import ReidEncoder

NO_DECAY = ("*cls_token", "*pos_embed", "*camera_embed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneOptimiserConfig:
    """Defaults: TransReID's SGD with the rate of TransReID-SSL for weights pre-trained on unlabelled persons; `MALE_OPTIMISER` is the other."""

    kind: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 4e-4  # at the recipe's batch, the peak; 8e-3 for weights of supervised ImageNet
    momentum: float = 0.9  # sgd only
    betas: tuple[float, float] = (0.9, 0.999)  # adamw only
    eps: float = 1e-8  # adamw only
    weight_decay: float = 1e-4  # sgd: of all parameters; adamw: not of vectors, tokens and positions
    bias_lr_factor: float = 2.0  # of the learning rate, for biases
    layer_decay: float = 1.0  # factor of the learning rate from each layer to the one before
    clip_norm: float | None = None  # of the gradient of all parameters

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise UserError(f"learning_rate is {self.learning_rate}; it is more than 0")
        if not 0.0 < self.layer_decay <= 1.0:
            raise UserError(f"layer_decay is {self.layer_decay}; it is a factor above 0, at most 1 (no decay)")


# MALE's: AdamW for weights of masked pre-training.
MALE_OPTIMISER = FinetuneOptimiserConfig(kind="adamw", learning_rate=8e-3, weight_decay=0.05, bias_lr_factor=1.0, layer_decay=0.4)


class _Layers(nn.Module):
    """Encoder and head as timm's grouping wants them."""

    def __init__(self, encoder: ReidEncoder, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Expressions of the layers, in ascending order; what matches none is the last layer."""
        last = len(self.encoder.encoder.blocks) - 1
        return {
            "stem": r"^encoder\.(?:camera_embed|encoder\.(?:cls_token|pos_embed|patch_embed))",
            "blocks": [(r"^encoder\.encoder\.blocks\.(\d+)\.", None), (r"^encoder\.parts\.blocks\.", (last,))],
        }


def finetuning_groups(encoder: ReidEncoder, head: nn.Module, config: FinetuneOptimiserConfig) -> list[dict[str, Any]]:
    """Parameter groups with "params", "weight_decay", "lr_scale" and "lr", of every parameter that is trained, each once.

    encoder and head as they were built, not wrapped."""
    from timm.optim import param_groups_layer_decay

    adamw = config.kind == "adamw"
    layers = _Layers(encoder, head)
    groups = param_groups_layer_decay(
        layers,
        weight_decay=config.weight_decay,
        no_weight_decay_list=NO_DECAY if adamw else (),
        weight_decay_exclude_1d=adamw,
        layer_decay=config.layer_decay,
    )
    if config.bias_lr_factor != 1.0:
        biases = {parameter for name, parameter in layers.named_parameters() if name.rsplit(".", 1)[-1] == "bias"}
        groups = [part for group in groups for part in _split_biases(group, biases, config.bias_lr_factor)]
    return [{**group, "lr": config.learning_rate * group["lr_scale"]} for group in groups]


def _split_biases(group: dict[str, Any], biases: set[nn.Parameter], factor: float) -> list[dict[str, Any]]:
    others = {**group, "params": [parameter for parameter in group["params"] if parameter not in biases]}
    own = {**group, "params": [parameter for parameter in group["params"] if parameter in biases], "lr_scale": group["lr_scale"] * factor}
    return [part for part in (others, own) if part["params"]]


def build_finetuning_optimiser(encoder: ReidEncoder, head: nn.Module, config: FinetuneOptimiserConfig) -> torch.optim.Optimizer:
    """The optimiser of a run, of modules that are on their device. `personmae.training.optimisers.update_weights` does its steps, at the rate of
    `personmae.training.schedules.finetuning_rate`. Loading the state of the other kind raises UserError."""
    groups = finetuning_groups(encoder, head, config)
    optimiser: torch.optim.Optimizer
    if config.kind == "sgd":
        optimiser = torch.optim.SGD(groups, momentum=config.momentum, fused=True)
    else:
        optimiser = torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=True)
    optimiser.register_load_state_dict_pre_hook(lambda _, state: _check_kind(config.kind, state))
    return optimiser


def _check_kind(kind: str, state: dict[str, Any]) -> None:
    saved = "adamw" if "betas" in state["param_groups"][0] else "sgd"
    if saved != kind:
        raise UserError(f"the optimiser's state is that of {saved}, and this run's is {kind}; go on with --optimiser.kind {saved}")
