"""Readers of labelled sets: names, junk, distractors, and what is said when a folder is not what it should be."""

from __future__ import annotations

from pathlib import Path

import pytest

from personmae.configs import UserError
from personmae.data.records import PersonImage
from personmae.data.reid import read_market_layout


def make_set(root: Path, **folders: list[str]) -> Path:
    for folder, names in folders.items():
        (root / folder).mkdir(parents=True)
        for name in names:
            (root / folder / name).touch()
    return root


def test_market_names_junk_and_distractors(tmp_path: Path) -> None:
    root = make_set(
        tmp_path / "Market-1501-v15.09.15",
        bounding_box_train=["0002_c1s1_000451_03.jpg", "0002_c3s1_000551_01.jpg", "0007_c6s4_001000_00.jpg"],
        query=["0001_c1s1_001051_00.jpg"],
        bounding_box_test=[
            "-1_c1s1_000401_03.jpg",
            "0000_c2s1_000301_01.jpg",
            "0001_c2s1_001051_00.jpg",
            "-1_c3s2_000401_03.jpg",
        ],
    )
    reid_set = read_market_layout(root)
    assert reid_set.name == "Market-1501-v15.09.15"
    assert [(image.person, image.camera) for image in reid_set.train] == [(2, 1), (2, 3), (7, 6)]
    assert reid_set.query == [PersonImage(root / "query" / "0001_c1s1_001051_00.jpg", 1, 1)]
    assert [(image.person, image.camera) for image in reid_set.gallery] == [(0, 2), (1, 2)]
    assert reid_set.num_junk == 2
    assert "gallery 2 images of 2 people from 1 cameras" in reid_set.describe()
    assert "2 junk" in reid_set.describe()


@pytest.mark.parametrize(
    ("name", "person", "camera"),
    [
        ("0001_c2_f0046182.jpg", 1, 2),  # Duke and Occluded-Duke
        ("1234_c14_0303morning_0015_0.jpg", 1234, 14),  # repacked MSMT17: two digits
        ("0007_c10s12_000001_00.JPG", 7, 10),
        ("0001_c1_1.png", 1, 1),  # CUHK03-NP
        ("0001_c1s1_000000_00.jpe", 1, 1),
        ("0001_c1s1_000000_00.JFIF", 1, 1),
    ],
)
def test_names_of_other_sets(tmp_path: Path, name: str, person: int, camera: int) -> None:
    reid_set = read_market_layout(make_set(tmp_path, query=[name], bounding_box_test=[name]))
    assert [(image.person, image.camera) for image in reid_set.query] == [(person, camera)]
    assert reid_set.train == []


def test_only_the_base_name_counts(tmp_path: Path) -> None:
    root = make_set(
        tmp_path / "run_2024_c3", query=["0001_c1s1_000000_00.jpg"], bounding_box_test=["0001_c2s1_000000_00.jpg"]
    )
    assert [(image.person, image.camera) for image in read_market_layout(root).query] == [(1, 1)]


def test_order_is_that_of_the_names(tmp_path: Path) -> None:
    names = [f"{person:04d}_c{camera}s1_000000_00.jpg" for person in (9, 3, 7) for camera in (2, 1)]
    gallery = read_market_layout(make_set(tmp_path, query=names[:1], bounding_box_test=names)).gallery
    assert [image.path.name for image in gallery] == sorted(names)


def test_other_files_are_passed_over(tmp_path: Path) -> None:
    names = ["0001_c1s1_000000_00.jpg", "Thumbs.db", "._0001_c1s1_000000_00.jpg", "readme.txt", ".DS_Store"]
    assert len(read_market_layout(make_set(tmp_path, query=names, bounding_box_test=names)).gallery) == 1


@pytest.mark.parametrize(
    "name",
    ["x0001_c1s1_000000_00.jpg", "0001c1.jpg", "-2_c1s1_000000_00.jpg", "0001_cs1_000000_00.jpg", "0001_c1x.jpg"],
)
def test_a_name_without_person_and_camera_is_an_error(tmp_path: Path, name: str) -> None:
    root = make_set(tmp_path, query=[name], bounding_box_test=["0001_c1s1_000000_00.jpg"])
    with pytest.raises(UserError, match=name):
        read_market_layout(root)


def test_missing_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        read_market_layout(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no folder 'query'"):
        read_market_layout(tmp_path)
    make_set(tmp_path / "inner", query=[], bounding_box_test=[])
    with pytest.raises(UserError, match=r"inner is$"):
        read_market_layout(tmp_path)
    with pytest.raises(UserError, match="query holds no image"):
        read_market_layout(tmp_path / "inner")


def test_a_gallery_of_junk_alone_is_empty(tmp_path: Path) -> None:
    root = make_set(tmp_path, query=["0001_c1s1_000000_00.jpg"], bounding_box_test=["-1_c1s1_000000_00.jpg"])
    with pytest.raises(UserError, match="bounding_box_test holds no image"):
        read_market_layout(root)
