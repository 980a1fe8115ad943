"""Files are whole or not there: an older one stays until the new one is complete, nothing half is left, what the system refuses is told."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from personmae.configs import UserError
from personmae.whole_files import PARTIAL_SUFFIX, flush_folder, whole_file, whole_path, write_whole


@pytest.mark.parametrize("flush", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_the_old_file_stays_until_the_new_one_is_complete(tmp_path: Path, flush: bool, shared: bool) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with whole_path(path, flush=flush, shared=shared) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
        assert partial.parent == tmp_path
        assert partial.name.endswith(PARTIAL_SUFFIX)
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("flush", [True, False])
def test_a_failure_leaves_the_old_file_alone(tmp_path: Path, flush: bool) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail() -> None:
        with whole_path(path, flush=flush) as partial:
            partial.write_text("half")
            raise KeyError("of the body")

    with pytest.raises(KeyError, match="of the body"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_writer_leaves_the_old_file_and_the_next_one_its_name(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    writer = (
        "import os, sys; from pathlib import Path; from personmae.whole_files import whole_path\n"
        "with whole_path(Path(sys.argv[1]), shared=False) as partial:\n"
        "    partial.write_text('half'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", writer, str(path)], check=False).returncode == 9
    assert path.read_text() == "old"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.txt", "a.txt.partial"]
    with whole_path(path, shared=False) as partial:
        partial.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_processes_do_not_write_into_the_same_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    with whole_path(path) as own:
        own.write_text("first")
        monkeypatch.setattr(os, "getpid", lambda: 4_194_305)  # beyond any process
        with whole_path(path) as other:
            other.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_told_with_its_cure(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    (tmp_path / f"a.bin.{os.getpid()}{PARTIAL_SUFFIX}").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"cannot write .*a\.bin: No space left on device; make room"):
        write_whole(path, bytes(3_000_000))
    assert list(tmp_path.iterdir()) == []


def test_what_the_disk_refuses_at_the_end_is_told_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match=r"cannot write .*a\.bin: Input/output error; mend the disk"):
        write_whole(tmp_path / "a.bin", b"1", "mend the disk")
    assert list(tmp_path.iterdir()) == []


def test_missing_folders_are_made_where_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "new" / "newer" / "a.bin"
    with pytest.raises(UserError, match=r"cannot write .*a\.bin: No such file or directory"):
        write_whole(path, b"1")
    assert not path.parent.exists()
    with whole_file(path, parents=True) as file:
        file.write(b"1")
    assert path.read_bytes() == b"1"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/a\.bin: File exists"):
        write_whole(tmp_path / "file" / "a.bin", b"1", parents=True)


def test_names_that_are_no_text_come_out_as_they_are(tmp_path: Path) -> None:
    write_whole(tmp_path / "names.txt", "größe " + os.fsdecode(b"\xff.jpg") + "\r\n")
    assert (tmp_path / "names.txt").read_bytes() == "größe ".encode() + b"\xff.jpg\r\n"


@pytest.mark.parametrize(("refusal", "is_told"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_folders_that_cannot_be_flushed_are_let_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: int, is_told: bool) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(os, "fsync", refuse)
    if is_told:
        with pytest.raises(OSError, match="Input/output error"):
            flush_folder(tmp_path)
    else:
        flush_folder(tmp_path)
