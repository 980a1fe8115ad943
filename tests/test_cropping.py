"""`personmae crop`: crops equal to slices of the frames, rules against brute force, layouts, taking up, bad input."""

import csv
import errno
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from personmae.configs import UserError
from personmae.data import crop_folder
from personmae.data.box_files import read_boxes
from personmae.data.crops import CropRules, crop_size, cut, plan_crops
from personmae.data.frames import FrameFolder
from personmae.data.image_index import build_index
from personmae.data.images import read_image
from personmae.data.reid import read_market_layout
from personmae.recipes.programs import CropConfig
from personmae.tasks import cropping
from tests.frame_sets import HEIGHT, WIDTH, damage_video_frame, frame_pixels, write_frames, write_mot_sequence, write_video

ANY = CropRules(min_height=1, min_width=1, min_inside=0)
FRAMES = (1, 2, 3, 5)


@pytest.fixture
def said():
    return []


@pytest.fixture
def crop(tmp_path, said):
    """Cuts the boxes of a text from frames 1, 2, 3, 5, or from those at `place`."""

    def crop(text=None, rules=ANY, out="out", place=None, **options):
        if text is not None:
            (tmp_path / "boxes").write_text(text)
            if place is None and not (tmp_path / "seq").exists():
                write_frames(tmp_path / "seq", FRAMES)
            options |= {"frames": (place or tmp_path / "seq",), "boxes": (tmp_path / "boxes",)}
        config = CropConfig(**{"folder": tmp_path / out, "image_format": "png", "rules": rules, "num_threads": 2, **options})
        cropping.main(config, said.append, progress=False)
        return config.folder

    return crop


def files(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix in (".png", ".jpg"))


def table(folder) -> list[dict[str, str]]:
    with open(folder / "boxes.csv", newline="", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def test_crops_are_slices_of_the_frames(crop):
    boxes = [(1, 10, 20, 40, 64), (3, 0, 0, WIDTH, HEIGHT), (3, 100, 30, 30, 33), (1, 159, 119, 1, 1), (5, 11.5, 20.4, 20, 30)]
    folder = crop("frame,x,y,w,h\n" + "".join("{},{},{},{},{}\n".format(*box) for box in boxes))
    assert files(folder) == [f"seq/{name}.png" for name in ("000001_00", "000001_01", "000003_00", "000003_01", "000005_00")]
    expected = {
        "000001_00": frame_pixels(1)[20:84, 10:50],
        "000001_01": frame_pixels(1)[119:120, 159:160],
        "000003_00": frame_pixels(3),
        "000003_01": frame_pixels(3)[30:63, 100:130],
        "000005_00": frame_pixels(5)[20:50, 12:32],
    }
    for name, pixels in expected.items():
        assert np.array_equal(read_image(folder / f"seq/{name}.png"), pixels)
    rows = table(folder)
    assert [row["crop"] for row in rows] == files(folder)
    assert [row["frame"] for row in rows] == ["1", "1", "3", "3", "5"]
    assert [rows[4][name] for name in ("x", "y", "w", "h", "cut_x0", "cut_y0", "cut_x1", "cut_y1")] == [
        "11.5",
        "20.4",
        "20",
        "30",
        "12",
        "20",
        "32",
        "50",
    ]
    assert rows[0]["source"].endswith("seq/000001.png")


def test_mot_counts_from_one(crop):
    folder = crop("1,7,1,1,40,64,1,1,1\n")
    assert np.array_equal(read_image(folder / "seq/000001_00.png"), frame_pixels(1)[:64, :40])
    (row,) = table(folder)
    assert (row["id"], row["person"], row["x"], row["class"], row["visibility"]) == ("7", "7", "0", "1|person", "1")


def test_mot_boxes_of_images_that_begin_with_0_are_not_guessed(crop, tmp_path):
    frames = write_frames(tmp_path / "zero", range(3))
    text = "1,7,1,1,40,64,1,1,1\n"
    with pytest.raises(UserError, match=r"counts frames from 1.*begin with 0.*--frame-offset -1"):
        crop(text, place=frames)
    assert np.array_equal(read_image(crop(text, place=frames, frame_offset=-1, out="a") / "zero/000000_00.png"), frame_pixels(0)[:64, :40])
    assert np.array_equal(read_image(crop(text, place=frames, frame_offset=0, out="b") / "zero/000001_00.png"), frame_pixels(1)[:64, :40])


rectangles = st.tuples(st.integers(-60, 200), st.integers(-60, 200), st.integers(1, 150), st.integers(1, 150)).map(
    lambda box: (box[0], box[1], box[0] + box[2], box[1] + box[3])
)


@settings(max_examples=100, deadline=None)
@given(rectangle=rectangles)
def test_replicated_borders(rectangle):
    frame = frame_pixels(0)
    x0, y0, x1, y1 = rectangle
    if x0 >= WIDTH or y0 >= HEIGHT or x1 <= 0 or y1 <= 0:
        return
    rows, columns = np.clip(np.arange(y0, y1), 0, HEIGHT - 1), np.clip(np.arange(x0, x1), 0, WIDTH - 1)
    assert np.array_equal(cut(frame, rectangle), frame[rows][:, columns])


@given(width=st.integers(1, 5000), height=st.integers(1, 5000), most=st.integers(1, 600))
def test_sizes_of_shrunk_crops(width, height, most):
    found = crop_size((0, 0, width, height), most)
    if max(width, height) <= most:
        assert found == (height, width)
    else:
        scale = most / max(width, height)
        assert max(found) == most
        assert all(abs(side - max(1, whole * scale)) <= 0.5 for side, whole in zip(found, (height, width), strict=True))


def test_shrunk_crops_are_averages():
    frame = frame_pixels(0)
    means = frame[20:84, 10:50].reshape(16, 4, 10, 4, 3).mean(axis=(1, 3))
    assert np.abs(cut(frame, (10, 20, 50, 84), max_side=16) - means).max() <= 0.5 + 1e-9


rule_sets = st.builds(
    CropRules,
    padding=st.sampled_from([0.0, 0.1, 0.5]),
    border=st.sampled_from(["clip", "replicate"]),
    min_height=st.sampled_from([1, 30]),
    min_width=st.sampled_from([1, 20]),
    min_area=st.sampled_from([0, 1500]),
    min_aspect=st.sampled_from([0.0, 0.8]),
    max_aspect=st.sampled_from([None, 2.5]),
    min_inside=st.sampled_from([0.0, 0.5, 1.0]),
    min_confidence=st.sampled_from([None, 0.5]),
    min_visibility=st.sampled_from([None, 0.3]),
    classes=st.sampled_from([("person",), ("all",), ("2", "car")]),
    keep_ignored=st.booleans(),
    every=st.sampled_from([1, 2, 3]),
)
truth_rows = st.lists(
    st.tuples(
        st.sampled_from(FRAMES),
        st.integers(1, 4),
        *(st.floats(-30, 110).map(lambda value: round(value, 1)),) * 2,
        *(st.floats(2, 90).map(lambda value: round(value, 1)),) * 2,
        st.sampled_from([0, 0.3, 0.5, 1]),
        st.sampled_from([1, 1, 2, 3]),
        st.floats(0, 1).map(lambda value: round(value, 2)),
    ),
    min_size=1,
    max_size=25,
    unique_by=lambda row: row[:2],
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=truth_rows, rules=rule_sets)
def test_rules_against_brute_force(tmp_path, rows, rules):
    if not (tmp_path / "seq").exists():
        write_frames(tmp_path / "seq", FRAMES)
    (tmp_path / "boxes").write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
    plan = plan_crops(read_boxes(tmp_path / "boxes"), FrameFolder(tmp_path / "seq"), rules, 1)
    expected, outside = [], 0
    for line, (frame, _, left, top, width, height, flag, kind, visibility) in enumerate(rows, 1):
        x0, y0 = left - 1, top - 1
        x1, y1 = left + width - 1, top + height - 1
        named = {1: "person", 2: "person on vehicle", 3: "car"}[kind]
        if not ("all" in rules.classes or {named, str(kind)} & set(rules.classes)):
            continue
        if flag == 0 and not rules.keep_ignored:
            continue
        if flag < (rules.min_confidence or -1) or visibility < (rules.min_visibility or -1) or (frame - 1) % rules.every:
            continue
        inner_width, inner_height = min(x1, WIDTH) - max(x0, 0), min(y1, HEIGHT) - max(y0, 0)
        if inner_width <= 0 or inner_height <= 0:
            outside += 1
            continue
        area, inner = (x1 - x0) * (y1 - y0), inner_width * inner_height
        # Where rounding decides, either is right.
        close = [inner - rules.min_inside * area, inner_width - rules.min_width, inner_height - rules.min_height, inner - rules.min_area]
        aspect = (y1 - y0) / (x1 - x0)
        close += [aspect - rules.min_aspect, (rules.max_aspect or math.inf) - aspect]
        if any(abs(value) < 1e-9 for value in close):
            return
        if min(close) < 0:
            continue
        edges = [
            math.floor(edge + 0.5)
            for edge in (
                x0 - rules.padding * (x1 - x0),
                y0 - rules.padding * (y1 - y0),
                x1 + rules.padding * (x1 - x0),
                y1 + rules.padding * (y1 - y0),
            )
        ]
        if rules.border == "clip":
            edges = [min(max(edge, 0), most) for edge, most in zip(edges, (WIDTH, HEIGHT, WIDTH, HEIGHT), strict=True)]
        expected.append((frame, line, edges))
    expected.sort(key=lambda entry: entry[:2])
    assert len(plan.rejected) == outside
    assert plan.numbers.tolist() == [frame for frame, _, _ in expected]
    assert plan.boxes.places.tolist() == [line for _, line, _ in expected]
    assert np.abs(plan.rectangles - np.array([edges for *_, edges in expected]).reshape(-1, 4)).max(initial=0) <= 1
    assert sum(plan.left_out.values()) + len(plan.rejected) + len(plan) == len(rows)
    order = [sum(other[0] == rows[line - 1][0] for other in rows[: line - 1]) for _, line, _ in expected]
    assert plan.ordinals.tolist() == order


@pytest.mark.parametrize(("most", "chosen"), [(1, [6]), (2, [3, 8]), (3, [2, 6, 9]), (10, list(range(1, 11))), (20, list(range(1, 11)))])
def test_crops_are_spread_over_a_track(tmp_path, most, chosen):
    write_mot_sequence(tmp_path, "seq", {1: range(1, 11), 2: range(4, 5)})
    boxes = read_boxes(tmp_path / "seq/gt/gt.txt")
    plan = plan_crops(boxes, FrameFolder(tmp_path / "seq/img1"), replace(ANY, max_per_track=most), 1)
    assert plan.numbers[plan.boxes.ids == 0].tolist() == chosen
    assert plan.numbers[plan.boxes.ids == 1].tolist() == [4]


def test_a_video(crop, tmp_path):
    video = write_video(tmp_path / "street.avi", 12)
    boxes = "frame,x,y,w,h\n" + "".join(f"{frame},8,8,48,64\n" for frame in (0, 4, 11))
    folder = crop(boxes, place=video)
    assert files(folder) == ["street/000000_00.png", "street/000004_00.png", "street/000011_00.png"]
    for name, level in (("000000_00", 0), ("000004_00", 40), ("000011_00", 110)):
        pixels = read_image(folder / f"street/{name}.png")
        assert pixels.shape == (64, 48, 3)
        assert abs(float(pixels.mean()) - level) <= 2
    # MOT calls the first frame 1.
    again = crop("1,-1,9,9,48,64,0.5\n12,-1,9,9,48,64,0.5\n", place=video, out="mot")
    assert abs(float(read_image(again / "street/000012_00.png").mean()) - 110) <= 2


def test_a_video_that_is_damaged_and_ends_early(crop, tmp_path, said):
    video = write_video(tmp_path / "street.avi", 8)
    damage_video_frame(video, 3)
    boxes = "frame,x,y,w,h\n" + "".join(f"{frame},8,8,48,64\n" for frame in range(10))
    with pytest.raises(UserError, match=r"2 of 10 frames cannot be read, more than max_unreadable = 0.1"):
        crop(boxes, place=video, max_unreadable=0.1)
    folder = crop(boxes, place=video, max_unreadable=0.3)
    assert files(folder) == [f"street/{frame:06d}_00.png" for frame in (0, 1, 2, 4, 5, 6, 7)]
    lines = (folder / "unreadable.tsv").read_text().splitlines()
    assert [line.split("\t")[0].rsplit(" ", 1)[1] for line in lines[1:]] == ["3", "8", "9"]
    assert "ends early" in lines[2]
    assert len(table(folder)) == 7
    assert any("3 frames could not be read" in line for line in said)


def test_unreadable_frames_are_counted(crop, tmp_path, said):
    write_frames(tmp_path / "seq", FRAMES)
    whole = (tmp_path / "seq/000002.png").read_bytes()
    (tmp_path / "seq/000002.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "seq/000003.png").write_bytes(b"")
    boxes = "frame,x,y,w,h\n" + "".join(f"{frame},8,8,48,64\n" for frame in FRAMES)
    with pytest.raises(UserError, match=r"2 of 4 frames cannot be read.*000002.png: truncated"):
        crop(boxes)
    folder = crop(boxes, max_unreadable=0.5)
    assert files(folder) == ["seq/000001_00.png", "seq/000005_00.png"]
    assert "2 frames could not be read" in said[-1]
    # Mended, the same call goes on.
    (tmp_path / "seq/000002.png").write_bytes(whole)
    assert files(crop(boxes, max_unreadable=0.5)) == ["seq/000001_00.png", "seq/000002_00.png", "seq/000005_00.png"]


def test_bad_boxes_end_it_or_are_skipped(crop, tmp_path, said):
    boxes = "frame,x,y,w,h\n1,8,8,48,64\n1,nan,8,48,64\n4,8,8,48,64\n2,500,8,48,64\n2,8,8,48\n"
    with pytest.raises(
        UserError, match=r"boxes, line 3: x is 'nan', not a finite number \(3 more\); mend the file, or skip such boxes by --skip-bad"
    ):
        crop(boxes)
    assert not (tmp_path / "out").exists()
    folder = crop(boxes, skip_bad=True)
    assert files(folder) == ["seq/000001_00.png"]
    lines = [line.split("\t") for line in (folder / "rejected.tsv").read_text().splitlines()]
    assert [line[1] for line in lines] == ["place", "line 3", "line 6", "line 4", "line 5"]
    assert lines[3][2].startswith("there is no frame 4: ")
    assert "numbered 1 to 5" in lines[3][2]
    assert lines[4][2] == "the box lies outside the frame: x 500 to 548, y 8 to 72 of 160 x 120 pixels (w x h)"
    assert any("4 boxes could not be used" in line for line in said)


def test_an_id_stands_once_in_a_frame(crop):
    with pytest.raises(UserError, match="line 3: the id 'a' stands twice in this frame"):
        crop("frame,x,y,w,h,id\n1,8,8,48,64,a\n1,9,8,48,64,a\n1,9,8,48,64,b\n")


@pytest.mark.parametrize(
    ("boxes", "rules", "message"),
    [
        ("frame,x,y,w,h,class\n1,8,8,48,64,0\n", ANY, r"its classes are numbers \(0\); say by --classes"),
        ("frame,x,y,w,h\n1,8,8,48,64\n", replace(ANY, min_confidence=0.5), "says no confidence of any box"),
        ("frame,x,y,w,h\n1,8,8,48,64\n", replace(ANY, max_per_track=5), "has no ids"),
        ("frame,x,y,w,h,class\n1,8,8,48,64,car\n", ANY, "no box is left to cut: 1 of other classes"),
        ("frame,x,y,w,h\n", ANY, "no box is left to cut: the box files hold none"),
        ("frame,x,y,w,h\n1,-9000,-9000,16000,16000\n", replace(ANY, border="replicate", padding=1.0), "with its padding"),
    ],
)
def test_rules_that_cannot_be_followed(crop, boxes, rules, message):
    with pytest.raises(UserError, match=message):
        crop(boxes, rules)


@pytest.mark.parametrize(
    "wrong", [{"padding": -0.1}, {"padding": math.nan}, {"min_height": 0}, {"every": 0}, {"min_inside": 1.5}, {"max_aspect": 0.0}, {"classes": ()}]
)
def test_wrong_rules(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        CropRules(**wrong)


def test_coco_by_name(crop, tmp_path):
    frames = write_frames(tmp_path / "images/a", [1, 2], "{}, odd näme.png").parent
    content = {
        "images": [{"id": 9, "file_name": "a/2, odd näme.png"}],
        "annotations": [
            {"image_id": 9, "bbox": [10, 20, 40, 64], "category_id": 1, "score": 0.75},
            {"image_id": 9, "bbox": [10, 20, 40, 64], "category_id": 2},
            {"image_id": 9, "bbox": [10, 20, 40, 64], "category_id": 1, "iscrowd": 1},
        ],
        "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "dog"}],
    }
    folder = crop(json.dumps(content), place=frames)
    assert files(folder) == ["images/000002_00.png"]
    assert np.array_equal(read_image(folder / "images/000002_00.png"), frame_pixels(2)[20:84, 10:50])
    (row,) = table(folder)
    assert (row["source"], row["score"]) == (str(frames / "a/2, odd näme.png"), "0.75")


def test_two_names_of_one_image_are_one_frame(crop):
    folder = crop("image,x,y,w,h\n000001.png,0,0,40,64\nelse/000001.png,9,9,40,64\n000001,20,20,40,64\n")
    assert files(folder) == [f"seq/000001_{number:02d}.png" for number in range(3)]


def test_relative_boxes(crop):
    folder = crop("frame,cx,cy,w,h\n1,0.5,0.5,0.5,0.5\n", relative=True)
    assert np.array_equal(read_image(folder / "seq/000001_00.png"), frame_pixels(1)[30:90, 40:120])


def test_a_training_set_in_markets_layout(crop, tmp_path):
    write_mot_sequence(tmp_path / "set", "MOT-02-DPM", {3: range(1, 6), 9: range(2, 4)})
    write_mot_sequence(tmp_path / "set", "MOT-04-DPM", {3: range(1, 3)})
    write_mot_sequence(tmp_path / "set", "MOT-04-SDP", {3: range(1, 3)})
    folder = crop(mot=tmp_path / "set", mot_match=r"*DPM", layout="market-train")
    # An id of MOT is a person of its own sequence alone.
    assert files(folder) == [
        *(f"bounding_box_train/0001_c1s1_{frame:06d}_00.png" for frame in range(1, 6)),
        *(f"bounding_box_train/0002_c1s1_{frame:06d}_00.png" for frame in range(2, 4)),
        *(f"bounding_box_train/0003_c2s1_{frame:06d}_00.png" for frame in range(1, 3)),
    ]
    assert np.array_equal(read_image(folder / "bounding_box_train/0002_c1s1_000003_00.png"), frame_pixels(3)[5:69, 90:130])
    people = {(row["sequence"], row["id"], row["person"], row["camera"]) for row in table(folder)}
    assert people == {("MOT-02-DPM", "3", "1", "1"), ("MOT-02-DPM", "9", "2", "1"), ("MOT-04-DPM", "3", "3", "2")}
    with pytest.raises(UserError, match="no person is seen by two cameras"):
        crop(mot=tmp_path / "set", mot_match=r"*DPM", layout="market-test", out="test")


def test_a_test_set_is_read_by_the_evaluators_reader(crop, tmp_path):
    for name in ("a", "b", "c"):
        write_mot_sequence(tmp_path / "set", name, {3: range(1, 6), 12: range(2, 4), **({7: range(1, 3)} if name == "a" else {})})
    folder = crop(mot=tmp_path / "set", layout="market-test", ids="all", cameras=(4, 4, 6), image_format="jpg")
    found = read_market_layout(folder)
    # One query a person and camera; person 7 is seen by camera 4 alone.
    assert {(image.person, image.camera) for image in found.query} == {(3, 4), (3, 6), (12, 4), (12, 6)}
    assert len(found.query) == 4
    assert len(found.gallery) == 3 * 7 + 2 - 4
    assert {(image.person, image.camera) for image in found.gallery} >= {(3, 4), (3, 6), (12, 4), (7, 4)}
    names = [image.path.name for image in (*found.query, *found.gallery)]
    assert {name[:9] for name in names} == {"0003_c4s1", "0003_c4s2", "0003_c6s1", "0007_c4s1", "0012_c4s1", "0012_c4s2", "0012_c6s1"}


def test_cameras_of_the_box_file(crop):
    folder = crop("frame,x,y,w,h,id,camera\n1,8,8,48,64,ann,2\n2,8,8,48,64,bob,5\n3,8,8,48,64,ann,5\n", layout="market-train")
    assert files(folder) == [f"bounding_box_train/{name}_00.png" for name in ("0001_c2s1_000001", "0001_c5s1_000003", "0002_c5s1_000002")]
    assert [(row["id"], row["person"]) for row in table(folder)] == [("ann", "1"), ("bob", "2"), ("ann", "1")]


def test_unlabelled_boxes_have_no_markets_layout(crop):
    with pytest.raises(UserError, match="1 boxes to cut have no id"):
        crop("frame,x,y,w,h,id\n1,8,8,48,64,\n2,8,8,48,64,bob\n", layout="market-train")


def test_crops_are_a_source_for_pretraining(crop, tmp_path):
    folder = crop("frame,x,y,w,h\n1,8,8,48,64\n2,8,8,48,64\n", image_format="jpg", quality=90)
    index = build_index(folder, tmp_path / "cache", progress=False, announce=lambda text: None)
    assert (len(index), index.rejected, index.plain.all()) == (2, [], True)


def test_taken_up_where_it_was_left(crop, tmp_path, said, monkeypatch):
    boxes = "frame,x,y,w,h\n" + "".join(f"{frame},{8 * box},8,48,64\n" for frame in FRAMES for box in range(3))
    whole = crop(boxes, out="whole")
    written = []
    write = crop_folder.write_unflushed

    def full_disk(path, content):
        if path.suffix == ".png":
            if len(written) == 7:
                raise OSError(errno.ENOSPC, "No space left on device")
            written.append(path)
        write(path, content)

    monkeypatch.setattr(crop_folder, "write_unflushed", full_disk)
    with pytest.raises(UserError, match=r"No space left on device; .* make room and call again: what is cut is kept"):
        crop(boxes, num_threads=1)
    monkeypatch.setattr(crop_folder, "write_unflushed", write)
    assert len(files(tmp_path / "out")) == 7
    # A file that a lost machine never filled, and one of it that was cut short.
    (tmp_path / "out" / "seq/000001_00.png").write_bytes(b"")
    second = tmp_path / "out" / "seq/000001_01.png"
    second.write_bytes(second.read_bytes()[:-20])
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*_02.png")}
    folder = crop(boxes)
    assert f"12 crops, {7 - 2} of them there already" in said[-1]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert files(folder) == files(whole)
    assert all((folder / name).read_bytes() == (whole / name).read_bytes() for name in [*files(whole), "boxes.csv"])
    assert sorted(path.name for path in folder.iterdir()) == ["boxes.csv", "crop.json", "seq"]
    # Nothing is left to do, and it says so.
    crop(boxes)
    assert "12 crops, 12 of them there already" in said[-1]


def test_frames_are_read_once_and_only_where_crops_are_missing(crop, tmp_path, monkeypatch):
    boxes = "frame,x,y,w,h\n" + "".join(f"{frame},{8 * box},8,48,64\n" for frame in (5, 1, 3) for box in range(2))
    delivered = []
    deliver = FrameFolder.deliver
    monkeypatch.setattr(FrameFolder, "deliver", lambda self, index: delivered.append(self.number(index)) or deliver(self, index))
    folder = crop(boxes)
    assert delivered == [1, 3, 5]
    (folder / "seq/000003_01.png").unlink()
    crop(boxes)
    assert delivered == [1, 3, 5, 3]


def test_the_folder_is_for_one_set_of_parameters(crop, tmp_path):
    boxes = "frame,x,y,w,h\n1,8,8,48,64\n"
    crop(boxes)
    # What only changes how it runs may change; so may the place of the inputs.
    shutil.copytree(tmp_path / "seq", tmp_path / "elsewhere/seq")
    crop(boxes, num_threads=1, skip_bad=True, place=tmp_path / "elsewhere/seq")
    with pytest.raises(UserError, match=r"out holds crops of other parameters \(settings.rules.padding: 0.0 -> 0.5\)"):
        crop(boxes, replace(ANY, padding=0.5))
    with pytest.raises(UserError, match=r"other parameters \(sequences.seq.boxes"):
        crop(boxes + "2,8,8,48,64\n")
    write_frames(tmp_path / "seq", [9])
    with pytest.raises(UserError, match=r"other parameters \(sequences.seq.frames"):
        crop(boxes)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/photo.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="holds files that are not of `personmae crop`"):
        crop(boxes, out="other")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write into .*file"):
        crop(boxes, out="file")
    with pytest.raises(UserError, match="lies inside the frames"):
        crop(boxes, out="seq/crops")


def test_two_calls_at_once(tmp_path):
    with crop_folder.claimed(tmp_path / "out", {}), pytest.raises(UserError, match="another `personmae crop` is writing"):  # noqa: SIM117
        with crop_folder.claimed(tmp_path / "out", {}):
            pass


def test_sequences_of_the_same_or_an_odd_name(crop, tmp_path):
    for place in ("x", "y"):
        write_frames(tmp_path / place / "-a b\u00e9/\u2028", [1])
    (tmp_path / "boxes").write_text("1,-1,9,9,48,64,0.5\n")
    odd = [tmp_path / place / "-a b\u00e9/\u2028" for place in ("x", "y")]
    frames = (*odd, write_frames(tmp_path / "-a b\u00e9", [1]))
    folder = crop(frames=frames, boxes=(tmp_path / "boxes",) * 3, cameras=(1, 1, 2))
    assert files(folder) == ["_/000001_00.png", "__2/000001_00.png", "a_b\u00e9/000001_00.png"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give --frames and --boxes"),
        ({"frames": ("a",)}, "1 --frames and 0 --boxes"),
        ({"mot": "."}, "holds no sequence as NAME/img1; .*deeper does"),
        ({"mot": "deeper", "mot_match": "X*"}, "none of the 1 sequences .* is called 'X.*'"),
        ({"mot": "deeper", "mot_boxes": "det"}, "has no det/det.txt"),
        ({"mot": "deeper", "cameras": (1, 2)}, "2 --cameras for 1 sequences"),
        ({"mot": "nothing"}, "no such folder"),
    ],
)
def test_what_are_no_sequences(crop, tmp_path, options, message):
    write_mot_sequence(tmp_path / "deeper", "a", {1: range(1, 2)})
    if "mot" in options:
        options = {**options, "mot": tmp_path / options["mot"]}
    with pytest.raises(UserError, match=message):
        crop(**options)
