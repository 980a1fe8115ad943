"""Packing: verdicts, bytes, and that no interruption, number of processes or other folder changes them."""

import errno
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from personmae.configs import UserError
from personmae.data.image_index import build_index
from personmae.data.images import UnreadableImage, read_image
from personmae.data.packs import entries, jobs, making
from personmae.data.packs.making import Share
from personmae.data.packs.opening import open_pack
from personmae.data.packs.shards import member_name
from personmae.data.packs.transcoding import Transcoding
from personmae.data.verdicts import Limits
from personmae.recipes.programs import PackConfig
from personmae.tasks import packing
from tests.bad_images import HEIGHT, WIDTH, broken_samples, encoded, picture, readable_samples, write_corpus, write_people
from tests.packing import fingerprint, ignore, pack

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import sys
from pathlib import Path
from personmae.configs import user_errors_exit
from personmae.recipes.programs import PackConfig
from personmae.tasks import packing
with user_errors_exit():
    packing.main(PackConfig(source=Path(sys.argv[1]), folder=Path(sys.argv[2]), images_per_shard=int(sys.argv[3]), num_workers=int(sys.argv[4]),
                            duplicates=sys.argv[5]))
"""


def start(
    source: Path, folder: Path, *, images_per_shard: int = 8, num_workers: int = 2, duplicates: str = "keep", **environment
) -> subprocess.Popen:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-c", PROGRAM, str(source), str(folder), str(images_per_shard), str(num_workers), duplicates]
    return subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": paths, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


@pytest.fixture
def people(tmp_path) -> Path:
    return write_people(tmp_path / "people", 30)


@pytest.mark.parametrize("kind", ["folder", "list", "zip", "tar", "tar.gz"])
def test_verdicts_are_those_of_the_index(tmp_path, kind):
    folder = write_corpus(tmp_path / "corpus", [*readable_samples(), *broken_samples()])
    index = build_index(folder, tmp_path / "cache", progress=False, announce=ignore)
    source = folder
    if kind == "list":
        source = folder / "list.txt"
        source.write_text("\n".join(path.name for path in folder.iterdir()))
    elif kind == "zip":
        source = tmp_path / "a.zip"
        with zipfile.ZipFile(source, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in folder.iterdir():
                archive.write(path, path.name)
    elif kind != "folder":
        source = tmp_path / f"a.{kind}"
        with tarfile.open(source, "w:gz" if kind == "tar.gz" else "w") as tar:
            tar.add(folder, ".")

    manifest = pack(source, tmp_path / "pack")

    assert manifest.source["kind"] == ("files" if kind in ("folder", "list") else kind)
    packed = open_pack(tmp_path / "pack", tmp_path / "cache 2", announce=ignore)
    assert [packed.name(n) for n in range(len(packed))] == [index.name(n) for n in range(len(index))]
    expected = {os.path.basename(path): reason for path, reason in index.rejected}
    assert dict(packed.rejected) == expected
    assert manifest.counts == {
        "listed": len(index) + len(expected),
        "packed": len(index),
        "rejected": len(expected),
        "duplicates_exact": 0,
        "duplicates_near": 0,
        "kept": 6,
        "trimmed": 1,
        "encoded": len(index) - 7,
        "shrunk": 0,
    }
    assert packed.plain.all()
    for sample in range(len(packed)):
        shape = (WIDTH, HEIGHT) if packed.name(sample).startswith("turned") else (HEIGHT, WIDTH)
        assert packed.image(sample).shape == (*shape, 3) == (packed.heights[sample], packed.widths[sample], 3)
    assert not (tmp_path / "pack" / "work").exists()


def test_shards_are_what_the_tools_of_others_expect(tmp_path, people):
    (people / "a" / "broken.jpg").write_bytes(b"no image")
    manifest = pack(people, tmp_path / "pack")
    assert [shard.name for shard in manifest.shards] == [f"shard-{number:06d}.tar" for number in range(4)]
    assert sum(shard.num_images for shard in manifest.shards) == 30
    seen = []
    for shard in manifest.shards:
        path = tmp_path / "pack" / shard.name
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            assert len(members) == shard.num_images
            for member in members:
                assert (member.isreg(), member.mode, member.mtime, member.uid, member.uname) == (True, 0o644, 0, 0, "")
                seen.append((int(member.name[:9]), tar.extractfile(member).read()))
        assert path.with_suffix(".idx").read_text().splitlines() == [
            f"v1.2 {len(members)}",
            *(f"jpg {member.offset_data} {member.size} {member.name}" for member in members),
        ]
    files = sorted(people.rglob("*.jpg"))
    assert sorted(seen) == [(row, path.read_bytes()) for row, path in enumerate(files) if path.name != "broken.jpg"]
    # Shuffled, so that shards in a row are no folder in a row.
    assert [row for row, _ in seen] != sorted(row for row, _ in seen)


def test_the_index_for_dali_is_that_of_its_own_tool(tmp_path, people):
    wds2idx = pytest.importorskip("wds2idx")
    manifest = pack(people, tmp_path / "pack")
    for shard in manifest.shards:
        path = tmp_path / "pack" / shard.name
        with wds2idx.IndexCreator(str(path), str(tmp_path / "theirs.idx"), verbose=False) as creator:
            creator.create_index()
        assert (tmp_path / "theirs.idx").read_bytes() == path.with_suffix(".idx").read_bytes()


def test_dali_reads_the_shards(tmp_path, people):
    pytest.importorskip("nvidia.dali")
    from nvidia.dali import fn, pipeline_def

    manifest = pack(people, tmp_path / "pack")
    paths = [str(tmp_path / "pack" / shard.name) for shard in manifest.shards]

    @pipeline_def(batch_size=10, num_threads=1, device_id=None)
    def graph():
        return fn.readers.webdataset(paths=paths, index_paths=[path.replace(".tar", ".idx") for path in paths], ext=["jpg"])

    pipeline = graph()
    pipeline.build()
    contents = [bytes(data) for _ in range(3) for output in pipeline.run() for data in output]
    assert sorted(contents) == sorted(path.read_bytes() for path in people.rglob("*.jpg"))


@pytest.mark.parametrize("duplicates", ["keep", "near"])
def test_the_bytes_do_not_depend_on_processes_or_the_folder(tmp_path, people, duplicates):
    write_corpus(people / "odd", [*readable_samples(), *broken_samples()])
    shutil.copy(people / "a" / "0000.jpg", people / "z.jpg")
    pack(people, tmp_path / "one", duplicates=duplicates)
    shutil.copytree(people, tmp_path / "elsewhere" / "people")
    pack(tmp_path / "elsewhere" / "people", tmp_path / "two", duplicates=duplicates, share=Share(num_workers=2))
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "two")
    pack(people, tmp_path / "other order", duplicates=duplicates, seed=1)
    assert fingerprint(tmp_path / "other order") != fingerprint(tmp_path / "one")


@pytest.mark.parametrize("duplicates", ["keep", "exact"])
def test_two_ranks_make_the_same_as_one(tmp_path, people, duplicates):
    write_corpus(people / "odd", [*readable_samples(), *broken_samples()])
    pack(people, tmp_path / "alone", duplicates=duplicates)
    ranks = [
        start(people, tmp_path / "shared", duplicates=duplicates, num_workers=1, RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
        for rank in (1, 0)
    ]
    said = [finish(process) for process in ranks]
    assert "rejected.tsv" in said[1]
    assert said[0] == ""
    (tmp_path / "shared" / "manifest.png").unlink()
    assert fingerprint(tmp_path / "shared") == fingerprint(tmp_path / "alone")


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_killed_pack_goes_on(tmp_path, num_workers):
    people = write_people(tmp_path / "people", 400)
    pack(people, tmp_path / "undisturbed", images_per_shard=40)
    folder = tmp_path / "killed"
    for wanted in (1, 4):
        process = start(people, folder, images_per_shard=40, num_workers=num_workers)
        while len(list((folder / "work").glob("shard-*.npz"))) < wanted and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        # A worker ends its shard when its parent has died: one that is cut in the middle, too.
        (folder / "shard-000009.tar.123.partial").write_bytes(b"cut")
    assert not (folder / "manifest.json").exists()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("shard-*.tar") if (folder / "work" / f"{path.stem}.npz").exists()}
    finish(start(people, folder, images_per_shard=40, num_workers=num_workers))
    assert [path for path, modified in before.items() if path.stat().st_mtime_ns != modified] == []
    (folder / "manifest.png").unlink()
    assert fingerprint(folder) == fingerprint(tmp_path / "undisturbed")


def test_what_was_begun_goes_on_from_any_point(tmp_path, people, monkeypatch):
    """An error after every number of images: what is left is never taken for more than it is."""
    (people / "a" / "broken.jpg").write_bytes(b"no image")
    pack(people, tmp_path / "undisturbed", duplicates="exact")
    read_all = entries._FileReader.read
    countdown = [0]

    def read_some(self, *arguments):
        countdown[0] -= 1
        if countdown[0] == 0:
            raise KeyboardInterrupt
        return read_all(self, *arguments)

    monkeypatch.setattr(entries._FileReader, "read", read_some)
    for stop in (*range(1, 16, 3), 29, 33, 45, 61):
        countdown[0] = stop
        folder = tmp_path / f"stopped {stop}"
        with pytest.raises(KeyboardInterrupt):
            pack(people, folder, duplicates="exact")
        assert list(folder.rglob("*.partial")) == []
        countdown[0] = 0
        pack(people, folder, duplicates="exact")
        assert fingerprint(folder) == fingerprint(tmp_path / "undisturbed")


def test_a_shard_that_was_lost_or_cut_while_packing_is_made_again(tmp_path, people, monkeypatch):
    pack(people, tmp_path / "undisturbed")
    monkeypatch.setattr(making, "join_shards", lambda *_: pytest.fail("stopped"))
    with pytest.raises(pytest.fail.Exception):
        pack(people, tmp_path / "pack")
    monkeypatch.undo()
    folder = tmp_path / "pack"
    (folder / "shard-000000.tar").unlink()
    (folder / "shard-000001.tar").write_bytes(b"cut")
    (folder / "shard-000002.idx").unlink()
    (folder / "work" / "shard-000003.npz").write_bytes(b"damaged")
    pack(people, folder)
    assert fingerprint(folder) == fingerprint(tmp_path / "undisturbed")


def test_a_finished_pack_is_left_as_it_is(tmp_path, people):
    said: list[str] = []
    manifest = pack(people, tmp_path / "pack")
    before = fingerprint(tmp_path / "pack")
    assert pack(people, tmp_path / "pack", say=said.append) == manifest
    assert "packed already: 30 images" in said[0]
    assert fingerprint(tmp_path / "pack") == before
    with pytest.raises(UserError, match=r"other settings \(quality: 95 -> 90\)"):
        pack(people, tmp_path / "pack", transcoding=Transcoding(quality=90))
    (people / "new.jpg").write_bytes(encoded(picture(), "JPEG"))
    with pytest.raises(UserError, match="another source"):
        pack(people, tmp_path / "pack")


def test_one_that_is_begun_wants_the_same_source_and_settings(tmp_path, people, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(making, "join_shards", lambda *_: pytest.fail("stopped"))
        with pytest.raises(pytest.fail.Exception):
            pack(people, tmp_path / "pack")
    with pytest.raises(UserError, match="other settings"):
        pack(people, tmp_path / "pack", seed=3)
    os.utime(people / "a" / "0000.jpg", ns=(1, 1))
    with pytest.raises(UserError, match="source has changed"):
        pack(people, tmp_path / "pack")
    with pytest.raises(UserError, match="not finished"):
        build_index(tmp_path / "pack", tmp_path / "cache", announce=ignore)


def test_duplicates_are_left_out_and_listed(tmp_path):
    people = write_people(tmp_path / "people", 12)
    shutil.copy(people / "a" / "0000.jpg", people / "copy of 0000.jpg")
    again = people / "c" / "0001 again.jpg"
    again.write_bytes(encoded(read_image(people / "b" / "0001.jpg"), "JPEG", quality=70))
    (people / "a" / "broken.jpg").write_bytes(b"no image")
    (people / "b" / "broken.jpg").write_bytes(b"no image")
    expected = {"keep": 14, "exact": 13, "near": 12}
    for kind, number in expected.items():
        manifest = pack(people, tmp_path / kind, duplicates=kind)
        assert (manifest.num_images, manifest.counts["rejected"]) == (number, 2)
    lines = [line.split("\t") for line in (tmp_path / "near" / "duplicates.tsv").read_text().splitlines()[1:]]
    assert [line[:2] for line in lines] == [["c/0001 again.jpg", "b/0001.jpg"], ["copy of 0000.jpg", "a/0000.jpg"]]
    assert lines[1][2] == "same content"
    assert 0 <= int(lines[0][2]) <= 3


def test_figures_are_those_of_the_pixels(tmp_path, people):
    manifest = pack(people, tmp_path / "pack")
    images = [read_image(path) for path in people.rglob("*.jpg")]
    pixels = np.concatenate([image.reshape(-1, 3) for image in images]) / 255
    assert np.allclose(manifest.statistics["mean"], pixels.mean(axis=0), atol=1e-6)
    assert np.allclose(manifest.statistics["std"], pixels.std(axis=0), atol=1e-6)
    assert manifest.statistics["heights_px"][::4] == [min(map(len, images)), max(map(len, images))]
    assert sum(manifest.statistics["aspect_histogram"]["counts"]) == 30
    assert manifest.statistics["total_bytes"] == sum(path.stat().st_size for path in people.rglob("*.jpg"))


def test_names_of_any_kind(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    data = encoded(picture(), "JPEG")
    odd = b"latin\xe9.jpg".decode("utf-8", "surrogateescape")
    names = ["x" * 250 + ".jpg", "人物 été.jpg", "tab\tline\n.jpg", odd, "a.b.c.jpg", "- '\"$(rm).jpg", ".jpg.jpg"]
    for name in names:
        (source / name).write_bytes(data)
    (source / "bad\tname.jpg").write_bytes(b"x")
    manifest = pack(source, tmp_path / "pack")
    index = open_pack(tmp_path / "pack", tmp_path / "cache", announce=ignore)
    assert {index.name(n) for n in range(len(index))} == set(names) - {".jpg.jpg"}
    assert index.rejected[0][0] == "bad\\tname.jpg"
    with tarfile.open(tmp_path / "pack" / manifest.shards[0].name) as tar:
        for member in tar.getnames():
            assert member.isascii()
            assert member.count(".") == 1
            assert len(member) <= 100
            assert "/" not in member
    assert member_name(7, "a/人物") == "000000007__.jpg"


def test_the_users_mistakes(tmp_path, people):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no JPEG"):
        pack(tmp_path / "empty", tmp_path / "pack")
    shutil.rmtree(tmp_path / "pack")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "text.jpg").write_text("hello")
    with pytest.raises(UserError, match=r"none of the 1 images .*text\.jpg: not a JPEG"):
        pack(tmp_path / "bad", tmp_path / "pack")
    assert "text.jpg" in (tmp_path / "pack" / "rejected.tsv").read_text()
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    with pytest.raises(UserError, match="holds no JPEG"):
        pack(tmp_path / "empty.zip", tmp_path / "pack 2")
    with pytest.raises(UserError, match="holds something else"):
        pack(people, tmp_path / "bad")
    with pytest.raises(UserError, match="lies in the source"):
        pack(people, people / "pack")
    with pytest.raises(UserError, match="cannot be opened"):
        pack(tmp_path / "nowhere", tmp_path / "pack 3")
    pack(people, tmp_path / "pack 4")
    with pytest.raises(UserError, match="is a pack already"):
        pack(tmp_path / "pack 4", tmp_path / "pack 5")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        pack(people, tmp_path / "file" / "pack")
    for wrong in ({"quality": 0}, {"near_bits": 9}, {"images_per_shard": 0}, {"max_side_px": -1}, {"max_side_px": 8}, {"num_workers": 0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            PackConfig(source=people, folder=tmp_path / "x", **wrong)


def test_a_full_disk_is_told_and_packing_goes_on_when_there_is_room(tmp_path, people):
    pack(people, tmp_path / "undisturbed")
    folder = tmp_path / "pack"
    folder.mkdir()
    (folder / "work").mkdir()
    full = folder / f"shard-000002.tar.{os.getpid()}.partial"
    remove = making._remove_partial
    making._remove_partial = lambda *_: full.symlink_to("/dev/full") if not full.is_symlink() else None
    try:
        with pytest.raises(UserError, match=r"cannot write .*shard-000002\.tar: No space left on device; make room"):
            pack(people, folder)
    finally:
        making._remove_partial = remove
    assert list(folder.rglob("*.partial")) == []
    assert sorted(path.name for path in folder.glob("*.tar")) == ["shard-000000.tar", "shard-000001.tar"]
    pack(people, folder)
    assert fingerprint(folder) == fingerprint(tmp_path / "undisturbed")


def test_a_full_disk_stops_all_workers(tmp_path, people):
    """The sentence of a worker is that of the program."""
    folder = tmp_path / "pack"
    folder.mkdir()
    folder.joinpath("work").mkdir()
    blocked = folder / "shard-000001.tar"
    blocked.mkdir()
    with pytest.raises(UserError, match=r"cannot write .*shard-000001\.tar"):
        pack(people, folder, share=Share(num_workers=2))
    blocked.rmdir()
    pack(people, tmp_path / "undisturbed")
    pack(people, folder, share=Share(num_workers=2))
    assert fingerprint(folder) == fingerprint(tmp_path / "undisturbed")


def test_a_worker_that_dies_is_told(tmp_path, people, monkeypatch):
    monkeypatch.setattr("personmae.data.packs.crew.sys.executable", "/bin/false")
    with pytest.raises(UserError, match=r"has ended in shard \d+ .*The same command goes on"):
        pack(people, tmp_path / "pack", share=Share(num_workers=2))


def test_a_disk_that_fails_for_a_moment_loses_nothing(tmp_path, people, monkeypatch):
    monkeypatch.setattr(entries, "RETRY_SECONDS", (0.0, 0.0))
    read_all, failed = entries._FileReader.read, set()

    def read_second_time(self, name, numbers, path, max_bytes):
        if name not in failed:
            failed.add(name)
            raise UnreadableImage(path, "cannot be read: Input/output error", by_system=True)
        return read_all(self, name, numbers, path, max_bytes)

    monkeypatch.setattr(entries._FileReader, "read", read_second_time)
    assert pack(people, tmp_path / "pack").num_images == 30


def test_a_disk_that_is_gone_ends_packing(tmp_path, people, monkeypatch):
    monkeypatch.setattr(entries, "RETRY_SECONDS", ())
    monkeypatch.setattr(jobs, "MAX_LOST", 5)

    def refuse(self, name, numbers, path, max_bytes):
        raise UnreadableImage(path, f"cannot be read: {os.strerror(errno.EIO)}", by_system=True)

    monkeypatch.setattr(entries._FileReader, "read", refuse)
    with pytest.raises(UserError, match="is the storage still there"):
        pack(people, tmp_path / "pack")


def test_files_that_change_meanwhile_are_left_out(tmp_path, people, monkeypatch):
    examine_all = making._Shards.do

    def spoil_after(self, stage, *arguments):
        examine_all(self, stage, *arguments)
        if stage == "examine":
            path = people / "a" / "0000.jpg"
            content = path.read_bytes()
            path.write_bytes(content[:-10] + b"x" + content[-9:])

    monkeypatch.setattr(making._Shards, "do", spoil_after)
    pack(people, tmp_path / "pack", duplicates="exact")
    lines = (tmp_path / "pack" / "rejected.tsv").read_text().splitlines()
    assert lines[1:] == ["a/0000.jpg\tchanged while it was being packed"]


def test_limits_and_shrinking(tmp_path, people):
    manifest = pack(people, tmp_path / "pack", transcoding=Transcoding(max_side_px=100), limits=Limits(min_side_px=35))
    index = open_pack(tmp_path / "pack", tmp_path / "cache", announce=ignore)
    assert max(index.heights.max(), index.widths.max()) == 100
    assert index.widths.min() >= 35
    assert {reason.split(":")[0] for _, reason in index.rejected} == {"too small", "too narrow to be shrunk"}
    assert manifest.counts["shrunk"] > 10


def test_other_processes_that_never_come_are_not_waited_for_for_ever(tmp_path, people, monkeypatch):
    monkeypatch.setattr(making, "STALL_SECONDS", 0.2)
    monkeypatch.setattr(making, "POLL_SECONDS", 0.01)
    said: list[str] = []
    with pytest.raises(UserError, match="start the same command again in all processes"):
        pack(people, tmp_path / "pack", share=Share(rank=0, world_size=2), say=said.append)
    assert any("waiting for the other processes" in line for line in said)
    with pytest.raises(UserError, match="process 0 to begin"):
        pack(people, tmp_path / "pack 2", share=Share(rank=1, world_size=2))
    # Started again with another number of processes, it goes on.
    assert pack(people, tmp_path / "pack").num_images == 30


def test_a_rank_that_comes_when_all_is_over_does_nothing(tmp_path, people, monkeypatch):
    pack(people, tmp_path / "pack", duplicates="exact")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "pack").rglob("*")}
    monkeypatch.setattr(making, "POLL_SECONDS", 0.01)
    for duplicates in ("keep", "exact"):
        assert pack(people, tmp_path / "pack", share=Share(1, 2), duplicates=duplicates) is None
    # Or between any two of its steps.
    for step in ("_check_plan", "_remove_partial", "_find_duplicates", "read_record"):
        pack_of_step = tmp_path / step
        with monkeypatch.context() as patched:
            patched.setattr(making, "join_shards", lambda *_: pytest.fail("stopped"))
            with pytest.raises(pytest.fail.Exception):
                pack(people, pack_of_step, duplicates="exact")
        original, ended = getattr(making, step), []

        def end_first(*arguments, original=original, ended=ended, folder=pack_of_step, **options):
            if not ended:
                ended.append(True)
                with monkeypatch.context() as undone:
                    undone.setattr(making, original.__name__, original)
                    pack(people, folder, duplicates="exact")
            return original(*arguments, **options)

        with monkeypatch.context() as patched:
            patched.setattr(making, step, end_first)
            assert pack(people, pack_of_step, share=Share(1, 2), duplicates="exact") is None
        assert ended
        assert fingerprint(pack_of_step) == fingerprint(tmp_path / "pack")
        assert list(pack_of_step.rglob("*.partial")) == []
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "pack").rglob("*")} == before


def test_ranks_may_come_late(tmp_path, people, monkeypatch):
    monkeypatch.setattr(making, "POLL_SECONDS", 0.01)
    late = threading.Timer(0.3, lambda: pack(people, tmp_path / "pack", share=Share(1, 2), duplicates="exact"))
    late.start()
    assert pack(people, tmp_path / "pack", share=Share(0, 2), duplicates="exact").num_images == 30
    late.join()


def test_the_program(tmp_path, people, monkeypatch):
    (people / "a" / "broken.jpg").write_bytes(b"no image")
    monkeypatch.delenv("RANK", raising=False)
    said: list[str] = []
    config = PackConfig(source=people, folder=tmp_path / "pack", images_per_shard=8, num_workers=1, duplicates="exact")
    packing.main(config, said.append)
    assert "30 images in 4 shards" in said[-2]
    assert "1 images left out, listed in" in said[-1]
    assert read_png(tmp_path / "pack" / "manifest.png")[1] > 800
    (tmp_path / "pack" / "manifest.png").unlink()
    packing.main(config, said.append)
    assert (tmp_path / "pack" / "manifest.png").exists()
    content = json.loads((tmp_path / "pack" / "manifest.json").read_text())
    assert str(tmp_path) not in json.dumps(content)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="RANK is 2"):
        packing.main(config, ignore)
    monkeypatch.setenv("RANK", "two")
    with pytest.raises(UserError, match="must be numbers"):
        packing.main(config, ignore)


def read_png(path: Path) -> tuple[int, ...]:
    return read_image(path).shape


def test_a_cut_archive_is_told_at_once(tmp_path, people):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        tar.add(people, "people")
    whole = (tmp_path / "a.tar.gz").read_bytes()
    (tmp_path / "a.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged or cut"):
        pack(tmp_path / "a.tar.gz", tmp_path / "pack")
    (tmp_path / "a.tar.gz").write_bytes(whole)
    assert pack(tmp_path / "a.tar.gz", tmp_path / "pack").num_images == 30
    # Another process of the same command finds all done too, and another archive is not taken for this one.
    assert pack(tmp_path / "a.tar.gz", tmp_path / "pack", share=Share(rank=1, world_size=2)) is None
    with tarfile.open(tmp_path / "b.tar.gz", "w:gz") as tar:
        tar.add(people / "new.jpg" if (people / "new.jpg").exists() else next(people.rglob("*.jpg")), "b.jpg")
    with pytest.raises(UserError, match="another source"):
        pack(tmp_path / "b.tar.gz", tmp_path / "pack")
    (tmp_path / "b.tar").write_bytes(gzip.decompress(whole)[:-20_000])
    with pytest.raises(UserError, match="get it again"):
        pack(tmp_path / "b.tar", tmp_path / "pack 2")


def test_lmdb(tmp_path, people):
    lmdb = pytest.importorskip("lmdb")
    files = sorted(people.rglob("*.jpg"))
    with lmdb.open(os.fspath(tmp_path / "set"), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        for path in files:
            transaction.put(os.fsencode(path.relative_to(people)), path.read_bytes())
        transaction.put(b"__len__", b"30")
    pack(people, tmp_path / "files")
    for share, name in ((Share(), "one"), (Share(num_workers=2), "two")):
        manifest = pack(tmp_path / "set", tmp_path / name, share=share)
        assert (manifest.num_images, manifest.counts["rejected"]) == (30, 1)
    packed, expected = (open_pack(tmp_path / name, tmp_path / "cache", announce=ignore) for name in ("one", "files"))
    assert packed.digest() == expected.digest()
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "two")
