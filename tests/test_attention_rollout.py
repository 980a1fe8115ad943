"""Attention maps against the blocks' own output and a float64 loop."""

from __future__ import annotations

import pytest
import torch
from test_vit import random_encoder, random_images
from torch import Tensor

from personmae.models.attention import set_attention
from personmae.models.attention_rollout import attention_layers, attention_maps, attention_probabilities, block_attentions
from personmae.models.vit import VisionTransformer, VitConfig

SIZE = (48, 24)


@pytest.fixture
def encoder() -> VisionTransformer:
    made = random_encoder(VitConfig(image_size=SIZE, patch_px=8, width=48, depth=3, num_heads=3))
    # Larger products, so that attention is far from uniform.
    for layer in attention_layers(made):
        layer.qkv.weight.data *= 3
    return made


@pytest.fixture
def images() -> Tensor:
    return random_images(4, SIZE)


@pytest.mark.parametrize("kind", ["sdpa", "short"])
def test_times_v_it_is_what_the_block_computes(encoder: VisionTransformer, images: Tensor, kind: str) -> None:
    if kind == "short":
        encoder = random_encoder(VitConfig(image_size=SIZE, patch_px=8, width=64, depth=2, num_heads=2))
    set_attention(encoder, kind)
    calls: list[tuple[Tensor, Tensor]] = []
    for layer in attention_layers(encoder):
        layer.register_forward_hook(lambda _, inputs, output: calls.append((inputs[0], output)))
    shown = block_attentions(encoder, images)
    assert len(calls) == len(shown) == len(encoder.blocks)
    for layer, probabilities, (x, output) in zip(attention_layers(encoder), shown, calls, strict=True):
        torch.testing.assert_close(probabilities, attention_probabilities(layer, x))
        torch.testing.assert_close(probabilities.sum(3), torch.ones_like(probabilities[..., 0]))
        B, N, D = x.shape
        v = layer.qkv(x).view(B, N, 3, layer.num_heads, layer.head_size)[:, :, 2].transpose(1, 2)
        again = layer.proj((probabilities @ v).transpose(1, 2).reshape(B, N, D))
        torch.testing.assert_close(again, output, atol=2e-5, rtol=1e-4)


def test_nothing_of_the_encoder_changes(encoder: VisionTransformer, images: Tensor) -> None:
    with torch.no_grad():
        before = encoder.encode(images).normed
        attention_maps(encoder, images)
        assert torch.equal(encoder.encode(images).normed, before)
    assert not any(module._forward_pre_hooks for module in encoder.modules())
    with pytest.raises(ValueError, match="images must be"):
        attention_maps(encoder, images[:, :8])
    assert not any(module._forward_pre_hooks for module in encoder.modules())


def rollout_of(attentions: Tensor, image: int) -> list[list[float]]:
    """Abnar & Zuidema's definition for one image, entry by entry in float64."""
    depth, _, H, N, _ = attentions.shape
    values = attentions[:, image].double().tolist()
    rolled = [[float(i == j) for j in range(N)] for i in range(N)]
    for block in range(depth):
        step = [[sum(values[block][h][i][j] for h in range(H)) / H / 2 + 0.5 * (i == j) for j in range(N)] for i in range(N)]
        rolled = [[sum(step[i][k] * rolled[k][j] for k in range(N)) for j in range(N)] for i in range(N)]
    return rolled


def test_maps_against_a_loop(encoder: VisionTransformer, images: Tensor) -> None:
    attentions = block_attentions(encoder, images)
    assert attentions.shape == (3, 4, 3, 19, 19)
    for image in (0, 3):
        rolled = torch.tensor(rollout_of(attentions, image), dtype=torch.float64)
        torch.testing.assert_close(rolled.sum(1), torch.ones(19, dtype=torch.float64))
        last = attentions[-1, image].double().mean(0)
        for kind, matrix in (("rollout", rolled), ("last", last)):
            for token, row in (("class", matrix[0, 1:]), ("mean", matrix[1:, 1:].mean(0))):
                found = attention_maps(encoder, images, kind, token)[image]  # type: ignore[arg-type]
                assert found.shape == (6, 3)
                torch.testing.assert_close(found.double().flatten(), row / row.sum(), atol=1e-6, rtol=1e-5)


def test_maps_tell_where_the_attention_is(encoder: VisionTransformer, images: Tensor) -> None:
    maps = attention_maps(encoder, images, "last")
    torch.testing.assert_close(maps.sum((1, 2)), torch.ones(4))
    assert maps.max() > 1.5 * maps.mean()
    # Keys that grow with a patch's place in the grid: the class token looks at the last patch, in the lower right corner.
    layer = attention_layers(encoder)[-1]
    layer.register_forward_pre_hook(lambda _, inputs: (torch.arange(19.0).view(1, 19, 1).expand(4, 19, 48),))
    layer.qkv.weight.data.zero_()
    layer.qkv.weight.data[48:96, 0] = 1.0
    layer.qkv.bias.data.fill_(1.0)
    assert attention_maps(encoder, images, "last").flatten(1).argmax(1).tolist() == [17] * 4
    assert attention_maps(encoder, images, "last")[:, 5, 2].min() > 0.5


def test_bf16_runs_and_unknown_words_are_refused(encoder: VisionTransformer, images: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        maps = attention_maps(encoder, images)
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps, attention_maps(encoder, images), atol=5e-3, rtol=0.1)
    with pytest.raises(ValueError, match="allowed: rollout or last, of class or mean"):
        attention_maps(encoder, images, "first")  # type: ignore[arg-type]
