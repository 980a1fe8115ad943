"""Measurements that are made of many runs: each run is a part, done once, in any order and side by side; what is missing or has failed is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks._measure import commit_at_first
from personmae.configs import UserError
from personmae.visuals.curves import read_metrics


@dataclass(frozen=True)
class Part:
    """name: of its files. about: what its rows say of it. command: arguments of Python. read: the rows that the run has left."""

    name: str
    about: dict[str, Any]
    command: tuple[str, ...]
    read: Callable[[], list[dict[str, Any]]]


class Parts:
    """Runs parts and keeps what they found in FOLDER/results/NAME.json, what they said in FOLDER/logs/NAME.txt. All methods raise UserError
    where a part was done with other settings.

    failed: names of the parts that did not go well in this call.
    """

    def __init__(self, folder: Path, jobs: int) -> None:
        self.failed: list[str] = []
        self._results, self._logs = folder / "results", folder / "logs"
        self._jobs = jobs
        for path in (self._results, self._logs):
            path.mkdir(parents=True, exist_ok=True)

    def run(self, parts: Sequence[Part]) -> None:
        """Runs those that are not done, `jobs` at a time, in their order."""
        with ThreadPoolExecutor(self._jobs) as pool:
            list(pool.map(self._run, parts))

    def rows(self, parts: Sequence[Part]) -> list[dict[str, Any]]:
        """The rows of those that are done, each with what its part is about, the seconds it took and its commit."""
        rows = []
        for part in parts:
            if (content := self._content(part)) is not None:
                rows += [{**part.about, "seconds": content["seconds"], "commit": content["commit"], **row} for row in content["rows"]]
        return rows

    def missing(self, parts: Sequence[Part]) -> list[str]:
        """Names of those that are neither done nor failed."""
        return [part.name for part in parts if part.name not in self.failed and self._content(part) is None]

    def say_what_is_not_there(self, parts: Sequence[Part]) -> bool:
        """Prints a line for what failed and for what is missing; whether all are there."""
        for word, names in (("failed", self.failed), ("missing", self.missing(parts))):
            if names:
                print(f"{word}: {', '.join(names)} (logs in {self._logs})")
        return not self.failed and not self.missing(parts)

    def _run(self, part: Part) -> None:
        if self._content(part) is not None:
            return
        started = time.perf_counter()
        with (self._logs / f"{part.name}.txt").open("a") as log:
            status = subprocess.run(
                [sys.executable, *part.command], stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}
            ).returncode
        seconds = round(time.perf_counter() - started)
        print(f"{part.name}: {'done' if status == 0 else f'failed ({status})'} in {seconds} s", flush=True)
        if status:
            self.failed.append(part.name)
            return
        content = {"part": part.name, "seconds": seconds, "commit": commit_at_first(), "command": part.command, "rows": part.read()}
        result = self._result(part)
        partial = result.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1))
        partial.replace(result)

    def _content(self, part: Part) -> dict[str, Any] | None:
        """What a part that is done has left. Raises UserError if it was done with other settings."""
        path = self._result(part)
        if not path.exists():
            return None
        content: dict[str, Any] = json.loads(path.read_text())
        if content["command"] != list(part.command):
            raise UserError(f"{path} is of a run with other settings: give those, choose another --folder, or remove the file and the run's folder")
        return content

    def _result(self, part: Part) -> Path:
        return self._results / f"{part.name}.json"


def zero_shot_command(checkpoint: Path, data: Path | str, output: Path, *flags: str) -> tuple[str, ...]:
    """Arguments of Python that score a checkpoint's features as they are."""
    where = ("--checkpoint", str(checkpoint), "--data", str(data), "--output", str(output), "--num-threads", "1", "--no-cache", "--no-compare")
    return ("-m", "personmae", "evaluate", *where, *flags)


def zero_shot_rows(output: Path) -> list[dict[str, Any]]:
    """What that command has found: a row for each feature, mAP and rank-1 as fractions."""
    (found,) = output.rglob("scores.json")
    scores = json.loads(found.read_text())["scores"]
    return [{"model": feature, **{name: row[name] for name in ("mAP", "rank1")}} for feature, row in scores.items()]


def logged(run_dir: Path, key: str) -> list[float]:
    """A value of a pre-training run's log, in the order of its steps; those of a run that was resumed stand once."""
    return [row[key] for row in read_metrics(run_dir / "metrics.jsonl").rows]


def no_rows() -> list[dict[str, Any]]:
    """Of a run that others begin with."""
    return []
