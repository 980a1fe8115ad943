"""Archives of anyone: entries are read as they were put in, and what is hostile or damaged is refused with its reason."""

import gzip
import io
import os
import struct
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from personmae.configs import UserError
from personmae.data.images import UnreadableImage
from personmae.data.packs.archives import decompress_tar, list_tar, list_zip, read_tar_entry, read_zip_entry
from personmae.data.packs.entries import list_entries, open_reader, source_kind, spool_file

MANY = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NAMES = st.lists(
    st.text(st.characters(codec="utf-8", exclude_characters="/\\\0:", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=150)
    .filter(lambda name: not name.startswith("."))
    .map(lambda name: f"folder/{name}.jpg"),
    max_size=6,
    unique=True,
)


def zip_of(path: Path, contents: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return path


def tar_of(path: Path, contents: dict[str, bytes], form: int = tarfile.PAX_FORMAT, mode: Literal["w", "w:gz"] = "w") -> Path:
    with tarfile.open(path, mode, format=form) as archive:
        for name, content in contents.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def read_all(path: Path, kind: str, max_bytes: int = 1 << 24) -> dict[str, bytes | str]:
    """Name -> content, or the reason why it is left out."""
    found: dict[str, bytes | str] = {}
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for entry in list_zip(path) if kind == "zip" else list_tar(path):
            read = read_zip_entry if kind == "zip" else read_tar_entry
            try:
                found[entry.name] = entry.refused or read(descriptor, entry.numbers, Path(entry.name), max_bytes)
            except UnreadableImage as error:
                found[entry.name] = error.reason
    finally:
        os.close(descriptor)
    return found


@MANY
@given(names=NAMES, data=st.data())
def test_zip_entries_are_what_was_put_in(tmp_path, names, data):
    contents = {name: data.draw(st.binary(min_size=1, max_size=2000)) for name in names}
    method = data.draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
    assert read_all(zip_of(tmp_path / "a.zip", contents, method), "zip") == contents


@MANY
@given(names=NAMES, data=st.data())
def test_tar_entries_are_what_was_put_in(tmp_path, names, data):
    contents = {name: data.draw(st.binary(min_size=1, max_size=2000)) for name in names}
    form = data.draw(st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
    assert read_all(tar_of(tmp_path / "a.tar", contents, form), "tar") == contents


@MANY
@given(kind=st.sampled_from(["zip", "tar"]), data=st.data())
def test_damage_anywhere_is_told_or_does_not_show(tmp_path, kind, data):
    contents = {f"a/{number}.jpg": bytes([number]) * 700 for number in range(4)}
    whole = (zip_of(tmp_path / "a", contents, zipfile.ZIP_DEFLATED) if kind == "zip" else tar_of(tmp_path / "a", contents)).read_bytes()
    broken = bytearray(whole[: data.draw(st.integers(1, len(whole)))])
    for _ in range(data.draw(st.integers(0, 6))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    if kind == "tar" and data.draw(st.booleans()):
        # As one would who means it: with checksums that fit the damage.
        for start in range(0, len(broken) - 511, 512):
            if broken[start + 257 : start + 262] == b"ustar":
                broken[start + 148 : start + 156] = b" " * 8
                broken[start + 148 : start + 156] = b"%06o\0 " % sum(broken[start : start + 512])
    (tmp_path / "b").write_bytes(bytes(broken))
    try:
        found = read_all(tmp_path / "b", kind)
    except UserError:
        return
    if kind == "zip":
        # Contents have their checksums; a tar has none.
        assert [name for name, content in found.items() if isinstance(content, bytes) and content not in contents.values()] == []


@MANY
@given(content=st.binary(max_size=3000))
def test_no_bytes_are_too_odd(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    for kind in ("zip", "tar"):
        try:
            read_all(tmp_path / "x", kind)
        except UserError:
            continue


HOSTILE = ["../up.jpg", "a/../../up.jpg", "/etc/passwd.jpg", "..\\up.jpg", "C:\\windows.jpg", "\\\\server\\share.jpg"]


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_names_that_lead_out_are_refused(tmp_path, kind):
    contents = dict.fromkeys([*HOSTILE, "./fine//name.jpg", ".hidden.jpg", "__MACOSX/._a.jpg", "notes.txt"], b"x")
    found = read_all((zip_of if kind == "zip" else tar_of)(tmp_path / "a", contents), kind)
    assert found.pop("fine/name.jpg") == b"x"
    assert len(found) == len(HOSTILE)
    assert set(found.values()) == {"its name leads out of the archive"}


def test_links_devices_and_pipes_of_a_tar_are_refused(tmp_path):
    kinds = {
        "soft.jpg": tarfile.SYMTYPE,
        "hard.jpg": tarfile.LNKTYPE,
        "pipe.jpg": tarfile.FIFOTYPE,
        "block.jpg": tarfile.BLKTYPE,
        "terminal.jpg": tarfile.CHRTYPE,
        "folder.jpg": tarfile.DIRTYPE,
    }
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind in kinds.items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/passwd"
            archive.addfile(entry)
    link, other = "a link, not a regular file", "not a regular file"
    found = read_all(tmp_path / "a.tar", "tar")
    assert found == {"soft.jpg": link, "hard.jpg": link, "pipe.jpg": other, "block.jpg": other, "terminal.jpg": other}


def test_links_and_encrypted_entries_of_a_zip_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        link = zipfile.ZipInfo("link.jpg")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("secret.jpg", b"x")
        archive.writestr(zipfile.ZipInfo("squeezed.jpg"), b"x" * 100, zipfile.ZIP_LZMA)
    content = bytearray((tmp_path / "a.zip").read_bytes())
    entry = content.index(b"PK\x01\x02", content.index(b"PK\x01\x02") + 1)
    content[entry + 8] |= 1
    (tmp_path / "a.zip").write_bytes(content)
    found = read_all(tmp_path / "a.zip", "zip")
    assert found["link.jpg"] == "a link, not a regular file"
    assert found["secret.jpg"] == "encrypted"
    assert "method 14" in str(found["squeezed.jpg"])


def test_bombs_are_not_decompressed(tmp_path):
    bomb = zip_of(tmp_path / "a.zip", {"bomb.jpg": bytes(50 << 20), "flat.bmp": b"BM" + bytes(500_000)}, zipfile.ZIP_DEFLATED)
    found = read_all(bomb, "zip")
    assert "more than 100 times its size" in str(found["bomb.jpg"])
    assert isinstance(found["flat.bmp"], bytes)

    # An entry that says less than it holds gives no more than it says.
    small = zip_of(tmp_path / "b.zip", {"liar.jpg": bytes(9 << 20)}, zipfile.ZIP_DEFLATED).read_bytes()
    (tmp_path / "b.zip").write_bytes(small.replace(struct.pack("<I", 9 << 20), struct.pack("<I", 1000)))
    assert str(read_all(tmp_path / "b.zip", "zip")["liar.jpg"]).startswith("damaged in the archive")

    with gzip.open(tmp_path / "c.tar.gz", "wb") as file:
        file.write(bytes(300 << 20))
    with pytest.raises(UserError, match="more than 100 times its size"):
        decompress_tar(tmp_path / "c.tar.gz", tmp_path / "c.tar")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "b.zip", "c.tar.gz"]


def test_entries_that_share_their_bytes_are_a_bomb(tmp_path):
    path = zip_of(tmp_path / "a.zip", {f"{number}.jpg": os.urandom(5000) for number in range(3)})
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    content = path.read_bytes()
    directory = content.index(b"PK\x01\x02")
    # The directory alone, as often as it likes, over the bytes of one entry.
    first = content[:directory][: entries[1].header_offset]
    records = content[directory : content.index(b"PK\x05\x06")]
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 9, 9, 3 * len(records), len(first), 0)
    path.write_bytes(first + 3 * records + end)
    with pytest.raises(UserError, match="entries overlap"):
        list(list_zip(path))


def test_a_tar_that_claims_a_huge_header_or_a_negative_length(tmp_path):
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 5 << 30
    with open(tmp_path / "a.tar", "wb") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.truncate(6 << 30)
    with pytest.raises(UserError, match="header claims"):
        list(list_tar(tmp_path / "a.tar"))

    entry = tarfile.TarInfo("a.jpg")
    block = bytearray(entry.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"\xff" * 8 + struct.pack(">i", -1024)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    (tmp_path / "b.tar").write_bytes(bytes(block) + bytes(4096))
    with pytest.raises(UserError, match="get it again"):
        list(list_tar(tmp_path / "b.tar"))


def test_cut_and_damaged_archives(tmp_path):
    contents = {f"{number}.jpg": os.urandom(3000) for number in range(5)}
    whole = tar_of(tmp_path / "a.tar", contents).read_bytes()
    for length in (100, 3000, 5000, 9000):
        (tmp_path / "b.tar").write_bytes(whole[:length])
        with pytest.raises(UserError, match="get it again"):
            list(list_tar(tmp_path / "b.tar"))
    # The third header; tarfile itself takes that for the end.
    (tmp_path / "b.tar").write_bytes(whole[:7200] + b"?" * 100 + whole[7300:])
    with pytest.raises(UserError, match="damaged at byte 7168"):
        list(list_tar(tmp_path / "b.tar"))
    (tmp_path / "c.zip").write_bytes(zip_of(tmp_path / "a.zip", contents).read_bytes()[:-30])
    with pytest.raises(UserError, match="no whole zip"):
        list(list_zip(tmp_path / "c.zip"))
    (tmp_path / "d.tar.gz").write_bytes(gzip.compress(whole)[:-500])
    with pytest.raises(UserError, match="damaged or cut"):
        decompress_tar(tmp_path / "d.tar.gz", tmp_path / "d.tar")
    assert not (tmp_path / "d.tar").exists()


def test_an_entry_without_a_name(tmp_path):
    content = zip_of(tmp_path / "a.zip", {"b.jpg": b"x", "a.jpg": b"y"}).read_bytes()
    # zipfile ends names at a zero byte.
    (tmp_path / "a.zip").write_bytes(content.replace(b"b.jpg", b"\0.jpg"))
    assert read_all(tmp_path / "a.zip", "zip") == {"a.jpg": b"y"}


def test_too_long_and_empty_entries(tmp_path):
    for kind, make in (("zip", zip_of), ("tar", tar_of)):
        found = read_all(make(tmp_path / kind, {"long.jpg": bytes(2000), "empty.jpg": b""}), kind, max_bytes=1000)
        assert found == {"long.jpg": "too large: 2000 bytes, at most 1000", "empty.jpg": "empty file"}


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_the_last_entry_of_a_name_counts(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    first, last = b"first", b"last!!"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.jpg", first)
            with pytest.warns(UserWarning, match="Duplicate"):
                archive.writestr("a.jpg", last)
    else:
        with tarfile.open(path, "w") as tar:
            for content in (first, last):
                entry = tarfile.TarInfo("./a.jpg")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    assert source_kind(path) == kind
    entries = list_entries(path, kind, spool_file(path, kind, tmp_path))
    assert entries.names == [b"a.jpg"]
    assert entries.refused == [("a.jpg", "another entry of the same name follows")]
    with open_reader(kind, path) as reader:
        one, two, three, four = entries.numbers[0].tolist()
        assert reader.read(b"a.jpg", (one, two, three, four), Path("a.jpg"), 1000) == last


def test_kinds_are_told_by_content(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "list.zip").write_text("a.jpg\n")
    tar_of(tmp_path / "x.jpg", {"a.jpg": b"x"}, mode="w:gz")
    assert source_kind(tmp_path / "folder") == "files"
    assert source_kind(tmp_path / "list.zip") == "files"
    assert source_kind(tmp_path / "x.jpg") == "tar.gz"
    with pytest.raises(UserError, match="cannot be opened"):
        source_kind(tmp_path / "nowhere")


def test_lmdb_is_missed_with_the_command_that_cures_it(tmp_path, monkeypatch):
    (tmp_path / "data.mdb").write_bytes(bytes(16) + b"\xde\xc0\xef\xbe" + bytes(100))
    assert source_kind(tmp_path) == "lmdb"
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(UserError, match="pip install lmdb"):
        list_entries(tmp_path, "lmdb", spool_file(tmp_path, "lmdb", tmp_path))


def test_lmdb(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(os.fspath(tmp_path / "set"), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        for number in range(5):
            transaction.put(b"key %d" % number, bytes([number]) * (100 * number))
    entries = list_entries(tmp_path / "set", "lmdb", spool_file(tmp_path / "set", "lmdb", tmp_path))
    assert entries.names == [b"key %d" % number for number in range(5)]
    with open_reader("lmdb", entries.place) as reader:
        assert reader.read(b"key 3", (0, 0, 0, 0), Path("key 3"), 1000) == b"\3" * 300
        for key, reason in ((b"key 0", "empty"), (b"key 4", "too large"), (b"gone", "no longer")):
            with pytest.raises(UnreadableImage, match=reason):
                reader.read(key, (0, 0, 0, 0), Path("key"), 350)
    (tmp_path / "set" / "data.mdb").write_bytes(bytes(16) + b"\xde\xc0\xef\xbe" + bytes(100))
    with pytest.raises(UserError, match="LMDB database"):
        list_entries(tmp_path / "set", "lmdb", tmp_path / "set" / "data.mdb")
