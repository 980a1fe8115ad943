"""short_attention and short_cross_attention in both forms against float64: all kinds of tiles, ragged ends, large logits, views."""

import pytest
import torch
from closeness import DEVICE, assert_close, outputs_and_gradients

from personmae_kernels import launching, reference
from personmae_kernels.short_attention import (
    _addressable,
    _short_attention,
    _short_attention_backward,
    _short_cross_attention,
    _short_cross_attention_backward,
    short_attention,
    short_cross_attention,
)

HALVES = [torch.bfloat16, torch.float16]
LENGTHS = [1, 15, 16, 31, 32, 33, 63, 64, 65, 127, 128, 129, 193, 211, 256]


def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v from the definition: [B, N, H, d], [B, M, H, d] twice -> [B, N, H, d]."""
    logits = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    return torch.einsum("bhnm,bmhd->bnhd", weights / weights.sum(-1, keepdim=True), v)


def self_example(N, B=1, H=2, d=64, dtype=torch.float32):
    generator = torch.Generator().manual_seed(N)
    qkv = torch.randn(B, N, 3, H, d, generator=generator).to(dtype)
    return {"qkv": qkv.to(DEVICE).requires_grad_()}


def cross_example(N, M, B=1, H=2, d=64, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1000 * N + M)
    q = torch.randn(B, N, H, d, generator=generator).to(dtype)
    kv = torch.randn(B, M, 2, H, d, generator=generator).to(dtype)
    return {"q": q.to(DEVICE).requires_grad_(), "kv": kv.to(DEVICE).requires_grad_()}


def run(inputs, gradient=None):
    """(of the operator in the form at hand, exact, of PyTorch's attention in the same format)

    The gradients of the parts of a packed tensor stand apart: "gradient of q", "of k", "of v".
    """
    packed = "qkv" in inputs
    if gradient is None:
        shape = inputs["qkv"][:, :, 0].shape if packed else inputs["q"].shape
        dtype = next(iter(inputs.values())).dtype
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(dtype).to(DEVICE)

    def exact(**inputs):
        return {"out": attention(*(inputs["qkv"].unbind(2) if packed else (inputs["q"], *inputs["kv"].unbind(2))))}

    def ours(**inputs):
        return {"out": short_attention(**inputs) if packed else short_cross_attention(**inputs)}

    def plain(**inputs):
        return {"out": reference.short_attention(**inputs) if packed else reference.short_cross_attention(**inputs)}

    def of(function, dtype=None):
        results = outputs_and_gradients(function, inputs, {"out": gradient}, dtype)
        whole = results.pop("gradient of qkv" if packed else "gradient of kv")
        names = ("q", "k", "v") if packed else ("k", "v")
        return results | {f"gradient of {name}": part for name, part in zip(names, whole.unbind(2), strict=True)}

    return of(ours), of(exact, torch.float64), of(plain)


def assert_accurate(inputs):
    """float32 within 1e-6; the others at most twice as far off as PyTorch's attention in the same format, and within 1e-2."""
    ours, exact, plain = run(inputs)
    dtype = next(iter(inputs.values())).dtype
    assert {result.dtype for result in ours.values()} == {dtype}
    # With one key q and k get no gradient: what is left there is rounding, and is no measure.
    if exact["gradient of k"].norm() < 1e-9:
        for name in ("gradient of q", "gradient of k"):
            assert ours.pop(name).abs().max() <= (1e-5 if dtype == torch.float32 else 0.1)
            del exact[name], plain[name]
    if dtype == torch.float32:
        assert_close(ours, exact, floor=1e-6)
    else:
        assert_close(ours, exact, plain)
        assert_close(ours, exact, floor=1e-2)


@pytest.mark.parametrize("N", LENGTHS)
def test_self_attention_in_float32(form, N):
    assert_accurate(self_example(N, H=1, d=32 if N % 2 else 64))


@pytest.mark.parametrize(("dtype", "odd", "even"), [(torch.bfloat16, 32, 64), (torch.bfloat16, 64, 32), (torch.float16, 64, 64)])
@pytest.mark.parametrize("N", LENGTHS)
def test_self_attention_in_16_bits(form, N, dtype, odd, even):
    assert_accurate(self_example(N, d=odd if N % 2 else even, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(("N", "M"), [(128, 64), (128, 65), (1, 256), (256, 1), (33, 17), (16, 130), (200, 31), (130, 128), (129, 211)])
def test_cross_attention(form, N, M, dtype):
    assert_accurate(cross_example(N, M, H=1, d=32 if (N + M) % 2 else 64, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("N", [31, 129])
def test_images_and_heads_stay_apart(form, N, dtype):
    assert_accurate(self_example(N, B=2, H=2, d=32, dtype=dtype))
    assert_accurate(cross_example(N, 20, B=2, H=2, d=32, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("example", [self_example(33), self_example(128), self_example(193), cross_example(65, 70)])
def test_large_logits(form, example, dtype):
    large = {name: (30 * tensor.detach()).to(dtype).requires_grad_() for name, tensor in example.items()}
    ours, exact, plain = run(large)
    # Rounding of logits in the thousands, which plain PyTorch has too, weighs more than all else.
    assert_close(ours, exact, plain, floor=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("N", [33, 129])
def test_logits_far_below_zero(form, N, dtype):
    inputs = self_example(N, H=1, dtype=dtype)
    with torch.no_grad():
        inputs["qkv"][:, :, 0] += 10
        inputs["qkv"][:, :, 1] -= 10
    ours, exact, plain = run(inputs)
    # Were they not masked, keys past the end (logits of 0) would have infinite probabilities in the backward pass. Logits near -800 are rounded to
    # 6e-5, and the gradient of q is a sum of keys near -10 whose weights add up to zero: a processor's order of summation shows in it.
    assert_close(ours, exact, plain, floor=1e-3 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("N", [33, 128, 193])
def test_identical_keys(form, N, dtype):
    inputs = self_example(N, dtype=dtype)
    with torch.no_grad():
        inputs["qkv"][:, :, 1] = inputs["qkv"][:, :1, 1]
    ours, exact, plain = run(inputs)
    values = inputs["qkv"].detach()[:, :, 2].double().cpu()
    assert_close({"out": ours["out"]}, {"out": values.mean(1, keepdim=True).expand_as(values)}, {"out": plain["out"]})
    # The exact gradient of q is zero: what is left of it is rounding, and is no measure.
    assert ours.pop("gradient of q").abs().max() <= (1e-6 if dtype == torch.float32 else 1e-2)
    del exact["gradient of q"], plain["gradient of q"]
    assert_close(ours, exact, plain)


def test_lse_is_the_log_of_the_sum(triton_form):
    for N, dtype in ((33, torch.float32), (193, torch.bfloat16)):
        qkv = self_example(N, dtype=dtype)["qkv"].detach()
        _, lse = _short_attention(qkv)
        q, k, _ = qkv.double().cpu().unbind(2)
        exact = torch.einsum("bnhd,bmhd->bhnm", q, k).div(8).logsumexp(-1) / torch.tensor(2.0, dtype=torch.float64).log()
        assert_close({"lse": lse}, {"lse": exact})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_are_read_in_place(triton_form, dtype):
    wide = self_example(20, B=2, H=2, d=64, dtype=dtype)["qkv"].detach()
    views = {
        "part of the channels": wide[..., 16:48],
        "part of the tokens": wide[:, 3:20],
        "part of the heads": wide[:, :, :, 1:],
        "tokens first": wide.transpose(0, 1).contiguous().transpose(0, 1),
        "heads first": wide.permute(3, 0, 1, 2, 4).contiguous().permute(1, 2, 3, 0, 4),
        "one image for all": wide[:1].expand(2, -1, -1, -1, -1),
        "parts last": wide.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3),
    }
    for name, view in views.items():
        gradient = torch.randn(view[:, :, 0].mT.shape, device=DEVICE).to(dtype).mT
        results = {}
        for kind, qkv in (("view", view), ("copy", view.contiguous())):
            out, lse = _short_attention(qkv)
            results[kind] = (out, lse, _short_attention_backward(gradient, qkv, out, lse))
        with launching.recorded(run=False) as launches:
            _short_attention(view)
        assert (launches[0].arguments[0].data_ptr() == view.data_ptr()) == (name != "parts last")
        assert all(torch.equal(a, b) for a, b in zip(*results.values(), strict=True)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_non_contiguous_inputs(form, dtype):
    def odd(tensor):
        return tensor.detach().transpose(1, -1).contiguous().transpose(1, -1).requires_grad_()

    example = self_example(33, dtype=dtype)
    for inputs in (example, cross_example(17, 33, B=2, dtype=dtype)):
        assert_accurate({name: odd(tensor) for name, tensor in inputs.items()})
    shape = example["qkv"][:, :, 0].shape
    ours, exact, plain = run(example, torch.ones((), dtype=dtype, device=DEVICE).expand(shape))
    # A gradient alike in all rows and channels, as that of a sum.
    assert_close({"v": ours["gradient of v"]}, {"v": exact["gradient of v"]}, {"v": plain["gradient of v"]})


def test_rows_too_far_apart_for_32_bits_are_copied():
    far = torch.empty_strided((1, 3, 3, 1, 32), (2**32, 2**30, 64, 32, 1), device="meta")
    assert _addressable(far).is_contiguous()
    near = torch.empty_strided((1, 3, 3, 1, 32), (2**32, 2**29, 64, 32, 1), device="meta")
    assert _addressable(near) is near


def test_an_empty_batch(form):
    ours, *_ = run(self_example(5, B=0))
    assert {name: tuple(result.shape) for name, result in ours.items()} == dict.fromkeys(ours, (0, 5, 2, 64))
    ours, *_ = run(cross_example(5, 7, B=0))
    assert ours["out"].shape == ours["gradient of q"].shape == (0, 5, 2, 64)
    assert ours["gradient of k"].shape == (0, 7, 2, 64)


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (lambda t: t.long(), TypeError, "qkv: float32 or bfloat16 or float16 is needed, got int64"),
        (lambda t: t[0], ValueError, r"qkv: \[B, N, 3, H, d\] is needed"),
        (lambda t: t[:, :, :2], ValueError, r"qkv: \[B, N, 3, H, d\] is needed"),
        (lambda t: t[..., :48], ValueError, "qkv: heads of 32 or 64 channels are needed, got 48"),
        (lambda t: t[:, :0], ValueError, "qkv: 1 to 256 tokens are needed, got 0"),
        (lambda t: t.expand(-1, 257, -1, -1, -1), ValueError, "qkv: 1 to 256 tokens are needed, got 257"),
        (lambda t: None, TypeError, "qkv: a tensor"),
    ],
)
def test_wrong_arguments_of_self_attention_are_named(form, spoil, error, words):
    with pytest.raises(error, match=words):
        short_attention(spoil(self_example(1)["qkv"]))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": lambda t: t.double()}, TypeError, "kv: float64 is needed, as in q, got float32"),
        ({"q": lambda t: t.bool()}, TypeError, "q: float32 or bfloat16 or float16"),
        ({"q": lambda t: t[..., :16]}, ValueError, r"kv: axis d of \[B, M, 2, H, d\] is 64, but 16 in q"),
        ({"q": lambda t: t.expand(-1, 300, -1, -1)}, ValueError, "q: 1 to 256 tokens are needed, got 300"),
        ({"q": lambda t: t[:, :0]}, ValueError, "q: 1 to 256 tokens are needed, got 0"),
        ({"q": lambda t: t[..., :16], "kv": lambda t: t[..., :16]}, ValueError, "q: heads of 32 or 64 channels are needed, got 16"),
        ({"kv": lambda t: t.bfloat16()}, TypeError, "kv: float32 is needed, as in q, got bfloat16"),
        ({"kv": lambda t: t.int()}, TypeError, "kv: float32 or bfloat16 or float16"),
        ({"kv": lambda t: t[:, :0]}, ValueError, "kv: 1 to 256 tokens are needed, got 0"),
        ({"kv": lambda t: t.expand(-1, 257, -1, -1, -1)}, ValueError, "kv: 1 to 256 tokens are needed, got 257"),
        ({"kv": lambda t: t[:, :, :, :1]}, ValueError, r"kv: axis H of \[B, M, 2, H, d\] is 1, but 2 in q"),
        ({"kv": lambda t: t.to("meta")}, ValueError, "kv: is on meta"),
    ],
)
def test_wrong_arguments_of_cross_attention_are_named(form, change, error, words):
    inputs = cross_example(1, 1)
    with pytest.raises(error, match=words):
        short_cross_attention(**{name: change.get(name, lambda t: t)(tensor) for name, tensor in inputs.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_gradients(form, dtype):
    inputs = self_example(17, dtype=dtype)
    with torch.no_grad():
        out = short_attention(**inputs)
    assert not out.requires_grad
    assert torch.equal(out, short_attention(**inputs))
    context = cross_example(17, 18, dtype=dtype)
    short_cross_attention(context["q"], context["kv"].detach()).sum().backward()
    short_cross_attention(context["q"].detach(), context["kv"]).sum().backward()
    both = cross_example(17, 18, dtype=dtype)
    short_cross_attention(**both).sum().backward()
    assert all(torch.equal(context[name].grad, both[name].grad) for name in both)


def test_opcheck(triton_form):
    inputs = self_example(5, B=2, dtype=torch.bfloat16)
    torch.library.opcheck(_short_attention.registered, tuple(inputs.values()))
    qkv = inputs["qkv"].detach()
    out, lse = _short_attention(qkv)
    torch.library.opcheck(_short_attention_backward.registered, (out, qkv, out, lse))
    inputs = cross_example(5, 6, B=2)
    torch.library.opcheck(_short_cross_attention.registered, tuple(inputs.values()))
    q, kv = (tensor.detach() for tensor in inputs.values())
    out, lse = _short_cross_attention(q, kv)
    torch.library.opcheck(_short_cross_attention_backward.registered, (out, q, kv, out, lse))


def test_it_compiles_into_one_graph(triton_form):
    for function, example in ((short_attention, lambda: self_example(33)), (short_cross_attention, lambda: cross_example(33, 17))):
        results = []
        for run_it in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
            inputs = example()
            out = run_it(**inputs)
            out.square().sum().backward()
            results.append([out.detach(), *(tensor.grad for tensor in inputs.values())])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("N", "M", "query_tiles", "key_tiles"), [(32, 32, 1, (1, 1)), (128, 65, 1, (1, 3)), (129, 129, 3, (3, 5)), (64, 211, 1, (4, 7))]
)
def test_the_kernels_that_are_launched(triton_form, N, M, query_tiles, key_tiles):
    with launching.recorded() as launches:
        short_cross_attention(**cross_example(N, M, dtype=torch.bfloat16)).sum().backward()
    assert [launch.kernel.fn.__name__ for launch in launches] == ["short_attention_forward_kernel", "short_attention_backward_kernel"]
    assert [launch.grid for launch in launches] == [(2 * query_tiles,), (2,)]
    assert tuple(launch.constants["KEY_TILES"] for launch in launches) == key_tiles
