"""Time of each operator against PyTorch, torch.compile and libraries: python benchmarks/operators.py [OPERATOR ...]

Forward, backward and both in the sizes of training, with the memory and arithmetic that the formulas count, as shares of the ceilings measured in the
same run (a large copy, a large matrix product); and the matrix products of a transformer block alone. An operator is timed only when its own test
passes. On a CPU the Triton kernels are left out: sizes are small, and what is timed is PyTorch, torch.compile and the C++ operators.

    --sweep          batches of 256, 1024 and 4096 over tokens and widths, one file a part; goes on where it was stopped
    --compile-only   compiles every kernel instead, without a GPU: in bfloat16 for sm_80, sm_90 and sm_100, where registers must not spill,
                     and in float32 for sm_80
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# A program's own folder is on the path, the root is not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._compile_ahead import TARGETS, Job, compile_all, to_job
from benchmarks._measure import RESULTS, ROOT, write_result
from benchmarks._operator_cases import FILES, OPERATORS, Case, Maker
from benchmarks._operator_peers import libraries, public_function
from benchmarks._operator_timing import CANNOT_RUN, Ceilings, measure_ceilings, time_operator, time_products
from personmae_kernels import interpreter, launching
from personmae_kernels.unit_gradient import poison_kernel

SWEEP_BATCHES = (256, 1024, 4096)
PRODUCTS = "products"  # the matrix products of a block, beside the operators


def main(arguments: Sequence[str] | None = None) -> int:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operators", nargs="*", default=[*OPERATORS, PRODUCTS], metavar="OPERATOR", help=f"of {', '.join(OPERATORS)}, {PRODUCTS}")
    parser.add_argument("--batch-size", type=int, default=1024 if cuda else 8)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16" if cuda else "fp32")
    parser.add_argument("--sweep", action="store_true", help=f"batches of {SWEEP_BATCHES} over tokens and widths")
    parser.add_argument("--part-seconds", type=float, help="no new version of an operator begins after this; 60, 300 with --sweep, 12 on a CPU")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if cuda else "cpu")
    parser.add_argument("--compile-only", action="store_true", help="compile the kernels ahead of time; needs no GPU")
    parser.add_argument("--num-processes", type=int, default=2, help="that compile")
    parser.add_argument("--output", type=Path, help="JSON; a folder with --sweep. By default under benchmarks/results, none with --compile-only")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.operators if name not in (*OPERATORS, PRODUCTS)]:
        parser.error(f"unknown operator {unknown[0]!r}; choose of {', '.join(OPERATORS)}, {PRODUCTS}")
    if interpreter.wanted() and (options.compile_only or options.device == "cuda"):
        parser.error("TRITON_INTERPRET is set, and in Triton's interpreter kernels are neither compiled nor worth timing: unset it")
    if options.part_seconds is None:
        options.part_seconds = 12.0 if options.device == "cpu" else 300.0 if options.sweep else 60.0
    if options.compile_only:
        return compile_kernels(options)
    return time_all(options, ROOT / "tests" / "ops")


def time_all(options: argparse.Namespace, tests: Path) -> int:
    """Tests, then times; 1 if a test or one of our operators failed, else 0. tests: the folder of the operators' tests."""
    device = torch.device(options.device)
    if device.type == "cpu":
        print("On a CPU the Triton kernels are not timed, for their interpreter is for tests: PyTorch, torch.compile and C++ on small sizes.")
    else:
        for sentence in sorted({sentence for name in options.operators for sentence in libraries(name)[1]}):
            print(sentence)
    failed = run_tests([name for name in options.operators if name != PRODUCTS], tests, device)
    chosen = [name for name in options.operators if name not in failed]
    ceilings = measure_ceilings(device)
    print(f"ceilings: copy {ceilings.bytes_per_second / 1e9:,.0f} GB/s, matrix product {ceilings.flops_per_second / 1e12:,.2f} TFLOP/s")
    settings = {**vars(options), "torch_threads": torch.get_num_threads(), "ceilings": ceilings._asdict(), "refused": sorted(failed)}
    results = sweep(chosen, options, ceilings, settings) if options.sweep else one_batch(chosen, options, ceilings, settings)
    ours = [row for row in results if "problem" in row and row["version"] in ("triton", "compiled")]
    for name, why in failed.items():
        print(f"{name} was not timed, for its test fails: {why}")
    for row in ours:
        print(f"{row['operator']}, {row['case']}, {row['version']}: {row['problem']}")
    return 1 if failed or ours else 0


def one_batch(chosen: list[str], options: argparse.Namespace, ceilings: Ceilings, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """All rows, for one batch size; the file is written anew after each operator."""
    output = options.output or RESULTS / "operators.json"
    rows: list[dict[str, Any]] = []
    for name in chosen:
        rows += time_part(name, options.batch_size, options, ceilings)
        write_result(output, "operators", settings, rows)
    print(f"written to {output}")
    return rows


def sweep(chosen: list[str], options: argparse.Namespace, ceilings: Ceilings, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the parts that were not yet there; a file for each operator and batch size."""
    folder = options.output or RESULTS / "operators-sweep"
    rows: list[dict[str, Any]] = []
    for batch_size in SWEEP_BATCHES:
        for name in chosen:
            output = folder / f"{name}-{batch_size}.json"
            if output.exists():
                print(f"{output} is there already")
                continue
            part = time_part(name, batch_size, options, ceilings)
            write_result(output, "operators", {**settings, "batch_size": batch_size}, part)
            rows += part
    return rows


def time_part(name: str, batch_size: int, options: argparse.Namespace, ceilings: Ceilings) -> list[dict[str, Any]]:
    """The rows of one operator in one batch size, as far as its time goes."""
    device = torch.device(options.device)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[options.precision]
    deadline = time.monotonic() + options.part_seconds
    if name == PRODUCTS:
        return time_products(batch_size, dtype, device, ceilings, deadline)
    cases = OPERATORS[name](options.sweep)
    # On a CPU one size has to do.
    return time_operator(name, cases if device.type == "cuda" else cases[:1], Maker(B=batch_size, dtype=dtype, device=device), ceilings, deadline)


def run_tests(names: list[str], tests: Path, device: torch.device) -> dict[str, str]:
    """{operator: what its test says} for those that fail. Only the forms that are timed there are tested: not Triton on a CPU, and not references on
    CUDA, which are held to what they reach on a CPU."""
    files = sorted({FILES.get(name, name) for name in names})

    def run(file: str) -> str:
        chosen = ["-k", "not triton" if device.type == "cpu" else "not reference"]
        found = [str(path) for path in sorted(tests.glob(f"test_{file}*.py"))]
        if not found:
            return f"there is no test_{file}.py in {tests}"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *found, *chosen]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        said = [line for line in (result.stdout + result.stderr).splitlines() if line.startswith(("FAILED", "ERROR"))]
        return "" if result.returncode == 0 else (said or [f"pytest ends with {result.returncode}"])[0]

    print(f"testing {', '.join(files)}", flush=True)
    with concurrent.futures.ThreadPoolExecutor(max(2, min(8, len(os.sched_getaffinity(0)) // 2))) as pool:
        verdicts = dict(zip(files, pool.map(run, files), strict=True))
    return {name: verdicts[FILES.get(name, name)] for name in names if verdicts[FILES.get(name, name)]}


def compile_kernels(options: argparse.Namespace) -> int:
    """Compiles what the chosen operators launch in training, prints a table; 1 if something does not compile or spills in bfloat16, else 0."""
    launching.use_operators("triton")
    jobs, failures = jobs_of([name for name in options.operators if name != PRODUCTS])
    print(f"{'operator':22} {'kernel':32} {'case':38} type    sm warps registers   shared  spills 16-byte loads")
    rows = []
    # In float32 no tensor core is used and the code is much the same everywhere: one target will do, the one with the least shared memory.
    pairs = [(job, target) for job, about in jobs.values() for target in (TARGETS if about["precision"] == "bf16" else TARGETS[:1])]
    for job, target, (compiled, problem) in compile_all(pairs, options.num_processes):
        row = {**jobs[repr(job)][1], "target": f"sm_{target}", "num_warps": job.num_warps, "problem": problem}
        label = f"{row['operator']:22} {row['kernel']:32} {row['case']:38} {row['precision']:5} {target:>4}"
        if compiled is not None:
            row |= {**compiled._asdict(), "spills": compiled.spills}
            loads = f"{compiled.num_wide_loads}/{compiled.num_loads}"
            spills = f"{compiled.stack_bytes} B" if compiled.spills else "-"
            print(f"{label} {job.num_warps:>5} {compiled.registers:>9} {compiled.shared_bytes:>8} {spills:>7} {loads:>13}", flush=True)
        if problem:
            failures.append(f"{label} {problem}")
        elif compiled is not None and compiled.spills and row["precision"] == "bf16":
            failures.append(f"{label} spills: {compiled.stack_bytes} bytes of stack, {compiled.num_local} instructions")
        rows.append(row)
    if options.output is not None:
        write_result(options.output, "operators, compiled ahead of time", {"targets": TARGETS}, rows)
    print(f"{len(jobs)} kernels as launched, {len(rows)} compiled, {len(failures)} failures")
    print("\n".join(failures), end="\n" if failures else "")
    return 1 if failures else 0


def jobs_of(names: list[str]) -> tuple[dict[str, tuple[Job, dict[str, Any]]], list[str]]:
    """({text of the job: (job, where it comes from)}, what fails before it is compiled): each different launch in the training sizes once."""
    jobs: dict[str, tuple[Job, dict[str, Any]]] = {}
    failures = []
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        maker = Maker(B=32, dtype=dtype, random=False)
        calls = [(name, case.name, functools.partial(run_once, name, case, maker)) for name in names for case in OPERATORS[name](False)]
        calls.append(("unit_gradient", "gradient of a loss", functools.partial(launch_poison, maker)))
        for name, case_name, call in calls:
            try:
                with launching.recorded(run=False) as launches:
                    call()
                for job in map(to_job, launches):
                    jobs.setdefault(repr(job), (job, {"operator": name, "kernel": job.kernel, "case": case_name, "precision": precision}))
            except CANNOT_RUN as error:
                failures.append(f"{name}, {case_name}, {precision}: {type(error).__name__}: {error}")
    return jobs, failures


def launch_poison(maker: Maker) -> None:
    """The backward pass of the losses: for tensors in the host's memory it goes another way, so its launch is repeated here."""
    gradient = maker.floats(maker.B, 128, 768)
    launching.launch(poison_kernel, (1024,), gradient, torch.ones(()), gradient.numel(), BLOCK=1024)


def run_once(name: str, case: Case, maker: Maker) -> None:
    """Forward and backward pass of an operator in one size."""
    with torch.autocast(maker.device.type, maker.dtype, enabled=case.autocast and maker.dtype != torch.float32):
        outputs = public_function(name)(**case.make(maker))
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs or [])
    if outputs := [output for output in outputs if output.requires_grad]:
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])


if __name__ == "__main__":
    sys.exit(main())
