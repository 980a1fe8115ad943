"""CUHK03, classic and new protocol: the extracted layout with its files of splits, and CUHK03-NP in Market-1501's layout."""

import json

import numpy as np
import pytest
from reid_trees import labels, touch
from scipy.io import savemat

from personmae.configs import UserError
from personmae.data.reid import num_splits, open_reid_set

FILES = ["1_001_1_01.png", "1_001_2_06.png", "1_002_1_01.png", "1_002_2_07.png", "2_001_1_01.png", "2_001_2_06.png"]


def extracted(root, kind="labeled"):
    return touch(root, *(f"images_{kind}/{file}" for file in FILES))


def rows(files, kind="labeled"):
    return [[f"/elsewhere/cuhk03/images_{kind}/{file}", 0, 0] for file in files]


def test_classic(tmp_path):
    root = extracted(tmp_path / "cuhk03", "detected")
    test = rows(FILES[4:], "detected")
    splits = [{"train": rows(FILES[:4], "detected"), "query": test, "gallery": test}] * 20
    (root / "splits_classic_detected.json").write_text(json.dumps(splits))
    assert num_splits("cuhk03-classic-detected") == 20
    found = open_reid_set("cuhk03_classic_detected", tmp_path, split=19)
    # Numbers begin anew in each part of the file, but not in ours.
    assert labels(found.train) == [(10_001, 1), (10_001, 2), (10_002, 1), (10_002, 2)]
    assert labels(found.query) == [(20_001, 1), (20_001, 2)]
    assert found.query == found.gallery
    assert found.single_gallery_shot
    with pytest.raises(UserError, match="not in"):
        open_reid_set("cuhk03-classic-labelled", tmp_path)


def test_the_raw_file_is_not_read_and_the_cure_is_said(tmp_path):
    root = extracted(touch(tmp_path, "cuhk03_release/cuhk-03.mat"))
    with pytest.raises(UserError, match=r"splits_classic_labeled.json is missing.*let torchreid's CUHK03 extract it once"):
        open_reid_set("cuhk03-classic-labelled", root)


def test_new_protocol_by_json(tmp_path):
    root = extracted(tmp_path)
    (root / "splits_new_labeled.json").write_text(json.dumps([{"train": rows(FILES[:2]), "query": rows(FILES[4:5]), "gallery": rows(FILES[5:])}]))
    found = open_reid_set("cuhk03-np-labeled", root)
    assert found.name == "cuhk03-np-labelled"
    assert labels(found.query) == [(20_001, 1)]
    assert not found.single_gallery_shot


def write_mat(root, **changes):
    filelist = np.empty((len(FILES), 1), dtype=object)
    filelist[:, 0] = FILES
    content = {
        "filelist": filelist,
        "labels": np.arange(6)[:, None],
        "train_idx": np.array([[1], [2]]),
        "query_idx": np.array([[5]]),
        "gallery_idx": [[6]],
    }
    savemat(root / "cuhk03_new_protocol_config_labeled.mat", content | changes)


def test_new_protocol_by_mat(tmp_path):
    root = extracted(tmp_path)
    write_mat(root)
    found = open_reid_set("cuhk03-np-labelled", root)
    assert labels(found.train) == [(10_001, 1), (10_001, 2)]
    assert labels(found.query) == [(20_001, 1)]
    assert labels(found.gallery) == [(20_001, 2)]
    write_mat(root, query_idx=[[7]])
    with pytest.raises(UserError, match="query_idx names file 7 of 6"):
        open_reid_set("cuhk03-np-labelled", root)
    (root / "images_labeled" / FILES[0]).unlink()
    write_mat(root)
    with pytest.raises(UserError, match=r"names 1_001_1_01.png, which is not among the images"):
        open_reid_set("cuhk03-np-labelled", root)


def test_np_in_market_layout(tmp_path):
    for kind in ("labeled", "detected"):
        touch(tmp_path / "cuhk03-np" / kind, "bounding_box_train/0001_c1_1.png", "query/0002_c1_1.png", "bounding_box_test/0002_c2_2.png")
    found = open_reid_set("cuhk03-np-detected", tmp_path)
    assert found.name == "cuhk03-np-detected"
    assert found.query[0].path.parent.parent.name == "detected"
    assert open_reid_set("cuhk03-np-labelled", tmp_path / "cuhk03-np").query[0].path.parent.parent.name == "labeled"
    with pytest.raises(UserError, match="holds the detected images of CUHK03-NP"):
        open_reid_set("cuhk03-np-labelled", tmp_path / "cuhk03-np" / "detected")
    with pytest.raises(UserError, match=r"name it: cuhk03-np-labelled in .*labeled, cuhk03-np-detected in .*detected"):
        open_reid_set(None, tmp_path / "cuhk03-np")
