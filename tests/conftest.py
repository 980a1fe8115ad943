"""Shared by all tests: one thread in each process, so that sums are equal to the bit across processes and a busy machine is not thrashed."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)
