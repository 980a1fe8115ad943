"""Files of features: every layout in use, what is mended, and what is refused by name."""

from __future__ import annotations

import contextlib
import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.io import savemat

from personmae.configs import UserError
from personmae.evaluation import feature_containers
from personmae.evaluation.feature_files import FeatureFile, read_feature_file, write_feature_file
from personmae.evaluation.ranking import Labels

Q, G, D = 3, 5, 4
RANDOM = np.random.default_rng(0)
QUERY, GALLERY = RANDOM.standard_normal((Q, D)).astype(np.float32), RANDOM.standard_normal((G, D)).astype(np.float32)
PEOPLE, CAMERAS = np.array([7, 0, 9]), np.array([1, 2, 14])
GALLERY_PEOPLE, GALLERY_CAMERAS = np.array([9, 7, 7, 0, 3]), np.array([3, 3, 1, 2, 5])
QUERY_PATHS, GALLERY_PATHS = ["a.jpg", "é b.jpg", "c\udce9.jpg"], [f"{number}.jpg" for number in range(G)]

OURS: dict[str, Any] = {
    "query_features": QUERY,
    "gallery_features": GALLERY,
    "query_people": PEOPLE,
    "gallery_people": GALLERY_PEOPLE,
    "query_cameras": CAMERAS,
    "gallery_cameras": GALLERY_CAMERAS,
}


def named(template: str, features: str, people: str, cameras: str) -> dict[str, Any]:
    """The same content under other names; {} stands for query and gallery."""
    query, gallery = ("q", "g") if template == "q" else ("query", "gallery")
    return {
        f"{part}{name}": OURS[f"{ours}_{key}"]
        for part, ours in ((query, "query"), (gallery, "gallery"))
        for name, key in ((features, "features"), (people, "people"), (cameras, "cameras"))
    }


def write(folder: Path, content: dict[str, Any], suffix: str = ".npz") -> Path:
    path = folder / f"features{suffix}"
    if suffix == ".npz":
        np.savez(path, **content)
    elif suffix == ".mat":
        savemat(path, content)
    else:
        torch.save({name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in content.items()}, path)
    return path


def check(found: FeatureFile, *, has_cameras: bool = True, query: np.ndarray = QUERY, gallery: np.ndarray = GALLERY) -> None:
    np.testing.assert_array_equal(found.query_features, query)
    np.testing.assert_array_equal(found.gallery_features, gallery)
    assert found.query.people.tolist() == PEOPLE.tolist()
    assert found.gallery.people.tolist() == GALLERY_PEOPLE.tolist()
    assert found.has_cameras == has_cameras
    if has_cameras:
        assert found.query.cameras.tolist() == CAMERAS.tolist()
        assert found.gallery.cameras.tolist() == GALLERY_CAMERAS.tolist()
    assert found.query.people.dtype == found.query.cameras.dtype == np.int64
    assert found.num_junk == 0


@pytest.mark.parametrize("suffix", [".npz", ".mat", ".pt", ".pth", ".NPZ"])
@pytest.mark.parametrize(
    "content",
    [
        OURS,
        named("query", "_feature", "_label", "_cam"),
        named("query", "_f", "_label", "_cam"),
        named("q", "f", "_pids", "_camids"),
        named("query", "-Feats", "_PIDs", "_camids"),
    ],
    ids=lambda content: next(iter(content)),
)
def test_the_names_in_use_are_known(tmp_path: Path, suffix: str, content: dict[str, Any]) -> None:
    if suffix == ".NPZ":
        write(tmp_path, content).rename(tmp_path / "features.NPZ")
    elif suffix == ".mat" and any("-" in name for name in content):
        pytest.skip("MATLAB has no such names")
    else:
        write(tmp_path, content, suffix)
    found = read_feature_file(tmp_path / f"features{suffix}")
    check(found)
    assert (found.query_paths, found.gallery_paths, found.notes) == (None, None, ())
    assert found.query_features.dtype == np.float32


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    features = FeatureFile(QUERY, GALLERY, Labels(PEOPLE, CAMERAS), Labels(GALLERY_PEOPLE, GALLERY_CAMERAS), QUERY_PATHS, GALLERY_PATHS)
    write_feature_file(tmp_path / "f.npz", features)
    found = read_feature_file(tmp_path / "f.npz")
    check(found)
    assert (found.query_paths, found.gallery_paths) == (QUERY_PATHS, GALLERY_PATHS)
    write_feature_file(tmp_path / "f.npz", FeatureFile(QUERY, GALLERY, features.query, features.gallery, has_cameras=False))
    check(read_feature_file(tmp_path / "f.npz"), has_cameras=False)
    assert [path.name for path in tmp_path.iterdir()] == ["f.npz"]
    with pytest.raises(UserError, match=r"cannot write .*gone"):
        write_feature_file(tmp_path / "gone" / "f.npz", features)
    with pytest.raises(UserError, match=r"written as \.npz"):
        write_feature_file(tmp_path / "f.mat", features)


def test_layumis_file_with_junk(tmp_path: Path) -> None:
    people = np.where(np.arange(G) % 2 == 1, -1, GALLERY_PEOPLE)
    content = {**named("query", "_f", "_label", "_cam"), "gallery_label": people}
    content["gallery_path"] = np.array(GALLERY_PATHS, object)
    content["query_path"] = np.array(["one.jpg", "three.jpg", "two.jpg"])
    found = read_feature_file(write(tmp_path, content, ".mat"))
    assert found.num_junk == 2
    np.testing.assert_array_equal(found.gallery_features, GALLERY[::2])
    assert found.gallery.people.tolist() == GALLERY_PEOPLE[::2].tolist()
    assert found.gallery.cameras.tolist() == GALLERY_CAMERAS[::2].tolist()
    assert found.gallery_paths == GALLERY_PATHS[::2]
    assert found.query_paths == ["one.jpg", "three.jpg", "two.jpg"]


@pytest.mark.parametrize("suffix", [".npz", ".mat", ".pt"])
def test_queries_and_gallery_may_be_joined(tmp_path: Path, suffix: str) -> None:
    content: dict[str, Any] = {
        "feats": np.concatenate([QUERY, GALLERY]),
        "pids": np.concatenate([PEOPLE, GALLERY_PEOPLE]),
        "camids": np.concatenate([CAMERAS, GALLERY_CAMERAS]),
        "num_query": np.array(Q),
    }
    check(read_feature_file(write(tmp_path, content, suffix)))
    content["feats"] = content["feats"].T.copy()
    check(read_feature_file(write(tmp_path, content, suffix)))
    for wrong in (0, Q + G, -1):
        with pytest.raises(UserError, match=rf"num_query is \[{wrong}\]; one number from 1 to 7"):
            read_feature_file(write(tmp_path, {**content, "num_query": np.array(wrong)}, suffix))
    with pytest.raises(UserError, match="no num_query"):
        read_feature_file(write(tmp_path, {"feats": content["feats"], "pids": content["pids"]}, suffix))


def test_transposed_features_are_turned_and_it_is_said(tmp_path: Path) -> None:
    found = read_feature_file(write(tmp_path, {**OURS, "query_features": QUERY.T, "gallery_features": GALLERY.T}))
    check(found)
    assert len(found.notes) == 2
    assert "query_features is transposed, [4, 3] in the file" in found.notes[0]
    # A square says nothing by itself; the other part does.
    square = RANDOM.standard_normal((4, 4))
    four = {"query_features": square, "query_people": np.arange(4), "query_cameras": np.arange(4)}
    as_is = read_feature_file(write(tmp_path, {**OURS, **four}))
    np.testing.assert_array_equal(as_is.query_features, square)
    turned = read_feature_file(write(tmp_path, {**OURS, **four, "gallery_features": GALLERY.T}))
    np.testing.assert_array_equal(turned.query_features, square.T)


@pytest.mark.parametrize(
    "mend",
    [
        lambda labels: labels[None],
        lambda labels: labels[:, None],
        lambda labels: labels.astype(np.float64),
        lambda labels: labels.astype(np.uint8)[None],
        lambda labels: np.array([f"{label:04d}" for label in labels]),
        lambda labels: np.array([f"{label}".encode() for label in labels]),
    ],
    ids=["row", "column", "float", "bytes", "text", "byte strings"],
)
def test_labels_are_whole_numbers_whatever_has_become_of_them(tmp_path: Path, mend) -> None:
    content = {name: value if name.endswith("features") else mend(value) for name, value in OURS.items()}
    check(read_feature_file(write(tmp_path, content)))
    check(read_feature_file(write(tmp_path, content, ".mat")))


def test_a_file_without_cameras_leaves_nothing_out(tmp_path: Path) -> None:
    found = read_feature_file(write(tmp_path, {name: value for name, value in OURS.items() if not name.endswith("cameras")}))
    check(found, has_cameras=False)
    assert set(found.query.cameras) & set(found.gallery.cameras) == set()
    assert "no cameras" in found.notes[0]


def test_number_formats(tmp_path: Path) -> None:
    for kind, expected in (("f2", np.float32), ("f8", np.float64), ("i1", np.float32), ("i8", np.float64), (">f4", np.float64)):
        content = {**OURS, "query_features": (QUERY * 9).astype(kind), "gallery_features": (GALLERY * 9).astype(kind)}
        found = read_feature_file(write(tmp_path, content))
        assert found.query_features.dtype == expected
        np.testing.assert_array_equal(found.query_features, content["query_features"])
    content = {**OURS, "query_features": torch.from_numpy(QUERY).bfloat16(), "query_people": PEOPLE.tolist()}
    content |= {"gallery_features": torch.from_numpy(GALLERY).bfloat16().requires_grad_()}
    found = read_feature_file(write(tmp_path, content, ".pt"))
    np.testing.assert_array_equal(found.query_features, torch.from_numpy(QUERY).bfloat16().float().numpy())


def nan_at(array: np.ndarray, row: int, value: float) -> np.ndarray:
    changed = array.copy()
    changed[row, 1] = value
    return changed


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("missing", {"query_features": None}, r"has no query_features \(also known as query_feature, .*\); it has .*query_people"),
    ("no people", {"gallery_people": None}, "has no gallery_people"),
    ("one camera", {"gallery_cameras": None}, "no cameras of the gallery"),
    ("twice", {"query_f": QUERY}, "query_features and query_f both mean query_features"),
    ("length", {"query_people": PEOPLE[:2], "query_cameras": CAMERAS[:2]}, r"query_features has shape \[3, 4\], but there are labels of 2 images"),
    ("cameras", {"query_cameras": CAMERAS[:2]}, "query_people has 3 entries, query_cameras 2"),
    ("paths", {"gallery_paths": np.array(["a", "b"])}, "gallery_people has 5 entries, gallery_paths 2"),
    ("width", {"gallery_features": RANDOM.standard_normal((G, 6))}, "query_features has 4 dimensions, gallery_features 6"),
    ("nan", {"gallery_features": nan_at(GALLERY, 3, np.nan)}, r"gallery_features: row 3 is not finite \(1 such rows of 5\)"),
    ("infinite", {"query_features": nan_at(QUERY, 0, -np.inf)}, "query_features: row 0 is not finite"),
    ("axes", {"query_features": QUERY[0]}, r"query_features has shape \[4\]"),
    ("empty", {"gallery_features": np.zeros((0, 4))}, r"shape \[0, 4\]"),
    ("complex", {"query_features": QUERY * 1j}, "real numbers are wanted"),
    ("label axes", {"query_people": np.zeros((2, 3), int)}, r"query_people has shape \[2, 3\]"),
    ("fraction", {"query_people": np.array([1, 2.5, 3])}, r"query_people: 2\.5 in row 1"),
    ("nan label", {"query_cameras": np.array([1, 2, np.nan])}, "query_cameras: nan in row 2"),
    ("huge", {"query_people": np.array([1, 2, 2**63], np.uint64)}, "query_people: 9223372036854775808 in row 2"),
    ("rounded float", {"query_people": np.array([1, 2, 2**24 + 2], np.float32)}, "query_people: 16777218.0 in row 2 is no whole number that float32"),
    ("huge float", {"query_people": np.array([1, 2, 2.0**63])}, "query_people: 9.2.* in row 2"),
    ("huge text", {"query_people": np.array(["1", "2", str(2**70)])}, "no whole number"),
    ("text", {"query_people": np.array(["1", "2", "three"])}, "no whole number"),
    ("negative", {"gallery_people": np.array([9, 7, -3, 0, 3])}, "row 2 beside gallery_features is of person -3"),
    ("all junk", {"gallery_people": np.full(G, -1)}, r"gallery_features has no image of a person \(5 of junk\)"),
]


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_what_cannot_be_mended_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write(tmp_path, {name: value for name, value in {**OURS, **change}.items() if value is not None})
    with pytest.raises(UserError, match=message) as caught:
        read_feature_file(path)
    assert str(path) in str(caught.value)


class Bomb:
    """What a pickle would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("unpickled",)


def test_nothing_is_unpickled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="query_people holds Python objects"):
        read_feature_file(write(tmp_path, {**OURS, "query_people": np.array([Bomb(), 1, 2], object)}))
    torch.save({**OURS, "bomb": Bomb()}, tmp_path / "features.pt")
    with pytest.raises(UserError, match="could run any code"):
        read_feature_file(tmp_path / "features.pt")
    torch.save([1, 2], tmp_path / "features.pt")
    with pytest.raises(UserError, match="holds a list"):
        read_feature_file(tmp_path / "features.pt")
    assert capsys.readouterr().out == ""


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"read from \.npz, \.mat, \.pt, \.pth, not \.csv"):
        read_feature_file(tmp_path / "features.csv")
    with pytest.raises(UserError, match="no such file"):
        read_feature_file(tmp_path / "features.npz")
    for suffix in (".npz", ".mat", ".pt"):
        for content in (b"", b"rubbish" * 50):
            (tmp_path / f"features{suffix}").write_bytes(content)
            with pytest.raises(UserError, match=r"cannot be read|is not read"):
                read_feature_file(tmp_path / f"features{suffix}")
    (tmp_path / "features.mat").write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(400))
    with pytest.raises(UserError, match=r"version 7\.3; save it with -v7"):
        read_feature_file(tmp_path / "features.mat")


def test_claims_are_compared_with_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, OURS)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10_000_000, 4096)})
    with zipfile.ZipFile(tmp_path / "claim.npz", "w") as claim, zipfile.ZipFile(path) as honest:
        for name in honest.namelist():
            claim.writestr(name, header.getvalue() + bytes(64) if name == "gallery_features.npy" else honest.read(name))
    with pytest.raises(UserError, match=r"gallery_features says it is \[10000000, 4096\] float32, 152\.59 GiB, but"):
        read_feature_file(tmp_path / "claim.npz")
    # A matrix of MATLAB's with 2^31 - 1 rows and columns.
    whole = bytearray(write(tmp_path, OURS, ".mat").read_bytes())
    place = whole.index(np.array([Q, D], np.int32).tobytes())
    whole[place : place + 8] = np.array([2**31 - 1] * 2, np.int32).tobytes()
    (tmp_path / "claim.mat").write_bytes(whole)
    with pytest.raises(UserError, match=r"claim\.mat.* query_features takes [\d,.]+ GiB; this machine has"):
        read_feature_file(tmp_path / "claim.mat")
    monkeypatch.setattr(feature_containers.os, "sysconf", lambda name: 7)
    for suffix in (".npz", ".pt"):
        with pytest.raises(UserError, match=r"GiB; this machine has 0\.0 GiB of memory"):
            read_feature_file(write(tmp_path, OURS, suffix))


def test_a_matlab_file_that_crashes_its_reader_is_damaged(tmp_path: Path) -> None:
    whole = bytearray(write(tmp_path, OURS, ".mat").read_bytes())
    # A type of data that does not exist, on which scipy 1.17 reads outside its table.
    whole[whole.index(b"gallery_people") + 17] = 1
    (tmp_path / "features.mat").write_bytes(whole)
    with pytest.raises(UserError, match=r"features\.mat cannot be read as a MATLAB file"):
        read_feature_file(tmp_path / "features.mat")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(suffix=st.sampled_from([".npz", ".pt"]), data=st.data())
def test_damage_is_a_user_error_or_does_no_harm(tmp_path: Path, suffix: str, data: st.DataObject) -> None:
    whole = bytearray(write(tmp_path, OURS, suffix).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / f"damaged{suffix}"
    path.write_bytes(whole[: data.draw(st.integers(len(whole) // 2, len(whole)))])
    with contextlib.suppress(UserError):
        found = read_feature_file(path)
        assert np.isfinite(found.query_features).all()
        assert found.query_features.shape[1] == found.gallery_features.shape[1]
