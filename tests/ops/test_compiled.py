"""The compiled operators: what is said where they are missing or do not fit, and that those there are are the definition, with gradients."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

from personmae_kernels import compiled, launching

needs_compiled = pytest.mark.skipif(not compiled.available(), reason=compiled.why_missing())
REQUIRED = os.environ.get("PERSONMAE_REQUIRE_COMPILED") == "1"


def why_missing_when(monkeypatch: pytest.MonkeyPatch, error: Exception) -> str:
    def fail(name: str) -> None:
        assert name == "personmae_kernels._C"
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)
    return compiled.why_missing.__wrapped__()


def test_missing_binary_is_said_with_the_cure(monkeypatch):
    sentence = why_missing_when(monkeypatch, ModuleNotFoundError("No module named 'personmae_kernels._C'"))
    assert "not built" in sentence
    assert "setup.py build_ext --inplace" in sentence


def test_a_binary_that_does_not_load_is_said_with_its_error_and_the_cure(monkeypatch):
    sentence = why_missing_when(monkeypatch, ImportError("undefined symbol: torch_library_impl"))
    assert "undefined symbol: torch_library_impl" in sentence
    assert "setup.py build_ext --inplace" in sentence


@needs_compiled
def test_a_binary_without_cuda_is_said_with_the_cure(monkeypatch):
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: False)
    assert "PERSONMAE_NVCC" in compiled.why_missing.__wrapped__(cuda=True)
    assert compiled.why_missing.__wrapped__() == ""


def test_available_agrees_with_why_missing():
    assert compiled.available() == (compiled.why_missing() == "")
    assert compiled.available(cuda=True) == (compiled.why_missing(cuda=True) == "")


@pytest.mark.skipif(not REQUIRED, reason="PERSONMAE_REQUIRE_COMPILED is not 1")
def test_built_where_it_has_to_be():
    assert compiled.why_missing() == ""
    if shutil.which("nvcc"):
        assert compiled.why_missing(cuda=True) == ""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc on the path")
def test_the_binary_holds_code_for_each_gpu_without_spills():
    if not compiled.available(cuda=True):
        pytest.skip(compiled.why_missing(cuda=True))
    for name in ("gather_visible", "scatter_visible", "adamw_ema_"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"personmae::{name}", "CUDA")
    binary = importlib.import_module("personmae_kernels._C").__file__

    def cuobjdump(*options: str) -> list[str]:
        command = [triton.knobs.nvidia.cuobjdump.path, *options, binary]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()

    assert {line.split()[-1] for line in cuobjdump() if line.startswith("arch =")} == {"sm_80", "sm_90a", "sm_90"}  # sm_90: PTX for later GPUs
    usage = [line for line in cuobjdump("-res-usage") if "REG:" in line]
    assert len(usage) >= 2 * 17
    assert all("STACK:0" in line and "LOCAL:0" in line for line in usage), usage


def example(B=3, L=9, V=4, D=5, dtype=torch.float32, index=torch.int32, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(-99, 99, (B, L, D), generator=generator).to(dtype)
    visible = torch.rand(B, L, generator=generator).argsort(1)[:, :V].to(index)
    return tokens.to(device), visible.to(device)


def exact_gather(tokens, visible):
    return torch.stack([image[rows] for image, rows in zip(tokens, visible.long(), strict=True)])


def exact_scatter(gradient, visible, num_tokens):
    result = torch.zeros(len(gradient), num_tokens, gradient.shape[2], dtype=gradient.dtype, device=gradient.device)
    for image, rows, source in zip(result, visible.long(), gradient, strict=True):
        image[rows] = source
    return result


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """The compiled operators run on this device."""
    if not compiled.available(cuda=request.param == "cuda"):
        pytest.skip(compiled.why_missing(cuda=request.param == "cuda"))
    return request.param


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.int64])
@pytest.mark.parametrize(("L", "V", "D"), [(9, 4, 5), (1, 1, 1), (127, 31, 33), (65, 65, 16), (300, 270, 24)])
def test_rows_go_and_come_back(device, L, V, D, dtype, index):
    tokens, visible = example(3, L, V, D, dtype, index, device=device)
    chosen = torch.ops.personmae.gather_visible(tokens, visible)
    assert torch.equal(chosen, exact_gather(tokens, visible))
    assert torch.equal(torch.ops.personmae.scatter_visible(chosen, visible, L), exact_scatter(chosen, visible, L))


def test_many_images_take_several_threads(device):
    tokens, visible = example(64, 128, 63, 96, device=device)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        chosen = torch.ops.personmae.gather_visible(tokens, visible)
        back = torch.ops.personmae.scatter_visible(chosen, visible, 128)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(chosen, exact_gather(tokens, visible))
    assert torch.equal(back, exact_scatter(chosen, visible, 128))


@pytest.mark.parametrize("view", ["class token cut off", "columns apart", "one image for all", "an odd address"])
def test_rows_of_views(device, view):
    tokens, visible = example(3, 9, 4, 8, device=device)
    if view == "class token cut off":
        tokens = tokens[:, 1:]
        visible = visible.clamp(max=7)
    elif view == "columns apart":
        tokens = tokens.transpose(1, 2).contiguous().transpose(1, 2)
    elif view == "one image for all":
        tokens = tokens[:1].expand(3, 9, 8)
    else:
        tokens = tokens.to(torch.uint8).flatten()[1:-7].view(-1)[: 2 * 9 * 8].view(2, 9, 8)
        visible = visible[:2]
    visible = visible.t().contiguous().t()
    assert torch.equal(torch.ops.personmae.gather_visible(tokens, visible), exact_gather(tokens, visible))
    gradient = tokens[:, : visible.shape[1]]
    unique = torch.arange(4, device=device, dtype=torch.int32).expand(len(tokens), 4)
    assert torch.equal(torch.ops.personmae.scatter_visible(gradient, unique, 9), exact_scatter(gradient, unique, 9))


@pytest.mark.parametrize(("B", "L", "V", "D"), [(0, 9, 4, 5), (3, 9, 0, 5), (3, 9, 4, 0), (3, 0, 0, 5)])
def test_nothing_to_copy(device, B, L, V, D):
    tokens = torch.ones(B, L, D, device=device)
    visible = torch.arange(V, device=device, dtype=torch.int32).expand(B, V)
    assert torch.ops.personmae.gather_visible(tokens, visible).shape == (B, V, D)
    back = torch.ops.personmae.scatter_visible(torch.ones(B, V, D, device=device), visible, L)
    assert back.shape == (B, L, D)
    assert back.sum() == B * V * D


@pytest.mark.parametrize("wrong", [9, -1, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_an_index_out_of_range(device, index, wrong):
    tokens, visible = example(index=index, device=device)
    visible[1, 2] = wrong
    if device == "cpu":
        with pytest.raises(RuntimeError, match=f"visible: 0 to 8, got {wrong} for image 1"):
            torch.ops.personmae.gather_visible(tokens, visible)
        with pytest.raises(RuntimeError, match=f"visible: 0 to 8, got {wrong} for image 1"):
            torch.ops.personmae.scatter_visible(tokens[:, :4], visible, 9)
        return
    chosen = torch.ops.personmae.gather_visible(tokens, visible)
    assert chosen[1, 2].isnan().all()
    assert chosen.isnan().sum() == 5
    back = torch.ops.personmae.scatter_visible(tokens[:, :4], visible, 9)
    assert (back[1] != 0).any(1).sum() <= 3
    assert torch.equal(back[0], exact_scatter(tokens[:1, :4], visible[:1], 9)[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": lambda t: t[0]}, "tokens: must have 3 dimensions, has 2"),
        ({"visible": lambda t: t[0]}, "visible: must have 2 dimensions, has 1"),
        ({"visible": lambda t: t.float()}, "visible: int32 or int64"),
        ({"visible": lambda t: t[:2]}, "visible: 2 images, but 3 in tokens"),
    ],
)
def test_wrong_arguments_are_named(device, change, words):
    tokens, visible = example(device=device)
    arguments = {"tokens": tokens, "visible": visible}
    ((name, spoil),) = change.items()
    with pytest.raises(RuntimeError, match=words):
        torch.ops.personmae.gather_visible(**{**arguments, name: spoil(arguments[name])})


def test_gradients(device):
    tokens, visible = example(dtype=torch.float64, device=device)
    tokens.requires_grad_()
    gather, scatter = torch.ops.personmae.gather_visible, torch.ops.personmae.scatter_visible
    assert torch.autograd.gradcheck(gather, (tokens, visible))
    assert torch.autograd.gradgradcheck(gather, (tokens, visible))
    gradient = torch.randn(3, 4, 5, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(scatter, (gradient, visible, 9))


def test_opcheck(device):
    tokens, visible = example(device=device)
    torch.library.opcheck(torch.ops.personmae.gather_visible, (tokens.requires_grad_(), visible))
    torch.library.opcheck(torch.ops.personmae.scatter_visible, (tokens.detach()[:, :4].requires_grad_(), visible, 9))
    if device == "cpu":
        shapes, ranges = torch.tensor([[1, 1], [1, 2]], dtype=torch.int32), torch.tensor([[0, 1]] * 7, dtype=torch.int32)
        torch.library.opcheck(torch.ops.personmae.block_masks, (torch.arange(3), shapes, ranges, 2, 3, 4, 8))


PROGRAM = """
import concurrent.futures, sys
import torch
from personmae_kernels import compiled, launching

def chosen(tokens, visible):
    if launching.form_for(tokens, has_compiled=True) == "compiled":
        return torch.ops.personmae.gather_visible(tokens, visible) * 2
    return tokens

if sys.argv[1] == "threads":
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda i: compiled.why_missing(bool(i % 2)), range(64))) <= {"", compiled.why_missing(True)}
    sys.exit()
tokens, visible = torch.randn(2, 5, 3, requires_grad=True), torch.tensor([[0, 3], [4, 1]], dtype=torch.int32)
result = torch.compile(chosen, backend="aot_eager", fullgraph=True)(tokens, visible)
assert result.shape == (2, 2, 3), result.shape
result.sum().backward()
assert tokens.grad[:, :, 0].tolist() == [[2, 0, 0, 2, 0], [0, 2, 0, 0, 2]], tokens.grad
"""


@needs_compiled
@pytest.mark.parametrize("first", ["threads", "compiler"])
def test_a_fresh_process_loads_them_once(first):
    """From threads at once, as loaders have them, or while torch.compile traces the first call."""
    folder = Path(launching.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(folder), "PERSONMAE_OPERATORS": "", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", PROGRAM, first], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@needs_compiled
def test_the_step_on_cuda_does_not_take_tensors_of_the_cpu():
    one = [torch.ones(1)]
    with pytest.raises(NotImplementedError, match="adamw_ema_"):
        torch.ops.personmae.adamw_ema_(one, one, one, one, torch.ones(8), [0.0], [], [], [])
