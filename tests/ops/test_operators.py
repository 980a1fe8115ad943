"""Operators called directly in eager code, and by their registered form wherever PyTorch looks on: the same values and gradients either way."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from personmae_kernels.operators import operator

calls: list[str] = []


@operator("personmae_tests::scaled_product")
def scaled_product(a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Returns scale * a * b, and a + b without a gradient."""
    calls.append("forward")
    return scale * a * b, a + b


@scaled_product.register_fake
def _(a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(a), torch.empty_like(a)


def _keep(ctx, inputs, output):
    a, b, ctx.scale = inputs
    ctx.save_for_backward(a, b)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, gradient, _):
    a, b = ctx.saved_tensors
    return *scaled_product_backward(gradient, a, b, ctx.scale), None


@operator("personmae_tests::scaled_product_backward")
def scaled_product_backward(gradient: Tensor, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    calls.append("backward")
    return scale * gradient * b, scale * gradient * a


@scaled_product_backward.register_fake
def _(gradient: Tensor, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(a), torch.empty_like(b)


scaled_product.register_autograd(_backward, setup_context=_keep)


class Watching(TorchDispatchMode):
    """Notes the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 5, generator=generator).requires_grad_() for _ in range(2)]


@pytest.fixture
def registered_calls(monkeypatch):
    """The names of operators whose registered form was called."""
    seen = []
    for each in (scaled_product, scaled_product_backward):
        form = each.registered
        monkeypatch.setattr(each, "registered", lambda *inputs, form=form: (seen.append(form._qualname), form(*inputs))[1])
    return seen


def by_pytorch(inputs, scale):
    a, b = (tensor.detach().clone().requires_grad_() for tensor in inputs)
    product = scale * a * b
    product.square().sum().backward()
    return product.detach(), a.grad, b.grad


def gradients_of(function, inputs, scale=1.5):
    a, b = inputs
    product, total = function(a, b, scale)
    assert not total.requires_grad
    product.square().sum().backward()
    return product.detach(), a.grad, b.grad


def test_eager_code_goes_past_the_registered_form_and_finds_the_same(inputs, registered_calls):
    for actual, expected in zip(gradients_of(scaled_product, inputs), by_pytorch(inputs, 1.5), strict=True):
        torch.testing.assert_close(actual, expected)
    assert registered_calls == []
    with torch.no_grad():
        assert not scaled_product(*inputs, 2.0)[0].requires_grad


def test_what_needs_no_gradient_gets_none(inputs):
    """One of two inputs alone, as with frozen weights."""
    a, b = inputs[0], inputs[1].detach()
    scaled_product(a, b, 1.5)[0].sum().backward()
    torch.testing.assert_close(a.grad, 1.5 * b)
    assert b.grad is None


def test_a_dispatch_mode_sees_it(inputs, registered_calls):
    with Watching() as watching:
        actual = gradients_of(scaled_product, inputs)
    assert any("scaled_product" in name for name in watching.seen)
    assert registered_calls
    for value, expected in zip(actual, by_pytorch(inputs, 1.5), strict=True):
        torch.testing.assert_close(value, expected)


def test_fake_tensors_are_not_computed():
    calls.clear()
    with FakeTensorMode():
        product, _ = scaled_product(torch.empty(3, 5), torch.empty(3, 5), 1.5)
    # Also where the mode is over and only the tensor tells.
    again, _ = scaled_product(product, product, 1.5)
    assert (product.shape, again.shape, calls) == ((3, 5), (3, 5), [])


def test_subclasses_of_tensors_are_left_to_pytorch(inputs, registered_calls):
    class Named(torch.Tensor):
        pass

    scaled_product(inputs[0].detach().as_subclass(Named), inputs[1].detach(), 1.5)
    assert registered_calls


def test_torch_func_refuses_it_as_all_operators_of_torch_library(inputs):
    a, b = (tensor.detach() for tensor in inputs)
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda a: scaled_product(a, b, 1.5)[0].sum())(a)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_holds_the_operator(inputs, backend):
    compiled = torch.compile(lambda a, b, scale: scaled_product(a, b, scale), backend=backend, fullgraph=True)
    for actual, expected in zip(gradients_of(compiled, inputs), by_pytorch(inputs, 1.5), strict=True):
        torch.testing.assert_close(actual, expected)


def test_exported_programs_hold_the_operator(inputs):
    class Module(torch.nn.Module):
        def forward(self, a, b):
            return scaled_product(a, b, 1.5)[0]

    program = torch.export.export(Module(), tuple(inputs))
    assert "scaled_product" in str(program.graph)


def test_there_is_no_second_gradient_and_no_silence_about_it(inputs):
    """The gradient of a gradient is not had: an error, and no number."""
    a, b = inputs
    with pytest.raises(RuntimeError, match=r"scaled_product_backward|does not require grad"):  # noqa: PT012
        (first,) = torch.autograd.grad(scaled_product(a, b, 1.5)[0].square().sum(), a, create_graph=True)
        torch.autograd.grad(first.sum(), a)


def test_an_operator_without_a_gradient_says_so(inputs):
    a, b = inputs
    with pytest.raises(RuntimeError, match="scaled_product_backward"):  # noqa: PT012
        result, _ = scaled_product_backward(a, a, b, 1.5)
        result.sum().backward()
