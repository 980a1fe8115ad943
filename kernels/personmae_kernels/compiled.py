"""Loads the compiled operators (personmae_kernels._C, built by setup.py from csrc/) at first use, and says what is missing with its cure.

Loading registers the operators with PyTorch: afterwards they are torch.ops.personmae.<name>.
"""

from __future__ import annotations

import functools
import importlib

# torch comes first: the binary needs its libraries in the process.
import torch

CURE = "`python setup.py build_ext --inplace` builds it; it takes a C++ compiler and Python's headers (Debian: apt-get install g++ python3-dev)"


def available() -> bool:
    """Whether the compiled operators are there; loads them on the first call."""
    return not why_missing()


@functools.cache
def why_missing() -> str:
    """Why the compiled operators are not used, with the cure, in one sentence; empty if they are there. Loads them on the first call."""
    try:
        importlib.import_module("personmae_kernels._C")
    except ModuleNotFoundError:
        return f"the compiled operators (personmae_kernels._C) are not built: {CURE}"
    except (ImportError, OSError, RuntimeError) as error:
        return f"the compiled operators (personmae_kernels._C) do not load with torch {torch.__version__} ({error}): {CURE}"
    return ""
