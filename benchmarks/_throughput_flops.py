"""How many operations a training step takes for an image: counted in our model as it runs in plain PyTorch."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks._throughput_inputs import noise_batch
from personmae import pretrain
from personmae.recipes.pretraining import PretrainConfig
from personmae_kernels.launching import use_operators

# GFLOP an image on which the speeds aimed at were reckoned: for these presets, half of the patches masked.
PLANNED = {"vit-small": 17.5, "vit-base": 67.6}
# Beyond this share of a difference those speeds are to be scaled.
ALLOWED = 0.03
_NUM_IMAGES = 2


class Flops(NamedTuple):
    """Operations of the matrix products of one image, a multiplication and an addition counted as two."""

    student: int  # encoder, forward and backward
    teacher: int  # forward
    decoders: int  # both, forward and backward

    @property
    def total(self) -> int:
        """Of a training step."""
        return self.student + self.teacher + self.decoders


def count_flops(config: PretrainConfig) -> Flops:
    """Counted on the CPU, over real tensors; attention as two products (and four backward: no recomputing)."""
    config = dataclasses.replace(config, batch_size=_NUM_IMAGES)
    model, teacher = pretrain.build_models(config)
    inputs = pretrain.to_inputs(noise_batch(config), config, torch.device("cpu"))

    def count_student() -> None:
        model.encode(inputs).normed.sum().backward()

    def count_all() -> None:
        features = teacher(inputs.region_b) if config.model.losses != "pixels" else None
        model(inputs, features).total.backward()

    counts = []
    try:
        use_operators("reference")
        for call in (count_student, lambda: teacher(inputs.region_b), count_all):
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                call()
            counts.append(counter.get_total_flops() // _NUM_IMAGES)
    finally:
        use_operators(None)
    student, of_teacher, total = counts
    of_teacher = of_teacher if config.model.losses != "pixels" else 0
    return Flops(student, of_teacher, total - student - of_teacher)


def describe_flops(preset: str, flops: Flops) -> str:
    """The count in a sentence, beside what was planned where there is a plan."""
    parts = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in flops._asdict().items())
    text = f"{preset}: {flops.total / 1e9:.2f} GFLOP an image ({parts})"
    if preset not in PLANNED:
        return text
    more = flops.total / 1e9 / PLANNED[preset] - 1
    text += f"; planned were {PLANNED[preset]}: {abs(more):.1%} {'more' if more > 0 else 'less'}"
    if abs(more) > ALLOWED:
        text += f", which is over {ALLOWED:.0%}: the speeds aimed at are to be multiplied by {1 / (1 + more):.3f}"
    return text
