"""Reading packs: the same samples as from files, by both loaders; what is wrong with a pack is told at the start or replaced on the way."""

import dataclasses
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from crops import SMALL, draw_crops
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from personmae import pretrain
from personmae.configs import UserError
from personmae.data import storage
from personmae.data.image_index import as_files, build_index
from personmae.data.images import UnreadableImage
from personmae.data.kept_index import keep_index, read_kept_index
from personmae.data.packs import opening
from personmae.data.packs.manifest import is_pack, manifest_bytes, read_manifest
from personmae.data.packs.opening import open_pack
from tests.bad_images import write_people
from tests.packing import ignore, pack
from tests.test_loaders import assert_equal_batches, batches, both_loaders, config_of, plan_of

COLUMNS = ("heights", "widths", "num_bytes", "checksums", "plain")


@pytest.fixture
def people(tmp_path) -> Path:
    return write_people(tmp_path / "people", 40)


@pytest.fixture
def packed(tmp_path, people) -> Path:
    pack(people, tmp_path / "pack")
    return tmp_path / "pack"


@pytest.fixture
def build(tmp_path):
    def build(source, **options):
        return build_index(source, tmp_path / f"cache of {source.name}", progress=False, **{"announce": ignore, **options})

    return build


def test_a_pack_is_the_index_of_its_source(people, packed, build):
    (people / "a" / "broken.jpg").write_bytes(b"no image")
    files, ours = build(people), build(packed)
    assert ours.digest() == files.digest()
    assert all(np.array_equal(getattr(ours, name), getattr(files, name)) for name in COLUMNS)
    for sample in range(40):
        assert ours.name(sample) == files.name(sample)
        assert ours.read(sample) == files.read(sample)
        assert np.array_equal(ours.image(sample), files.image(sample))
        assert ours.path(sample).parts[-3:] == (f"shard-{ours.storage.shard_numbers[sample]:06d}.tar", *Path(ours.name(sample)).parts)
        assert ours.is_there(sample)


@both_loaders
def test_batches_are_those_of_the_files(kind, people, packed, build):
    files, ours = build(people), build(packed)
    expected = batches(files, plan_of(files), config_of(kind), last=9)
    assert_equal_batches(batches(ours, plan_of(ours), config_of(kind), last=9), expected)


def test_what_a_pack_says_of_an_image_is_looked_at_before_it_is_decoded(packed, build):
    index = build(packed)
    heights = index.heights.copy()
    heights[3] += 1
    wrong = dataclasses.replace(index, heights=heights)
    with pytest.raises(UnreadableImage, match=r"is \d+ x \d+ pixels \(w x h\), and its pack says"):
        wrong.image(3)
    assert np.array_equal(wrong.image(4), index.image(4))


def test_a_run_goes_on_from_a_pack_that_was_made_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = draw_crops(tmp_path / "crops")
    pack(source, tmp_path / "pack")
    flags = [*SMALL, "--data.source", str(tmp_path / "pack"), "--run-dir", str(tmp_path / "run"), "--schedule.steps", "4", "--checkpoint-every", "2"]
    config = pretrain.from_command_line(flags)
    pretrain.main(config)
    expected = weights_of(tmp_path / "run")
    shutil.rmtree(tmp_path / "pack")
    # The same images, in other shards.
    pack(source, tmp_path / "pack", seed=1)
    (tmp_path / "run" / "checkpoints" / "step_0000004.pt").unlink()
    pretrain.main(config)
    assert all(torch.equal(values, expected[name]) for name, values in weights_of(tmp_path / "run").items())
    assert not (tmp_path / "run" / "quarantine.tsv").exists()


@both_loaders
def test_bytes_that_change_meanwhile_are_replaced(kind, packed, build):
    index = build(packed)
    plan = plan_of(index)
    bad = [int(sample) for sample in plan.step_samples(1)[[0, 5, 7]]]
    for sample in bad:
        shard = packed / index.storage.shards[index.storage.shard_numbers[sample]]
        with open(shard, "r+b") as file:
            file.seek(int(index.storage.positions[sample]) + int(index.num_bytes[sample]) // 2)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(UserError, match="max_bad_ratio"):
        batches(index, plan, config_of(kind), last=3)
    made = batches(index, plan, config_of(kind, max_bad_ratio=0.2), last=3)
    assert_equal_batches(made[:1], batches(build(packed, verify="no"), plan, config_of(kind, max_bad_ratio=0.2), last=1))
    replaced = {int(sample) for batch in made for sample in batch.planned[batch.samples != batch.planned]}
    assert replaced == set(bad)


def test_a_shard_that_is_cut_or_lost_meanwhile(packed, build):
    index = build(packed)
    first, last = (packed / index.storage.shards[number] for number in (0, -1))
    samples = [int(np.flatnonzero(index.storage.shard_numbers == number)[-1]) for number in (0, len(index.storage.shards) - 1)]
    index.read(samples[0])
    os.truncate(first, 1024)
    with pytest.raises(UnreadableImage, match=r"shard-000000\.tar has been truncated since the start"):
        index.read(samples[0])
    last.unlink()
    with pytest.raises(UnreadableImage, match=r"shard-000004\.tar cannot be read: No such file") as caught:
        index.read(samples[1])
    assert caught.value.by_system
    assert not index.is_there(samples[1])


def test_what_is_wrong_is_named_at_the_start(packed, build):
    files = {path.name: path.read_bytes() for path in packed.glob("*.tar")}
    column = packed / "index" / "heights.npy"
    heights = column.read_bytes()
    cure = "copy it again"
    build(packed)
    shard = packed / "shard-000002.tar"

    shard.write_bytes(files[shard.name][:-512])
    for verify in ("auto", "always", "no"):
        with pytest.raises(UserError, match=rf"shard-000002\.tar is truncated: .*{cure}"):
            build(packed, verify=verify)
    shard.write_bytes(files[shard.name] + b"x")
    with pytest.raises(UserError, match="is altered"):
        build(packed, verify="no")
    shard.unlink()
    with pytest.raises(UserError, match="cannot be opened"):
        build(packed)
    middle = len(files[shard.name]) // 2
    altered = files[shard.name][:middle] + bytes([files[shard.name][middle] ^ 1]) + files[shard.name][middle + 1 :]
    shard.write_bytes(altered)
    (packed / "shard-000003.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"shard-000003\.tar is truncated.*shard-000002\.tar is altered: its bytes are not those"):
        build(packed)
    (packed / "shard-000003.tar").write_bytes(files["shard-000003.tar"])
    assert len(build(packed, verify="no")) == 40
    shard.write_bytes(files[shard.name])
    column.write_bytes(heights[:-1] + bytes([heights[-1] ^ 1]))
    with pytest.raises(UserError, match=r"heights\.npy is altered"):
        build(packed)
    column.write_bytes(heights)
    assert len(build(packed)) == 40


def test_checksums_are_computed_once(packed, build, monkeypatch):
    said: list[str] = []
    build(packed, announce=said.append)
    assert "SHA-256 of 13 files checked" in said[0]
    read: list[Path] = []
    compute = opening._sha256

    def counted(path):
        read.append(path)
        return compute(path)

    monkeypatch.setattr(opening, "_sha256", counted)
    build(packed, announce=said.append)
    assert read == []
    assert "as they were when last checked" in said[1]
    os.utime(packed / "shard-000001.tar", ns=(7, 7))
    build(packed)
    assert read == [packed / "shard-000001.tar"]
    build(packed, verify="always")
    assert len(read) == 14
    build(packed, verify="no", announce=said.append)
    assert len(read) == 14
    assert "by length alone" in said[-1]


def test_a_verdict_that_cannot_be_kept_or_read_costs_time_alone(packed, tmp_path):
    (tmp_path / "file").write_text("")
    assert len(open_pack(packed, tmp_path / "file", announce=ignore)) == 40
    (tmp_path / "cache").mkdir()
    for content in ("", "[]", "{"):
        (tmp_path / "cache" / "verified.json").write_text(content)
        assert len(open_pack(packed, tmp_path / "cache", announce=ignore)) == 40


def test_folders_with_another_manifest_are_no_packs(people, build):
    (people / "manifest.json").write_text('{"generator": 2}')
    assert not is_pack(people)
    assert len(build(people)) == 40


def replaced(content: dict, path: list, value) -> bytes:
    changed = json.loads(json.dumps(content))
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(changed).encode()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["version"], 2),
        (["num_images"], 41),
        (["shards", 0, "name"], "../../etc/passwd"),
        (["shards", 0, "name"], "/dev/zero"),
        (["shards", 0, "name"], "shard-000001.tar"),
        (["shards", 0, "num_bytes"], -1),
        (["shards", 0, "sha256"], "x"),
        (["shards"], {}),
        (["shards"], 7),
        (["columns", 0, "name"], "index/../../x.npy"),
        (["counts"], []),
        (["unknown"], 1),
    ],
    ids=str,
)
def test_a_manifest_is_not_trusted(packed, path, value):
    content = json.loads((packed / "manifest.json").read_bytes())
    (packed / "manifest.json").write_bytes(replaced(content, path, value))
    with pytest.raises(UserError, match=r"manifest\.json"):
        read_manifest(packed)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_manifests(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "one pack"
    if not folder.exists():
        pack(write_people(folder.parent / "some people", 10), folder)
        shutil.copy(folder / "manifest.json", folder / "whole.json")
    content = bytearray((folder / "whole.json").read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(40, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(40, len(content)))]
    (folder / "manifest.json").write_bytes(bytes(content))
    try:
        read_manifest(folder)
    except UserError as error:
        assert "manifest.json" in str(error)  # noqa: PT017


def test_deep_manifests(packed):
    (packed / "manifest.json").write_bytes(b'{"format": "personmae-pack", "x": ' + b"[" * 100_000)
    with pytest.raises(UserError, match="damaged"):
        read_manifest(packed)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("shards", lambda values: values + 5),
        ("shards", lambda values: values - 1),
        ("positions", lambda values: values + 10**9),
        ("positions", lambda values: values - 10**9),
        ("lengths", lambda values: values * 0 - 1),
        ("offsets", lambda values: values[::-1].copy()),
        ("heights", lambda values: values * 0),
        ("widths", lambda values: values[:-1]),
        ("checksums", lambda values: values.astype(np.int64)),
        ("names", lambda values: np.array([{}], dtype=object)),
    ],
)
def test_an_index_is_not_trusted_either(packed, tmp_path, name, change):
    """Whoever makes the index can make its checksums too."""
    path = packed / "index" / f"{name}.npy"
    np.save(path, change(np.load(path)), allow_pickle=True)
    manifest = read_manifest(packed)
    content = json.loads(manifest_bytes(manifest))
    for row in content["columns"]:
        if row["name"] == f"index/{name}.npy":
            row.update(num_bytes=path.stat().st_size, sha256=opening._sha256(path))
    (packed / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"damaged|cannot be read"):
        open_pack(packed, tmp_path / "cache", announce=ignore)


def test_a_kept_index_of_a_pack(tmp_path, packed, build):
    index = build(packed)
    keep_index(packed, index, tmp_path / "index.npz")
    kept = read_kept_index(tmp_path / "index.npz")
    assert kept.source == packed
    assert kept.index.digest() == index.digest()
    assert [kept.index.read(sample) for sample in range(40)] == [index.read(sample) for sample in range(40)]
    assert kept.index.path(3) == index.path(3)


def test_an_index_travels_to_other_processes(packed, build):
    index = build(packed)
    index.read(0)
    there = pickle.loads(pickle.dumps(index))
    assert there.digest() == index.digest()
    assert there.read(7) == index.read(7)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, index.read(5)[:100])
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 100) == index.read(5)[:100]
    os.close(reader)
    os.close(writer)


def test_descriptors_are_few_and_shared(packed, build, monkeypatch):
    before = len(os.listdir("/proc/self/fd"))
    index = build(packed)
    # Each mapped column has one of its own.
    mapped = len(os.listdir("/proc/self/fd")) - before
    expected = [index.read(sample) for sample in range(40)]
    assert len(os.listdir("/proc/self/fd")) == before + mapped + 5
    monkeypatch.setattr(storage.resource, "getrlimit", lambda _: (0, 0))
    monkeypatch.setattr(storage, "max", lambda *_: 2, raising=False)
    few = build(packed)
    assert [few.read(sample) for sample in range(40)] == expected
    assert len(os.listdir("/proc/self/fd")) == before + 2 * mapped + 5 + 2
    del index, few
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_descriptor_that_goes_bad_is_opened_anew(packed, build, monkeypatch):
    index = build(packed)
    expected = index.read(0)
    pread, broken = os.pread, [True]

    def stale(descriptor, length, position):
        if broken[0]:
            raise OSError(116, "Stale file handle")
        return pread(descriptor, min(length, 100), position)

    monkeypatch.setattr(storage.os, "pread", stale)
    with pytest.raises(UnreadableImage, match="Stale file handle"):
        index.read(0)
    broken[0] = False
    assert index.read(0) == expected


def test_images_of_a_pack_as_files(tmp_path, people, packed, build):
    files, ours = build(people), build(packed)
    assert as_files(files, [3, 1], tmp_path) == [files.path(3), files.path(1)]
    written = as_files(ours, [3, 1], tmp_path)
    assert [path.read_bytes() for path in written] == [files.read(3), files.read(1)]
    (packed / ours.storage.shards[ours.storage.shard_numbers[3]]).unlink()
    with pytest.raises(UserError, match="cannot be read"):
        as_files(build_pack_again(ours), [3], tmp_path)


def build_pack_again(index):
    """The same without its open descriptors."""
    return pickle.loads(pickle.dumps(index))


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run / "encoder.safetensors")


def test_pre_training_on_a_pack_is_that_on_its_files_and_either_goes_on_from_the_other(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = draw_crops(tmp_path / "crops")
    pack(source, tmp_path / "pack")

    def train(run: str, steps: int, place: Path) -> Path:
        flags = [*SMALL, "--data.source", str(place), "--run-dir", str(tmp_path / run), "--schedule.steps", "4", "--checkpoint-every", "2"]
        config = pretrain.from_command_line(flags)
        if steps < 4:
            monkeypatch.setattr(pretrain.StopSignal, "requested", stop_after(steps))
        pretrain.main(config)
        monkeypatch.undo()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        return tmp_path / run

    expected = weights_of(train("files", 4, source))
    ours = weights_of(train("pack", 4, tmp_path / "pack"))
    train("both", 2, source)
    both = weights_of(train("both", 4, tmp_path / "pack"))
    for name, values in expected.items():
        assert torch.equal(values, ours[name]), name
        assert torch.equal(values, both[name]), name
    shard = tmp_path / "pack" / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match="truncated"):
        train("pack", 4, tmp_path / "pack")


def stop_after(steps: int):
    calls = [0]

    def requested(self) -> bool:
        calls[0] += 1
        return calls[0] >= steps

    return requested
