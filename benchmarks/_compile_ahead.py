"""Compiles Triton kernels as they would be launched on GPUs that are not there, and reads from the machine code what they will need.

A launch is bound to its kernel by Triton's own code, so it is specialised as at run time: pointers and integers that are multiples of 16, integers
that are 1, arguments that are None. The compilers (ptxas and the disassemblers) are those of Triton's wheel; neither GPU nor driver is needed.
"""

from __future__ import annotations

import concurrent.futures
import importlib
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.errors import TritonError
from triton.runtime.jit import create_function_from_signature

from personmae_kernels.launching import Launch

TARGETS = (80, 90, 100)  # compute capabilities: A100, H100 and H200, B200
# What one block may have of it, by the CUDA C++ Programming Guide, technical specifications per compute capability.
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


class Job(NamedTuple):
    """A kernel with all that its machine code depends on; plain values, for another process."""

    module: str
    kernel: str
    signature: dict[str, str]  # type of each parameter
    constants: dict[tuple[int, ...], Any]  # by place
    attributes: dict[tuple[int, ...], Any]  # by place: divisibility
    num_warps: int
    num_stages: int


class Compiled(NamedTuple):
    """A kernel's machine code in numbers."""

    registers: int  # of a thread
    shared_bytes: int  # of a block
    stack_bytes: int  # of a thread, in local memory
    num_local: int  # instructions that read or write local memory
    num_loads: int  # instructions that read global memory
    num_wide_loads: int  # of them, those of 16 bytes or more a thread

    @property
    def spills(self) -> bool:
        """Whether registers did not suffice: anything in local memory is a spill, for the kernels index no arrays of their own."""
        return self.stack_bytes > 0 or self.num_local > 0


class Outcome(NamedTuple):
    """What came of one job on one target."""

    compiled: Compiled | None
    problem: str  # why it cannot run there; empty if it can


def to_job(launch: Launch) -> Job:
    """What Triton would compile for this launch. Raises RuntimeError where the kernels were defined for the interpreter."""
    kernel = launch.kernel
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError(f"{kernel.fn.__name__} was defined under TRITON_INTERPRET, where nothing is compiled")
    # Specialisation is alike on all NVIDIA targets.
    backend = make_backend(GPUTarget("cuda", TARGETS[0], 32))
    keywords = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, **launch.constants}
    bound, specialization, options = create_function_from_signature(kernel.signature, kernel.params, backend)(*launch.arguments, **keywords)
    _, signature, constants, attributes = kernel._pack_args(backend, keywords, bound, specialization, options)
    return Job(kernel.fn.__module__, kernel.fn.__name__, signature, constants, attributes, launch.num_warps, launch.num_stages)


def compile_job(job: Job, target: int) -> Outcome:
    """Compiles for one compute capability. A compiler that gives up is an outcome, not an error."""
    kernel = getattr(importlib.import_module(job.module), job.kernel)
    source = ASTSource(kernel, job.signature, constexprs=job.constants, attrs=job.attributes)
    options = {"num_warps": job.num_warps, "num_stages": job.num_stages}
    try:
        binary = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    except (TritonError, RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError) as error:
        return Outcome(None, f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")
    compiled = read_machine_code(binary.asm["cubin"], binary.asm["sass"], binary.metadata.shared)
    if compiled.shared_bytes > SHARED_BYTES[target]:
        return Outcome(compiled, f"{compiled.shared_bytes} bytes of shared memory, but a block of sm_{target} has {SHARED_BYTES[target]}")
    return Outcome(compiled, "")


def read_machine_code(cubin: bytes, sass: str, shared_bytes: int) -> Compiled:
    """Registers and stack as the binary declares them, local and global memory instructions as they stand in the disassembly."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    declared = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    # LDGSTS copies to shared memory without a register in between, on Ampere.
    loads = re.findall(r"\bLDG(?:STS)?[.\w]*", sass)
    wide = [load for load in loads if re.search(r"\.(128|256)\b", load)]
    return Compiled(
        registers=declared["REG"],
        shared_bytes=shared_bytes,
        stack_bytes=declared["STACK"] + declared["LOCAL"],
        num_local=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        num_loads=len(loads),
        num_wide_loads=len(wide),
    )


def compile_all(pairs: Iterable[tuple[Job, int]], num_processes: int = 2) -> Iterator[tuple[Job, int, Outcome]]:
    """(job, target, outcome) in the order of the pairs (job, target), as they get ready."""
    pairs = list(pairs)
    # Fresh processes: a forked one would inherit PyTorch's threads as they happen to be.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(num_processes, mp_context=context) as pool:
        futures = [pool.submit(compile_job, job, target) for job, target in pairs]
        for (job, target), future in zip(pairs, futures, strict=True):
            yield job, target, future.result()
