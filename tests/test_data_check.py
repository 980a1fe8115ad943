"""`personmae data check`: what it prints and its exit status, on sets that are sound and on every kind that is not."""

import pickle
import shutil

import pytest
from reid_trees import draw, market, touch
from test_luperson import KEYS, database  # noqa: F401 (a fixture)

from personmae.configs import UserError
from personmae.data.reid import published
from personmae.data.reid.published import Counts
from personmae.recipes.programs import DataCheckConfig
from personmae.tasks import data_check


def check(name, root, **settings):
    """(exit status, everything that was said)."""
    lines = []
    status = data_check.main(DataCheckConfig(name=name, root=root, **settings), lines.append)
    return status, "\n".join(lines)


@pytest.fixture
def counts(monkeypatch):
    """Counts of the small tree, as if they had been published."""
    known = {"train": Counts(4, 2, 2), "query": Counts(2, 2, 1), "gallery": Counts(3, 3, 1)}
    monkeypatch.setitem(published.PUBLISHED, "market1501", known)
    return known


def test_a_sound_set(tmp_path, counts):
    status, said = check("market1501", market(tmp_path))
    assert status == 0
    for words in (
        "train            4        2  2.0 (2 to 2)                     2 (1: 2, 2: 2)",
        "1 junk images",
        "ok     images, people and cameras are as many as published",
        "ok     no person is in train",
        "ok     every query has a match",
        "ok     all 9 files are decoded to the end",
        "ok     no image is there twice",
    ):
        assert words in said
    assert "wrong" not in said
    assert "read as market-layout" in check("auto", tmp_path)[1]
    assert "it has as many images as market1501" in check("auto", tmp_path)[1]


def test_missing_images(tmp_path, counts):
    root = market(tmp_path)
    (root / "bounding_box_train" / "0007_c2s1_000001_00.jpg").unlink()
    status, said = check("market1501", root)
    assert status == 1
    assert "wrong  train has 3 images, 1 fewer than published (4)" in said
    shutil.rmtree(root / "bounding_box_train")
    said = check("market1501", root)[1]
    assert "train has 0 images, 4 fewer" in said
    assert "train has 0 people, 2 fewer" in said


def test_unreadable_files(tmp_path):
    root = market(tmp_path)
    broken = root / "query" / "0001_c1s1_000001_00.jpg"
    broken.write_bytes(broken.read_bytes()[:-20])
    (root / "query" / "0003_c1s1_000001_00.jpg").write_bytes(b"")
    status, said = check("market-layout", root)
    assert status == 1
    assert "wrong  2 of 9 files are unreadable" in said
    assert f"{broken}: truncated or damaged" in said
    assert "empty file" in said
    status, said = check("market-layout", root, decode=False)
    assert "wrong  1 of 9 files are unreadable" in said
    status, said = check("market-layout", root, max_listed=1)
    assert "2 more; --max-listed" in said


def test_missing_files_of_a_table(tmp_path):
    (tmp_path / "a.csv").write_text("path,person,camera,split\nno.jpg,1,1,query\nnone.jpg,1,2,gallery\n")
    status, said = check("csv", tmp_path / "a.csv")
    assert status == 1
    assert "cannot be read: No such file" in said


def test_leakage(tmp_path):
    root = market(tmp_path)
    shutil.copy(root / "bounding_box_train" / "0002_c1s1_000001_00.jpg", root / "bounding_box_test" / "0003_c4s1_000009_00.jpg")
    status, said = check("market-layout", root)
    assert status == 1
    assert "wrong  1 images of train are in query or gallery too, as 0002_c1s1_000001_00.jpg" in said
    assert "note   1 images have the labels of two people" in said


def test_shared_people(tmp_path):
    root = draw(market(tmp_path), "bounding_box_test/0007_c3s1_000009_00.jpg", first_seed=90)
    status, said = check("market-layout", root)
    assert status == 1
    assert "wrong  1 people are in train and in query or gallery, as 7" in said


def test_person_0_is_a_distractor_unless_it_is_asked_for(tmp_path):
    root = draw(market(tmp_path / "a"), "bounding_box_train/0000_c3s1_000009_00.jpg", "bounding_box_test/0000_c4s1_000009_00.jpg", first_seed=90)
    assert "no person is in train and in query or gallery" in check("market-layout", root)[1]
    draw(root, "query/0000_c5s1_000009_00.jpg", first_seed=95)
    status, said = check("market-layout", root)
    assert status == 1
    assert "1 people are in train and in query or gallery, as 0" in said


def test_queries_in_the_gallery(tmp_path):
    root = market(tmp_path)
    query = root / "query" / "0001_c1s1_000001_00.jpg"
    shutil.copy(query, root / "bounding_box_test" / "0001_c1s1_000001_00.jpg")
    status, said = check("market-layout", root)
    assert status == 0
    assert "note   1 queries are in the gallery too, as the same person from the same camera" in said
    shutil.copy(query, root / "bounding_box_test" / "0001_c5s1_000001_00.jpg")
    status, said = check("market-layout", root)
    assert status == 1
    assert "wrong  1 queries are in the gallery too, as another person or from another camera" in said
    assert "note   1 images are there several times in one part" in said


def test_queries_without_a_match(tmp_path):
    root = market(tmp_path)
    (root / "bounding_box_test" / "0003_c2s1_000001_00.jpg").unlink()
    status, said = check("market-layout", root)
    assert status == 0
    assert "note   1 of 2 queries have no match from another camera" in said
    (root / "bounding_box_test" / "0001_c2s1_000001_00.jpg").unlink()
    status, said = check("market-layout", root)
    assert status == 1
    assert "nothing to score" in said


def test_cameras_that_are_not_told(tmp_path, monkeypatch):
    draw(tmp_path, *(f"{folder}/{person}.jpg" for folder in ("partial_body_images", "whole_body_images") for person in (1, 2)))
    monkeypatch.setitem(published.PUBLISHED, "partial-ilids", {"query": Counts(2, 2, 7), "gallery": Counts(2, 2, None)})
    status, said = check("partial-ilids", tmp_path)
    assert status == 0
    assert "not told" in said


def test_luperson_as_an_lmdb(tmp_path, database):  # noqa: F811
    touch(tmp_path, "lmdb/data.mdb")
    (tmp_path / "keys.pkl").write_bytes(pickle.dumps({"keys": KEYS, "pids": [1, 1, 1, 2, 2, 2]}))
    status, said = check("luperson", tmp_path)
    assert status == 0
    assert "6 keys, pids of 2 kinds" in said
    assert "ok     all 6 files are decoded to the end" in said
    database.content[KEYS[1].encode()] = database.content[KEYS[1].encode()][:100]
    del database.content[KEYS[3].encode()]
    status, said = check("LUPerson", tmp_path)
    assert status == 1
    assert "keys.pkl lists 6 keys, but the database has 5 entries" in said
    assert "wrong  2 of 6 files are unreadable" in said
    assert f"{KEYS[3]}: no such key" in said


def test_luperson_as_a_folder(tmp_path, monkeypatch):
    draw(tmp_path, "a/b/1.jpg", "a/2.jpg")
    monkeypatch.setattr(data_check, "NUM_LUPERSON", 2)
    status, said = check("luperson", tmp_path)
    assert status == 0
    assert "ok     as many images as published" in said


def test_mistakes_of_the_user(tmp_path):
    with pytest.raises(UserError, match="unknown data set"):
        check("marked", tmp_path)
    with pytest.raises(UserError, match="is not in"):
        check("market1501", tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        check("luperson", tmp_path / "no")
    with pytest.raises(UserError, match="max_listed is 0"):
        DataCheckConfig(name="auto", root=tmp_path, max_listed=0)
