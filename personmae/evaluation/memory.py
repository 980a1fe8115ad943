"""Says no, with the estimate, before memory is taken that is not there."""

from __future__ import annotations

import os
from pathlib import Path

from personmae.configs import UserError

GIB = 2**30


def available_bytes() -> int:
    """Memory that can be had without swapping: the kernel's own estimate, which counts caches as free; where there is none, all memory."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        lines = []
    kib = next((int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if kib is None else kib * 1024


def require_memory(num_bytes: int, what: str) -> None:
    """Raises UserError, with both figures, if so many bytes are not there. `what` says what they are for: "the matches of ..."."""
    there = available_bytes()
    if num_bytes > there:
        raise UserError(f"{what} would take about {num_bytes / GIB:,.1f} GiB, and {there / GIB:,.1f} GiB are available")
