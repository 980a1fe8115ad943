"""The environment of worker processes that are programs of their own."""

from __future__ import annotations

import os
import sys


def worker_environment() -> dict[str, str]:
    """The path, so that workers find this package as this process did; one thread each, as there is a process per core."""
    # An empty entry is the current folder: notebooks and `python -c` find packages by it.
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
