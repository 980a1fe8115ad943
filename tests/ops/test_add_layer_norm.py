"""add_layer_norm in both forms against float64: with and without scales, mixed formats, odd widths; gradients of every input."""

import itertools

import pytest
import torch
from closeness import DEVICE, assert_close, outputs_and_gradients

from personmae_kernels import launching
from personmae_kernels.add_layer_norm import _add_layer_norm, _add_layer_norm_backward, add_layer_norm

SCALES = ["none", "branch_scale", "row_scale", "both"]


def exact_norm(stream, branch, weight, bias, branch_scale=None, row_scale=None):
    """From the definition; in float64 nothing is rounded."""
    added = branch
    if branch_scale is not None:
        added = added * branch_scale
    if row_scale is not None:
        added = added * row_scale.view(-1, 1, 1)
    out = stream + added
    mean = out.mean(-1, keepdim=True)
    variance = (out - mean).square().mean(-1, keepdim=True)
    return {"stream": out, "normed": (out - mean) / (variance + 1e-6).sqrt() * weight + bias}


def plain_norm(stream, branch, weight, bias, branch_scale=None, row_scale=None):
    """As a model without the operator would: PyTorch's own functions in the formats at hand."""
    added = branch.float()
    if branch_scale is not None:
        added = added * branch_scale
    if row_scale is not None:
        added = added * row_scale.view(-1, 1, 1)
    out = stream + added.to(stream.dtype)
    return {"stream": out, "normed": torch.nn.functional.layer_norm(out.float(), out.shape[-1:], weight, bias, 1e-6).to(branch.dtype)}


def operator(**inputs):
    return add_layer_norm(**inputs)._asdict()


def example(B=3, N=5, D=24, stream=torch.float32, branch=torch.float32, scales="both", seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    inputs = {
        "stream": normal(B, N, D).to(stream),
        "branch": normal(B, N, D).to(branch),
        "weight": 1 + 0.3 * normal(D),
        "bias": normal(D),
    }
    if scales in ("branch_scale", "both"):
        inputs["branch_scale"] = normal(D)
    for tensor in inputs.values():
        tensor.requires_grad_()
    if scales in ("row_scale", "both"):
        inputs["row_scale"] = (torch.arange(B) % 3 != 1).float().to(DEVICE) / 0.7
    return inputs, {"stream": normal(B, N, D), "normed": normal(B, N, D)}


def check(inputs, gradients, floor=None):
    exact = outputs_and_gradients(exact_norm, inputs, gradients, torch.float64)
    plain = outputs_and_gradients(plain_norm, inputs, gradients)
    assert_close(outputs_and_gradients(operator, inputs, gradients), exact, plain, floor)


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize(("stream", "branch"), list(itertools.product([torch.float32, torch.bfloat16, torch.float16], repeat=2)))
def test_it_is_the_definition(form, stream, branch, scales):
    check(*example(stream=stream, branch=branch, scales=scales))


def test_parameters_in_a_half_format(form):
    inputs, gradients = example(stream=torch.bfloat16, branch=torch.bfloat16)
    for name in ("weight", "bias", "branch_scale"):
        inputs[name] = inputs[name].detach().bfloat16().requires_grad_()
    results = outputs_and_gradients(operator, inputs, gradients)
    assert results["gradient of weight"].dtype == results["gradient of branch_scale"].dtype == torch.bfloat16
    exact = outputs_and_gradients(exact_norm, inputs, gradients, torch.float64)
    assert_close(results, exact, floor=1e-2)


@pytest.mark.parametrize("D", [3, 7, 64, 255, 384, 513, 1024])
@pytest.mark.parametrize(("B", "N"), [(1, 1), (2, 33)])
def test_sizes(form, B, N, D):
    check(*example(B, N, D))


def test_the_mean_is_far_above_the_deviation(form):
    inputs, gradients = example(D=96, scales="none")
    with torch.no_grad():
        inputs["stream"].mul_(0.01).add_(4.0)
        inputs["branch"].mul_(0.01)
    check(inputs, gradients)


def test_constant_tokens(form):
    inputs, gradients = example(D=64, scales="none")
    with torch.no_grad():
        inputs["stream"].fill_(0.5)
        inputs["branch"].fill_(1.25)
    results = outputs_and_gradients(operator, inputs, gradients)
    assert torch.equal(results["normed"], inputs["bias"].expand_as(results["normed"]))
    assert results["gradient of stream"].isfinite().all()


@pytest.mark.parametrize("used", ["stream", "normed"])
def test_only_one_output_is_used(form, used):
    inputs, gradients = example()
    check(inputs, {name: gradient if name == used else None for name, gradient in gradients.items()})


def test_a_dropped_row_leaves_its_branch_without_gradient(form):
    inputs, gradients = example(scales="row_scale")
    results = outputs_and_gradients(operator, inputs, gradients)
    assert torch.equal(results["stream"][1], inputs["stream"][1])
    assert (results["gradient of branch"][1] == 0).all()
    assert (results["gradient of branch"][0] != 0).any()


def test_non_contiguous_inputs(form):
    inputs, gradients = example()
    for name in ("stream", "branch"):
        inputs[name] = inputs[name].detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
        gradients[{"stream": "stream", "branch": "normed"}[name]] = inputs[name].detach().clone()
    check(inputs, gradients)


def test_an_empty_batch(form):
    inputs, gradients = example(B=0)
    results = outputs_and_gradients(operator, inputs, gradients)
    assert results["stream"].shape == results["normed"].shape == (0, 5, 24)
    assert (results["gradient of weight"] == 0).all()
    assert (results["gradient of branch_scale"] == 0).all()


def test_runs_are_equal_to_the_bit(form):
    first, second = (outputs_and_gradients(operator, *example(B=4, N=65)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("name", "spoil", "error", "words"),
    [
        ("stream", lambda t: t.long(), TypeError, "stream: float32 or bfloat16 or float16 is needed, got int64"),
        ("stream", lambda t: t[0], ValueError, r"stream: \[B, N, D\] is needed"),
        ("branch", lambda t: t[:, :4], ValueError, "branch: axis N"),
        ("branch", lambda t: t.int(), TypeError, "branch: float32 or bfloat16"),
        ("weight", lambda t: t[:5], ValueError, "weight: axis D"),
        ("weight", lambda t: t.int(), TypeError, "weight: float32 or"),
        ("bias", lambda t: t.to("meta"), ValueError, "bias: is on meta"),
        ("branch_scale", lambda t: t[:5], ValueError, "branch_scale: axis D"),
        ("row_scale", lambda t: t[:2], ValueError, "row_scale: axis B"),
        ("row_scale", lambda t: t.requires_grad_(), ValueError, "row_scale: the operator has no gradient"),
    ],
)
def test_wrong_arguments_are_named(form, name, spoil, error, words):
    inputs, _ = example()
    with pytest.raises(error, match=words):
        add_layer_norm(**{**inputs, name: spoil(inputs[name])})


@pytest.mark.parametrize("scales", ["none", "both"])
def test_opcheck(triton_form, scales):
    inputs, gradients = example(B=2, N=3, scales=scales)
    arguments = [inputs.get(name) for name in ("stream", "branch", "weight", "bias", "branch_scale", "row_scale")]
    torch.library.opcheck(_add_layer_norm.registered, (*arguments, 1e-6))
    arguments = [None if tensor is None else tensor.detach() for tensor in arguments]
    out, _, mean, rstd = _add_layer_norm(*arguments, 1e-6)
    branch = arguments[1] if scales == "both" else None
    torch.library.opcheck(
        _add_layer_norm_backward.registered, (gradients["stream"], gradients["normed"], out, branch, arguments[2], *arguments[4:], mean, rstd)
    )


def test_it_compiles_into_one_graph(triton_form):
    inputs, gradients = example()
    plain = outputs_and_gradients(operator, inputs, gradients)
    compiled = outputs_and_gradients(torch.compile(operator, backend="aot_eager", fullgraph=True), inputs, gradients)
    assert all(torch.equal(plain[name], compiled[name]) for name in plain)


def test_the_kernels_are_launched(triton_form):
    with launching.recorded() as launches:
        outputs_and_gradients(operator, *example())
    assert [launch.kernel.fn.__name__ for launch in launches] == ["add_layer_norm_kernel", "add_layer_norm_backward_kernel"]
