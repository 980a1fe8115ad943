"""What a run was started on: commit, versions, machine, date."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path

import torch

from personmae import __version__


def describe_environment() -> dict[str, str | int]:
    """For config.json, JSON-ready: date, commit of the checkout ("unknown" outside one), versions, processor and cores."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "commit": commit(),
        "personmae": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
    }


def commit() -> str:
    """The commit of the checkout that this file belongs to, marked when files differ from it; "unknown" for an installed copy.

    An installed copy may lie inside somebody else's repository (a .venv in it), whose commit would say nothing.
    """
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here.parent, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        revision, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{revision} with changes" if changes else revision
