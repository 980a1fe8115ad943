"""How close is close: an operator against float64, measured by what plain PyTorch reaches in the same format."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# What rounding alone may cost, as a relative error of the whole tensor (Frobenius norm).
FLOORS = {torch.float64: 1e-12, torch.float32: 3e-7, torch.float16: 3e-4, torch.bfloat16: 3e-3}


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the difference over that of the exact value; NaN counts as infinitely wrong."""
    assert actual.shape == exact.shape, f"shape {list(actual.shape)}, {list(exact.shape)} is expected"
    if exact.numel() == 0:
        return 0.0
    difference = (actual.double().cpu() - exact.double().cpu()).norm().item()
    size = exact.double().norm().item()
    error = difference / size if size > 0 else difference
    return error if error == error else float("inf")


def assert_close(actual: Mapping[str, Tensor], exact: Mapping[str, Tensor], plain: Mapping[str, Tensor] | None = None, floor: float | None = None):
    """Every named output and gradient: at most twice the error of plain PyTorch in the same format, plus the floor of that format.

    actual: of the operator. exact: in float64. plain: of plain PyTorch in the operator's formats; None where the floor alone is to hold.
    """
    assert actual.keys() == exact.keys()
    wrong = []
    for name, value in actual.items():
        allowed = FLOORS[value.dtype] if floor is None else floor
        if plain is not None:
            allowed += 2 * relative_error(plain[name], exact[name])
        error = relative_error(value, exact[name])
        if not error <= allowed:
            wrong.append(f"{name}: relative error {error:.2e}, allowed {allowed:.2e}")
    assert not wrong, "; ".join(wrong)


def outputs_and_gradients(
    function: Callable[..., Mapping[str, Tensor]],
    inputs: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor | None],
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Runs function(**inputs) -> named outputs, and its backward pass.

    gradients: what each output gets; None: that output is left out of the backward pass. Inputs that require gradients give results named
    "gradient of <input>". dtype: floating inputs and gradients are cast to it first; float64 goes to the CPU too.
    """

    def cast(tensor: Tensor) -> Tensor:
        if dtype == torch.float64:
            tensor = tensor.cpu()
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

    leaves = {name: cast(tensor.detach()).requires_grad_(tensor.requires_grad) for name, tensor in inputs.items()}
    outputs = function(**leaves)
    used = {name: cast(gradient) for name, gradient in gradients.items() if gradient is not None}
    if used:
        torch.autograd.backward([outputs[name] for name in used], [used[name].to(outputs[name]) for name in used])
    results = {name: output.detach() for name, output in outputs.items()}
    for name, leaf in leaves.items():
        if leaf.requires_grad:
            results[f"gradient of {name}"] = leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
    return results
