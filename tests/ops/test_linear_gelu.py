"""linear_gelu in both forms against float64: ragged tiles of every size, leading axes, tails of the GELU; and that it asks for no gradient."""

import math

import pytest
import torch
from closeness import DEVICE, assert_close

from personmae_kernels import launching
from personmae_kernels.linear_gelu import _linear_gelu, linear_gelu, tiles_for

FORMATS = [torch.float32, torch.bfloat16, torch.float16]


def exact_linear_gelu(x, weight, bias):
    """From the definition, in float64: the error function comes from the C library."""
    x, weight, bias = x.double().cpu(), weight.double().cpu(), bias.double().cpu()
    v = (x[..., None, :] * weight).sum(-1) + bias
    erf = torch.tensor([math.erf(value / math.sqrt(2)) for value in v.flatten().tolist()], dtype=torch.float64).reshape(v.shape)
    return {"result": v / 2 * (1 + erf)}


def example(leading=(2, 5), D=48, E=24, dtype=torch.float32, bias_dtype=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*leading, D, generator=generator)
    weight = torch.randn(E, D, generator=generator) / math.sqrt(max(1, D))
    bias = torch.randn(E, generator=generator)
    return {"x": x.to(DEVICE, dtype), "weight": weight.to(DEVICE, dtype), "bias": bias.to(DEVICE, bias_dtype or dtype)}


def check(inputs, form, exact=None):
    """The result, once it is close enough. The kernel rounds to a half format once, at its end, so that alone may cost it anything there; elsewhere
    PyTorch is the bar: where 1 + erf cancels, single values lose digits in float32 too."""
    x, weight, bias = inputs.values()
    ours, exact = {"result": linear_gelu(**inputs)}, exact or exact_linear_gelu(**inputs)
    assert ours["result"].dtype == x.dtype
    rounded_once = form == "triton" and x.dtype != torch.float32
    plain = exact["result"].to(x.dtype) if rounded_once else torch.nn.functional.gelu(torch.nn.functional.linear(x, weight, bias.to(x.dtype)))
    assert_close(ours, exact, {"result": plain}, floor=1e-6)
    return ours["result"]


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(
    ("T", "D", "E"), [(1, 1, 1), (3, 31, 2), (31, 33, 63), (33, 64, 65), (63, 65, 127), (64, 64, 64), (65, 127, 31), (127, 96, 129), (130, 17, 70)]
)
def test_it_is_the_definition(form, T, D, E, dtype):
    check(example((T,), D, E, dtype), form)


@pytest.mark.parametrize("dtype", FORMATS)
def test_the_large_tiles_in_their_groups(form, dtype):
    """10 x 7 tiles of 128 x 128: a whole group of eight tiles of rows and a part of one, the last tile ragged both ways."""
    inputs = example((1153,), 72, 784, dtype)
    x, weight, bias = (tensor.double().cpu() for tensor in inputs.values())
    check(inputs, form, {"result": torch.nn.functional.gelu(x @ weight.t() + bias)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bias_in_float32(form, dtype):
    check(example(dtype=dtype, bias_dtype=torch.float32), form)


@pytest.mark.parametrize("leading", [(), (1,), (7,), (2, 1, 3), (2, 2, 2, 2)])
def test_leading_axes(form, leading):
    inputs = example(leading)
    result = check(inputs, form)
    assert result.shape == (*leading, 24)
    flat = linear_gelu(inputs["x"].reshape(-1, 48), inputs["weight"], inputs["bias"])
    assert_close({"result": result.reshape(-1, 24)}, {"result": flat}, floor=1e-6)


@pytest.mark.parametrize("leading", [(0,), (0, 5), (3, 0)])
def test_an_empty_batch(form, leading):
    assert linear_gelu(**example(leading)).shape == (*leading, 24)


def test_no_width_leaves_the_bias(form):
    inputs = example((5,), D=0)
    assert_close({"result": linear_gelu(**inputs)}, exact_linear_gelu(**inputs), floor=1e-6)
    assert linear_gelu(**example((5,), E=0)).shape == (5, 0)


def test_the_tails(form):
    """Far out the GELU is its argument, or nothing, and never NaN."""
    x = torch.tensor([[-1e4], [-50.0], [-9.0], [-1.0], [0.0], [1.0], [9.0], [50.0], [1e4]], device=DEVICE)
    one, zero = torch.ones(1, 1, device=DEVICE), torch.zeros(1, device=DEVICE)
    result = linear_gelu(x, one, zero)
    assert_close({"result": result}, exact_linear_gelu(x, one, zero), floor=1e-6)
    assert torch.equal(result[-3:], x[-3:])
    assert (result[:3].abs() < 1e-6).all()


def test_non_contiguous_inputs(form):
    inputs = example((6, 10), 48, 24)
    odd = {
        "x": inputs["x"].transpose(0, 1),
        "weight": inputs["weight"].t().contiguous().t(),
        "bias": torch.stack([inputs["bias"], inputs["bias"]], 1)[:, 0],
    }
    assert not any(tensor.is_contiguous() for tensor in odd.values())
    check(odd, form)


def test_rows_do_not_depend_on_one_another(triton_form):
    inputs = example((70,), 80, 40)
    whole = linear_gelu(**inputs)
    spoilt = inputs["x"].clone()
    spoilt[33] = float("nan")
    result = linear_gelu(spoilt, inputs["weight"], inputs["bias"])
    assert result[33].isnan().all()
    kept = torch.arange(70, device=DEVICE) != 33
    assert torch.equal(result[kept], whole[kept])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": lambda t: t.long()}, TypeError, "x: float32 or bfloat16 or float16 is needed, got int64"),
        ({"x": lambda t: t[0, 0, 0]}, ValueError, r"x: \[D\] is needed, got shape \[\]"),
        ({"x": lambda t: [1.0]}, TypeError, r"x: a tensor \[D\]"),
        ({"x": lambda t: t[..., :40]}, ValueError, r"weight: axis D of \[E, D\] is 48, but 40 in x"),
        ({"x": lambda t: t.bfloat16()}, TypeError, "weight: bfloat16 is needed, as x is, got float32"),
        ({"weight": lambda t: t.double()}, TypeError, "weight: float32 is needed, as x is, got float64"),
        ({"weight": lambda t: t[0]}, ValueError, r"weight: \[E, D\] is needed"),
        ({"weight": lambda t: t[:20]}, ValueError, r"bias: axis E of \[E\] is 24, but 20 in weight"),
        ({"weight": lambda t: t.to("meta")}, ValueError, "weight: is on meta"),
        ({"bias": lambda t: t.half()}, TypeError, "bias: float32"),
        ({"bias": lambda t: t[None]}, ValueError, r"bias: \[E\] is needed"),
        ({"bias": lambda t: None}, TypeError, r"bias: a tensor \[E\]"),
    ],
)
def test_wrong_arguments_are_named(form, change, error, words):
    inputs = example()
    ((name, spoil),) = change.items()
    with pytest.raises(error, match=words):
        linear_gelu(**{**inputs, name: spoil(inputs[name])})


@pytest.mark.parametrize("name", ["x", "weight", "bias"])
def test_it_is_for_the_forward_pass_alone(form, name):
    inputs = example()
    plain = linear_gelu(**inputs)
    inputs[name].requires_grad_()
    with pytest.raises(ValueError, match=rf"{name}: requires a gradient, which linear_gelu does not give; .*torch.no_grad"):
        linear_gelu(**inputs)
    with torch.no_grad():
        assert torch.equal(linear_gelu(**inputs), plain)


def test_float64_is_for_the_reference(form):
    inputs = example(dtype=torch.float64)
    if form == "reference":
        assert_close({"result": linear_gelu(**inputs)}, exact_linear_gelu(**inputs))
    else:
        with pytest.raises(TypeError, match="float64"):
            linear_gelu(**inputs)


@pytest.mark.parametrize("dtype", FORMATS)
def test_opcheck(triton_form, dtype):
    torch.library.opcheck(_linear_gelu, tuple(example(dtype=dtype).values()))


def test_it_compiles_into_one_graph(triton_form):
    inputs = example()
    compiled = torch.compile(linear_gelu, backend="aot_eager", fullgraph=True)(**inputs)
    assert torch.equal(compiled, linear_gelu(**inputs))


def test_tiles_follow_the_size(triton_form):
    """The teacher's layers get the large tile; where that would leave most of a GPU idle, and in float32, a small one."""
    assert tiles_for(256 * 128, 1536, torch.bfloat16)[:3] == (128, 128, 64)
    assert tiles_for(16 * 128, 3072, torch.float16)[:3] == (128, 128, 64)
    assert tiles_for(128, 1536, torch.bfloat16)[:3] == (64, 64, 64)
    assert tiles_for(256 * 128, 1536, torch.float32)[:2] == (64, 64)
    with launching.recorded(run=False) as launches:
        linear_gelu(**example((256, 129), 384, 1536, torch.bfloat16))
    ((kernel, grid, *_),) = launches
    assert kernel.fn.__name__ == "linear_gelu_kernel"
    assert grid == (258 * 12,)
