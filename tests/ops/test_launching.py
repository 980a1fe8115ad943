"""Which form of an operator runs, what is said of it, and what goes wrong in words; and Triton's interpreter, mended."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from closeness import DEVICE

from personmae_kernels import compiled, launching
from personmae_kernels.launching import describe_operators, form_for, launch, recorded, use_operators

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(autouse=True)
def _nothing_is_forced(monkeypatch):
    monkeypatch.delenv("PERSONMAE_OPERATORS", raising=False)
    yield
    use_operators(None)


def test_the_device_decides(monkeypatch):
    cpu = torch.zeros(1)
    monkeypatch.setattr(compiled, "available", lambda cuda=False: True)
    assert form_for(cpu) == "reference"
    assert form_for(cpu, has_compiled=True) == "compiled"
    monkeypatch.setattr(compiled, "available", lambda cuda=False: False)
    assert form_for(cpu, has_compiled=True) == "reference"
    if DEVICE == "cuda":
        assert form_for(cpu.cuda()) == "triton"


@pytest.mark.parametrize("way", ["environment", "call"])
def test_a_form_can_be_forced(way, monkeypatch):
    for form in ("reference", "triton"):
        if way == "environment":
            monkeypatch.setenv("PERSONMAE_OPERATORS", form)
        else:
            use_operators(form)
        assert form_for(torch.zeros(1, device=DEVICE), has_compiled=True) == form


def test_the_call_goes_before_the_environment(monkeypatch):
    monkeypatch.setenv("PERSONMAE_OPERATORS", "triton")
    use_operators("reference")
    assert form_for(torch.zeros(1)) == "reference"


def test_compiled_is_for_operators_that_have_it(monkeypatch):
    use_operators("compiled")
    monkeypatch.setattr(compiled, "available", lambda cuda=False: True)
    assert form_for(torch.zeros(1), has_compiled=True) == "compiled"
    assert form_for(torch.zeros(1), has_compiled=False) == "reference"
    monkeypatch.setattr(compiled, "available", lambda cuda=False: False)
    monkeypatch.setattr(compiled, "why_missing", lambda cuda=False: "it is not built: build it")
    with pytest.raises(RuntimeError, match="is not built: build it"):
        form_for(torch.zeros(1), has_compiled=True)


def test_unknown_forms_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="reference, triton, compiled or None is needed, got 'fast'"):
        use_operators("fast")
    monkeypatch.setenv("PERSONMAE_OPERATORS", "fast")
    with pytest.raises(ValueError, match="PERSONMAE_OPERATORS is 'fast'; it may be reference, triton or compiled"):
        form_for(torch.zeros(1))


def test_triton_computes_no_float64():
    use_operators("triton")
    with pytest.raises(TypeError, match="PERSONMAE_OPERATORS=reference does"):
        form_for(torch.zeros(1, dtype=torch.float64, device=DEVICE))


def test_triton_on_a_cpu_without_its_interpreter_says_what_to_do():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PERSONMAE_OPERATORS": "triton", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    program = "import torch; from personmae_kernels.launching import form_for; form_for(torch.zeros(1))"
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert "cannot run on cpu: unset PERSONMAE_OPERATORS for plain PyTorch, or set TRITON_INTERPRET=1" in result.stderr


def test_the_description_says_what_and_why(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(compiled, "available", lambda cuda=False: True)
    assert describe_operators(cpu) == "C++ where an operator has it, else plain PyTorch (on cpu)"
    monkeypatch.setattr(compiled, "available", lambda cuda=False: False)
    monkeypatch.setattr(compiled, "why_missing", lambda cuda=False: "it is not built")
    assert describe_operators(cpu) == "plain PyTorch (on cpu; it is not built)"
    monkeypatch.setenv("PERSONMAE_OPERATORS", "reference")
    assert describe_operators(cpu) == "plain PyTorch (PERSONMAE_OPERATORS)"
    use_operators("reference")
    assert describe_operators(cpu) == "plain PyTorch (asked for)"


@triton.jit
def rounding_kernel(x_ptr, out_ptr, back_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    rounded = tl.load(x_ptr + offsets, mask=offsets < n, other=0.0).to(tl.bfloat16)
    tl.store(out_ptr + offsets, rounded, mask=offsets < n)
    tl.store(back_ptr + offsets, rounded.to(tl.float32), mask=offsets < n)


@triton.jit
def product_kernel(a_ptr, b_ptr, out_ptr, num_repeats):
    i = tl.arange(0, 16)
    place = i[:, None] * 16 + i[None, :]
    total = tl.zeros([16, 16], tl.float32)
    for _ in range(num_repeats):
        total += tl.dot(tl.load(a_ptr + place), tl.load(b_ptr + place), input_precision="ieee")
    tl.store(out_ptr + place, total)


def test_bfloat16_is_rounded_to_the_nearest_even():
    edges = torch.tensor([0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, float("inf"), -float("inf"), 3.4e38, 2**-126])
    x = torch.cat([torch.randn(200), edges]).to(DEVICE)
    out, back = torch.empty_like(x, dtype=torch.bfloat16), torch.empty_like(x)
    launch(rounding_kernel, (1,), x, out, back, len(x), BLOCK=256)
    assert torch.equal(out, x.bfloat16())
    assert torch.equal(back, x.bfloat16().float())
    launch(rounding_kernel, (1,), torch.full_like(x, float("nan")), out, back, len(x), BLOCK=256)
    assert out.isnan().all()
    assert back.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dot_and_loops_with_bounds_at_run_time(dtype):
    torch.manual_seed(0)
    a, b = (torch.randn(16, 16, device=DEVICE).to(dtype) for _ in range(2))
    out = torch.empty(16, 16, device=DEVICE)
    launch(product_kernel, (1,), a, b, out, 3)
    assert torch.allclose(out.double(), 3 * a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_launches_are_noted_and_can_be_left_out():
    x = torch.zeros(4, device=DEVICE)
    out, back = torch.full_like(x, 7).bfloat16(), x.clone()
    with recorded(run=False) as launches:
        launch(rounding_kernel, (1,), x, out, back, 4, BLOCK=16, num_warps=2)
        launch(rounding_kernel, (0,), x, out, back, 4, BLOCK=16)
    assert (out == 7).all()
    (noted,) = launches
    assert (noted.kernel, noted.grid, noted.constants, noted.num_warps) == (rounding_kernel, (1,), {"BLOCK": 16}, 2)
    assert launching._records is None
    launch(rounding_kernel, (1,), x, out, back, 4, BLOCK=16)
    assert (out == 0).all()
