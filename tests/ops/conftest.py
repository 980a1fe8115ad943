"""Shared by the tests of the operators: each runs in both forms, on buffers that are NaN until they are written.

`form` is "reference" (plain PyTorch) and "triton": the kernels, natively on a GPU, in Triton's interpreter elsewhere.
"""

import pytest
import torch
from closeness import DEVICE

from personmae_kernels import launching


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan(monkeypatch):
    """torch.empty gives NaN (the largest integer), so that what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["reference", "triton"])
def form(request):
    """The operators run in this form."""
    launching.use_operators(request.param)
    yield request.param
    launching.use_operators(None)


@pytest.fixture
def triton_form():
    """The operators run as Triton kernels."""
    launching.use_operators("triton")
    yield
    launching.use_operators(None)
