"""How far a long evaluation has come: a bar where stderr is a terminal, else a line every ten seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TextIO

from tqdm import tqdm

LINE_SECONDS = 10.0


class Progress:
    """Counts things done, such as images. A context manager: leaving it clears the bar.

    total: things in all. label: what is being done. unit: of the things. shown: False is silence. stream: default
    stderr. clock: in seconds. What ends within ten seconds writes no line.
    """

    def __init__(
        self,
        total: int,
        label: str,
        unit: str = "img",
        *,
        shown: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.label, self.unit = total, label, unit
        self.done = 0
        self._stream = stream if stream is not None else sys.stderr
        self._clock = clock
        self._start = self._line_time = clock()
        self._bar: tqdm[Any] | None = None
        self._lines = shown and not self._stream.isatty()
        if shown and not self._lines:
            self._bar = tqdm(total=total, desc=label, unit=unit, file=self._stream, dynamic_ncols=True, leave=False)

    def advance(self, count: int) -> None:
        """So many more are done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        now = self._clock()
        if self._lines and now - self._line_time >= LINE_SECONDS:
            self._line_time = now
            speed = self.done / max(now - self._start, 1e-9)
            rest = f", {(self.total - self.done) / speed:,.0f} s to go" if speed > 0 else ""
            print(f"{self.label}: {self.done:,} of {self.total:,}, {speed:,.1f} {self.unit}/s{rest}", file=self._stream, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
