"""Every Triton kernel compiles for the GPUs of three generations in the sizes of training, without spills in bfloat16; no GPU is needed."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

# One kernel that fits its registers, one that cannot, and one that asks for more shared memory than a block has.
KERNELS = """
import triton
import triton.language as tl


@triton.jit
def copy_kernel(source_ptr, target_ptr, N: tl.constexpr):
    offsets = tl.arange(0, N)
    tl.store(target_ptr + offsets, tl.load(source_ptr + offsets))


@triton.jit
def product_kernel(source_ptr, target_ptr, N: tl.constexpr):
    offsets = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    a = tl.load(source_ptr + offsets)
    tl.store(target_ptr + offsets, tl.dot(a, a))
"""
SCRIPT = """
import json
import torch
import kernels_of_the_test as kernels
from benchmarks._compile_ahead import compile_all, to_job
from personmae_kernels import launching

if __name__ == "__main__":
    with launching.recorded(run=False) as launches:
        floats, halves = torch.empty(2, 1024), torch.empty(2, 256, 256, dtype=torch.bfloat16)
        launching.launch(kernels.copy_kernel, (1,), floats[0], floats[1], N=1024)
        launching.launch(kernels.copy_kernel, (1,), floats.flatten()[1:1025], floats[1], N=1024)
        launching.launch(kernels.product_kernel, (1,), *torch.empty(2, 128, 128), N=128, num_warps=1)
        launching.launch(kernels.product_kernel, (1,), *torch.empty(2, 256, 256), N=256, num_warps=8)
    outcomes = compile_all([(to_job(launch), 90) for launch in launches], num_processes=1)
    print(json.dumps([[job.kernel, target, outcome.compiled and outcome.compiled._asdict(), outcome.problem] for job, target, outcome in outcomes]))
"""


def run_compiling(*arguments: str, paths: list[Path] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs Python where kernels are compiled: the tests themselves run where they are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, [ROOT, ROOT / "kernels", *(paths or [])]))
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1400)


def kernels_of_the_package() -> set[str]:
    """The names of the functions that are Triton kernels: @triton.jit and a name that ends so."""
    found = set()
    for path in (ROOT / "kernels" / "personmae_kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                found |= {node.name for decorator in node.decorator_list if "jit" in ast.unparse(decorator)}
    return found


# The compilers take minutes of two cores.
@pytest.mark.timeout(1500)
def test_every_kernel_compiles_and_none_spills(tmp_path):
    result = run_compiling("benchmarks/operators.py", "--compile-only", "--output", str(tmp_path / "table.json"))
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    rows = json.loads((tmp_path / "table.json").read_text())["results"]
    names = kernels_of_the_package()
    assert len(names) > 10
    for target in ("sm_80", "sm_90", "sm_100"):
        assert names - {row["kernel"] for row in rows if row["target"] == target and row["precision"] == "bf16"} == set()
    assert [name for name in sorted(names) if f" {name} " not in result.stdout] == []
    assert not any(row["problem"] or (row["precision"] == "bf16" and row["spills"]) for row in rows)
    assert all(0 < row["registers"] <= 255 for row in rows)


def test_what_would_not_run_well_is_seen(tmp_path):
    (tmp_path / "kernels_of_the_test.py").write_text(KERNELS)
    (tmp_path / "script.py").write_text(SCRIPT)
    result = run_compiling(str(tmp_path / "script.py"), paths=[tmp_path])
    assert result.returncode == 0, result.stderr
    (name, target, aligned, problem), unaligned, spilling, large = json.loads(result.stdout.splitlines()[-1])
    assert (name, target, problem) == ("copy_kernel", 90, "")
    assert (aligned["stack_bytes"], aligned["num_local"]) == (0, 0)
    assert aligned["num_wide_loads"] == aligned["num_loads"] > 0
    # As at run time: a pointer that is no multiple of 16 bytes is read word by word.
    assert unaligned[2]["num_wide_loads"] == 0 < unaligned[2]["num_loads"]
    assert spilling[2]["num_local"] > 0
    assert "shared memory" in large[3]
