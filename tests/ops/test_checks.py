"""The checks at the boundary of the operators: every error names the argument."""

import pytest
import torch

from personmae_kernels.checks import FLOATS, axis_sizes, check_dtype, check_no_gradient, wide


def test_axes_are_gathered():
    assert axis_sizes(tokens=(torch.zeros(2, 3, 4), "B L D"), visible=(torch.zeros(2, 5), "B V")) == {"B": 2, "L": 3, "D": 4, "V": 5}


@pytest.mark.parametrize(
    ("second", "error", "words"),
    [
        ((torch.zeros(2, 4), "B L"), ValueError, r"second: axis L of \[B, L\] is 4, but 3 in first"),
        ((torch.zeros(2), "B L"), ValueError, r"second: \[B, L\] is needed, got shape \[2\]"),
        ((torch.zeros(2, 5), "B 4"), ValueError, r"second: \[B, 4\] is needed, got shape \[2, 5\]"),
        ((torch.zeros(2, 3, device="meta"), "B L"), ValueError, "second: is on meta, but first is on cpu"),
        ((None, "B L"), TypeError, r"second: a tensor \[B, L\] is needed, got NoneType"),
    ],
)
def test_what_does_not_fit_is_named(second, error, words):
    with pytest.raises(error, match=words):
        axis_sizes(first=(torch.zeros(2, 3), "B L"), second=second)


def test_dtypes():
    check_dtype(FLOATS, x=torch.zeros(1), y=torch.zeros(1).bfloat16(), z=torch.zeros(1).double())
    check_dtype(torch.uint8, x=torch.zeros(1, dtype=torch.uint8))
    with pytest.raises(TypeError, match="y: float32 or bfloat16 is needed, got float16"):
        check_dtype(FLOATS, x=torch.zeros(1), y=torch.zeros(1).half())
    with pytest.raises(TypeError, match="x: uint8 is needed, got float64"):
        check_dtype(torch.uint8, x=torch.zeros(1).double())


def test_gradients_that_are_not_given_are_refused():
    check_no_gradient(x=torch.zeros(1))
    with pytest.raises(ValueError, match=r"x: the operator has no gradient for it; pass x.detach\(\)"):
        check_no_gradient(x=torch.zeros(1, requires_grad=True))


def test_wide():
    assert [wide(torch.zeros(1, dtype=dtype)).dtype for dtype in (torch.bfloat16, torch.float32, torch.float64)] == [
        torch.float32,
        torch.float32,
        torch.float64,
    ]
