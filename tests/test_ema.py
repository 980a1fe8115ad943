"""The moving average moves, and as its formula says."""

import pytest
import torch

from personmae.training.ema import MovingAverage


def test_it_equals_the_closed_form_after_changing_momenta():
    torch.manual_seed(0)
    student, teacher = torch.nn.Linear(3, 2).double(), torch.nn.Linear(3, 2).double()
    expected = teacher.weight.detach().clone()
    start = expected.clone()
    average = MovingAverage(teacher, student)
    for momentum in (0.9, 0.99, 0.5, 1.0):
        with torch.no_grad():
            student.weight += torch.randn_like(student.weight)
        average.update(momentum)
        expected = momentum * expected + (1 - momentum) * student.weight.detach()
    assert torch.allclose(teacher.weight, expected, atol=1e-12)
    assert not torch.allclose(teacher.weight, start)


def test_a_partial_match_is_refused():
    with pytest.raises(ValueError, match="bias"):
        MovingAverage(torch.nn.Linear(3, 2), torch.nn.Linear(3, 2, bias=False))
    with pytest.raises(ValueError, match="no parameters"):
        MovingAverage(torch.nn.Identity(), torch.nn.Identity())
