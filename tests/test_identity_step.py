"""The step of fine-tuning: its gradients are those of one plain pass over the whole batch, however the batch is divided."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn

from personmae.models.identity_head import IdentityHead, IdentityHeadConfig
from personmae.models.reid import ReidConfig, ReidEncoder
from personmae.models.vit import VitConfig
from personmae.training.identity_losses import LossConfig, identity_loss
from personmae.training.identity_step import MicroBatch, identity_gradients
from tests.test_vit import random_encoder, random_images

SIZE = (64, 32)
VIT = VitConfig(image_size=SIZE, patch_px=8, width=32, depth=3, num_heads=2)
ROOT = Path(__file__).parent.parent

# One of the processes: what it has of the gradients, for the parent to compare.
CHILD = """
import sys
import torch
import torch.distributed as dist
from tests.test_identity_step import built, divided, grads_of, step

rank, world_size, port, out, accumulation = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5])
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
encoder, head = built()
parts = divided(encoder, world_size * accumulation)[rank::world_size]
losses = step(encoder, head, parts, rank=rank, world_size=world_size)
torch.save({"losses": list(losses), "grads": grads_of(encoder, head), "state": head.state_dict()}, out)
dist.destroy_process_group()
"""


def built(parts: Literal["none", "jpm", "lem"] = "jpm", **options) -> tuple[ReidEncoder, IdentityHead]:
    config = ReidConfig(image_size=SIZE, stride_px=8, parts=parts, camera_weight=1.5, drop_path=0.4, **options)
    encoder = ReidEncoder(random_encoder(VIT), config, num_cameras=3).train()
    head = IdentityHead(IdentityHeadConfig(widths=encoder.widths, num_people=6)).train()
    with torch.no_grad():
        for weight in head.classifiers.parameters():
            weight.mul_(100)
    return encoder, head


def labels() -> torch.Tensor:
    return torch.tensor([0, 3, 4, 5]).repeat_interleave(3)


def divided(encoder: ReidEncoder, num_parts: int) -> list[MicroBatch]:
    images, cameras = random_images(12, SIZE), torch.arange(12) % 3
    size = 12 // num_parts
    rows = [slice(size * part, size * (part + 1)) for part in range(num_parts)]
    return [MicroBatch(images[row], cameras[row], encoder.draw_drop_paths(7, 0, range(row.start, row.stop))) for row in rows]


def step(encoder, head, parts, precision="fp32", **options):
    return identity_gradients(encoder, head, parts, labels(), LossConfig(label_smoothing=0.1), precision=precision, **options)


def grads_of(*modules: nn.Module) -> dict[str, torch.Tensor]:
    return {f"{n}.{name}": value.grad for n, part in enumerate(modules) for name, value in part.named_parameters() if value.grad is not None}


def plain():
    """One pass, and autograd through all of it."""
    encoder, head = built()
    (whole,) = divided(encoder, 1)
    features = encoder(*whole)
    losses = identity_loss(head(features), features, labels(), LossConfig(label_smoothing=0.1))
    losses.total.backward()
    return losses, grads_of(encoder, head), head


def assert_same(grads, expected):
    assert grads.keys() == expected.keys()
    # Some are 0 but for rounding: what the neck takes off again.
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert torch.allclose(grads[name], gradient, rtol=1e-3, atol=2e-6 * largest), name


@pytest.mark.parametrize("num_parts", [1, 2, 4, 6])
def test_micro_batches_have_the_gradients_of_the_whole(num_parts):
    expected_losses, expected, expected_head = plain()
    encoder, head = built()
    losses = step(encoder, head, divided(encoder, num_parts))
    for name, value in losses._asdict().items():
        assert torch.allclose(value, getattr(expected_losses, name), rtol=1e-5), name
        assert not value.requires_grad
    assert_same(grads_of(encoder, head), expected)
    for name, value in head.state_dict().items():
        assert torch.allclose(value, expected_head.state_dict()[name], rtol=1e-5, atol=1e-7), name


def test_without_the_others_the_pairs_would_be_other_ones():
    """The test above can fail: each part by itself has other gradients."""
    _, expected, _ = plain()
    encoder, head = built()
    for number, part in enumerate(divided(encoder, 2)):
        features = encoder(*part)
        losses = identity_loss(head(features), features, labels()[6 * number :][:6], LossConfig(label_smoothing=0.1))
        (losses.total / 2).backward()
    name = "0.encoder.blocks.1.mlp.fc1.weight"
    assert not torch.allclose(grads_of(encoder, head)[name], expected[name], rtol=0.05)


@pytest.mark.parametrize(("world_size", "accumulation"), [(2, 1), (2, 2)])
def test_processes_have_the_gradients_of_the_whole(tmp_path, world_size, accumulation):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))}
    port = 29_600 + os.getpid() % 1000 + 10 * accumulation
    outs = [tmp_path / f"{rank}.pt" for rank in range(world_size)]
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(rank), str(world_size), str(port), str(out), str(accumulation)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        )
        for rank, out in enumerate(outs)
    ]
    for child in children:
        text = child.communicate(timeout=240)[0]
        assert child.returncode == 0, text
    expected_losses, expected, _ = plain()
    found = [torch.load(out) for out in outs]
    for one in found:
        assert_same(one["grads"], expected)
        assert torch.allclose(torch.stack(one["losses"]), torch.stack([value.detach() for value in expected_losses]), rtol=1e-5)
    for name, value in found[0]["state"].items():
        assert torch.equal(value, found[1]["state"][name]), name


def test_bf16_is_near():
    _, expected, _ = plain()
    encoder, head = built()
    step(encoder, head, divided(encoder, 2), precision="bf16")
    for name, gradient in grads_of(encoder, head).items():
        assert gradient.dtype == torch.float32
        if gradient.abs().max() > 1e-3:
            assert torch.nn.functional.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0) > 0.9, name
