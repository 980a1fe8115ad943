"""Attention against its formula in float64, of whole batches and of packed sequences."""

import pytest
import torch

from personmae.configs import UserError
from personmae.models import attention
from personmae.models.attention import Attention, AttentionChoice, CrossAttention, choose_attention, set_attention
from personmae.models.packed_attention import packed_attention

CUDA = torch.device("cuda")


def by_formula(q, k, v):  # [N, d], [M, d], [M, d]
    weights = torch.softmax(q @ k.T / q.shape[-1] ** 0.5, dim=-1)
    return weights @ v


def test_self_attention_is_its_formula_head_by_head():
    torch.manual_seed(0)
    layer = Attention(12, 3).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    qkv = x @ layer.qkv.weight.T + layer.qkv.bias
    for b in range(2):
        heads = [by_formula(*(qkv[b, :, 12 * part + 4 * h : 12 * part + 4 * h + 4] for part in range(3))) for h in range(3)]
        expected = torch.cat(heads, dim=1) @ layer.proj.weight.T + layer.proj.bias
        assert torch.allclose(layer(x)[b], expected, atol=1e-12)


def test_cross_attention_is_its_formula_head_by_head():
    torch.manual_seed(0)
    layer = CrossAttention(8, 2).double()
    x, context = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 7, 8, dtype=torch.float64)
    q, kv = x @ layer.q.weight.T + layer.q.bias, context @ layer.kv.weight.T + layer.kv.bias
    for b in range(2):
        heads = [by_formula(q[b, :, 4 * h : 4 * h + 4], kv[b, :, 4 * h : 4 * h + 4], kv[b, :, 8 + 4 * h : 12 + 4 * h]) for h in range(2)]
        expected = torch.cat(heads, dim=1) @ layer.proj.weight.T + layer.proj.bias
        assert torch.allclose(layer(x, context)[b], expected, atol=1e-12)


def test_a_layer_runs_what_replaces_its_kind():
    torch.manual_seed(0)
    layer, x = Attention(64, 2), torch.randn(2, 5, 64)
    expected = layer(x)
    set_attention(layer, AttentionChoice("no such kind", "", {32: (5, "short")}))
    assert torch.allclose(layer(x), expected, atol=1e-6)
    with pytest.raises(KeyError, match="no such kind"):
        layer(torch.randn(2, 6, 64))


def test_short_attention_gives_what_sdpa_gives():
    torch.manual_seed(0)
    own, cross = Attention(64, 2), CrossAttention(64, 2)
    x, context = torch.randn(2, 5, 64), torch.randn(2, 7, 64)
    expected = own(x), cross(x, context)
    for layer in (own, cross):
        set_attention(layer, "short", num_tokens=7)
        assert layer.kind == "short"
    assert torch.allclose(own(x), expected[0], atol=1e-6)
    assert torch.allclose(cross(x, context), expected[1], atol=1e-6)


def test_short_attention_refuses_what_its_kernels_do_not_reach():
    assert choose_attention("short", torch.device("cuda")).kind == "short"
    with pytest.raises(UserError, match="heads of 32 or 64 channels, not 16"):
        set_attention(Attention(64, 4), "short")
    with pytest.raises(UserError, match="reaches to 256 tokens, and there are 257 here"):
        set_attention(Attention(64, 2), "short", num_tokens=257)
    set_attention(Attention(64, 4), "sdpa", num_tokens=257)


def test_heads_must_divide_the_width():
    with pytest.raises(UserError, match="5 heads"):
        Attention(12, 5)
    with pytest.raises(UserError, match="5 heads"):
        CrossAttention(12, 5)


LENGTHS = (5, 1, 7, 5)


def packed_by_formula(q, k, v, lengths):  # [total, H, d] each
    parts = zip(*(tensor.split(lengths) for tensor in (q, k, v)), strict=True)
    return torch.cat([torch.stack([by_formula(a[:, h], b[:, h], c[:, h]) for h in range(a.shape[1])], dim=1) for a, b, c in parts])


def packed_inputs(device, dtype, head_size):
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(sum(LENGTHS), 2, head_size, generator=generator).to(device, dtype) for _ in range(4)]
    return [tensor.requires_grad_() for tensor in drawn[:3]], drawn[3]


def test_packed_sequences_attend_each_to_itself():
    values, upstream = packed_inputs("cpu", torch.float64, 4)
    out, expected = packed_attention(*values, LENGTHS), packed_by_formula(*values, list(LENGTHS))
    assert torch.allclose(out, expected, atol=1e-12)
    ours, theirs = (torch.autograd.grad((result * upstream).sum(), values) for result in (out, expected))
    for name, a, b in zip("qkv", ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-12), name


def test_packed_lengths_must_fit():
    values, _ = packed_inputs("cpu", torch.float32, 4)
    for lengths in ((5, 1, 7), (18, 0), (19, -1)):
        with pytest.raises(ValueError, match="must be positive and sum to the 18 tokens"):
            packed_attention(*values, lengths)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("kind", ["xformers", "sdpa"])
def test_packed_sequences_of_a_gpu_attend_each_to_itself(kind, dtype, tolerance):
    if kind == "xformers" and choose_attention("auto", CUDA, "fp32" if dtype == torch.float32 else "bf16").kind != kind:
        pytest.skip(choose_attention("auto", CUDA, "bf16").reason)
    values, upstream = packed_inputs("cuda", dtype, 64)
    exact = [tensor.detach().double().requires_grad_() for tensor in values]
    out, expected = packed_attention(*values, LENGTHS, kind), packed_by_formula(*exact, list(LENGTHS))
    assert torch.allclose(out.double(), expected, atol=tolerance, rtol=tolerance)
    ours = torch.autograd.grad((out * upstream).sum(), values)
    theirs = torch.autograd.grad((expected * upstream.double()).sum(), exact)
    for name, a, b in zip("qkv", ours, theirs, strict=True):
        assert (a.double() - b).norm() <= tolerance * b.norm(), name


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("num_tokens", [33, 64, 129])
def test_each_attention_of_a_gpu_is_the_formula_in_float64(dtype, tolerance, num_tokens):
    device = torch.device("cuda")
    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    kinds = {"sdpa", "sdpa-efficient", choose_attention("auto", device, precision).kind} | ({"sdpa-flash"} if precision == "bf16" else set())
    q, k, v = (torch.randn(2, num_tokens, 3, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    upstream = torch.randn(2, num_tokens, 3, 64, device=device, dtype=dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in (q, k, v)]
    expected = attention.attend(*exact, "sdpa")
    wanted = torch.autograd.grad((expected * upstream.double()).sum(), exact)
    for kind in kinds:
        found = attention.attend(q, k, v, kind)
        assert torch.allclose(found.double(), expected, atol=tolerance, rtol=tolerance), kind
        for name, ours, theirs in zip("qkv", torch.autograd.grad((found * upstream).sum(), (q, k, v)), wanted, strict=True):
            assert (ours.double() - theirs).norm() <= tolerance * theirs.norm(), (kind, name)
