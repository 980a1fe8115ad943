"""Attention against its formula in float64, and the choice of an implementation."""

import pytest
import torch

from personmae.configs import UserError
from personmae.models import attention
from personmae.models.attention import Attention, CrossAttention, choose_attention, set_attention


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


def test_the_choice_says_its_reason(monkeypatch):
    assert choose_attention("auto", torch.device("cpu")).kind == "sdpa"
    assert "cpu" in choose_attention("auto", torch.device("cpu")).reason
    with pytest.raises(UserError, match="CUDA only"):
        choose_attention("xformers", torch.device("cpu"))
    monkeypatch.setattr(attention, "_xformers_problem", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose_attention("auto", torch.device("cuda")).kind == "xformers"
    assert choose_attention("sdpa", torch.device("cuda")).kind == "sdpa"
    monkeypatch.setattr(attention, "_xformers_problem", lambda: "xformers is not installed (pip install xformers)")
    choice = choose_attention("auto", torch.device("cuda"))
    assert choice.kind == "sdpa"
    assert "pip install" in choice.reason
    with pytest.raises(UserError, match="pip install"):
        choose_attention("xformers", torch.device("cuda"))


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


@pytest.mark.parametrize(
    ("capability", "precision", "deterministic", "kind"),
    [
        ((9, 0), "bf16", False, "xformers"),
        ((9, 0), "fp32", False, "xformers"),
        ((9, 0), "bf16", True, "sdpa"),
        ((12, 0), "fp32", False, "sdpa"),
        ((12, 0), "bf16", False, "xformers"),
        ((7, 5), "bf16", False, "sdpa"),
    ],
)
def test_xformers_is_left_where_it_has_no_kernel(monkeypatch, capability, precision, deterministic, kind):
    monkeypatch.setattr(attention, "_xformers_problem", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_attention("auto", torch.device("cuda"), precision, deterministic).kind == kind


def test_a_missing_xformers_is_named_with_the_cure(monkeypatch):
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: None)
    attention._xformers_problem.cache_clear()
    try:
        assert "pip install" in (attention._xformers_problem() or "")
    finally:
        attention._xformers_problem.cache_clear()


def test_heads_must_divide_the_width():
    with pytest.raises(UserError, match="5 heads"):
        Attention(12, 5)
    with pytest.raises(UserError, match="5 heads"):
        CrossAttention(12, 5)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("num_tokens", [33, 64, 129])
def test_each_attention_of_a_gpu_is_the_formula_in_float64(dtype, tolerance, num_tokens):
    device = torch.device("cuda")
    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    kinds = {"sdpa", choose_attention("auto", device, precision).kind}
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
