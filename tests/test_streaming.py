"""Packs behind an address: the samples of the same pack on a disk, whatever the store does, in a folder of bounded size."""

import contextlib
import fcntl
import json
import os
import pickle
import shutil
import threading
import time
from pathlib import Path
from typing import ClassVar

import fsspec
import numpy as np
import pytest
import torch
from crops import SMALL, draw_crops
from fsspec.implementations.local import LocalFileSystem

from personmae import pretrain
from personmae.configs import UserError
from personmae.data.delivery import part_plans
from personmae.data.image_index import build_index
from personmae.data.images import UnreadableImage
from personmae.data.order import choose_order
from personmae.data.packs.manifest import read_manifest
from personmae.data.packs.streaming import needed_bytes, open_streamed_pack
from personmae.data.plan import Plan
from personmae.data.region_draws import RegionConfig
from personmae.data.remote import Store, is_address, redacted
from personmae.data.shard_cache import StreamConfig
from personmae.data.shards_ahead import ShardsAhead
from tests.bad_images import write_people
from tests.packing import ignore, pack
from tests.test_loaders import assert_equal_batches, batches, both_loaders, config_of
from tests.test_pack_reading import replaced, weights_of

GIB = 1 << 30


class Troubled(LocalFileSystem):
    """The local disk as a store that fails as it is told to."""

    protocol = "troubled"
    cachable = False
    failures: ClassVar[dict[str, int]] = {}  # name -> how many more times it cannot be opened
    opened: ClassVar[list[str]] = []
    pause = 0.0

    def _open(self, path, mode="rb", **options):
        name = Path(path).name
        self.opened.append(name)
        time.sleep(self.pause)
        if self.failures.get(name, 0) > 0:
            self.failures[name] -= 1
            raise ConnectionError(f"{name}: reset by peer, key=topsecret")
        return super()._open(path, mode, **options)


@pytest.fixture(autouse=True)
def troubled():
    fsspec.register_implementation("troubled", Troubled, clobber=True)
    Troubled.failures, Troubled.opened, Troubled.pause = {}, [], 0.0
    return Troubled


@pytest.fixture
def packed(tmp_path) -> Path:
    pack(write_people(tmp_path / "people", 40), tmp_path / "pack")
    return tmp_path / "pack"


@pytest.fixture
def stream(tmp_path, packed):
    def stream(address=f"troubled://{packed}", *, window=None, **options):
        config = StreamConfig(folder=tmp_path / "shards", **{"retry_seconds": 0, "gib": 1.0, **options})
        return open_streamed_pack(address, config, tmp_path / "index of the stream", window=window, announce=ignore)

    return stream


@pytest.fixture
def local(tmp_path, packed):
    return build_index(packed, tmp_path / "index", progress=False, announce=ignore)


def plan_of(index, window=2):
    order = choose_order("windows", window, index.storage, seed=5)
    return Plan(index.heights, index.widths, 10, 5, RegionConfig(), order=order, neighbours=order.neighbours)


def used_bytes(folder: Path) -> int:
    sizes = 0
    for path in folder.glob("*.tar*"):
        with contextlib.suppress(FileNotFoundError):
            sizes += path.stat().st_size
    return sizes


def test_addresses_and_paths():
    assert all(is_address(text) for text in ("s3://bucket/pack", "https://host/pack?key=1", "memory://pack"))
    assert not any(is_address(text) for text in ("crops", "/data/crops", "C:/crops", "./s3:/crops", Path("s3://bucket")))
    assert redacted("cannot open s3://key:secret@bucket/pack/x.tar, retry") == "cannot open s3://***@bucket/pack/x.tar, retry"
    assert redacted("https://host/pack?token=abc") == "https://host/pack?***"
    assert redacted("/data/people/a?b@c.jpg") == "/data/people/a?b@c.jpg"


def test_samples_are_those_of_the_pack_on_a_disk(stream, local):
    index = stream()
    assert index.digest() == local.digest()
    for sample in range(len(local)):
        assert index.name(sample) == local.name(sample)
        assert index.read(sample) == local.read(sample)
        assert np.array_equal(index.image(sample), local.image(sample))
        assert index.is_there(sample)
    assert str(index.path(0)).startswith("troubled:///")


@both_loaders
def test_batches_are_those_of_the_pack_on_a_disk(kind, stream, local):
    index = stream(window=2)
    # Nine steps are more than two epochs.
    expected = batches(local, plan_of(local), config_of(kind), last=9)
    assert_equal_batches(batches(index, plan_of(index), config_of(kind), last=9), expected)


def test_processes_share_the_folder_and_it_stays_within_its_bound(stream, packed, tmp_path, troubled):
    shards = read_manifest(packed).shards
    gib = needed_bytes(shards, 1) / GIB
    index = stream(window=1, gib=gib, fetches=2)
    plan, most, stop = plan_of(index, window=1), [0], threading.Event()

    def watch():
        while not stop.is_set():
            # Not while a shard makes way for the next: one would be counted before and the other after.
            with index.storage.cache._lock_file("lock") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                most[0] = max(most[0], used_bytes(tmp_path / "shards"))
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    parts = [batches(index, plan, config_of("threads"), last=8, rank=rank, world_size=2) for rank in range(2)]
    stop.set()
    watcher.join()
    shown = torch.cat([batch.samples for rank in parts for batch in rank if batch.epoch == 0])
    assert sorted(shown.tolist()) == list(range(40))
    assert 0 < most[0] <= gib * GIB
    assert len(shards) > 2
    # Another process reads what is here without asking the store.
    here = pickle.loads(pickle.dumps(index.storage))
    troubled.opened.clear()
    last = int(plan.step_samples(7)[-1])
    assert here.read(last, index.name(last)) == index.read(last)
    assert troubled.opened == []


def test_shards_are_fetched_before_they_are_needed(stream, packed, troubled):
    shards = read_manifest(packed).shards
    index = stream(gib=(sum(shard.num_bytes for shard in shards[:4]) + 1) / GIB, window=1)
    plan = plan_of(index, window=1)
    ahead = ShardsAhead(index.storage, plan, 0, 8, num_threads=1)
    parts = ahead.watch(part_plans(plan, first_step=0, last_step=8, rank=0, world_size=1, accumulation=1))
    next(parts)
    # Nobody has read an image. There is room for some of the five shards: those come that are needed first, in the order of need.
    deadline = time.monotonic() + 10
    while len(index.storage.cache.here()) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    ahead.close()
    order = list(dict.fromkeys(index.storage.shard_numbers[plan.order(0)].tolist()))
    fetched = [name for name in troubled.opened if name.endswith(".tar")]
    assert fetched[:3] == [shards[number].name for number in order[:3]]


def test_what_fails_for_a_while_is_waited_for(stream, local, troubled):
    index = stream(retries=3)
    troubled.failures = {"shard-000000.tar": 3}
    sample = int(np.flatnonzero(local.storage.shard_numbers == 0)[0])
    assert index.read(sample) == local.read(sample)
    troubled.failures = {"manifest.json": 2, "heights.npy": 1}
    shutil.rmtree(index.storage.root)
    assert len(stream(retries=2)) == len(local)


def test_what_fails_for_good_is_replaced_within_the_bound_and_said_without_secrets(stream, troubled, monkeypatch):
    index = stream(retries=1, window=2)
    troubled.failures = {"shard-000001.tar": 10**6}
    sample = int(np.flatnonzero(index.storage.shard_numbers == 1)[0])
    with pytest.raises(UnreadableImage, match=r"its shard cannot be fetched: .*ConnectionError: .*reset by peer") as caught:
        index.read(sample)
    assert caught.value.tried
    tries = troubled.opened.count("shard-000001.tar")
    # The thousands of other images of the shard do not each wait for it.
    with pytest.raises(UnreadableImage):
        index.read(sample)
    assert troubled.opened.count("shard-000001.tar") == tries
    with pytest.raises(UserError, match="max_bad_ratio"):
        batches(index, plan_of(index), config_of("threads"), last=4)
    made = batches(index, plan_of(index), config_of("threads", max_bad_ratio=0.5), last=4)
    bad = set(np.flatnonzero(index.storage.shard_numbers == 1).tolist())
    assert {int(sample) for batch in made for sample in batch.planned[batch.samples != batch.planned]} == bad
    assert not bad & {int(sample) for batch in made for sample in batch.samples}


def test_a_shard_that_is_cut_or_lost_is_told_at_the_start(stream, packed):
    os.truncate(packed / "shard-000002.tar", 2048)
    (packed / "shard-000004.tar").unlink()
    with pytest.raises(UserError, match=r"shard-000002\.tar is truncated: 2048 bytes, \d+ when it was packed.*shard-000004\.tar is not there"):
        stream()


def test_a_shard_that_was_altered_is_refused_when_it_arrives(stream, packed):
    index = stream(retries=0)
    with open(packed / "shard-000000.tar", "r+b") as file:
        file.seek(700)
        file.write(b"x")
    sample = int(np.flatnonzero(index.storage.shard_numbers == 0)[0])
    with pytest.raises(UnreadableImage, match=r"shard-000000\.tar is altered: its bytes are not those that were packed"):
        index.read(sample)
    assert index.storage.cache.here() == set()
    assert used_bytes(index.storage.root) == 0


def test_a_column_that_was_altered_is_told_at_the_start(stream, packed):
    with open(packed / "index" / "heights.npy", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    with pytest.raises(UserError, match=r"heights\.npy is altered: it is not what was packed"):
        stream(retries=0)


@pytest.mark.parametrize(("path", "value"), [(["shards", 0, "name"], "../../shard-000000.tar"), (["columns", 0, "name"], "index/../../heights.npy")])
def test_names_in_a_manifest_lead_nowhere_else(stream, packed, path, value):
    content = json.loads((packed / "manifest.json").read_bytes())
    (packed / "manifest.json").write_bytes(replaced(content, path, value))
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        stream()


def test_mistakes_are_explained(stream, tmp_path, packed):
    for address, said in (
        (f"troubled://{tmp_path}/nowhere", r"nowhere/manifest\.json: it is not there"),
        ("nosuch://user:hunter22@host/pack", r"nosuch://\*\*\*@host/pack cannot be used"),
        ("s3://bucket/pack", r"s3://bucket/pack needs a package that is not installed .*pip install s3fs"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            stream(address, retries=0)
        assert "hunter22" not in str(caught.value)
    with pytest.raises(UserError, match=r"stream.gib is 1e-06, and two windows of 2 shards take 0.01 GiB: give --data.stream.gib 0.01 or more"):
        stream(window=2, gib=1e-6)
    with pytest.raises(UserError, match="and all shards take"):
        stream(gib=1e-6)
    with pytest.raises(UserError, match=r"stream\.fetches is 0"):
        StreamConfig(fetches=0)


def test_a_store_is_sent_to_a_process_without_its_connection(packed):
    store = Store(f"troubled://{packed}")
    assert b"".join(store.blocks("manifest.json", 100)) == (packed / "manifest.json").read_bytes()
    again = pickle.loads(pickle.dumps(store))
    assert again._connected is None
    assert again.sizes(["manifest.json", "nothing"]) == {"manifest.json": (packed / "manifest.json").stat().st_size}


def test_a_run_from_an_address_is_resumed_and_is_that_from_the_disk(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pack(draw_crops(tmp_path / "crops"), tmp_path / "pack")
    common = [*SMALL, "--schedule.steps", "4", "--checkpoint-every", "2", "--data.order-window", "2"]

    def run(source, name, *flags):
        pretrain.main(pretrain.from_command_line([*common, "--data.source", source, "--run-dir", str(tmp_path / name), *flags]))
        return weights_of(tmp_path / name)

    expected = run(str(tmp_path / "pack"), "disk", "--data.order", "windows")
    address = f"troubled://{tmp_path}/pack"
    streamed = run(address, "stream")
    assert all(torch.equal(values, expected[name]) for name, values in streamed.items())
    (tmp_path / "stream" / "checkpoints" / "step_0000004.pt").unlink()
    shutil.rmtree(tmp_path / "cache" / "personmae" / "shards")
    again = run(address, "stream")
    assert all(torch.equal(values, expected[name]) for name, values in again.items())
    assert json.loads((tmp_path / "stream" / "config.json").read_text())["data"]["source"] == address
    said = "".join(capsys.readouterr())
    assert "lengths checked, SHA-256 when they arrive" in said
    assert "order of the images: windows of 2 shards" in said
    # Another order is another run.
    with pytest.raises(UserError, match=r"was trained in another order of the images \(windows of 2 shards .*now: global\)"):
        run(address, "stream", "--data.order", "global")
