"""Shared by all tests: one thread in each process, so that sums are equal to the bit across processes and a busy machine is not thrashed; and tests
marked `gpu` are skipped where there is none; Triton's kernels then run in its interpreter, which is asked for before they are defined."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


# The files that take longest go first, so that no process is left alone with one of them at the end.
LONGEST = (
    *("test_fused_convergence", "test_ahead_of_time", "test_multi_node", "test_finetuning", "test_unsupervised", "test_packing", "test_durability"),
    *("test_accuracy", "test_ranking_benchmark", "test_operators_benchmark", "test_parallel", "test_demo"),
)


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    named_by_address = [item.nodeid for item in items if " at 0x" in item.nodeid]
    if named_by_address:  # Side by side, the processes must agree on every name.
        raise pytest.UsageError(f"Name the cases of {named_by_address[0]}: an address in a name differs from process to process.")
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))
