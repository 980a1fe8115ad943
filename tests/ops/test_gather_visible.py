"""gather_visible in its three forms against float64 loops over tokens: odd sizes, views, numbers off the grid; and its gradient."""

import pytest
import torch
from closeness import DEVICE, assert_close, outputs_and_gradients

from personmae_kernels import compiled, launching
from personmae_kernels.gather_visible import _gather_visible, gather_visible


@pytest.fixture(params=["reference", "triton", "compiled"])
def form(request):
    """The operator runs in this form."""
    if request.param == "compiled" and not compiled.available(cuda=DEVICE == "cuda"):
        pytest.skip(compiled.why_missing(cuda=DEVICE == "cuda"))
    launching.use_operators(request.param)
    yield request.param
    launching.use_operators(None)


def exact_gather(tokens, visible, positions=None):
    """From the definition, token by token, in float64."""
    rows = []
    for b, numbers in enumerate(visible.tolist()):
        for number in numbers:
            rows.append(tokens[b, number] if positions is None else tokens[b, number] + positions[number])
    (B, V), D = visible.shape, tokens.shape[2]
    return {"out": torch.stack(rows).reshape(B, V, D) if rows else tokens.reshape(B, -1, D)[:, :0]}


def example(B=3, L=7, V=4, D=5, dtype=torch.float32, positions="float32", index_dtype=torch.int32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = {
        "tokens": torch.randn(B, L, D, generator=generator).to(DEVICE, dtype).requires_grad_(),
        "visible": torch.rand(B, L, generator=generator).argsort(1)[:, :V].to(DEVICE, index_dtype),
    }
    if positions:
        inputs["positions"] = torch.randn(L, D, generator=generator).to(DEVICE, torch.float32 if positions == "float32" else dtype)
    return inputs


def check(inputs):
    gradient = torch.randn(*inputs["visible"].shape, inputs["tokens"].shape[2], generator=torch.Generator().manual_seed(1)).to(DEVICE)
    gradient = {"out": gradient.to(inputs["tokens"].dtype)}
    ours = outputs_and_gradients(lambda **kw: {"out": gather_visible(**kw)}, inputs, gradient)
    exact = outputs_and_gradients(exact_gather, inputs, gradient, torch.float64)
    dtype = inputs["tokens"].dtype
    assert all(value.dtype == dtype for value in ours.values())
    assert_close(ours, exact, {name: value.to(dtype) for name, value in exact.items()}, floor=1e-6)
    # A gather moves rows and adds nothing.
    assert torch.equal(ours["gradient of tokens"].double().cpu(), exact["gradient of tokens"])


@pytest.mark.parametrize(
    ("dtype", "positions"),
    [
        (torch.float32, None),
        (torch.float32, "float32"),
        (torch.bfloat16, None),
        (torch.bfloat16, "float32"),
        (torch.bfloat16, "same"),
        (torch.float16, "same"),
    ],
)
@pytest.mark.parametrize(
    ("B", "L", "V", "D"), [(1, 1, 1, 1), (3, 33, 31, 5), (2, 128, 63, 127), (3, 65, 65, 33), (2, 127, 1, 384), (2, 130, 129, 16)]
)
def test_it_is_the_definition(form, B, L, V, D, dtype, positions):
    check(example(B, L, V, D, dtype, positions))


def test_float64_is_not_for_triton(form):
    inputs = example(dtype=torch.float64, positions="same")
    if form != "triton":
        check(inputs)
    else:
        with pytest.raises(TypeError, match="do not compute in float64"):
            gather_visible(**inputs)


@pytest.mark.parametrize("positions", [None, "float32"])
def test_patch_numbers_of_64_bits(form, positions):
    check(example(index_dtype=torch.int64, positions=positions))


@pytest.mark.parametrize("view", ["without the class token", "one image for all", "last axis strided", "images and rows swapped"])
def test_views(form, view):
    inputs = example(B=3, L=7, D=8)
    tokens = inputs["tokens"].detach()
    leaf = {
        "without the class token": lambda: torch.cat([tokens[:, :1], tokens], dim=1),
        "one image for all": lambda: tokens[:1].clone(),
        "last axis strided": lambda: tokens.transpose(1, 2).contiguous(),
        "images and rows swapped": lambda: tokens.transpose(0, 1).contiguous(),
    }[view]()
    leaf.requires_grad_()

    def seen(leaf):
        return {
            "without the class token": lambda: leaf[:, 1:],
            "one image for all": lambda: leaf.expand(3, -1, -1),
            "last axis strided": lambda: leaf.transpose(1, 2),
            "images and rows swapped": lambda: leaf.transpose(0, 1),
        }[view]()

    assert not seen(leaf).is_contiguous()
    rest = {"visible": inputs["visible"].t().contiguous().t(), "positions": inputs["positions"].t().contiguous().t()}
    gradient = {"out": torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(1)).to(DEVICE).transpose(1, 2)}

    def ours(tokens, visible, positions):
        return {"out": gather_visible(seen(tokens), visible, positions)}

    def exact(tokens, visible, positions):
        return exact_gather(seen(tokens), visible, positions)

    wanted = outputs_and_gradients(exact, {"tokens": leaf, **rest}, gradient, torch.float64)
    assert_close(outputs_and_gradients(ours, {"tokens": leaf, **rest}, gradient), wanted, floor=1e-6)


def test_a_view_with_contiguous_rows_is_not_copied(triton_form):
    tokens = torch.randn(3, 8, 16, device=DEVICE)
    with launching.recorded() as launches:
        gather_visible(tokens[:, 1:], example()["visible"])
    assert launches[0].arguments[0].data_ptr() == tokens[:, 1:].data_ptr()


def test_a_gradient_that_is_one_number(form):
    inputs = example()
    gather_visible(**inputs).sum().backward()
    chosen = torch.zeros(3, 7, device=DEVICE).scatter_(1, inputs["visible"].long(), 1.0)
    assert torch.equal(inputs["tokens"].grad, chosen[:, :, None].expand(-1, -1, 5))


def test_tokens_in_front_stay_as_they_are(triton_form):
    inputs = example()
    tokens, front = inputs["tokens"].detach(), torch.randn(3, 2, 5, device=DEVICE)
    tokens_too = torch.cat([front, tokens], dim=1).requires_grad_()
    out = _gather_visible(tokens_too, inputs["visible"], inputs["positions"], 2)
    assert torch.equal(out, torch.cat([front, gather_visible(**inputs)], dim=1))
    out.sum().backward()
    gather_visible(**inputs).sum().backward()
    assert torch.equal(tokens_too.grad, torch.cat([torch.ones_like(front), inputs["tokens"].grad], dim=1))


@pytest.mark.parametrize(("B", "V"), [(0, 4), (3, 0)])
def test_nothing_to_do(form, B, V):
    inputs = example(B=B, V=V)
    out = gather_visible(**inputs)
    out.sum().backward()
    assert out.shape == (B, V, 5)
    assert torch.equal(inputs["tokens"].grad, torch.zeros(B, 7, 5, device=DEVICE))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_a_number_off_the_grid_shows_and_touches_nothing(triton_form, index_dtype):
    right, wrong = example(index_dtype=index_dtype), example(index_dtype=index_dtype)
    wrong["visible"] = wrong["visible"].clone()
    spots = ((0, 0), (1, 2), (2, 3))
    wrong["visible"][0, 0], wrong["visible"][1, 2], wrong["visible"][2, 3] = -1, 7, torch.iinfo(index_dtype).max
    out, expected = gather_visible(**wrong), gather_visible(**right)
    gradient = torch.ones_like(expected)
    out.backward(gradient)
    out = out.detach()
    for b, v in spots:
        assert out[b, v].isnan().all()
        out[b, v] = expected[b, v].detach()
        gradient[b, v] = 0
    assert torch.equal(out, expected)
    expected.backward(gradient)
    assert torch.equal(wrong["tokens"].grad, right["tokens"].grad)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"tokens": lambda t: t.long()}, TypeError, "tokens: float32 or bfloat16 or float16"),
        ({"tokens": lambda t: t[0]}, ValueError, r"tokens: \[B, L, D\] is needed"),
        ({"visible": lambda t: t.float()}, TypeError, "visible: int32 or int64"),
        ({"visible": lambda t: t[:2]}, ValueError, r"visible: axis B of \[B, V\] is 2, but 3 in tokens"),
        ({"visible": lambda t: t.to("meta")}, ValueError, "visible: is on meta"),
        ({"visible": lambda t: t.tolist()}, TypeError, "visible: a tensor"),
        ({"positions": lambda t: t[:6]}, ValueError, r"positions: axis L of \[L, D\] is 6, but 7 in tokens"),
        ({"positions": lambda t: t[:, :4]}, ValueError, r"positions: axis D of \[L, D\] is 4, but 5 in tokens"),
        ({"positions": lambda t: t.bfloat16()}, TypeError, "positions: float32"),
        ({"positions": lambda t: t.requires_grad_()}, ValueError, "positions: the operator has no gradient"),
    ],
)
def test_wrong_arguments_are_named(form, change, error, words):
    inputs = example()
    ((name, spoil),) = change.items()
    with pytest.raises(error, match=words):
        gather_visible(**{**inputs, name: spoil(inputs[name])})


@pytest.mark.parametrize("num_head", [0, 1])
@pytest.mark.parametrize("positions", [None, "float32"])
def test_opcheck(triton_form, positions, num_head):
    inputs = example(positions=positions)
    tokens = torch.cat([torch.zeros(3, num_head, 5, device=DEVICE), inputs["tokens"].detach()], dim=1).requires_grad_()
    torch.library.opcheck(_gather_visible.registered, (tokens, inputs["visible"], inputs.get("positions"), num_head))


def test_it_compiles_into_one_graph(form):
    inputs, other = example(), example()
    traced = torch.compile(gather_visible, backend="aot_eager", fullgraph=True)(**inputs)
    plain = gather_visible(**other)
    traced.square().sum().backward()
    plain.square().sum().backward()
    assert torch.equal(traced, plain)
    assert torch.equal(inputs["tokens"].grad, other["tokens"].grad)


def test_the_kernels_are_launched(triton_form):
    with launching.recorded() as launches:
        gather_visible(**example()).sum().backward()
    assert [launch.kernel.fn.__name__ for launch in launches] == ["gather_visible_kernel", "place_visible_kernel"]
