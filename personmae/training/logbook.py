"""The logbook of a run: numbers to metrics.jsonl and TensorBoard, sentences to log.txt, progress to the terminal;
config.json at the start.

Values stay on the device and are summed there; they are read, over all processes, once per log interval. No step waits
for the GPU.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import torch
from torch import Tensor
from tqdm import tqdm

from personmae.configs import UserError
from personmae.whole_files import explained_write, write_whole

Reduce = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
# A process that writes to a file rather than a terminal gets a line at most this often.
LINE_SECONDS = 10.0


@dataclass(frozen=True)
class Share:
    """A value logged as total / count over the interval and over all processes, such as a loss over cells of one kind,
    of which each batch has another number. Both zero-dimensional tensors on one device, or numbers.
    """

    total: Tensor | float
    count: Tensor | float


class Logbook:
    """Writes what a run has to say. Every process makes one and calls `log` alike; only the main one has files and a
    terminal.

    A context manager: leaving it closes the files.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        num_steps: int,
        images_per_step: int,
        log_every: int = 50,
        resume_step: int = 0,
        config: Mapping[str, Any] | None = None,
        is_main: bool = True,
        device: torch.device | str = "cpu",
        reduce: Reduce | None = None,
        tensorboard: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """run_dir: made if missing. num_steps: of the whole run. images_per_step: of all processes together.
        resume_step: steps done before; later lines of metrics.jsonl, of a run that was interrupted, are dropped.
        config: JSON-ready, for config.json. reduce: `Processes.sum_across`, or None for a process alone. stream: the
        terminal, default stderr. clock: in seconds.

        Raises UserError naming run_dir if it is a file or cannot be written.
        """
        if log_every < 1:
            raise UserError(f"log_every is {log_every}; it must be at least 1 step")
        self.run_dir = run_dir
        self.num_steps = num_steps
        self.images_per_step = images_per_step
        self.log_every = log_every
        self._is_main = is_main
        self._device = device
        self._reduce = reduce
        self._clock = clock
        self._stream = stream if stream is not None else sys.stderr
        # For each name on the device: the sum of its totals, the sum of its counts.
        self._sums: dict[str, Tensor] = {}
        self._num_values: dict[str, int] = {}
        self._latest: dict[str, Tensor | float] = {}
        self._said: set[str] = set()
        self._bar: tqdm[Any] | None = None
        self._events: Any = None
        self._line_time = -math.inf
        self.start_clock(resume_step)
        if is_main:
            self._open(config, resume_step, tensorboard)

    def announce(self, text: str) -> None:
        """Say a sentence once, on the terminal and in log.txt; the same sentence again, or from another process, is
        silence.
        """
        if not self._is_main or text in self._said:
            return
        self._said.add(text)
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)
        _append_line(self.run_dir / "log.txt", f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}")

    def start_clock(self, step: int, wait_seconds: float = 0.0) -> None:
        """Start measuring images/s here; called right before the first step, with the steps done and the loader's
        waiting time so far.
        """
        self._run_start = self._interval_start = self._clock()
        self._first_step = self._interval_step = step
        self._interval_wait = wait_seconds

    def log(
        self,
        step: int,
        means: Mapping[str, Tensor | float | Share],
        latest: Mapping[str, Tensor | float] | None = None,
        *,
        wait_seconds: float = 0.0,
        last: bool = False,
    ) -> dict[str, float] | None:
        """Take the values of a step; every `log_every` steps, and if `last`, write a line and return it, in every
        process. Else return None.

        step: steps done, this one included. means: averaged over the steps of the interval and over the processes;
        zero-dimensional tensors on any device are not read before the line is due. latest: written as they are, the
        main process's last value of the interval (learning rate, epoch, monitors). wait_seconds: how long this process
        has waited for data in all.

        A value that is not finite is null in metrics.jsonl (JSON has no NaN), and NaN in what is returned.
        """
        for name, value in means.items():
            self._add(name, value)
        self._latest.update(latest or {})
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
        if not last and step % self.log_every:
            return None
        line = self._read(step, wait_seconds)
        if self._is_main:
            self._write(step, line, last)
        return line

    def close(self) -> None:
        """Close the files and the progress bar; nothing is written, and closing again does nothing."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._events is not None:
            self._events.close()
            self._events = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _open(self, config: Mapping[str, Any] | None, resume_step: int, tensorboard: bool) -> None:
        check_run_dir(self.run_dir)
        num_dropped = keep_lines_to(self.run_dir / "metrics.jsonl", resume_step)
        if config is not None:
            write_whole(self.run_dir / "config.json", json.dumps(config, indent=2, allow_nan=False) + "\n")
        if num_dropped:
            self.announce(f"dropped {num_dropped} lines of metrics.jsonl that an interrupted run left after step {resume_step}")
        if tensorboard:
            self._events = self._open_events(resume_step)
        if self._stream.isatty():
            self._bar = tqdm(
                total=self.num_steps,
                initial=resume_step,
                file=self._stream,
                unit="step",
                dynamic_ncols=has_width(self._stream),
                ncols=None if has_width(self._stream) else 120,
                bar_format="{percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
            )

    def _open_events(self, resume_step: int) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.announce("no TensorBoard events are written, only metrics.jsonl: the package is missing; pip install tensorboard")
            return None
        with explained_write(self.run_dir / "events"):
            return SummaryWriter(str(self.run_dir / "events"), purge_step=resume_step + 1)  # type: ignore[no-untyped-call]

    def _add(self, name: str, value: Tensor | float | Share) -> None:
        sums = self._sums.get(name)
        if sums is None:
            sums = self._sums[name] = torch.zeros(2, dtype=torch.float64, device=self._device)
        # Additions on the device: nothing is copied to the host, hence nobody waits. A count of steps needs no device.
        if isinstance(value, Share):
            sums[0].add_(_detached(value.total))
            sums[1].add_(_detached(value.count))
        else:
            sums[0].add_(_detached(value))
            self._num_values[name] = self._num_values.get(name, 0) + 1

    def _read(self, step: int, wait_seconds: float) -> dict[str, float]:
        for name, count in self._num_values.items():
            self._sums[name][1].add_(count)
        sums = self._reduce(self._sums) if self._reduce is not None else self._sums
        line = {}
        if sums:
            for name, (total, count) in zip(sums, torch.stack(list(sums.values())).tolist(), strict=True):
                line[name] = total / count if count else math.nan
        line.update({name: value.item() if isinstance(value, Tensor) else value for name, value in self._latest.items()})
        # After the values were read: only then has the GPU done the steps that are counted.
        now = self._clock()
        seconds = max(now - self._interval_start, 1e-9)
        line["images_per_second"] = (step - self._interval_step) * self.images_per_step / seconds
        line["data_wait_ratio"] = min(max((wait_seconds - self._interval_wait) / seconds, 0.0), 1.0)
        self._interval_start, self._interval_step, self._interval_wait = now, step, wait_seconds
        self._sums, self._num_values, self._latest = {}, {}, {}
        return line

    def _write(self, step: int, line: Mapping[str, float], last: bool) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in line.items()}
        _append_line(self.run_dir / "metrics.jsonl", json.dumps({"step": step, **finite}, allow_nan=False))
        if self._events is not None:
            with explained_write(self.run_dir / "events"):
                for name, value in finite.items():
                    if value is not None:
                        self._events.add_scalar(name, value, step)
                self._events.flush()
        figures = describe_line(line)
        if self._bar is not None:
            self._bar.set_postfix_str(figures)
        elif last or step >= self.num_steps or self._clock() - self._line_time >= LINE_SECONDS:
            self._line_time = self._clock()
            done = max(step - self._first_step, 1)
            remaining = (self._line_time - self._run_start) / done * max(self.num_steps - step, 0)
            print(
                f"step {step}/{self.num_steps}  {figures}  {tqdm.format_interval(remaining)} left",
                file=self._stream,
                flush=True,
            )


def has_width(terminal: TextIO) -> bool:
    """Whether a terminal knows its width. Some (in containers) say 0 columns, in which a bar would be drawn as nothing."""
    try:
        return os.get_terminal_size(terminal.fileno()).columns > 0
    except OSError:
        return False


def describe_line(line: Mapping[str, float]) -> str:
    """The figures of a line that a person watches: both losses, images/s, share of time spent waiting for data."""
    losses = [f"{label} {line[name]:.4f}" for name, label in (("loss_pixels", "pixels"), ("loss_features", "features")) if name in line]
    if not losses and "loss" in line:
        losses = [f"loss {line['loss']:.4f}"]
    return "  ".join([*losses, f"{line['images_per_second']:.0f} images/s", f"data wait {line['data_wait_ratio']:.0%}"])


def check_run_dir(run_dir: Path) -> None:
    """Make run_dir if it is missing and try to write in it. Raises UserError naming it if it is a file or cannot be
    written.
    """
    probe = run_dir / ".write_probe"
    with explained_write(run_dir):
        if run_dir.exists() and not run_dir.is_dir():
            raise UserError(f"the run folder {run_dir} is a file; give the path of a folder")
        run_dir.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"probe")
        probe.unlink()


def keep_lines_to(path: Path, step: int) -> int:
    """Drop from a metrics.jsonl the lines after `step` and those that are no JSON object with a step (cut off by a
    crash).

    The file is rewritten whole under another name and renamed. Returns how many lines were dropped; 0 if there is no
    file.
    """
    if not path.exists():
        return 0
    with explained_write(path):
        # Bytes: a line that a crash has filled with rubbish need not be UTF-8.
        lines = path.read_bytes().splitlines()
        kept = [line for line in lines if (found := _step_of(line)) is not None and found <= step]
        content = b"".join(line + b"\n" for line in kept)
        if content != path.read_bytes():
            write_whole(path, content)
    return len(lines) - len(kept)


def _detached(value: Tensor | float) -> Tensor | float:
    return value.detach() if isinstance(value, Tensor) else value


def _append_line(path: Path, line: str) -> None:
    # Opened for each line, a few times a minute: nothing is buffered when the run is killed.
    with explained_write(path), open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def _step_of(line: bytes) -> int | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    step = entry.get("step") if isinstance(entry, dict) else None
    return step if isinstance(step, int) else None
