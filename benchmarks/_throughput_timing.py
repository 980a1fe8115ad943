"""Times the steps of several ways in turns, each as long as its time goes."""

from __future__ import annotations

import functools
import gc
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from benchmarks._measure import spread, time_calls
from benchmarks._operator_timing import CANNOT_RUN, describe_problem, measure_ceilings
from benchmarks._throughput_inputs import Feed, Source
from benchmarks._throughput_ways import Trainer, Way
from personmae.data.loaders import RegionBatch


class Turn(NamedTuple):
    """Some steps one after another."""

    seconds: list[float]  # of each step, its wait for data included
    data_wait_ratio: float  # share of their time that the host waited for batches
    peak_bytes: int | None  # of GPU memory in a step, above what stays between steps; None on a CPU


@dataclass
class Timing:
    """What was timed of one way so far."""

    turns: list[Turn] = field(default_factory=list)
    first_step_seconds: float | None = None  # in which torch.compile and Triton compile
    spent: float = 0.0  # seconds, the first step left out
    problem: str | None = None

    def row(self, batch_size: int, flops_per_image: int, flops_ceiling: float) -> dict[str, Any]:
        """The numbers of a result."""
        row: dict[str, Any] = {"problem": self.problem} if self.problem else {}
        seconds = [value for turn in self.turns for value in turn.seconds]
        if not seconds:
            return row
        speed = spread([batch_size / value for value in seconds])
        peaks = [turn.peak_bytes for turn in self.turns if turn.peak_bytes is not None]
        return row | {
            "images_per_second": speed,
            "step_ms": spread([1e3 * value for value in seconds]),
            "turn_images_per_second": [spread([batch_size / value for value in turn.seconds]).median for turn in self.turns],
            "peak_bytes_per_image": max(peaks) // batch_size if peaks else None,
            "share_of_matmul": speed.median * flops_per_image / flops_ceiling,
            "data_wait_ratio": spread([turn.data_wait_ratio for turn in self.turns]),
            "first_step_seconds": self.first_step_seconds,
        }


class Lengths(NamedTuple):
    """How long is timed."""

    num_turns: int
    num_steps: int  # timed in a turn
    num_untimed: int  # before those of the first turn
    num_untimed_later: int  # before those of the other turns
    part_seconds: float  # after which a way has no further step, its first one not counted


def time_in_turns(
    trainers: dict[Way, Trainer], timings: dict[Way, Timing], source: Source, lengths: Lengths, device: torch.device, done: Callable[[], None]
) -> None:
    """Fills `timings`; `done` is called after each turn of each way. A way that fails leaves `trainers`, one that has had its time has no further
    turn; the others go on."""
    step = 0
    for turn in range(lengths.num_turns):
        num_untimed = lengths.num_untimed_later if turn else lengths.num_untimed
        for way in list(trainers):
            timing = timings[way]
            left = lengths.part_seconds - timing.spent
            if left <= 0:
                continue
            try:
                with source(step, num_untimed + lengths.num_steps) as feed:
                    timing.turns.append(time_turn(trainers[way].step, feed, lengths.num_steps, num_untimed, device, left, timing))
            except (*CANNOT_RUN, MemoryError) as error:
                timing.problem = describe_problem(error)
            if timing.problem:
                del trainers[way]
            # The next way finds the memory as if it were alone.
            free_memory(device)
            done()
        step += num_untimed + lengths.num_steps


def time_turn(step: Callable[[RegionBatch], None], feed: Feed, num: int, num_untimed: int, device: torch.device, left: float, timing: Timing) -> Turn:
    """`num` steps after `num_untimed`, fewer but at least one when `left` seconds are over. Notes in `timing` what it took."""
    cuda = device.type == "cuda"

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize(device)

    wait()
    if timing.first_step_seconds is None:
        started = time.perf_counter()
        step(next(feed))
        wait()
        timing.first_step_seconds = time.perf_counter() - started
        num_untimed -= 1
    began = time.perf_counter()
    over = began + left
    for _ in range(num_untimed):
        if time.perf_counter() < over:
            step(next(feed))
    wait()
    resident = torch.cuda.memory_allocated(device) if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    waited = feed.wait_seconds
    marks = [mark(cuda)]
    while len(marks) <= num and (len(marks) == 1 or time.perf_counter() < over):
        step(next(feed))
        marks.append(mark(cuda))
    wait()
    timing.spent += time.perf_counter() - began
    seconds = list(between(marks))
    peak = torch.cuda.max_memory_allocated(device) - resident if cuda else None
    return Turn(seconds, (feed.wait_seconds - waited) / sum(seconds), peak)


def mark(cuda: bool) -> Any:
    """A point in time: on the GPU's own clock, in the order of its work, or on the host's."""
    if not cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(marks: list[Any]) -> Iterator[float]:
    """Seconds from each mark to the next."""
    for begin, end in itertools.pairwise(marks):
        yield end - begin if isinstance(end, float) else begin.elapsed_time(end) / 1e3


def measure_ceiling(device: torch.device) -> float:
    """Operations per second of a large matrix product of random numbers: on CUDA 8192 x 8192 in bfloat16, in the middle of many; on a CPU
    1024 x 1024 in float32, the fastest of many, for whatever else the machine does only slows it."""
    if device.type == "cuda":
        return measure_ceilings(device).flops_per_second
    side = 1024
    a, b = torch.randn(side, side), torch.randn(side, side)
    return 2 * side**3 / min(time_calls(functools.partial(torch.mm, a, b), num=1, num_warm_up=0).median for _ in range(50))


def free_memory(device: torch.device) -> None:
    """Gives the GPU's memory that is no longer used back to all."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
