"""A pool of threads that a read which never returns cannot hold up: they are left behind on closing, and at the end of the program.

The standard library's pool waits for its threads in both cases, for ever on a network disk that is gone.
"""

from __future__ import annotations

import atexit
import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import Any, TypeVar

Result = TypeVar("Result")
CLOSE_SECONDS = 5.0


class ThreadPool:
    """Runs functions on `num_threads` threads, in the order they are given."""

    def __init__(self, num_threads: int, name: str) -> None:
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work, name=f"{name}_{number}", daemon=True) for number in range(num_threads)]
        for thread in self._threads:
            thread.start()
        # Threads that work in C++ while the interpreter ends could crash it.
        atexit.register(self.close)

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """What the function will return or raise."""
        future: Future[Result] = Future()
        self._tasks.put((future, lambda: function(*arguments)))
        return future

    def map(self, function: Callable[[Any], Result], values: Iterable[Any]) -> Iterator[Result]:
        """The results for all values, in their order; all are started at once."""
        futures = [self.submit(function, value) for value in values]
        return (future.result() for future in futures)

    def close(self) -> bool:
        """Drops what has not begun and waits for the rest up to `CLOSE_SECONDS`; whether all threads have ended. If not, there is a warning."""
        atexit.unregister(self.close)
        while True:
            try:
                task = self._tasks.get_nowait()
            except queue.Empty:
                break
            if task is not None:
                task[0].cancel()
        for _ in self._threads:
            self._tasks.put(None)
        last_time = time.monotonic() + CLOSE_SECONDS
        for thread in self._threads:
            thread.join(max(last_time - time.monotonic(), 0))
        stuck = sum(thread.is_alive() for thread in self._threads)
        if stuck:
            warnings.warn(f"{stuck} threads did not end within {CLOSE_SECONDS:g} s and are left behind: does the storage still answer?", stacklevel=2)
        return not stuck

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, function = task
            if future.set_running_or_notify_cancel():
                with _Settling(future):
                    future.set_result(function())
            # Not kept while waiting for the next one: a result may be a batch.
            del task, future, function


class _Settling:
    """Hands an error to a future, whatever it is, as the standard library's pool does."""

    def __init__(self, future: Future[Any]) -> None:
        self._future = future

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if error is not None:
            self._future.set_exception(error)
        return True
