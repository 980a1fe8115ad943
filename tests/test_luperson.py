"""LUPerson's LMDB: keys.pkl as list or dict, unsafe and broken pickles, the database through a stand-in and, where it is installed, through lmdb."""

import collections
import contextlib
import os
import pickle
import sys
import types

import numpy as np
import pytest
from bad_images import encoded, picture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from personmae.configs import UserError
from personmae.data.images import UnreadableImage
from personmae.data.reid.luperson import open_luperson, read_keys

KEYS = [f"00_01_{video:04d}_{image:08d}" for video in (2, 7) for image in range(3)]


class Environment:
    """What lmdb.open returns, as far as it is used."""

    def __init__(self, content):
        self.content = content
        self.is_open = True

    def begin(self, *, write):
        assert self.is_open
        assert write is False
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def get(self, key):
        assert isinstance(key, bytes)
        return self.content.get(key)

    def stat(self):
        return {"entries": len(self.content)}

    def close(self):
        self.is_open = False


@pytest.fixture
def database(monkeypatch):
    """The content of a stand-in for the package lmdb, and the calls of its `open`."""
    module = types.ModuleType("lmdb")
    content = {key.encode(): encoded(picture(seed, 32, 16), "JPEG") for seed, key in enumerate(KEYS)}
    calls = []

    def open_(path, map_size=10485760, subdir=True, readonly=False, metasync=True, sync=True, map_async=False, mode=493, create=True, readahead=True,
              writemap=False, meminit=True, max_readers=126, max_dbs=0, max_spare_txns=1, lock=True):  # fmt: skip
        calls.append({"path": path, "readonly": readonly, "lock": lock, "readahead": readahead, "meminit": meminit})
        if not os.path.isfile(os.path.join(path, "data.mdb")):
            raise module.Error("No such file")
        return Environment(content)

    module.Error = type("Error", (Exception,), {})
    module.open = open_
    monkeypatch.setitem(sys.modules, "lmdb", module)
    return types.SimpleNamespace(content=content, calls=calls, module=module)


def write_keys(folder, content, protocol=None):
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "keys.pkl"
    file.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
    return file


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (KEYS, None),
        (tuple(KEYS), None),
        (np.array(KEYS), None),
        (np.array(KEYS, dtype=object), None),
        ([key.encode() for key in KEYS], None),
        ({"keys": KEYS}, None),
        ({"keys": KEYS, "pids": [5, 5, 5, 6, 6, 2**40]}, "pids"),
        ({"keys": KEYS, "vids": np.array([2, 2, 2, 7, 7, 7], dtype=np.int32)}, "vids"),
        ({"keys": np.array(KEYS, dtype="S"), "vids": np.array([2, 2, 2, 7, 7, 7], dtype=">u2")[::-1]}, "vids"),
        (collections.OrderedDict(keys=KEYS), None),
        ({"keys": list(np.array(KEYS)), "pids": list(np.arange(6)), "note": {frozenset({1}), 2.5, None, True, b"x"}}, "pids"),
    ],
)
def test_keys_as_list_or_dict(tmp_path, content, kind, protocol):
    keys, labels, found_kind = read_keys(write_keys(tmp_path, content, protocol))
    assert keys == KEYS
    assert all(type(key) is str for key in keys)
    assert found_kind == kind
    if kind:
        assert labels.dtype == np.int64
        assert labels.tolist() == [int(label) for label in content[kind]]
    else:
        assert labels is None


class Runs:
    """Unpickled by an ordinary unpickler, this makes a file."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("call", [os.system, eval, exec, open, getattr, np.load, os.path.join, bytearray], ids=lambda call: call.__name__)
def test_a_pickle_that_would_run_something_is_refused(tmp_path, call, protocol):
    marker = tmp_path / "ran"
    program = f"open({str(marker)!r}, 'w')"
    argument = {"system": f"touch {marker}", "eval": program, "exec": program}.get(call.__name__, str(marker))
    file = write_keys(tmp_path, {"keys": KEYS, "pids": Runs(call, argument, *(["w"] if call is open else []))}, protocol)
    with pytest.raises(UserError, match=r"asks for .*: do not trust it"):
        read_keys(file)
    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"cbuiltins\ngetattr\n(c__builtin__\neval\nS'x'\ntR.",
        b"\x80\x04\x8c\x05numpy\x8c\x12testing.measure_x\x93.",
        b"\x80\x04\x8c\x08builtins\x8c\rstr.__class__\x93.",
        b"cnumpy\nndarray.__class__\n.",
        b"c_codecs\nencode\n(Vx\nVrot13\ntR.",
        b"\x82\x01.",
        b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(VO8\ntRVabcdefgh\ntR.",
        b"cnumpy\ndtype\n(VV8\nI00\nI01\ntR.",
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntVb\ntR(I1\n(I99\ntcnumpy\ndtype\n(Vi8\ntRI00\nVabc\ntb.",
    ],
)
def test_hand_written_pickles(tmp_path, content):
    with pytest.raises(UserError, match=r"is not read|is no pickle"):
        read_keys(write_keys(tmp_path, content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no pickle of plain values: EOFError"),
        (b"not a pickle", r"is not read|is no pickle"),
        (pickle.dumps(KEYS)[:-9], r"is not read|is no pickle"),
        ([], "holds no list of keys"),
        ("abc", "holds no list of keys, but str"),
        ({"names": KEYS}, "a dict without 'keys'; it has 'names'"),
        ([1, 2], "a key is 1, not text"),
        ({"keys": KEYS, "pids": [1, 2]}, "6 keys but 2 pids"),
        ({"keys": KEYS, "pids": ["a"] * 6}, "pids is no flat list of integers"),
        ({"keys": KEYS, "pids": np.zeros((6, 1), np.int64)}, "pids is no flat list of integers"),
        ({"keys": KEYS, "pids": np.zeros(6)}, "pids is no flat list of integers"),
        ({"keys": np.zeros(6, [("a", int)])}, "a structured array|an array of 'V8'"),
        ({"keys": KEYS, "pids": np.zeros(6, np.complex128)}, "an array of 'c16'"),
        ({"keys": KEYS, "vids": [[1], [1, 2]]}, "vids is no flat list of integers"),
    ],
)
def test_other_contents_are_refused(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read_keys(write_keys(tmp_path, content))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=4), st.sampled_from([0, 2, 4]))
def test_any_damage_is_survived(tmp_path, place, bytes_, protocol):
    content = bytearray(pickle.dumps({"keys": KEYS, "pids": np.arange(6)}, protocol))
    place %= len(content)
    content[place : place + len(bytes_)] = bytes_
    # A UserError or keys, and nothing else.
    with contextlib.suppress(UserError):
        keys, _, _ = read_keys(write_keys(tmp_path, bytes(content)))
        assert all(type(key) is str for key in keys)


@pytest.mark.parametrize(("mdb", "pkl"), [("", ""), ("lmdb", ""), ("lup_lmdb", "lup_lmdb")])
def test_images_are_read_lazily(tmp_path, database, mdb, pkl):
    write_keys(tmp_path / pkl, {"keys": KEYS, "vids": [2, 2, 2, 7, 7, 7]})
    (tmp_path / mdb).mkdir(exist_ok=True)
    (tmp_path / mdb / "data.mdb").touch()
    images = open_luperson(tmp_path)
    assert len(images) == 6
    assert database.calls == [], "opened at the first read alone"
    assert images.read(4) == database.content[KEYS[4].encode()]
    assert images.num_entries() == 6
    assert database.calls == [{"path": str(tmp_path / mdb), "readonly": True, "lock": False, "readahead": False, "meminit": False}]
    copy = pickle.loads(pickle.dumps(images))
    assert copy.read(0) == images.read(0)
    assert len(database.calls) == 2, "a copy for another process opens its own"
    images.close()
    assert images.read(1) == copy.read(1)
    del database.content[KEYS[2].encode()]
    with pytest.raises(UnreadableImage, match=r"00_01_0002_00000002: no such key in the database"):
        images.read(2)


def test_what_is_missing_is_said(tmp_path, database, monkeypatch):
    with pytest.raises(UserError, match=r"holds no LMDB: looked for data.mdb in it and in lmdb, lup_lmdb"):
        open_luperson(tmp_path)
    (tmp_path / "data.mdb").touch()
    with pytest.raises(UserError, match=r"has no keys.pkl"):
        open_luperson(tmp_path)
    write_keys(tmp_path, KEYS)
    images = open_luperson(tmp_path)
    (tmp_path / "data.mdb").unlink()
    with pytest.raises(UserError, match="cannot be opened as an LMDB: No such file"):
        images.read(0)
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(UserError, match="pip install lmdb"):
        images.read(0)


def test_with_the_real_package(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    environment = lmdb.open(str(tmp_path / "lmdb"), map_size=2**20)
    with environment.begin(write=True) as transaction:
        for number, key in enumerate(KEYS):
            transaction.put(key.encode("ascii"), np.frombuffer(b"image %d" % number, np.uint8))
    environment.close()
    write_keys(tmp_path, KEYS)
    images = open_luperson(tmp_path)
    assert [images.read(number) for number in range(6)] == [b"image %d" % number for number in range(6)]
    assert images.num_entries() == 6
    images.close()
    (tmp_path / "lmdb" / "data.mdb").write_bytes(b"nothing like it" * 1000)
    with pytest.raises(UserError, match="cannot be opened as an LMDB"):
        images.read(0)
