"""feature_loss in both forms against float64: odd sizes, constant tokens, views of the teacher's tokens, weights of accumulation and ramp; and its
contract on unit gradients."""

import pytest
import torch
from closeness import DEVICE, assert_close, outputs_and_gradients

from personmae_kernels import launching, unit_gradient
from personmae_kernels.feature_loss import _feature_loss, feature_loss

KINDS = ("mse", "smooth-l1", "cosine")
BOTH = [(kind, normalise) for kind in KINDS for normalise in (True, False)]


def exact_loss(predicted, target, weights, kind, normalise):
    """From the definition, in float64."""

    def standard(x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def unit(x):
        norm = x.norm(dim=-1, keepdim=True)
        return x / (norm + (norm.clamp(min=1e-8) - norm).detach())

    p, t = standard(predicted) if normalise else predicted, standard(target.detach().double().cpu())
    size = (p - t).abs()
    if kind == "mse":
        per_cell = (size**2).mean(-1)
    elif kind == "smooth-l1":
        per_cell = torch.where(size < 1, size**2 / 2, size - 0.5).mean(-1)
    else:
        per_cell = 1 - (unit(p) * unit(t)).sum(-1)
    return {"total": (per_cell * weights.double().cpu()).sum(), "per_cell": per_cell}


def example(B=3, L=6, D=24, dtype=torch.float32, target_dtype=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    predicted = (0.7 * torch.randn(B, L, D, generator=generator) + 0.3).to(dtype)
    target = (3 * torch.randn(B, L, D, generator=generator) + 1).to(target_dtype or dtype)
    weights = torch.rand(B, L, generator=generator)
    return {"predicted": predicted.to(DEVICE).requires_grad_(), "target": target.to(DEVICE), "weights": weights.to(DEVICE)}


def run(inputs, kind="mse", normalise=True):
    """(of the operator in the form at hand, exact)"""
    one = {"total": torch.ones(()), "per_cell": None}

    def ours(predicted, target, weights):
        return feature_loss(predicted, target, weights, kind, normalise)._asdict()

    def exact(predicted, target, weights):
        return exact_loss(predicted, target, weights, kind, normalise)

    return outputs_and_gradients(ours, inputs, one), outputs_and_gradients(exact, inputs, one, torch.float64)


def as_formats(results, inputs):
    """What the formats of the outputs alone make of exact results, as the plain error: a gradient is rounded to the prediction's format."""
    return {name: value.to(inputs["predicted"].dtype) if name.startswith("gradient") else value.float() for name, value in results.items()}


@pytest.mark.parametrize(("kind", "normalise"), BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("B", "L", "D"), [(1, 1, 31), (3, 7, 65), (2, 5, 384)])
def test_it_is_the_definition(form, B, L, D, dtype, target_dtype, kind, normalise):
    inputs = example(B, L, D, dtype, target_dtype)
    ours, exact = run(inputs, kind, normalise)
    assert ours["gradient of predicted"].dtype == dtype
    assert ours["per_cell"].dtype == torch.float32
    assert_close(ours, exact, as_formats(exact, inputs), floor=1e-6)


@pytest.mark.parametrize("D", [1, 33, 63, 127, 129, 768, 2100])
def test_odd_and_wide_widths(form, D):
    inputs = example(2, 3, D)
    ours, exact = run(inputs)
    if D == 1:  # one channel: its LayerNorm is zero
        assert not ours["per_cell"].any()
        assert not ours["gradient of predicted"].any()
    else:
        assert_close(ours, exact, floor=1e-6)


@pytest.mark.parametrize(("kind", "normalise"), BOTH)
def test_constant_tokens(form, kind, normalise):
    """Variance zero: of the prediction, of the target, of both, and nearly so; each token is compared for itself, for the sizes differ by 1e11."""
    inputs = example(1, 7, 40)
    # The average of 40 times 0.1 is not 0.1 in float32; the operator does not mind, the reference does.
    constant = 0.1 if form == "triton" else 0.5
    with torch.no_grad():
        inputs["predicted"][0, 0] = constant
        inputs["target"][0, 1] = constant
        inputs["predicted"][0, 2] = inputs["target"][0, 2] = constant
        inputs["predicted"][0, 3] = 0
        inputs["predicted"][0, 4] = 0.5
        inputs["predicted"][0, 4, 7] = 0.5 + 2**-10
        inputs["target"][0, 5] = 0.5
        inputs["target"][0, 5, 7] = 0.5 + 2**-10
    ours, exact = run(inputs, kind, normalise)
    # The variance of nearly constant tokens costs the reference digits.
    floor = 3e-4 if form == "reference" else 3e-6
    assert_close({"per_cell": ours["per_cell"]}, {"per_cell": exact["per_cell"]}, floor=floor)
    gradient, right = ours["gradient of predicted"][0].double().cpu(), exact["gradient of predicted"][0]
    assert gradient.isfinite().all()
    # Against the constant target of token 1 a normalised prediction has next to no gradient: the size of an ordinary one, token 6, counts too.
    assert ((gradient - right).norm(dim=-1) <= floor * (right.norm(dim=-1) + right[6].norm())).all()


@pytest.mark.parametrize("chosen", ["none", "all", "one image"])
@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_weights(form, chosen, kind):
    inputs = example()
    inputs["weights"] = {"none": torch.zeros, "all": torch.ones, "one image": torch.zeros}[chosen](3, 6, device=DEVICE)
    if chosen == "one image":
        inputs["weights"][1] = 1 / 6
    ours, exact = run(inputs, kind)
    assert_close(ours, exact, floor=1e-6)
    assert (ours["gradient of predicted"][inputs["weights"] == 0] == 0).all()


@pytest.mark.parametrize("ramp", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_and_ramp_go_into_the_weights(form, ramp, kind):
    whole = example(B=4)
    exact = run(whole | {"weights": whole["weights"] * ramp}, kind)[1]
    halves = []
    for half in (slice(0, 2), slice(2, 4)):
        part = {name: tensor.detach()[half] for name, tensor in whole.items()}
        part["predicted"].requires_grad_()
        part["weights"] = part["weights"] * (ramp * 0.5)
        halves.append(run(part, kind)[0])
    assert_close(
        {"total": halves[0]["total"] + halves[1]["total"], "gradient": torch.cat([half["gradient of predicted"] for half in halves])},
        {"total": exact["total"] * 0.5, "gradient": exact["gradient of predicted"] * 0.5},
        floor=1e-6,
    )


def test_the_teachers_tokens_are_read_where_they_lie(triton_form):
    inputs = example(B=3, L=5, D=24)
    tokens = torch.cat([torch.full((3, 1, 24), float("nan"), device=DEVICE), inputs["target"]], 1)
    with launching.recorded() as launches:
        view = feature_loss(inputs["predicted"], tokens[:, 1:], inputs["weights"])
    assert launches[0].arguments[1].data_ptr() == tokens[:, 1:].data_ptr()
    assert torch.equal(view.per_cell, feature_loss(**inputs).per_cell)


def test_non_contiguous_inputs(form):
    inputs = example()
    odd = {
        "predicted": inputs["predicted"].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(),
        "target": inputs["target"].transpose(1, 2).contiguous().transpose(1, 2),
        "weights": inputs["weights"].t().contiguous().t(),
    }
    assert not any(tensor.is_contiguous() for tensor in odd.values())
    ours, exact = run(odd)
    assert_close(ours, exact, floor=1e-6)
    ours, exact = run(inputs | {"target": inputs["target"][:1].expand(3, -1, -1)})
    assert_close(ours, exact, floor=1e-6)


def test_an_empty_batch(form):
    ours, _ = run(example(B=0))
    assert ours["total"] == 0
    assert ours["per_cell"].shape == (0, 6)
    assert ours["gradient of predicted"].shape == (0, 6, 24)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_nan(form, kind):
    inputs = example()
    with torch.no_grad():
        inputs["predicted"][1, 2, 3] = float("nan")
    loss = feature_loss(**inputs, kind=kind)
    assert loss.total.isnan()
    assert loss.per_cell.isnan().nonzero().tolist() == [[1, 2]]
    loss.total.backward()
    assert inputs["predicted"].grad[1, 2].isnan().all()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"predicted": lambda t: t.long()}, TypeError, "predicted: float32 or bfloat16"),
        ({"predicted": lambda t: t[:, :5]}, ValueError, r"target: axis L of \[B, L, D\] is 6, but 5 in predicted"),
        ({"predicted": lambda t: [1.0]}, TypeError, "predicted: a tensor"),
        ({"target": lambda t: t[..., :23]}, ValueError, r"target: axis D of \[B, L, D\] is 23"),
        ({"target": lambda t: t.half()}, TypeError, "target: float32 or bfloat16"),
        ({"target": lambda t: t[0]}, ValueError, r"target: \[B, L, D\] is needed"),
        ({"target": lambda t: t.to("meta")}, ValueError, "target: is on meta"),
        ({"weights": lambda t: t[:, :, None]}, ValueError, r"weights: \[B, L\] is needed"),
        ({"weights": lambda t: t.bfloat16()}, TypeError, "weights: float32"),
        ({"weights": lambda t: t.requires_grad_()}, ValueError, "weights: the operator has no gradient"),
        ({name: lambda t: t.new_zeros(3, 6, 16385) for name in ("predicted", "target")}, ValueError, "predicted: a width of 1 to 16384"),
    ],
)
def test_wrong_arguments_are_named(form, change, error, words):
    inputs = example()
    with pytest.raises(error, match=words):
        feature_loss(**{**inputs, **{name: spoil(inputs[name]) for name, spoil in change.items()}})


def test_an_unknown_kind_is_named(form):
    with pytest.raises(ValueError, match="kind must be mse, smooth-l1 or cosine, not 'l3'"):
        feature_loss(**example(), kind="l3")


def test_a_scaled_total_fails_clearly(triton_form):
    inputs = example()
    loss = feature_loss(**inputs)
    words = "feature_loss: the total reached backward.. with a gradient of 0.5.*put the factor into `weights`"
    if DEVICE == "cpu":
        with pytest.raises(RuntimeError, match=words):
            (loss.total * 0.5).backward()
        assert inputs["predicted"].grad is None
    else:
        (loss.total * 0.5).backward()
        assert inputs["predicted"].grad.isnan().all()
        torch.cuda.synchronize()
        with pytest.raises(RuntimeError, match=words):
            feature_loss(**inputs)
    unit_gradient.raise_if_scaled()
    inputs["predicted"].grad = None
    feature_loss(**inputs).total.backward()
    assert inputs["predicted"].grad.isfinite().all()


def test_only_the_prediction_gets_a_gradient(form):
    inputs = example()
    inputs["target"].requires_grad_()
    loss = feature_loss(**inputs)
    assert not loss.per_cell.requires_grad
    loss.total.backward()
    assert inputs["target"].grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(triton_form, kind):
    inputs = example()
    for needs_gradient in (True, False):
        torch.library.opcheck(_feature_loss.registered, (*(tensor.detach() for tensor in inputs.values()), kind, True, 1e-6, needs_gradient))


@pytest.mark.parametrize("normalise", [False, True])
def test_without_a_gradient_none_is_written(form, normalise):
    inputs = example()
    with torch.no_grad():
        loss = feature_loss(**inputs, normalise_predicted=normalise)
    expected = feature_loss(**inputs, normalise_predicted=normalise)
    # On a GPU the two are different programs, which the compiler rounds in its own ways.
    assert torch.allclose(loss.total, expected.total, rtol=1e-6)
    assert torch.allclose(loss.per_cell, expected.per_cell, rtol=1e-6)
    assert not loss.total.requires_grad


def test_backward_may_be_called_again(triton_form):
    inputs = example()
    total = feature_loss(**inputs).total
    first, second = (torch.autograd.grad(total, inputs["predicted"], retain_graph=True)[0].clone() for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("kind", KINDS)
def test_it_compiles_into_one_graph(triton_form, kind):
    inputs, other = example(), example()
    compiled = torch.compile(feature_loss, backend="aot_eager", fullgraph=True)(**inputs, kind=kind)
    plain = feature_loss(**other, kind=kind)
    compiled.total.backward()
    plain.total.backward()
    assert torch.equal(compiled.total, plain.total)
    assert torch.equal(inputs["predicted"].grad, other["predicted"].grad)


def test_the_kernel_is_launched(triton_form):
    with launching.recorded() as launches:
        feature_loss(**example())
    assert [launch.kernel.fn.__name__ for launch in launches] == ["feature_loss_kernel"]
