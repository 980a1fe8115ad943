"""Box files of every kind: made by hypothesis and read back, conventions by hand, every malformed row named with its place."""

import csv
import io
import json
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from personmae.configs import UserError
from personmae.data.box_files import read_boxes

RELAXED = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
numbers = st.floats(-500, 3000, allow_nan=False).map(lambda value: round(value, 3))
sides = st.floats(0.5, 900).map(lambda value: round(value, 3))
rows = st.lists(
    st.tuples(st.integers(1, 10**6), st.integers(-1, 300), numbers, numbers, sides, sides, numbers, st.integers(1, 13), st.floats(0, 1)), max_size=30
)


@pytest.fixture
def read(tmp_path):
    def read(text, **options):
        path = tmp_path / "boxes"
        path.write_text(text) if isinstance(text, str) else path.write_bytes(text)
        return read_boxes(path, **options)

    return read


def reasons(boxes) -> dict[str, str]:
    return {row.place: row.reason for row in boxes.rejected}


def identities(boxes) -> list[str]:
    return [boxes.identities[code] if code >= 0 else "" for code in boxes.ids]


def same(left, right) -> bool:
    return np.allclose(np.asarray(left, dtype=float).reshape(-1), np.asarray(right, dtype=float).reshape(-1), rtol=0, atol=1e-6, equal_nan=True)


@RELAXED
@given(rows=rows, columns=st.sampled_from([6, 7, 9, 10]), separator=st.sampled_from([",", ", ", " "]), end=st.sampled_from(["\n", "\r\n", "\n\n"]))
def test_mot_text(read, rows, columns, separator, end):
    lines = [separator.join(map(str, [*row[:7], *(row[7:9] if columns == 9 else (-1, -1, -1))][:columns])) for row in rows]
    boxes = read(end.join(lines))
    assert boxes.rejected == []
    assert boxes.images is None
    assert boxes.frames.tolist() == [row[0] for row in rows]
    assert identities(boxes) == [str(row[1]) if row[1] >= 0 else "" for row in rows]
    # MOT counts pixels from 1: a box whose left is 1 begins with the first column.
    assert same(boxes.edges, [(x - 1, y - 1, x - 1 + w, y - 1 + h) for _, _, x, y, w, h, *_ in rows])
    assert same(boxes.scores, [row[6] if columns > 6 else math.nan for row in rows])
    truth = columns == 9
    assert same(boxes.visibility, [row[8] if truth else math.nan for row in rows])
    assert boxes.ignored.tolist() == [truth and row[6] == 0 for row in rows]
    assert all(("person" in boxes.labels[code]) == (row[7] == 1) for code, row in zip(boxes.classes, rows, strict=True) if code >= 0)
    assert (boxes.classes >= 0).tolist() == [truth] * len(rows)


@RELAXED
@given(rows=rows, shape=st.sampled_from(["x y w h", "left top width height", "X0 Y0 X1 Y1", "x1 y1 x2 y2", "xmin ymin xmax ymax", "cx cy w h"]))
@pytest.mark.parametrize("kind", [",", ";", "\t", "json"])
def test_tables(read, kind, rows, shape):
    records = []
    for frame, person, x, y, w, h, score, kind_of, visibility in rows:
        box = (x, y, x + w, y + h)
        if shape.split()[2].lower() in ("w", "width"):
            box = (x + w / 2, y + h / 2, w, h) if shape.startswith("cx") else (x, y, w, h)
        record = {"other": "a,b", "score": score, **dict(zip(shape.split(), box, strict=True)), "track_id": person, "frame": frame}
        records.append({**record, "class": kind_of, "visibility": visibility, "camera": frame % 5})
    if kind == "json":
        text = json.dumps(records)
    else:
        file = io.StringIO()
        writer = csv.DictWriter(file, ["other", "score", *shape.split(), "track_id", "frame", "class", "visibility", "camera"], delimiter=kind)
        writer.writeheader()
        writer.writerows(records)
        text = file.getvalue()
    boxes = read("\ufeff" + text)
    assert boxes.rejected == []
    assert boxes.frames.tolist() == [row[0] for row in rows]
    assert identities(boxes) == [str(row[1]) if row[1] >= 0 else "" for row in rows]
    assert same(boxes.edges, [(x, y, x + w, y + h) for _, _, x, y, w, h, *_ in rows])
    assert same(boxes.scores, [row[6] for row in rows])
    assert same(boxes.visibility, [row[8] for row in rows])
    assert [boxes.labels[code] for code in boxes.classes] == [{str(row[7])} for row in rows]
    assert boxes.cameras.tolist() == [row[0] % 5 for row in rows]


@RELAXED
@given(rows=rows, with_categories=st.booleans())
def test_coco(read, rows, with_categories):
    content = {
        "images": [{"id": frame, "file_name": f"cam/{frame}.jpg"} for frame in {row[0] for row in rows}],
        "annotations": [
            {"id": 5, "image_id": frame, "bbox": [x, y, w, h], "category_id": kind, "track_id": person, "score": score, "iscrowd": int(kind == 2)}
            for frame, person, x, y, w, h, score, kind, _ in rows
        ],
    }
    if with_categories:
        content["categories"] = [{"id": kind, "name": "Pedestrian" if kind == 3 else f"thing {kind}"} for kind in range(1, 14)]
    boxes = read(json.dumps(content))
    assert boxes.rejected == []
    assert [boxes.images[code] for code in boxes.frames] == [f"cam/{row[0]}.jpg" for row in rows]
    assert identities(boxes) == [str(row[1]) if row[1] >= 0 else "" for row in rows]
    assert same(boxes.edges, [(x, y, x + w, y + h) for _, _, x, y, w, h, *_ in rows])
    person = 3 if with_categories else 1
    assert ["person" in boxes.labels[code] for code in boxes.classes] == [row[7] == person for row in rows]
    assert boxes.ignored.tolist() == [row[7] == 2 for row in rows]


def test_coco_results(read):
    boxes = read(
        '[{"image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}, {"image_id": 8, "category_id": 3, "bbox": [0, 0, 9, 9], "id": 4}]'
    )
    assert boxes.frames.tolist() == [7, 8]
    assert boxes.edges.tolist() == [[1, 2, 4, 6], [0, 0, 9, 9]]
    assert [sorted(boxes.labels[code]) for code in boxes.classes] == [["1", "person"], ["3"]]
    assert identities(boxes) == ["", ""]
    by_name = read('[{"image_id": "a.jpg", "bbox": [1, 2, 3, 4]}]')
    assert by_name.images == ["a.jpg"]


def test_origin_and_relative(read):
    mot, table = "1,2,11,21,5,6,1\n", "frame,x,y,w,h\n1,11,21,5,6\n"
    assert read(mot).edges.tolist() == [[10, 20, 15, 26]]
    assert read(mot, origin=0).edges.tolist() == [[11, 21, 16, 27]]
    assert read(table).edges.tolist() == [[11, 21, 16, 27]]
    assert read(table, origin=1).edges.tolist() == [[10, 20, 15, 26]]
    assert read("frame,cx,cy,w,h\n1,0.5,0.5,0.5,1\n", relative=True).edges.tolist() == [[0.25, 0, 0.75, 1]]
    with pytest.raises(UserError, match="leave --relative out"):
        read(mot, relative=True)
    (row,) = read(table, relative=True).rejected + read("frame,x,y,w,h\n1,11,21,20,6\n", relative=True).rejected
    assert "look like pixels" in row.reason


def test_flavours(read):
    line = "1,2,11,21,5,6,0,7,0.25"
    truth = read(line)
    assert (truth.ignored.tolist(), truth.visibility.tolist()) == ([True], [0.25])
    assert truth.labels == [{"7", "static person"}]
    detection = read(line, mot_flavour="det")
    assert (detection.ignored.tolist(), detection.labels) == ([False], [])
    assert "8 columns" in reasons(read("1,2,11,21,5,6,0,7"))["line 1"]
    assert read("1,2,11,21,5,6,1,1", mot_flavour="gt").labels == [{"1", "person"}]
    # MOT15's ground truth has no class and no visibility.
    assert read("1,2,11,21,5,6,1,-1,-1,-1", mot_flavour="gt").labels == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("1,2,3", "3 columns"),
        ("1,2,3,4,5,6,7,8,9,10,11", "11 columns"),
        ("1,2,x,4,5,6,1", "left is 'x', not a number"),
        ("1,2,nan,4,5,6,1", "left is 'nan', not a finite number"),
        ("1,2,3,4,inf,6,1", "width is 'inf'"),
        ("1,2,3,4,-5,6,1", "the box has no area"),
        ("1,2,3,4,5,0,1", "the box has no area"),
        ("1,2,1e12,4,5,6,1", "absurdly far"),
        ("1,2,3,4,99999,6,1", "at most 16384"),
        ("1.5,2,3,4,5,6,1", "frame is '1.5', not a whole number"),
        ("0,2,3,4,5,6,1", "MOT counts frames from 1"),
        ("9999999999,2,3,4,5,6,1", "is allowed"),
        ("1,2,3,4,5,6,", "confidence is '', not a number"),
        ("1,2,1_0,4,5,6,1", "left is '1_0'"),
        ("1,a,3,4,5,6,1", "id is 'a'"),
    ],
)
def test_malformed_mot_lines(read, line, reason):
    boxes = read(f"1,1,1,1,9,9,1\n{line}\n2,1,1,1,9,9,1\n")
    assert boxes.frames.tolist() == [1, 2]
    assert list(reasons(boxes)) == ["line 2"]
    assert reason in reasons(boxes)["line 2"]


def test_malformed_csv_lines(read):
    lines = [
        "frame,x,y,w,h,id,camera",
        "1,1,1,9,9,a,1",
        "1,1,1,9,9",
        "1,,1,9,9,a,1",
        "x,1,1,9,9,a,1",
        "-1,1,1,9,9,a,1",
        '2,1,1,9,9,"two\nlines",1',
        "3,1,1,9,9,a,-2",
        "3,1,1,9,9,a,cam",
        "4,1,1,9,9,,",
    ]
    boxes = read("\n".join(lines))
    assert boxes.frames.tolist() == [1, 2, 4]
    assert identities(boxes) == ["a", "two\nlines", ""]
    assert boxes.cameras.tolist() == [1, 1, -1]
    found = reasons(boxes)
    # The quoted field takes a line more.
    assert list(found) == ["line 3", "line 4", "line 5", "line 6", "line 9", "line 10"]
    assert [text.split(";")[0] for text in found.values()] == [
        "5 fields, the header has 7",
        "x is '', not a number",
        "frame is 'x', not a number",
        "frame is -1",
        "camera is -2",
        "camera is 'cam', not a number",
    ]


def test_malformed_json(read):
    content = {"images": [{"id": 1, "file_name": "a.jpg"}], "categories": [{"id": 1, "name": "person"}]}
    good = {"image_id": 1, "bbox": [1, 2, 3, 4], "category_id": 1}
    bad = [7, {**good, "image_id": 2}, {**good, "bbox": [1, 2, 3]}, {**good, "bbox": [1, 2, math.nan, 4]}, {**good, "category_id": 9}]
    bad += [{**good, "bbox": [1, 2, True, 4]}, {**good, "image_id": [1]}, {**good, "bbox": [1, 2, 10**400, 4]}, {**good, "score": "high"}]
    boxes = read(json.dumps({**content, "annotations": [good, *bad]}))
    assert len(boxes) == 1
    assert list(reasons(boxes)) == [f"annotations[{number}]" for number in range(1, len(bad) + 1)]
    box = {"x": 1, "y": 1, "w": 2, "h": 2}
    items = read(json.dumps([{"frame": 1, **box}, {"frame": 1}, 3, {"image": "a", **box}, {"frame": None, "bbox": [1, 1, 2, 2]}]))
    assert len(items) == 1
    assert list(reasons(items)) == ["item [1]", "item [2]", "item [3]", "item [4]"]
    assert "give numbers of frames" in reasons(items)["item [3]"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("time,x,y,w,h\n", "no column 'frame'"),
        ("frame,x,y,w\n", "no box among"),
        ("frame,x,y,w,h,cx,cy\n", "more than one box"),
        ("frame,x,left,y,w,h\n", "two columns say x"),
        ("{]", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("{}", "neither a list"),
        ('{"images": [{"id": 1}], "annotations": []}', r"images\[0\]"),
        ('{"images": [3], "annotations": []}', r"images\[0\]"),
        ('{"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}], "annotations": []}', "'a' as well as of 'b'"),
        (b"\x89PNG\r\n\x1a\n\0\0\0", "is no text"),
    ],
)
def test_files_that_are_none(read, text, message):
    with pytest.raises(UserError, match=message):
        read(text)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_boxes(tmp_path / "nothing")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_boxes(tmp_path)


def test_empty_files_hold_no_boxes(read):
    assert len(read("")) == 0
    assert len(read("[]")) == 0


def test_names_that_are_no_text(read):
    boxes = read(b"image,x,y,w,h\nfa\xe7ade.jpg,1,2,3,4\n")
    assert boxes.images == ["fa\udce7ade.jpg"]
