"""Sets without cameras: Occluded-REID, Partial-REID, Partial-iLIDS, P-DukeMTMC-reID."""

import pytest
from reid_trees import labels, touch

from personmae.configs import UserError
from personmae.data.reid import open_reid_set

OCCLUDED = [
    f"{folder}/{person:03d}/{person:03d}_{image:02d}.tif"
    for folder in ("occluded_body_images", "whole_body_images")
    for person in (1, 12)
    for image in (1, 2)
]


def test_occluded_reid(tmp_path):
    touch(tmp_path / "Occluded_REID", *OCCLUDED)
    found = open_reid_set("occluded-reid", tmp_path)
    assert labels(found.query) == [(1, 0), (1, 0), (12, 0), (12, 0)]
    assert labels(found.gallery) == [(1, 1), (1, 1), (12, 1), (12, 1)]
    assert not found.has_cameras
    assert found.train == []
    assert "cameras not told" in found.describe()
    found_out = open_reid_set(None, tmp_path / "Occluded_REID")
    assert found_out.query == found.query
    assert "read as occluded-reid" in found_out.notes[0]


def test_flat_folders_as_fast_reid_has_them(tmp_path):
    touch(tmp_path / "OccludedREID", "query/001_02.jpg", "gallery/001_01.JPG", "gallery/002_01.jpg")
    assert labels(open_reid_set("occluded-reid", tmp_path).gallery) == [(1, 1), (2, 1)]
    with pytest.raises(UserError, match=r"name it: occluded-reid, partial-reid, partial-ilids"):
        open_reid_set(None, tmp_path / "OccludedREID")


def test_name_and_folder_contradict(tmp_path):
    root = touch(tmp_path, *OCCLUDED, "whole_body_images/003/004_01.tif")
    with pytest.raises(UserError, match="the name says person 4, its folder person 3"):
        open_reid_set("occluded-reid", root)


def test_partial_reid_and_ilids_are_told_apart(tmp_path):
    reid = touch(
        tmp_path / "a",
        *(
            f"{folder}/{person:03d}_{image:03d}.jpg"
            for folder in ("partial_body_images", "whole_body_images")
            for person in (1, 60)
            for image in (1, 2)
        ),
    )
    ilids = touch(tmp_path / "b", *(f"{folder}/{person}.jpg" for folder in ("partial_body_images", "whole_body_images") for person in (1, 2, 119)))
    assert open_reid_set(None, reid).name == "partial-reid"
    found = open_reid_set(None, ilids)
    assert found.name == "partial-ilids"
    assert labels(found.query) == [(1, 0), (119, 0), (2, 0)]
    assert open_reid_set("partial-reid", reid).gallery == open_reid_set(None, reid).gallery


def test_lists_as_light_reid_reads_them(tmp_path):
    root = touch(tmp_path, "Probe/001.jpg", "Probe/002.jpg", "Gallery/001.jpg")
    (root / "Probe.txt").write_text("Probe/001.jpg\n\n")
    (root / "Gallery.txt").write_text("Gallery\\001.jpg\r\n")
    found = open_reid_set("partial-ilids", root)
    assert labels(found.query) == [(1, 0)]
    assert found.gallery[0].path.is_file()
    (root / "Gallery.txt").write_text("")
    with pytest.raises(UserError, match=r"Gallery.txt lists no image"):
        open_reid_set("partial-ilids", root)


def p_duke(root, parts=("train", "test")):
    for part, person in zip(parts, (5, 8), strict=False):
        for folder in ("occluded_body_images", "whole_body_images"):
            touch(root / part / folder, f"{person:04d}/{person:04d}_c2_f0046985.jpg", f"{person:04d}/{person:04d}_c7_f0046985.jpg")
    return root


def test_p_duke_in_both_settings(tmp_path):
    root = p_duke(tmp_path / "P-DukeMTMC-reID")
    supervised, zero_shot = (open_reid_set(name, tmp_path) for name in ("p-dukemtmc", "p-dukemtmc-zero-shot"))
    assert labels(supervised.train) == [(5, 0), (5, 1), (5, 0), (5, 1)]
    assert zero_shot.train == []
    assert supervised.query == zero_shot.query
    assert labels(supervised.query) == [(8, 0), (8, 0)]
    assert "supervised" in supervised.notes[-1]
    assert "zero-shot" in zero_shot.notes[-1]
    with pytest.raises(UserError, match="name it: p-dukemtmc, p-dukemtmc-zero-shot"):
        open_reid_set(None, root)


def test_p_duke_without_its_training_part(tmp_path):
    root = p_duke(tmp_path, ("test",))
    assert len(open_reid_set("p-dukemtmc-zero-shot", root).query) == 2
    with pytest.raises(UserError, match="without a training part it is p-dukemtmc-zero-shot"):
        open_reid_set("p-dukemtmc", root)


def test_an_empty_folder(tmp_path):
    root = touch(tmp_path, *OCCLUDED[:1], "whole_body_images/001/readme.txt")
    with pytest.raises(UserError, match="whole_body_images holds no image"):
        open_reid_set("occluded-reid", root)
