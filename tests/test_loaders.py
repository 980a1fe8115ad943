"""Both loaders against the plan, against each other, and against files that go bad while they run."""

import contextlib
import importlib.util
import itertools
import math
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from personmae.configs import UserError
from personmae.data import delivery, loaders, painting_processes, row_painter
from personmae.data.image_index import ImageIndex, build_index
from personmae.data.images import UnreadableImage, read_image, sample_box
from personmae.data.loaders import LoaderConfig, open_loader
from personmae.data.plan import Plan
from personmae.data.region_draws import RegionConfig
from personmae.data.worker_environment import worker_environment
from tests.bad_images import HEIGHT, WIDTH, encoded, picture, readable_samples, spoil, write_corpus, write_people

HAS_DALI = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
needs_dali = pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed (pip install nvidia-dali-cuda120)")
both_loaders = pytest.mark.parametrize("kind", ["threads", pytest.param("dali", marks=needs_dali)])
all_loaders = pytest.mark.parametrize("kind", ["threads", "processes", pytest.param("dali", marks=needs_dali)])

CPU = torch.device("cpu")
SIZE = (64, 32)
COLOURED = RegionConfig(brightness=0.4, contrast=0.4, saturation=0.3, hue=0.1, grey_prob=0.2, blur_prob=0.5, erasing_prob=0.5, independent_flips=True)


def ignore(message: str) -> None:
    del message


def index_of(source: Path) -> ImageIndex:
    return build_index(source, source.parent / f"{source.name} index", progress=False, announce=ignore)


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> ImageIndex:
    """60 JPEGs, in both usual subsamplings."""
    return index_of(write_people(tmp_path_factory.mktemp("data") / "people", 60))


def plan_of(index: ImageIndex, batch_size: int = 12, seed: int = 1, regions: RegionConfig | None = None) -> Plan:
    return Plan(index.heights, index.widths, batch_size, seed, regions or RegionConfig(independent_flips=True))


def config_of(kind: Any, **options) -> LoaderConfig:
    return LoaderConfig(kind=kind, **{"num_threads": 2, "cache_gib": 0, "retry_seconds": 0, **options})


def batches(index, plan, config, *, first=0, last=4, size=SIZE, **options) -> list[loaders.RegionBatch]:
    with open_loader(index, plan, config, size=size, device=CPU, first_step=first, last_step=last, announce=ignore, **options) as loader:
        return list(loader)


def assert_equal_batches(left, right, names=("region_a", "region_b", "boxes", "flips", "samples", "planned")):
    assert [(batch.epoch, batch.step, batch.micro) for batch in left] == [(batch.epoch, batch.step, batch.micro) for batch in right]
    for ours, theirs in zip(left, right, strict=True):
        for name in names:
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), (ours.step, name)


def assert_follows_plan(batch, plan):
    """What is said about a batch is what the plan draws for the samples delivered."""
    assert torch.equal(batch.planned, torch.from_numpy(plan.step_samples(batch.step)))
    drawn = plan.for_samples(batch.epoch, batch.samples.numpy())
    assert np.array_equal(batch.boxes.numpy(), drawn.boxes)
    assert np.array_equal(batch.flips.numpy(), drawn.flips)


@all_loaders
def test_shapes_and_plan(kind, people):
    plan = plan_of(people)
    for step, batch in enumerate(batches(people, plan, config_of(kind), last=11)):
        assert batch.region_a.shape == batch.region_b.shape == (12, *SIZE, 3)
        assert batch.region_a.dtype == batch.region_b.dtype == torch.uint8
        assert batch.region_a.is_contiguous()
        assert batch.region_b.is_contiguous()
        assert (batch.boxes.dtype, batch.boxes.shape) == (torch.int32, (12, 2, 4))
        assert (batch.flips.dtype, batch.flips.shape) == (torch.bool, (12, 2))
        assert batch.samples.dtype == batch.planned.dtype == torch.int64
        assert (batch.step, batch.epoch, batch.micro) == (step, step // 5, 0)
        assert torch.equal(batch.samples, batch.planned)
        assert_follows_plan(batch, plan)


@both_loaders
@pytest.mark.parametrize("size", [(256, 128), (32, 16)])
def test_boxes_are_exact_on_ramps(kind, size, tmp_path):
    """Lossless images in which red is the column and green the row: every output pixel tells where it was looked up, flipped or not."""
    generator = np.random.default_rng(0)
    shapes = [(int(generator.integers(40, 250)), int(generator.integers(20, 250))) for _ in range(40)]
    (tmp_path / "ramps").mkdir()
    for number, (height, width) in enumerate(shapes):
        image = np.zeros((height, width, 3), np.uint8)
        image[:, :, 0], image[:, :, 1] = np.arange(width), np.arange(height)[:, None]
        (tmp_path / "ramps" / f"{number:02d}.png").write_bytes(encoded(image, "PNG"))
    index = index_of(tmp_path / "ramps")
    plan = plan_of(index, 20, regions=RegionConfig(crop_scale=(0.05, 1), independent_flips=True))
    seen_flips = set()
    for batch in batches(index, plan, config_of(kind), size=size, last=8):
        for row, region in itertools.product(range(20), (0, 1)):
            out = (batch.region_a, batch.region_b)[region][row].numpy().astype(np.float64)
            y0, x0, y1, x1 = batch.boxes[row, region].tolist()
            height, width = shapes[batch.samples[row]]
            assert (index.heights[batch.samples[row]], index.widths[batch.samples[row]]) == (height, width)
            columns = x0 + (np.arange(size[1]) + 0.5) * (x1 - x0) / size[1] - 0.5
            rows = y0 + (np.arange(size[0]) + 0.5) * (y1 - y0) / size[0] - 0.5
            if batch.flips[row, region]:
                columns = columns[::-1]
            seen_flips.add(bool(batch.flips[row, region]))
            error = np.maximum(np.abs(out[:, :, 0] - columns.clip(0, width - 1)), np.abs(out[:, :, 1] - rows.clip(0, height - 1)[:, None]))
            # Levels are rounded: once by DALI, twice by OpenCV. DALI's filter is one-sided where it meets the image's edge.
            inner = error[1:-1, 1:-1] if kind == "dali" else error
            assert inner.max() <= (0.51 if kind == "dali" else 0.75)
            assert error.max() <= 0.75 + (0.2 * max((y1 - y0) / size[0], (x1 - x0) / size[1]) if kind == "dali" else 0)
    assert seen_flips == {False, True}


@needs_dali
@pytest.mark.parametrize("regions", [RegionConfig(independent_flips=True), COLOURED], ids=["plain", "coloured"])
@pytest.mark.parametrize("size", [(256, 128), (64, 32)])
def test_loaders_agree(regions, size, people):
    """The same plan to the bit. Pixels: DALI antialiases by a triangle, OpenCV by a box, so contours of shrunk images differ a little."""
    plan = plan_of(people, regions=regions)
    ours, theirs = (batches(people, plan, config_of(kind), size=size, last=6) for kind in ("threads", "dali"))
    assert_equal_batches(ours, theirs, names=("boxes", "flips", "samples", "planned"))
    boxes = torch.cat([batch.boxes for batch in ours])
    shrink = ((boxes[:, :, 2:] - boxes[:, :, :2]) / torch.tensor(size)).amax(dim=2)
    left, right = (
        torch.stack([torch.cat([getattr(batch, name) for batch in made]) for name in ("region_a", "region_b")], 1) for made in (ours, theirs)
    )
    difference = (left.int() - right.int()).abs()
    plain, antialiased = difference[shrink <= 1.25], difference[shrink > 1.25]
    assert len(plain) > 20
    # Colour and blur carry a difference of one level further.
    assert plain.amax() <= (4 if regions is COLOURED else 1)
    assert plain.float().mean() < 0.2
    if size == (64, 32):
        assert len(antialiased) > 20
        assert antialiased.amax() <= 16
        assert antialiased.float().mean() < 1


@needs_dali
def test_loaders_see_the_same_pixels_of_every_kind_of_file(tmp_path):
    """At the size of the file and with the box on all of it nothing is resampled: what is left is decoding, and that is equal to the bit."""
    index = index_of(write_corpus(tmp_path / "corpus", readable_samples()))
    whole = RegionConfig(crop_scale=(1, 1), crop_aspect=(WIDTH / HEIGHT, WIDTH / HEIGHT), flip_prob=0.5)
    plan = plan_of(index, len(index), regions=whole)
    results = [batches(index, plan, config_of(kind), size=(HEIGHT, WIDTH), last=2) for kind in ("threads", "dali")]
    assert_equal_batches(*results)
    for batch in results[0]:
        assert (batch.boxes == torch.tensor([0, 0, HEIGHT, WIDTH])).all()
        for row, sample in enumerate(batch.samples.tolist()):
            expected = read_image(index.path(sample))
            expected = expected[:, ::-1] if batch.flips[row, 0] else expected
            assert np.array_equal(batch.region_a[row].numpy(), expected), index.name(sample)


@both_loaders
def test_batches_do_not_depend_on_threads_or_prefetch(kind, people):
    plan = plan_of(people, regions=COLOURED)
    reference = batches(people, plan, config_of(kind, num_threads=1, prefetch=1))
    assert_equal_batches(reference, batches(people, plan, config_of(kind, num_threads=3, prefetch=4)))


def test_batches_do_not_depend_on_the_cache(people):
    plan = plan_of(people)
    reference = batches(people, plan, config_of("threads"), last=12)
    assert_equal_batches(reference, batches(people, plan, config_of("threads", cache_gib=1), last=12))


@pytest.mark.parametrize("cache_gib", [0, 1])
def test_processes_draw_what_threads_draw(cache_gib, people):
    """Several tasks to a batch, the last one short; images that are decoded once for all processes."""
    plan = Plan(people.heights, people.widths, 78, 1, COLOURED, repeats=2)
    reference = batches(people, plan, config_of("threads"), last=3)
    assert_equal_batches(reference, batches(people, plan, config_of("processes", cache_gib=cache_gib), last=3))


def members(group: int) -> list[int]:
    """The processes of a group that run, in their order."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, its_group = (folder / "stat").read_text().rsplit(") ", 1)[1].split()[:3]
            if int(its_group) == group and state != "Z":
                found.append(int(folder.name))
    return sorted(found)


def comes_to(group: int, count: int) -> bool:
    """Whether that many processes of a group run soon: the first of them draws while the others are still being forked."""
    last_time = time.monotonic() + 20
    while len(members(group)) != count and time.monotonic() < last_time:
        time.sleep(0.05)
    return len(members(group)) == count


@pytest.mark.parametrize("victim", ["process", "program"])
def test_a_process_that_dies_is_said(victim, people, monkeypatch):
    programs = []
    start = painting_processes._start

    def noted(*arguments):
        program, workers = start(*arguments)
        programs.append(program)
        return program, workers

    monkeypatch.setattr(painting_processes, "_start", noted)
    options = {"size": SIZE, "device": CPU, "first_step": 0, "last_step": 10_000, "announce": ignore}
    with open_loader(people, plan_of(people), config_of("processes"), **options) as loader:
        next(loader)
        group = programs[0].pid
        assert comes_to(group, 3)
        program, *workers = members(group)
        assert program == group
        # What a terminal sends to the group of the training process does not reach them; what a job scheduler sends to all, they leave to it.
        assert os.getpgid(workers[0]) != os.getpgid(0)
        for process in (program, *workers):
            os.kill(process, signal.SIGTERM)
        for _ in range(20):
            next(loader)
        if victim == "process":
            os.kill(workers[0], signal.SIGKILL)
        else:
            os.killpg(group, signal.SIGKILL)
        with pytest.raises(UserError, match=r"a process of the loader has ended, signal 9: .*--data.loader.num-threads"):
            list(loader)
    assert comes_to(group, 0)


def test_processes_end_with_the_process_that_trains(people, tmp_path):
    program = """
import sys
from pathlib import Path
import torch
from personmae.data import painting_processes
from personmae.data.image_index import build_index
from personmae.data.loaders import LoaderConfig, open_loader
from personmae.data.plan import Plan
from personmae.data.region_draws import RegionConfig

start = painting_processes._start
def noted(*arguments):
    program, workers = start(*arguments)
    print(program.pid, flush=True)
    return program, workers
painting_processes._start = noted
index = build_index(Path(sys.argv[1]), Path(sys.argv[2]), progress=False, announce=lambda line: None)
plan = Plan(index.heights, index.widths, 12, 1, RegionConfig())
config = LoaderConfig(kind="processes", num_threads=2)
loader = open_loader(index, plan, config, size=(64, 32), device=torch.device("cpu"), first_step=0, last_step=10**6, announce=lambda line: None)
next(loader)
print("ready", flush=True)
while True:
    next(loader)
"""
    command = [sys.executable, "-c", program, str(people.root), str(tmp_path / "index")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=worker_environment()) as trainer:
        group, ready = int(trainer.stdout.readline()), trainer.stdout.readline()
        assert ready == "ready\n"
        assert comes_to(group, 3)
        trainer.kill()
    assert comes_to(group, 0)


@both_loaders
def test_a_run_goes_on_where_it_stopped(kind, people):
    """From any step, in the middle of an epoch or at its end, without what came before."""
    plan = plan_of(people)
    whole = batches(people, plan, config_of(kind), last=12)
    for first in (1, 5, 8):
        assert_equal_batches(whole[first:], batches(people, plan_of(people), config_of(kind), first=first, last=12))


@both_loaders
@pytest.mark.parametrize(("world_size", "accumulation"), [(2, 1), (3, 2), (1, 4)])
def test_processes_and_micro_batches_share_the_batch(kind, world_size, accumulation, people):
    plan = plan_of(people)
    whole = batches(people, plan, config_of(kind), last=2)
    split = [
        batches(people, plan, config_of(kind), last=2, rank=rank, world_size=world_size, accumulation=accumulation) for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        parts = [split[rank][step * accumulation + micro] for micro in range(accumulation) for rank in range(world_size)]
        assert [part.micro for part in parts] == [micro for micro in range(accumulation) for _ in range(world_size)]
        for name in ("region_a", "region_b", "boxes", "flips", "samples"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name)), name


@both_loaders
def test_delivered_batches_stay_as_they_are(kind, people):
    plan = plan_of(people)
    with open_loader(people, plan, config_of(kind), size=SIZE, device=CPU, first_step=0, last_step=12, announce=ignore) as loader:
        first = next(loader)
        before = first.region_a.clone(), first.region_b.clone()
        rest = list(loader)
    assert len(rest) == 11
    assert torch.equal(first.region_a, before[0])
    assert torch.equal(first.region_b, before[1])


@all_loaders
def test_files_that_go_bad_are_replaced(kind, tmp_path):
    """Six files break after indexing, in six ways. Every batch comes; all else is as it was; both loaders replace by the same samples."""
    index = index_of(write_people(tmp_path / "people", 60))
    plan = plan_of(index)
    clean = batches(index, plan, config_of(kind), last=10)
    bad = {int(sample): index.path(int(sample)) for sample in plan.step_samples(1)[[0, 3, 4, 7, 10, 11]]}
    expected = spoil(list(bad.values()))
    assert len(expected) == 6

    with open_loader(index, plan, config_of(kind, max_bad_ratio=0.1), size=SIZE, device=CPU, first_step=0, last_step=10, announce=ignore) as loader:
        got = list(loader)
        quarantine = dict(loader.quarantine)
        assert len(loader.quarantine) == 6
    assert quarantine.keys() == {str(path) for path in expected}
    assert all(reason in quarantine[str(path)] for path, reason in expected.items())

    assert len(got) == 10
    for ours, theirs in zip(got, clean, strict=True):
        assert_follows_plan(ours, plan)
        for row, planned in enumerate(ours.planned.tolist()):
            if planned not in bad:
                assert ours.samples[row] == planned
                for name in ("region_a", "region_b", "boxes", "flips"):
                    assert torch.equal(getattr(ours, name)[row], getattr(theirs, name)[row])
            else:
                chosen = itertools.chain([planned], (plan.replacement(ours.epoch, planned, attempt) for attempt in itertools.count(1)))
                assert ours.samples[row] == next(sample for sample in chosen if sample not in bad)
                for region, pixels in enumerate((ours.region_a[row], ours.region_b[row])):
                    expected_pixels = sample_box(
                        read_image(index.path(int(ours.samples[row]))), ours.boxes[row, region].tolist(), bool(ours.flips[row, region]), SIZE
                    )
                    difference = np.abs(pixels.numpy().astype(int) - expected_pixels)
                    assert difference.mean() <= (1.5 if kind == "dali" else 0)
    # A run that goes on from the middle replaces by the same samples, though it does not know what failed before.
    again = batches(index, plan, config_of(kind, max_bad_ratio=0.1), first=6, last=10)
    assert_equal_batches(got[6:], again)


@both_loaders
def test_a_read_that_fails_is_tried_again(kind, people, monkeypatch):
    plan = plan_of(people)
    expected = batches(people, plan, config_of(kind))
    original, tries = ImageIndex.read, {}
    lock = threading.Lock()

    def flaky(self, sample):
        with lock:
            tries[sample] = tries.get(sample, 0) + 1
            if tries[sample] <= 2 and sample % 5 == 0:
                raise UnreadableImage(self.path(sample), "cannot be read: Input/output error", by_system=True)
        return original(self, sample)

    monkeypatch.setattr(ImageIndex, "read", flaky)
    with open_loader(people, plan, config_of(kind), size=SIZE, device=CPU, first_step=0, last_step=4, announce=ignore) as loader:
        assert_equal_batches(list(loader), expected)
        assert loader.quarantine == []
    assert max(tries.values()) == 3


def test_pauses_between_tries_grow(monkeypatch):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)

    def fails(sample):
        raise UnreadableImage(Path("x.jpg"), "gone")

    with pytest.raises(UnreadableImage):
        delivery.fetch_with_retries(fails, 3, LoaderConfig(retries=3, retry_seconds=0.1))
    assert pauses == pytest.approx([0.1, 0.4, 1.6])


@both_loaders
def test_too_many_bad_files_stop_the_run(kind, tmp_path):
    index = index_of(write_people(tmp_path / "people", 60))
    plan = plan_of(index)
    spoil([index.path(sample) for sample in range(0, 12, 2)])
    # 3 of 60 are allowed.
    with open_loader(index, plan, config_of(kind, max_bad_ratio=0.05), size=SIZE, device=CPU, first_step=0, last_step=20, announce=ignore) as loader:
        with pytest.raises(UserError, match=r"of 60 images can no longer be read, more than max_bad_ratio = 0\.05 allows"):
            list(loader)
        assert len(loader.quarantine) >= 4
        with pytest.raises(StopIteration):
            next(loader)


@both_loaders
def test_a_lost_storage_stops_the_run(kind, tmp_path):
    source = write_people(tmp_path / "people", 24)
    index = index_of(source)
    source.rename(tmp_path / "unmounted")
    with pytest.raises(UserError, match=r"images in a row could not be read.*No such file.*is the storage still there"):
        batches(index, plan_of(index), config_of(kind, max_bad_ratio=1))


@needs_dali
@pytest.mark.parametrize("bad_step", [0, 2, 4])
def test_a_batch_that_dali_fails_on_is_made_on_the_host(people, bad_step):
    """DALI gets nonsense for a sample, once. Its batch comes all the same, the others are what they are without, and nothing is quarantined."""
    from personmae.data.loader_dali import DaliLoader

    plan = plan_of(people)
    clean = batches(people, plan, config_of("dali"), last=5)
    victim = int(plan.step_samples(bad_step)[5])

    class Damaged(DaliLoader):
        def _content(self, sample):
            content = super()._content(sample)
            return content[: len(content) // 2].copy() if sample == victim and sample not in self._host_decoded else content

    parts = delivery.part_plans(plan, first_step=0, last_step=5, rank=0, world_size=1, accumulation=1)
    with (
        warnings.catch_warnings(record=True) as caught,
        Damaged(people, plan, config_of("dali"), parts, size=SIZE, device=CPU, num_threads=2) as loader,
    ):
        warnings.simplefilter("always")
        got = list(loader)
    assert loader.recoveries >= 1
    assert loader.quarantine == []
    assert any(f"DALI failed on a batch of step {bad_step}" in str(warning.message) for warning in caught)
    assert_equal_batches(got, clean, names=("boxes", "flips", "samples", "planned"))
    remade = [step for step in range(5) if not torch.equal(got[step].region_a, clean[step].region_a)]
    assert set(remade) <= {bad_step}
    difference = (got[bad_step].region_a.int() - clean[bad_step].region_a.int()).abs()
    assert difference.float().mean() < 1.5


@needs_dali
def test_dali_reserves_for_one_part_and_frees_what_failed(people):
    """The pipeline is of a micro-batch's size, not of the whole batch's; one that failed is gone when its batch is made on the host."""
    from personmae.data.loader_dali import DaliLoader

    plan = plan_of(people)
    victim = int(plan.batch(0, 1, 3).samples[2])
    built, alive = [], []

    class Watched(DaliLoader):
        def _content(self, sample):
            content = super()._content(sample)
            return content[: len(content) // 2].copy() if sample == victim and sample not in self._host_decoded else content

        def _build(self, readers, batch_size):
            pipeline = super()._build(readers, batch_size)
            built.append((weakref.ref(pipeline), pipeline.max_batch_size))
            return pipeline

        def _make_on_host(self, part):
            alive.extend(pipeline() is not None for pipeline, _ in built)
            return super()._make_on_host(part)

    parts = delivery.part_plans(plan, first_step=0, last_step=2, rank=0, world_size=1, accumulation=3)
    with (
        pytest.warns(UserWarning, match="DALI failed"),
        Watched(people, plan, config_of("dali"), parts, size=SIZE, device=CPU, num_threads=2) as loader,
    ):
        assert [len(batch) for batch in loader] == [4] * 6
    assert len(alive) >= 1
    assert not any(alive)
    assert len(built) >= 2
    assert {size for _, size in built} == {4}


@needs_dali
def test_a_dali_that_always_fails_is_not_hidden(people, monkeypatch):
    from personmae.data import loader_dali

    monkeypatch.setattr(loader_dali.DaliLoader, "_content", lambda self, sample: np.frombuffer(b"\xff\xd8\xffnonsense" * 9, np.uint8))
    with pytest.warns(UserWarning, match="DALI failed"), pytest.raises(RuntimeError):
        batches(people, plan_of(people), config_of("dali"), last=9)


@all_loaders
def test_closing_at_any_time(kind, people):
    threads = threading.active_count()
    plan = plan_of(people)
    options = {"size": SIZE, "device": CPU, "first_step": 0, "last_step": 10_000, "announce": ignore}
    unused = open_loader(people, plan, config_of(kind), **options)
    unused.close()
    unused.close()
    with pytest.raises(StopIteration):
        next(unused)
    loader = open_loader(people, plan, config_of(kind), **options)
    kept = [next(loader) for _ in range(3)]
    loader.close()
    with pytest.raises(StopIteration):
        next(loader)
    assert (kept[0].region_a.float().std() > 0).all()

    def interrupted() -> None:
        with open_loader(people, plan, config_of(kind), **options) as loader:
            next(loader)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert threading.active_count() <= threads


def test_closing_while_another_thread_waits(people, monkeypatch):
    """As a signal handler does: the waiting consumer is told that there is no more."""
    entered, released = threading.Event(), threading.Event()
    original = ImageIndex.read

    def stuck(self, sample):
        entered.set()
        assert released.wait(30)
        return original(self, sample)

    monkeypatch.setattr(ImageIndex, "read", stuck)
    loader = open_loader(people, plan_of(people), config_of("threads"), size=SIZE, device=CPU, first_step=0, last_step=100, announce=ignore)
    with ThreadPoolExecutor(2) as pool:
        consumer = pool.submit(list, loader)
        assert entered.wait(30)
        closer = pool.submit(loader.close)
        released.set()
        closer.result(30)
        assert len(consumer.result(30)) <= 3


def test_waiting_is_measured(people, monkeypatch):
    original = row_painter.sample_box

    def slow(*arguments):
        time.sleep(0.01)
        return original(*arguments)

    monkeypatch.setattr(row_painter, "sample_box", slow)
    with open_loader(
        people, plan_of(people), config_of("threads", num_threads=1), size=SIZE, device=CPU, first_step=0, last_step=1, announce=ignore
    ) as loader:
        list(loader)
    assert loader.wait_seconds >= 0.2


def test_which_loader_and_why(people, monkeypatch):
    plan = plan_of(people)
    said = []
    options = {"size": SIZE, "first_step": 0, "last_step": 1, "announce": said.append}
    open_loader(people, plan, LoaderConfig(), device=CPU, **options).close()
    assert "threads with simplejpeg" in said[-1]
    assert "faster" in said[-1]
    monkeypatch.setattr(loaders, "has_dali", lambda: False)
    open_loader(people, plan, LoaderConfig(), device=CPU, **options).close()
    with pytest.raises(UserError, match="pip install nvidia-dali"):
        open_loader(people, plan, LoaderConfig(kind="dali"), device=CPU, **options)
    assert loaders.choose_loader("auto", torch.device("cuda"), 4) == ("threads", "DALI is not installed; to use it: pip install nvidia-dali-cuda120")
    assert loaders.choose_loader("auto", torch.device("cuda"), 16)[0] == loaders.choose_loader("auto", CPU, 16)[0] == "processes"
    monkeypatch.setattr(loaders, "has_dali", lambda: True)
    assert loaders.choose_loader("auto", torch.device("cuda", 1), 16)[0] == "dali"
    assert loaders.choose_loader("auto", torch.device("cuda", 1), 16, is_decoded=True)[0] == "processes"
    assert loaders.choose_loader("threads", torch.device("cuda"), 16)[0] == "threads"
    assert loaders.choose_loader("dali", CPU, 1)[0] == "dali"
    assert len(said) == 2


def test_only_rank_0_prints(people, capsys):
    for rank in (0, 1):
        open_loader(people, plan_of(people), LoaderConfig(), size=SIZE, device=CPU, first_step=0, last_step=1, rank=rank, world_size=2).close()
        assert len(capsys.readouterr().out.splitlines()) == (1 if rank == 0 else 0)


def test_the_threads_loader_needs_no_dali(people, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("nvidia.dali")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert len(batches(people, plan_of(people), LoaderConfig(kind="threads"))) == 4


def test_the_users_mistakes(people):
    plan = plan_of(people)
    with pytest.raises(UserError, match="cannot be cut into 5 equal parts"):
        batches(people, plan, config_of("threads"), world_size=5)
    for options in ({"kind": "dataloader"}, {"prefetch": 0}, {"max_bad_ratio": 1.5}, {"dali_decode": "gpu"}, {"cache_gib": -1}, {"retries": -1}):
        with pytest.raises(UserError, match=next(iter(options))):
            LoaderConfig(**options)
    with pytest.raises(UserError, match="cache_gib"):
        LoaderConfig(cache_gib=math.nan)


def test_pixels_are_those_of_pillow(people):
    """An independent way from file to region: Pillow's decoder and its resampler with `box=`."""
    for batch in batches(people, plan_of(people), config_of("threads"), size=(256, 128), last=2):
        for row, sample in enumerate(batch.samples.tolist()):
            y0, x0, y1, x1 = batch.boxes[row, 1].tolist()
            with Image.open(people.path(sample)) as image:
                expected = np.asarray(image.resize((128, 256), Image.Resampling.BILINEAR, box=(x0, y0, x1, y1))).astype(int)
            if batch.flips[row, 1]:
                expected = expected[:, ::-1]
            assert np.abs(batch.region_b[row].numpy() - expected).max() <= 2


def test_a_plan_of_other_images_is_refused(people):
    with pytest.raises(ValueError, match="the plan is for 3 images, the index has 60"):
        open_loader(people, Plan([9] * 3, [9] * 3, 1, 0, RegionConfig()), LoaderConfig(), size=SIZE, device=CPU, first_step=0, last_step=1)


def test_pictures_differ():
    """The pictures that these tests rest on are not flat."""
    assert picture(0).std() > 30
    assert (picture(0) != picture(1)).mean() > 0.9
