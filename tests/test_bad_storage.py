"""A slow, failing or dead disk under both loaders: what comes back is waited for, what does not is replaced, and nothing hangs for ever."""

import errno
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from personmae.configs import UserError
from personmae.data import delivery, thread_pool
from personmae.data.image_index import ImageIndex
from personmae.data.loaders import open_loader
from tests.bad_images import encoded, picture, write_people
from tests.test_loaders import CPU, SIZE, assert_equal_batches, batches, both_loaders, config_of, ignore, index_of, plan_of


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> ImageIndex:
    return index_of(write_people(tmp_path_factory.mktemp("data") / "people", 60))


def open_people(index, kind, last_step=4, **options):
    return open_loader(index, plan_of(index), config_of(kind, **options), size=SIZE, device=CPU, first_step=0, last_step=last_step, announce=ignore)


class Disk:
    """Opening a file of the index fails or takes its time, by rules: sample -> what to do at the n-th try, from 1."""

    def __init__(self, monkeypatch, index):
        self.rules, self.tries = {}, {}
        original, samples, lock = os.open, {str(index.path(sample)): sample for sample in range(len(index))}, threading.Lock()

        def open_(path, *arguments, **options):
            sample = samples.get(os.fspath(path))
            if sample in self.rules:
                with lock:
                    self.tries[sample] = self.tries.get(sample, 0) + 1
                    number = self.tries[sample]
                self.rules[sample](number)
            return original(path, *arguments, **options)

        monkeypatch.setattr(os, "open", open_)


def refuse(number):
    raise OSError(number, os.strerror(number))


@both_loaders
def test_an_error_that_passes_leaves_no_trace(kind, people, monkeypatch):
    """EIO, a stale handle, too many open files: at two tries, each in another file; and one that is missing for a moment."""
    expected = batches(people, plan_of(people), config_of(kind))
    disk = Disk(monkeypatch, people)
    for place, number in enumerate((errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOENT)):
        sample = int(plan_of(people).step_samples(place)[3])
        disk.rules[sample] = lambda tried, number=number: refuse(number) if tried <= 2 else None
    with open_people(people, kind) as loader:
        assert_equal_batches(list(loader), expected)
        assert loader.quarantine == []
    assert set(disk.tries.values()) == {3}


@both_loaders
def test_what_stays_forbidden_is_replaced_and_named(kind, people, monkeypatch):
    expected = batches(people, plan_of(people), config_of(kind))
    disk = Disk(monkeypatch, people)
    sample = int(plan_of(people).step_samples(1)[5])
    disk.rules[sample] = lambda tried: refuse(errno.EACCES)
    with open_people(people, kind, max_bad_ratio=0.05) as loader:
        got = list(loader)
        assert loader.quarantine == [(str(people.path(sample)), "cannot be read: Permission denied")]
    assert disk.tries[sample] == 3
    assert got[1].samples[5] == plan_of(people).replacement(0, sample, 1)
    rows = [row for row in range(12) if row != 5]
    assert torch.equal(got[1].region_a[rows], expected[1].region_a[rows])
    for step in (0, 2, 3):
        assert_equal_batches(got[step : step + 1], expected[step : step + 1])


@both_loaders
def test_a_disk_that_fails_altogether_stops_the_run(kind, people, monkeypatch):
    disk = Disk(monkeypatch, people)
    disk.rules = {sample: lambda tried: refuse(errno.EIO) for sample in range(len(people))}
    with pytest.raises(UserError, match=r"9 images in a row could not be read.*Input/output error; is the storage still there"):
        batches(people, plan_of(people), config_of(kind, max_bad_ratio=1))


@both_loaders
def test_a_file_that_is_written_while_it_is_read(kind, tmp_path):
    """Its content changes all the time: half of it, another image, nothing. Its row is true or another sample's, all else is as ever."""
    index = index_of(write_people(tmp_path / "people", 60))
    plan = plan_of(index)
    expected = batches(index, plan, config_of(kind), last=15)
    victim = int(plan.step_samples(0)[2])
    path, ended = index.path(victim), threading.Event()
    true = path.read_bytes()

    def write_on():
        while not ended.is_set():
            for content in (true[: len(true) // 2], encoded(picture(7, 90, 40), "JPEG"), b"", true[:-1] + b"\0", true):
                path.write_bytes(content)

    writer = threading.Thread(target=write_on)
    writer.start()
    try:
        with open_people(index, kind, last_step=15, retries=0, max_bad_ratio=1) as loader:
            got = list(loader)
            quarantine = loader.quarantine
    finally:
        ended.set()
        writer.join()
    assert {name for name, _ in quarantine} <= {str(path)}
    assert len(got) == 15
    for ours, theirs in zip(got, expected, strict=True):
        for row, sample in enumerate(ours.samples.tolist()):
            assert sample == theirs.samples[row] or theirs.samples[row] == victim
            if sample == theirs.samples[row]:
                assert torch.equal(ours.region_b[row], theirs.region_b[row])


@both_loaders
def test_reads_that_take_seconds_are_waited_for_and_spoken_of(kind, people, monkeypatch):
    expected = batches(people, plan_of(people), config_of(kind))
    monkeypatch.setattr(delivery, "SLOW_SECONDS", 1.0)
    disk = Disk(monkeypatch, people)
    disk.rules[int(plan_of(people).step_samples(0)[4])] = lambda tried: time.sleep(2.2)
    with open_people(people, kind) as loader:
        with pytest.warns(UserWarning, match="training has waited for images for 1 s, and waits on"):
            got = list(loader)
        assert_equal_batches(got, expected)
        assert loader.wait_seconds > 2
        assert loader.quarantine == []


@both_loaders
def test_a_read_that_hangs_does_not_hold_up_closing(kind, people, monkeypatch):
    monkeypatch.setattr(thread_pool, "CLOSE_SECONDS", 0.3)
    disk, entered, released = Disk(monkeypatch, people), threading.Event(), threading.Event()

    def hang(tried):
        entered.set()
        assert released.wait(60)

    disk.rules[int(plan_of(people).step_samples(20)[4])] = hang
    loader = open_people(people, kind, last_step=1000)
    try:
        assert np.isfinite([next(loader).region_a.float().mean() for _ in range(2)]).all()
        with ThreadPoolExecutor(1) as pool:
            consumer = pool.submit(list, loader)
            assert entered.wait(30)
            started = time.monotonic()
            with pytest.warns(UserWarning, match="left behind"):
                loader.close()
            assert time.monotonic() - started < 10
            # The one who waits is told that there is no more.
            consumer.result(30)
    finally:
        released.set()


HUNG = """
import sys, threading, time
from pathlib import Path
import torch
from personmae.data import thread_pool
from personmae.data.image_index import ImageIndex, build_index
from personmae.data.loaders import LoaderConfig, open_loader
from personmae.data.plan import Plan
from personmae.data.region_draws import RegionConfig

thread_pool.CLOSE_SECONDS = 0.3
index = build_index(Path(sys.argv[1]), Path(sys.argv[2]), progress=False)
original, entered = ImageIndex.read, threading.Event()
plan = Plan(index.heights, index.widths, 12, 1, RegionConfig())
victim = int(plan.step_samples(3)[4])


def hang(self, sample):
    if sample == victim:
        entered.set()
        threading.Event().wait()
    return original(self, sample)


ImageIndex.read = hang
config = LoaderConfig(kind=sys.argv[3], num_threads=2, cache_gib=0)
with open_loader(index, plan, config, size=(64, 32), device=torch.device("cpu"), first_step=0, last_step=9) as loader:
    assert len(next(loader)) == 12
    assert entered.wait(30)
print("ends")
"""


@both_loaders
def test_a_program_with_a_read_that_hangs_ends(kind, people, tmp_path):
    command = [sys.executable, "-c", HUNG, str(Path(people.root)), str(tmp_path / "index"), kind]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("ends\n")
    assert "left behind" in done.stderr
