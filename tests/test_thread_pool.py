"""The pool of threads: results in order, errors to whom they belong, and nobody waits for a thread that does not return."""

import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError

import pytest

from personmae.data import thread_pool
from personmae.data.thread_pool import ThreadPool


def test_results_and_errors_arrive():
    pool = ThreadPool(3, "test")
    assert list(pool.map(lambda value: value * value, range(20))) == [value * value for value in range(20)]
    with pytest.raises(ZeroDivisionError):
        pool.submit(lambda: 1 / 0).result()
    with pytest.raises(SystemExit):
        pool.submit(sys.exit).result()
    assert pool.submit(max, 3, 7).result() == 7
    assert pool.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("test_")]


def test_what_has_not_begun_is_dropped_on_closing():
    entered, released = threading.Event(), threading.Event()
    pool = ThreadPool(1, "test")
    first = pool.submit(lambda: entered.set() or released.wait(30))
    second = pool.submit(time.sleep, 1000)
    assert entered.wait(30)
    threading.Timer(0.05, released.set).start()
    assert pool.close()
    assert first.result() is True
    with pytest.raises(CancelledError):
        second.result()


def test_a_thread_that_does_not_return_is_left_behind(monkeypatch):
    monkeypatch.setattr(thread_pool, "CLOSE_SECONDS", 0.1)
    entered, released = threading.Event(), threading.Event()
    pool = ThreadPool(2, "test")
    future = pool.submit(lambda: entered.set() or released.wait(30))
    assert entered.wait(30)
    with pytest.warns(UserWarning, match="1 threads did not end within 0.1 s and are left behind"):
        assert not pool.close()
    released.set()
    assert future.result(30)


PROGRAM = """
import threading, time
from personmae.data import thread_pool
thread_pool.CLOSE_SECONDS = 0.1
pool = thread_pool.ThreadPool(2, "test")
pool.submit(threading.Event().wait)
pool.submit(print, "done")
time.sleep(0.1)
"""


def test_the_program_ends_all_the_same():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, env={"PYTHONPATH": ":".join(sys.path)})
    assert done.returncode == 0
    assert done.stdout == "done\n"
    assert "left behind" in done.stderr
