"""What every benchmark needs: repeated timings with their spread, the machine, the commit, and a JSON result that says all of it."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from personmae.training.environment import commit

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "triton", "numpy", "nvidia-dali-cuda120", "simplejpeg", "opencv-python-headless", "pillow", "xformers", "timm", "faiss-gpu")


@dataclass(frozen=True)
class Spread:
    """Median of repeated measurements, their 10 % and 90 % quantiles, and how many there were."""

    median: float
    low: float
    high: float
    num: int

    def __str__(self) -> str:
        return f"{self.median:,.4g} ({self.low:,.4g} to {self.high:,.4g}, n = {self.num})"


def spread(values: Sequence[float]) -> Spread:
    """The spread of at least one value; quantiles are interpolated, and lie within the values."""
    if not values:
        raise ValueError("a spread needs at least one value")
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return Spread(statistics.median(values), tenths[0], tenths[-1], len(values))


def time_calls(call: Callable[[], object], *, num: int, num_warm_up: int = 3, device: torch.device | None = None) -> Spread:
    """Seconds of one call, over `num` calls after `num_warm_up` that do not count. On CUDA every call is waited for."""

    def wait() -> None:
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)

    seconds = []
    for number in range(num_warm_up + num):
        wait()
        started = time.perf_counter()
        call()
        wait()
        if number >= num_warm_up:
            seconds.append(time.perf_counter() - started)
    return spread(seconds)


def describe_machine() -> dict[str, Any]:
    """Processor, cores that this process may use, memory, GPU, system, Python and the packages that matter."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "missing"
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": round(os.getloadavg()[0], 2),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": versions,
    }


def write_result(path: Path, benchmark: str, settings: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> None:
    """A result as JSON: benchmark, UTC date, commit, machine, settings, and rows whose `Spread` values become objects. Replaces the file at once."""
    rows = [{key: asdict(value) if isinstance(value, Spread) else value for key, value in row.items()} for row in results]
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record = {
        "benchmark": benchmark,
        "date": date,
        "commit": commit_at_first(),
        "machine": describe_machine(),
        "settings": {key: path_in_words(value) if isinstance(value, Path) else value for key, value in settings.items()},
        "results": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


@functools.cache
def commit_at_first() -> str:
    """The commit as it stands when it is first asked for: a result that is written piece by piece changes the tree itself."""
    return commit()


def path_in_words(path: Path) -> str:
    """Relative to the project where it lies in it, else its name alone: results tell no folders of a machine."""
    path = path.absolute()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
