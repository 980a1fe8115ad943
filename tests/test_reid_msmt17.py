"""MSMT17: V1, V2 and repacked told apart, train and train + val told explicitly, lists that are missing or broken."""

import pytest
from reid_trees import MSMT17_LINES, labels, msmt17, names, touch

from personmae.configs import UserError
from personmae.data.reid import msmt17 as reader
from personmae.data.reid import open_reid_set


@pytest.mark.parametrize(("version", "folders"), [("V1", ("train", "test")), ("V2", ("mask_train_v2", "mask_test_v2"))])
def test_lists(tmp_path, version, folders):
    root = msmt17(tmp_path / "MSMT17", *folders)
    found = open_reid_set("msmt17", root)
    assert labels(found.train) == [(0, 1), (1, 14)]
    assert labels(found.query) == [(1041, 2)]
    assert labels(found.gallery) == [(1041, 3), (1042, 4)], "test people begin at 0 in the lists, and are moved up"
    assert names(found.gallery) == sorted(names(found.gallery))
    assert all(image.path.is_file() for images in found.parts().values() for image in images)
    assert version in found.notes[0]
    assert "without val" in found.notes[0]
    both = open_reid_set("msmt17-trainval", root)
    assert labels(both.train) == [(0, 1), (1, 14), (1, 15)]
    assert both.gallery == found.gallery


def test_a_missing_list_of_val_matters_to_trainval_alone(tmp_path):
    root = msmt17(tmp_path)
    (root / "list_val.txt").unlink()
    assert len(open_reid_set("msmt17", root).train) == 2
    with pytest.raises(UserError, match=r"list_val.txt is missing.*copy it from there"):
        open_reid_set("msmt17-trainval", root)


def test_a_missing_list_of_queries(tmp_path):
    root = msmt17(tmp_path)
    (root / "list_query.txt").unlink()
    with pytest.raises(UserError, match=r"list_query.txt is missing"):
        open_reid_set("msmt17", root)


def test_query_and_gallery_alone(tmp_path):
    root = msmt17(tmp_path)
    (root / "list_train.txt").unlink()
    (root / "list_val.txt").unlink()
    found = open_reid_set("msmt17", root)
    assert found.train == []
    assert labels(found.query) == [(1041, 2)]


def test_both_versions_in_one_folder_or_none(tmp_path):
    root = msmt17(tmp_path)
    (root / "mask_test_v2").mkdir()
    with pytest.raises(UserError, match="holds both versions"):
        open_reid_set("msmt17", root)
    for file in MSMT17_LINES:
        touch(tmp_path / "lists", file)
    with pytest.raises(UserError, match="lists but no images"):
        open_reid_set("msmt17", tmp_path / "lists")


@pytest.mark.parametrize(
    "line",
    [
        "0000/0000_000_01_a.jpg",
        "0000/0000_000_01_a.jpg x",
        "0000/0000_000_01_a.jpg -1",
        "0000/0000.jpg 3",
        "a_1_b.jpg 0",
        " 7",
        f"0_0_1_a.jpg {2**63}",
    ],
)
def test_broken_lines_are_named(tmp_path, line):
    root = msmt17(tmp_path)
    (root / "list_gallery.txt").write_text("0000/0000_001_03_0303morning_0002_0.jpg 0\n" + line + "\n")
    with pytest.raises(UserError, match=r"line 2|no person and camera"):
        open_reid_set("msmt17", root)


def repacked(root):
    train = [f"bounding_box_train/{person:04d}_c{camera}_{camera}.jpg" for person in (0, 1) for camera in (1, 15)]
    return touch(root, *train, "query/0000_c2_0001.jpg", "bounding_box_test/0000_c11_0001.jpg", "bounding_box_test/0001_c12_0001.jpg")


def test_repacked(tmp_path, monkeypatch):
    root = repacked(tmp_path / "msmt17" / "MSMT17_V1")
    found = open_reid_set("msmt17-trainval", tmp_path)
    assert labels(found.train) == [(0, 15), (0, 1), (1, 15), (1, 1)]
    assert labels(found.gallery) == [(1041, 11), (1042, 12)]
    assert any("repacked" in note for note in found.notes)
    # Neither of the two: `data check` tells how many are missing.
    assert len(open_reid_set("msmt17", tmp_path).train) == 4
    monkeypatch.setattr(reader, "NUM_TRAIN_AND_VAL_IMAGES", 4)
    with pytest.raises(UserError, match=r"4 images: train and val in one; name it msmt17-trainval"):
        open_reid_set("msmt17", tmp_path)
    monkeypatch.setattr(reader, "NUM_TRAIN_IMAGES", 4)
    assert len(open_reid_set("msmt17", root).train) == 4
    with pytest.raises(UserError, match=r"4 images: train alone; name it msmt17$"):
        open_reid_set("msmt17-trainval", root)


def test_found_out_it_must_still_be_said_which(tmp_path):
    with pytest.raises(UserError, match=r"name it: msmt17, msmt17-trainval"):
        open_reid_set(None, msmt17(tmp_path))


def test_two_versions_below_one_root(tmp_path):
    msmt17(tmp_path / "MSMT17_V1")
    msmt17(tmp_path / "MSMT17_V2", "mask_train_v2", "mask_test_v2")
    with pytest.raises(UserError, match="holds msmt17 2 times"):
        open_reid_set("msmt17", tmp_path)
