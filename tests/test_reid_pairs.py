"""VIPeR, PRID-2011, GRID, CUHK01: layouts, drawn splits, and the splits files of torchreid."""

import json

import numpy as np
import pytest
from reid_trees import labels, names, touch
from scipy.io import savemat

from personmae.configs import UserError
from personmae.data.reid import num_splits, open_reid_set
from personmae.data.reid.splits import draw_train_people


def viper(root, num=8):
    return touch(root, *(f"cam_a/{person:03d}_45.bmp" for person in range(num)), *(f"cam_b/{person:03d}_90.bmp" for person in range(num)))


def people(images):
    return {image.person for image in images}


def test_a_drawn_split_is_the_same_for_ever():
    assert draw_train_people(range(632), 316, 0) != draw_train_people(range(632), 316, 1)
    assert sorted(draw_train_people(range(12), 6, 0)) == sorted(draw_train_people(reversed(range(12)), 6, 0)) == FIRST_HALF
    halves = np.array([[person in draw_train_people(range(60), 30, number) for person in range(60)] for number in range(200)])
    assert (halves.sum(1) == 30).all()
    assert abs(halves.mean(0) - 0.5).max() < 0.15


# As drawn when this was written: other numbers would be other splits under the same name.
FIRST_HALF = [0, 4, 5, 8, 10, 11]


def test_viper_both_ways(tmp_path):
    root = viper(tmp_path / "viper" / "VIPeR")
    assert num_splits("viper") == 20
    for number in range(20):
        found = open_reid_set("viper", tmp_path, split=number)
        query_camera = 1 + number % 2
        assert {image.camera for image in found.query} == {query_camera}
        assert {image.camera for image in found.gallery} == {3 - query_camera}
        assert people(found.query) == people(found.gallery) == set(range(8)) - people(found.train)
        assert len(found.train) == 8
        assert found.split == f"split {number}"
    even, odd = open_reid_set("viper", root, split=4), open_reid_set("viper", root, split=5)
    assert even.train == odd.train
    assert even.query == odd.gallery
    assert "drawn" in even.notes[-1]
    with pytest.raises(UserError, match="no split 20 of viper"):
        open_reid_set("viper", root, split=20)


def test_viper_of_other_people(tmp_path):
    root = touch(viper(tmp_path), "cam_b/099_0.bmp")
    with pytest.raises(UserError, match="person 99 is seen by one camera alone"):
        open_reid_set("viper", root)


def test_a_splits_file_written_elsewhere(tmp_path):
    root = viper(tmp_path / "viper" / "VIPeR")

    def rows(letter, angle, ids):
        return [[f"C:\\someone\\viper\\VIPeR\\cam_{letter}\\{person:03d}_{angle}.bmp", 0, 0] for person in ids]

    split = {"train": rows("a", 45, [5, 6]) + rows("b", 90, [5, 6]), "query": rows("b", 90, [7, 1]), "gallery": rows("a", 45, [7, 1])}
    (tmp_path / "viper" / "splits.json").write_text(json.dumps([split, split]))
    found = open_reid_set("viper", tmp_path, split=1)
    assert labels(found.train) == [(5, 1), (5, 2), (6, 1), (6, 2)]
    assert labels(found.query) == [(1, 2), (7, 2)]
    assert labels(found.gallery) == [(1, 1), (7, 1)]
    assert "splits.json" in found.notes[-1]
    with pytest.raises(UserError, match="no split 2 of"):
        open_reid_set("viper", root, split=2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("{}", "not a list of splits"),
        ("[]", "not a list of splits"),
        ("[3]", "no list 'train'"),
        ('[{"train": [["a"]], "query": 3}]', "there is no a here"),
        ('[{"train": [], "query": [5], "gallery": []}]', "no list 'query'"),
        ('[{"train": [], "query": [["/x/cam_a/077_45.bmp", 0, 0]], "gallery": []}]', r"no cam_a/077_45.bmp here"),
    ],
)
def test_broken_splits_files(tmp_path, content, message):
    root = viper(tmp_path)
    (root / "splits.json").write_text(content)
    with pytest.raises(UserError, match=message):
        open_reid_set("viper", root)


def prid(root):
    first = [f"cam_a/person_{person:04d}.png" for person in (*range(1, 7), 201, 202)]
    return touch(root, *first, *(f"cam_b/person_{person:04d}.png" for person in (*range(1, 7), 201, 203)))


def test_prid(tmp_path):
    prid(tmp_path / "prid2011" / "prid_2011" / "single_shot")
    found = open_reid_set("prid2011", tmp_path, split=3)
    assert len(people(found.train)) == 3
    assert len(found.train) == 6
    assert {image.camera for image in found.query} == {1}
    assert {image.camera for image in found.gallery} == {2}
    # 201 is one person in camera a and another in camera b.
    assert people(found.gallery) == people(found.query) | {201, 203}
    assert people(found.query) <= set(range(1, 7))
    (tmp_path / "prid2011" / "splits_single_shot.json").write_text('[{"train": [1, 2, 5], "test": [3, 4, 6]}]')
    found = open_reid_set("prid2011", tmp_path)
    assert people(found.train) == {1, 2, 5}
    assert people(found.query) == {3, 4, 6}
    for content, message in (
        ('[{"train": [1, 201], "test": []}]', "trains on a person"),
        ("[3]", "is not a list of"),
        ('[{"train": [[1]]}]', "is not a list of"),
    ):
        (tmp_path / "prid2011" / "splits_single_shot.json").write_text(content)
        with pytest.raises(UserError, match=message):
            open_reid_set("prid2011", tmp_path)


def grid(root):
    probe = [f"probe/{person:04d}_{camera}_25004_107_32_106_221.jpeg" for person, camera in ((1, 1), (2, 5), (3, 3), (4, 6))]
    gallery = [f"gallery/{person:04d}_{camera}_25004_10_32_106_22.jpeg" for person, camera in ((1, 2), (2, 6), (3, 4), (4, 8), (0, 7))]
    return touch(root, *probe, *gallery)


def test_grid(tmp_path):
    root = grid(tmp_path / "grid" / "underground_reid")
    found = open_reid_set("grid", tmp_path)
    assert people(found.gallery) == people(found.query) | {0}
    assert len(found.train) == 4
    assert "official" in found.notes[-1]
    # The field's names do not matter, its place does.
    cells = np.empty((1, 2), dtype=object)
    for number, train in enumerate(([1, 3], [2, 4])):
        cells[0, number] = {"a": 1, "b": "x", "c": np.array([train])}
    savemat(root / "features_and_partitions.mat", {"trainIdxAll": cells, "features": np.zeros((2, 2))})
    found = open_reid_set("grid", tmp_path, split=1)
    assert labels(found.train) == [(2, 5), (2, 6), (4, 6), (4, 8)]
    assert labels(found.query) == [(1, 1), (3, 3)]
    assert labels(found.gallery) == [(0, 7), (1, 2), (3, 4)]
    (root.parent / "splits.json").write_text(
        json.dumps([{"train": [], "query": [["probe/" + names(found.query)[0], 0, 0]], "gallery": [["gallery/" + names(found.gallery)[1], 9, 9]]}])
    )
    assert labels(open_reid_set("grid", tmp_path).gallery) == [(1, 2)]


@pytest.mark.parametrize("content", [b"", b"MATLAB 5.0 nonsense", bytes(200)])
def test_broken_partitions(tmp_path, content):
    root = grid(tmp_path)
    (root / "features_and_partitions.mat").write_bytes(content)
    with pytest.raises(UserError, match=r"features_and_partitions.mat"):
        open_reid_set("grid", root)


@pytest.mark.parametrize("value", [np.zeros((1, 3)), np.array([["a"]])])
def test_partitions_of_another_form(tmp_path, value):
    root = grid(tmp_path)
    savemat(root / "features_and_partitions.mat", {"trainIdxAll": value})
    with pytest.raises(UserError, match="third field"):
        open_reid_set("grid", root)
    savemat(root / "features_and_partitions.mat", {"other": value})
    with pytest.raises(UserError, match="no variable 'trainIdxAll'"):
        open_reid_set("grid", root)


def test_cuhk01(tmp_path):
    touch(tmp_path / "cuhk01" / "campus", *(f"{person:04d}{image:03d}.png" for person in (1, 2, 3, 4, 971) for image in (1, 2, 3, 4)))
    found = open_reid_set("cuhk01", tmp_path, split=1)
    assert len(people(found.train)) == 2
    assert len(found.train) == 8
    assert {image.camera for image in found.query} == {2}
    assert names(found.query)[0][4:] == "003.png"
    assert len(found.query) == len(found.gallery) == 6
