"""Shared by all tests: one thread in each process, so that sums are equal to the bit across processes and a busy machine is not thrashed; and tests
marked `gpu` are skipped where there is none; Triton's kernels then run in its interpreter, which is asked for before they are defined."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    named_by_address = [item.nodeid for item in items if " at 0x" in item.nodeid]
    if named_by_address:  # Side by side, the processes must agree on every name.
        raise pytest.UsageError(f"Name the cases of {named_by_address[0]}: an address in a name differs from process to process.")
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))
