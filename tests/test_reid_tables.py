"""Sets as CSV files: what is read, and errors that name file and line."""

import contextlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reid_trees import labels, names

from personmae.configs import UserError
from personmae.data.reid import ReidSet, open_reid_set
from personmae.data.reid.tables import read_table

GOOD = "path,person,camera,split\na.jpg,1,1,train\nb/q.png,2,1,query\nb/g.png,2,-3,gallery\n/abs/d.jpg,0,14,gallery\nj.jpg,-1,1,gallery\n"


def write(folder, text, name="my set.csv"):
    file = folder / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def test_a_table(tmp_path):
    found = read_table(write(tmp_path, GOOD))
    assert found.name == "my set"
    assert labels(found.train) == [(1, 1)]
    assert labels(found.gallery) == [(0, 14), (2, -3)]
    assert found.query[0].path == tmp_path / "b" / "q.png"
    assert str(found.gallery[0].path) == "/abs/d.jpg"
    assert found.num_junk == 1


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode(),
        GOOD.replace("path,person", " Path , PERSON"),
        GOOD.replace("\n", ",x\n").replace("a.jpg", '"a.jpg"') + ",,,,\n\n",
        GOOD.replace("train", "Train").replace(",1,1,", ", +1 , 01 ,"),
    ],
)
def test_other_ways_to_write_it(tmp_path, text):
    found = read_table(write(tmp_path, text))
    assert labels(found.train) == [(1, 1)]
    assert names(found.gallery) == ["d.jpg", "g.png"]


def test_without_cameras(tmp_path):
    found = read_table(write(tmp_path, "split,person,path\nquery,5,a.jpg\ngallery,5,b.jpg\n"))
    assert labels(found.query + found.gallery) == [(5, 0), (5, 1)]
    assert not found.has_cameras
    assert "no column camera" in found.notes[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: no column 'path'; .* is: nothing"),
        ("path;person;camera;split\n", "line 1: no column 'path'"),
        ("path,person,camera\n", "line 1: no column 'split'"),
        ("path,person,camera,split,person\n", "line 1: the column 'person' is there 2 times"),
        (GOOD + "x.jpg,1,1\n", "line 7: 3 fields, but the first line has 4"),
        (GOOD + "x.jpg,1,1,val\n", "line 7: split is 'val'; it must be train, query or gallery"),
        (GOOD + "x.jpg,-2,1,train\n", "line 7: person is '-2'"),
        (GOOD + "x.jpg,1.0,1,train\n", "line 7: person is '1.0'"),
        (GOOD + "x.jpg,٣,1,train\n", "line 7: person is"),
        (GOOD + f"x.jpg,{2**63},1,train\n", "line 7: person is '9223372036854775808'"),
        (GOOD + "x.jpg," + "9" * 9000 + ",1,train\n", "line 7: person is '99999"),
        (GOOD + "x.jpg,1,north,train\n", "line 7: camera is 'north'"),
        (GOOD + ",1,1,train\n", "line 7: the path is empty"),
        (GOOD + "x\0.jpg,1,1,train\n", "line 7: (a path with a NUL|line contains NUL)"),
        (GOOD + "b/q.png,2,1,query\n", "line 7: .*q.png is in query already, by line 3"),
        (GOOD + '"x.jpg,1,1,train\n', "line 8?7?: unexpected end of data"),
        (GOOD + '"x"y,1,1,train\n', "line 7: "),
        ("path,person,camera,split\na.jpg,1,1,gallery\n", "lists no image of a person with split 'query'"),
        (GOOD.encode() + b"\xff\xfe,1,1,train\n", "not in UTF-8"),
    ],
)
def test_mistakes_name_file_and_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as caught:
        read_table(write(tmp_path, text))
    assert "my set.csv" in str(caught.value)


def test_an_image_in_query_and_gallery(tmp_path):
    found = read_table(write(tmp_path, GOOD + "b/q.png,2,1,gallery\n"))
    assert len(found.gallery) == 3


def test_by_name_and_found_out(tmp_path):
    file = write(tmp_path, GOOD, "people.csv")
    for found in (open_reid_set("csv", file), open_reid_set("csv", tmp_path), open_reid_set(None, file), open_reid_set(None, tmp_path)):
        assert labels(found.query) == [(2, 1)]
        assert found.name == "people"
    write(tmp_path, GOOD, "other.csv")
    with pytest.raises(UserError, match="holds 2 CSV files"):
        open_reid_set("csv", tmp_path)
    with pytest.raises(UserError, match="name it: csv in"):
        open_reid_set(None, tmp_path)


FIELD = st.one_of(
    st.sampled_from(["train", "query", "gallery", "0", "-1", "7", "a.jpg", '"', "", "path", "person", "camera", "split", "\0"]), st.text(max_size=8)
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.lists(FIELD, max_size=6), max_size=6), st.booleans())
def test_any_table_is_read_or_refused(tmp_path, rows, with_header):
    text = (GOOD if with_header else "") + "\n".join(",".join(row) for row in rows)
    check_read_or_refused(write(tmp_path, text.encode("utf-8", "surrogatepass")))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(max_size=80), st.booleans())
def test_any_bytes_are_read_or_refused(tmp_path, content, with_header):
    check_read_or_refused(write(tmp_path, (GOOD.encode() if with_header else b"") + content))


def check_read_or_refused(file):
    # A set or a UserError, and nothing else.
    with contextlib.suppress(UserError):
        found = read_table(file)
        assert isinstance(found, ReidSet)
        assert found.query
        assert found.gallery
