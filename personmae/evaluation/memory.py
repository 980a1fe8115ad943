"""How much memory there is for a computation on features, and the refusal of what does not fit, before it starts."""

from __future__ import annotations

from pathlib import Path

import torch

from personmae.configs import UserError

GIB = 2**30


def require_memory(num_bytes: float, what: str, device: torch.device | str = "cpu") -> None:
    """Raises UserError with the estimate if `what` needs more bytes than are free on the device; does nothing where that cannot be told."""
    free = available_bytes(torch.device(device))
    if free is not None and num_bytes > free:
        raise UserError(f"{what} needs about {num_bytes / GIB:,.1f} GiB, and {free / GIB:,.1f} GiB are free on {device}")


def available_bytes(device: torch.device) -> int | None:
    """Free bytes of the GPU, or of the machine and the control group this process is in; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = [limit for limit in (_machine_bytes(), _group_bytes()) if limit is not None]
    return min(limits, default=None)


def _machine_bytes(path: Path = Path("/proc/meminfo")) -> int | None:
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kilobytes = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return None if kilobytes is None else int(kilobytes) * 1024


def _group_bytes(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    # What the kernel can take back from the file cache counts as free.
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        cached = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(0, int(limit) - used + int(cached.get("inactive_file", 0)))
