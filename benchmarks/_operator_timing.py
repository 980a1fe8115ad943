"""Times operators and matrix products, and puts them beside what the machine can move and multiply."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime.errors import TritonError

from benchmarks._measure import Spread, spread, time_calls
from benchmarks._operator_cases import Case, Maker, Work
from benchmarks._operator_peers import Version, versions
from personmae_kernels import launching

# What a version that cannot run here may raise: no kernel for the sizes, no memory, too large for the device, a library that changed.
CANNOT_RUN = (RuntimeError, ValueError, TypeError, NotImplementedError, ImportError, AttributeError, TritonError)
SECONDS = 0.1  # of measuring for each number


class Ceilings(NamedTuple):
    """What the machine reached in this run, by the medians."""

    bytes_per_second: float
    flops_per_second: float


class Time(NamedTuple):
    """Of one call."""

    seconds: Spread  # on the device
    host_seconds: float  # until the call came back; on a GPU the launches alone


def time_on(device: torch.device, call: Callable[[], object]) -> Time:
    """On CUDA each call finds the L2 cache without its data, as do_bench of Triton does it; and its launches queued.

    The GPU is kept busy until they are: else the time of a small operator would be that of Python. A host that needs more than 5 ms for
    its launches is waited for.
    """
    if device.type != "cuda":
        seconds = time_calls(call, num=7, num_warm_up=2)
        return Time(seconds, seconds.median)
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    host_seconds = time.perf_counter() - started
    torch.cuda.synchronize()
    num = max(10, min(200, int(SECONDS / (time.perf_counter() - started + 1e-4))))
    cache = torch.empty(256 * 2**20, dtype=torch.int8, device=device)
    # The clock counts cycles, of which no GPU has more than two in a nanosecond.
    cycles = int(2e9 * min(5e-3, 1.5 * host_seconds + 2e-5))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(num)]
    for begin, end in events:
        cache.zero_()
        torch.cuda._sleep(cycles)
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return Time(spread([begin.elapsed_time(end) / 1e3 for begin, end in events]), host_seconds)


def measure_ceilings(device: torch.device) -> Ceilings:
    """A copy of 1 GiB and a product of 8192 x 8192 in bfloat16, both of random numbers; small ones, in float32, on a CPU."""
    cuda = device.type == "cuda"
    dtype, num, side = (torch.bfloat16, 2**29, 8192) if cuda else (torch.float32, 2**24, 1024)
    source = torch.randn(num, device=device, dtype=dtype)
    target = torch.empty_like(source)
    copied = time_on(device, functools.partial(target.copy_, source))
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    multiplied = time_on(device, functools.partial(torch.mm, a, b))
    return Ceilings(2 * source.nbytes / copied.seconds.median, 2 * side**3 / multiplied.seconds.median)


def time_operator(name: str, cases: list[Case], maker: Maker, ceilings: Ceilings, deadline: float) -> list[dict[str, Any]]:
    """The rows of an operator: each case, version and direction. What comes after the deadline (of time.monotonic) is left out, and said."""
    rows = []
    for case in cases:
        about = {"operator": name, "case": case.name, "batch_size": maker.B, "dtype": name_of(maker.dtype)}
        forward, backward = case.work(maker.B, maker.dtype.itemsize)
        works = {"forward": forward, "backward": backward, "both": backward and forward + backward}
        for version in versions(name, maker.device, case.can_compile):
            row = {**about, "version": version.name}
            if time.monotonic() > deadline:
                rows.append(left_out(row))
                continue
            try:
                for direction, taken in time_version(case, version, maker):
                    rows.append(finish_row({**row, "direction": direction}, taken, works[direction], ceilings))
            except CANNOT_RUN as error:
                problem = describe_problem(error)
                rows.append({**row, "problem": problem})
                print(f"{name}, {case.name}, {version.name}: {problem}", flush=True)
            finally:
                launching.use_operators(None)
    return rows


def time_version(case: Case, version: Version, maker: Maker) -> Iterator[tuple[str, Time]]:
    """(direction, time): forward, and where there are gradients backward over one forward pass, and both."""
    launching.use_operators(version.form)
    arguments = case.make(maker)
    leaves = [value for value in arguments.values() if isinstance(value, Tensor) and value.requires_grad]
    bound = version.bind(arguments)

    def forward() -> Any:
        with torch.autocast(maker.device.type, maker.dtype, enabled=case.autocast and maker.dtype != torch.float32):
            return bound()

    yield "forward", time_on(maker.device, forward)
    if not leaves:
        return
    outputs = differentiable(forward())
    # The losses are begun with ones, as they ask for.
    gradients = [torch.randn_like(output) if output.ndim else torch.ones_like(output) for output in outputs]
    yield "backward", time_on(maker.device, lambda: torch.autograd.grad(outputs, leaves, gradients, retain_graph=True))
    yield "both", time_on(maker.device, lambda: torch.autograd.grad(differentiable(forward()), leaves, gradients))


def differentiable(outputs: Any) -> list[Tensor]:
    """Those of an operator's outputs that have gradients."""
    return [output for output in ([outputs] if isinstance(outputs, Tensor) else outputs) if output.requires_grad]


def time_products(batch_size: int, dtype: torch.dtype, device: torch.device, ceilings: Ceilings, deadline: float) -> list[dict[str, Any]]:
    """The eight matrix products of a block (qkv, proj, fc1, fc2 at widths 384 and 768), with their gradients, for 33 and 129 tokens of each image."""
    rows = []
    for D in (384, 768):
        for layer, K, N in (("qkv", D, 3 * D), ("proj", D, D), ("fc1", D, 4 * D), ("fc2", 4 * D, D)):
            for M in (33 * batch_size, 129 * batch_size):
                about = {"operator": "products", "case": f"{layer} {M} x {K} x {N}", "batch_size": batch_size, "dtype": name_of(dtype)}
                if time.monotonic() > deadline:
                    rows.append(left_out({**about, "version": "eager"}))
                    continue
                x, weight, gradient = (torch.randn(*shape, dtype=dtype, device=device) for shape in ((M, K), (N, K), (M, N)))
                work = Work((M * K + N * K + M * N) * dtype.itemsize, 2 * M * N * K)
                products = {"forward": (x, weight.t()), "input gradient": (gradient, weight), "weight gradient": (gradient.t(), x)}
                for direction, factors in products.items():
                    taken = time_on(device, functools.partial(torch.mm, *factors))
                    rows.append(finish_row({**about, "version": "eager", "direction": direction}, taken, work, ceilings))
    return rows


def left_out(row: dict[str, Any]) -> dict[str, Any]:
    """The row of what was not measured any more, said once for each."""
    print(f"{row['operator']}, {row['case']}, {row['version']}: left out for lack of time (--part-seconds)", flush=True)
    return {**row, "left_out": "out of time; --part-seconds gives more"}


def describe_problem(error: BaseException) -> str:
    """On one line, without PyTorch's advice."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def finish_row(row: dict[str, Any], taken: Time, work: Work | None, ceilings: Ceilings) -> dict[str, Any]:
    """The row with its times and rates, printed. Rates are of the work that the formulas count, whatever a version really moves."""
    row = {**row, **taken._asdict(), "num_bytes": 0, "num_flops": 0}
    text = f"{1e6 * taken.seconds.median:10.1f} us ({1e6 * taken.seconds.low:.1f} to {1e6 * taken.seconds.high:.1f})"
    if work is not None and work.num_bytes:
        moved, computed = work.num_bytes / taken.seconds.median, work.num_flops / taken.seconds.median
        row |= {**work._asdict(), "gb_per_second": moved / 1e9, "share_of_copy": moved / ceilings.bytes_per_second}
        row |= {"tflop_per_second": computed / 1e12, "share_of_matmul": computed / ceilings.flops_per_second}
        text += f"{moved / 1e9:8.0f} GB/s ({100 * row['share_of_copy']:.0f} %) {computed / 1e12:7.2f} TFLOP/s ({100 * row['share_of_matmul']:.0f} %)"
    print(f"{row['operator']:22} {row['case']:36} {row['version']:18} {row['direction']:15} {text}", flush=True)
    return row
