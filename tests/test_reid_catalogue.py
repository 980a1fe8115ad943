"""Sets by name: the folders that code bases use, what is said of a missing one, and finding out what lies there."""

import pytest
from reid_trees import draw, labels, market, touch

from personmae.configs import UserError
from personmae.data.reid import REID_SETS, num_splits, open_reid_set
from personmae.data.reid.catalogue import ENTRIES, known_name
from personmae.data.reid.published import PUBLISHED


def test_every_set_has_a_description_and_most_have_counts():
    assert set(REID_SETS) == set(ENTRIES)
    assert set(ENTRIES) - set(PUBLISHED) == {"market-layout", "csv"}
    assert all(num_splits(name) >= 1 for name in REID_SETS)


@pytest.mark.parametrize(
    ("name", "folder"),
    [(name, folder) for name in ("market1501", "market1501-500k", "dukemtmc", "occluded-duke") for folder in ENTRIES[name].folders],
)
def test_folders_of_code_bases(tmp_path, name, folder):
    root = market(tmp_path / folder)
    touch(root, "images/0000_c1s1_000001_00.jpg")
    found = open_reid_set(name, tmp_path)
    assert found.name == name
    assert str(root) in found.notes[0]
    assert labels(found.train) == [(2, 1), (2, 2), (7, 1), (7, 2)]
    assert open_reid_set(name, root).query == found.query


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".bmp", ".JPG", ".TIFF"])
def test_suffixes(tmp_path, suffix):
    assert len(open_reid_set("market1501", market(tmp_path, suffix)).gallery) == 3


def test_a_parent_with_a_camera_in_its_name(tmp_path):
    found = open_reid_set("market1501", market(tmp_path / "run_2024_c3" / "market1501").parent)
    assert labels(found.query) == [(1, 1), (3, 1)]


def test_query_and_gallery_alone(tmp_path):
    found = open_reid_set("market1501", market(tmp_path, with_train=False))
    assert found.train == []
    assert "train 0 images of 0 people" in found.describe()


def test_distractors(tmp_path):
    root = market(tmp_path / "Market-1501-v15.09.15")
    with pytest.raises(UserError, match="no folder 'images'"):
        open_reid_set("market1501-500k", tmp_path)
    touch(root, "images/0000_c3s1_000001_00.jpg", "images/-1_c3s1_000001_01.jpg", "images/00000017.jpg", "images/0001_c9s1_0.jpg")
    found = open_reid_set("market1501-500k", tmp_path)
    # Without a parseable name: still a distractor. With a person's number: a distractor all the same.
    assert labels(found.gallery) == [(0, 2), (0, 3), (0, 0), (1, 2), (0, 9), (3, 2)] or sorted(labels(found.gallery)) == sorted(
        [(0, 2), (0, 3), (0, 0), (1, 2), (0, 9), (3, 2)]
    )
    assert "3 distractors" in found.notes[-1]
    assert len(open_reid_set("market1501", tmp_path).gallery) == 3


def test_spellings():
    assert known_name("Market_1501") == known_name("market") == "market1501"
    assert known_name("cuhk03_np_labeled") == "cuhk03-np-labelled"
    with pytest.raises(UserError, match="unknown data set 'market15001'; did you mean market1501"):
        known_name("market15001")
    with pytest.raises(UserError, match="luperson has no query and gallery"):
        known_name("LUPerson")


def test_a_missing_set_is_said_with_what_and_where(tmp_path):
    with pytest.raises(UserError) as caught:
        open_reid_set("market1501", touch(tmp_path, "market_1501/readme.txt"))
    text = str(caught.value)
    for words in (
        "market1501 is not in",
        "query, bounding_box_test and bounding_box_train",
        "market1501/Market-1501-v15.09.15",
        "there is market_1501",
        "nothing is downloaded",
    ):
        assert words in text
    assert f"put them into {tmp_path / 'Market-1501-v15.09.15'}" in text
    with pytest.raises(UserError, match=rf"no such folder: .*there is {tmp_path.name}"):
        open_reid_set("market1501", tmp_path.parent / (tmp_path.name + "s"))


@pytest.mark.parametrize("name", [name for name in ENTRIES if name != "csv"])
def test_every_set_says_where_it_belongs(tmp_path, name):
    with pytest.raises(UserError, match=f"{name} is not in {tmp_path}: it does not hold"):
        open_reid_set(name, tmp_path)
    with pytest.raises(UserError, match=f"{name} is not in .*: it does not hold"):
        open_reid_set(name, touch(tmp_path, "file") / "file")


def test_the_same_set_twice(tmp_path):
    market(tmp_path / "market1501")
    market(tmp_path / "Market-1501-v15.09.15")
    with pytest.raises(UserError, match=r"holds market1501 2 times: .*give the path of one"):
        open_reid_set("market1501", tmp_path)
    # Unless they are one, by two names.
    (tmp_path / "other").mkdir()
    market(tmp_path / "other" / "market1501")
    (tmp_path / "other" / "Market-1501").symlink_to(tmp_path / "other" / "market1501")
    assert len(open_reid_set("market1501", tmp_path / "other").query) == 2


def test_the_folder_itself_wins(tmp_path):
    market(tmp_path)
    market(tmp_path / "market1501")
    assert open_reid_set("market1501", tmp_path).query[0].path.parent.parent == tmp_path


def test_found_out(tmp_path):
    found = open_reid_set(None, market(tmp_path / "anything"))
    assert found.name == "anything"
    assert "read as market-layout" in found.notes[0]
    market(tmp_path / "two" / "market1501")
    assert open_reid_set(None, tmp_path / "two").name == "market1501"
    market(tmp_path / "two" / "DukeMTMC-reID")
    with pytest.raises(UserError, match=r"one of several sets; name it: market1501 in .*, dukemtmc in "):
        open_reid_set(None, tmp_path / "two")
    with pytest.raises(UserError, match="holds no data set that is known"):
        open_reid_set(None, tmp_path)
    with pytest.raises(UserError, match="LUPerson's LMDB"):
        open_reid_set(None, touch(tmp_path / "lup", "lmdb/data.mdb"))
    with pytest.raises(UserError, match="neither a folder nor a CSV file"):
        open_reid_set(None, draw(tmp_path, "a.jpg") / "a.jpg")


@pytest.mark.parametrize("split", [-1, 1])
def test_splits_that_do_not_exist(tmp_path, split):
    with pytest.raises(UserError, match=f"no split {split} of market1501: it has 1"):
        open_reid_set("market1501", market(tmp_path), split=split)
