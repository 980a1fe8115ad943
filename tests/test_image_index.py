"""The index: verdicts over a corpus of odd and broken files, reuse, limits, sources of every kind."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from personmae.configs import UserError
from personmae.data import image_index
from personmae.data.image_index import build_index, default_cache_dir
from personmae.data.images import UnreadableImage, decode
from tests.bad_images import HEIGHT, WIDTH, broken_samples, encoded, picture, readable_samples, write_corpus, write_people


@pytest.fixture
def said():
    return []


@pytest.fixture
def build(tmp_path, said):
    def build(source, **options):
        return build_index(source, tmp_path / "cache", progress=False, announce=said.append, **options)

    return build


def names(index) -> list[str]:
    return [index.name(sample) for sample in range(len(index))]


def test_verdicts_over_the_corpus(tmp_path, build, said):
    readable, broken = readable_samples(), broken_samples()
    source = write_corpus(tmp_path / "corpus", [*readable, *broken])
    os.mkfifo(source / "pipe.jpg")
    (source / "dangling.jpg").symlink_to(source / "nowhere")
    (source / "notes.txt").write_text("no image, and not taken for one")
    (source / ".hidden.jpg").write_bytes(b"left alone")

    index = build(source, num_workers=3)

    assert names(index) == sorted((sample.name for sample in readable), key=os.fsencode)
    assert set(zip(index.heights.tolist(), index.widths.tolist(), strict=True)) == {(HEIGHT, WIDTH)}
    reasons = {os.path.basename(path): reason for path, reason in index.rejected}
    expected = {sample.name: sample.reason for sample in broken} | {"pipe.jpg": "not a regular file", "dangling.jpg": "cannot be read"}
    assert reasons.keys() == expected.keys()
    assert [(name, reasons[name], words) for name, words in expected.items() if not reasons[name].startswith(words)] == []

    lines = index.rejected_file.read_text().splitlines()
    assert lines == ["path\treason", *(f"{path}\t{reason}" for path, reason in index.rejected)]
    assert len(said) == 1
    assert f"{len(readable)} images ({len(expected)} left out, listed in {index.rejected_file})" in said[0]


def test_samples_are_what_was_indexed(tmp_path, build):
    index = build(write_people(tmp_path / "people", 12))
    assert names(index) == sorted(names(index))
    for sample in range(12):
        data = index.read(sample)
        assert index.path(sample).read_bytes() == data
        assert len(data) == index.num_bytes[sample]
        assert decode(data, index.path(sample)).shape == (index.heights[sample], index.widths[sample], 3)
    assert index.plain.all()


def test_an_unchanged_source_is_not_read_again(tmp_path, build, said, monkeypatch):
    source = write_people(tmp_path / "people", 10)
    (source / "a" / "broken.jpg").write_bytes(b"nonsense")
    first = build(source)
    monkeypatch.setattr(image_index, "_examine_file", lambda *_: pytest.fail("a file was examined again"))
    second = build(source)
    assert "reused" in said[-1]
    assert second.digest() == first.digest()
    assert second.rejected == first.rejected
    for name in ("heights", "widths", "num_bytes", "checksums", "plain"):
        assert np.array_equal(getattr(first, name), getattr(second, name)), name


def test_only_what_changed_is_read_again(tmp_path, build, said):
    source = write_people(tmp_path / "people", 10)
    (source / "a" / "broken.jpg").write_bytes(b"nonsense")
    first = build(source)
    (source / "a" / "0000.jpg").unlink()
    (source / "a" / "0003.jpg").write_bytes(encoded(picture(50, 77, 33), "JPEG"))
    (source / "c" / "new.png").write_bytes(encoded(picture(51, 66, 44), "PNG"))
    second = build(source)
    assert "brought up to date, 2 new or changed files read" in said[-1]
    assert set(names(second)) == set(names(first)) - {"a/0000.jpg"} | {"c/new.png"}
    changed = names(second).index("a/0003.jpg")
    assert (second.heights[changed], second.widths[changed]) == (77, 33)
    assert [reason for _, reason in second.rejected] == [reason for _, reason in first.rejected]
    assert second.digest() != first.digest()
    fresh = build_index(source, tmp_path / "other cache", progress=False, announce=said.append)
    assert fresh.digest() == second.digest()
    assert fresh.rejected == second.rejected


def test_the_same_files_with_other_limits_are_examined_again(tmp_path, build):
    source = write_people(tmp_path / "people", 8)
    everything = build(source)
    assert len(everything) == 8
    tall = build(source, min_side_px=int(np.median(everything.widths)))
    assert 0 < len(tall) < 8
    assert all("too small" in reason for _, reason in tall.rejected)
    assert len(build(source, max_pixels=int((everything.heights * everything.widths).max()) - 1)) == 7
    assert len(build(source, max_side_px=int(everything.heights.max()) - 1)) <= 7
    assert len(build(source)) == 8


def test_what_could_not_be_read_is_tried_again(tmp_path, build, said):
    source = write_people(tmp_path / "people", 3)
    link = source / "a" / "later.jpg"
    link.symlink_to(tmp_path / "later.jpg")
    assert len(build(source)) == 3
    (tmp_path / "later.jpg").write_bytes(encoded(picture(), "JPEG"))
    assert "a/later.jpg" in names(build(source))


def test_what_the_system_refused_is_tried_again_though_unchanged(tmp_path, build, monkeypatch):
    source = write_people(tmp_path / "people", 3)

    def refuse(path, max_bytes=None):
        if path.name == "0001.jpg":
            raise UnreadableImage(path, "cannot be read: Input/output error", by_system=True)
        return path.read_bytes()

    with monkeypatch.context() as patched:
        patched.setattr(image_index, "read_bytes", refuse)
        assert len(build(source)) == 2
    assert len(build(source)) == 3


def test_a_broken_cache_is_built_anew(tmp_path, build):
    source = write_people(tmp_path / "people", 5)
    first = build(source)
    cache = tmp_path / "cache" / "index.npz"
    content = cache.read_bytes()
    for broken in (b"", b"nonsense", content[: len(content) // 2], content[:200] + bytes(100) + content[300:]):
        cache.write_bytes(broken)
        assert build(source).digest() == first.digest()
    assert sorted(path.name for path in cache.parent.iterdir()) == ["index.npz", "rejected.tsv"]


def test_folders_of_any_depth_and_links(tmp_path, build):
    source = tmp_path / "source"
    deep = source.joinpath(*["deeper"] * 30)
    deep.mkdir(parents=True)
    image = encoded(picture(), "JPEG")
    (deep / "a.jpg").write_bytes(image)
    (source / "tab\tand\nnewline.jpg").write_bytes(image)
    os.symlink(source, deep / "round")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "b.PNG").write_bytes(encoded(picture(), "PNG"))
    os.symlink(outside, source / "linked")
    (source / b"latin\xe9.jpg".decode("utf-8", "surrogateescape")).write_bytes(image)
    (source / "bad\tname.jpg").write_bytes(b"x")

    index = build(source)

    assert len(index) == 4
    assert {str(index.path(sample)) for sample in range(4)} >= {str(deep / "a.jpg"), str(source / "linked" / "b.PNG")}
    for sample in range(4):
        index.read(sample)
    assert index.rejected_file.read_text().splitlines()[1].split("\t")[0].endswith("bad\\tname.jpg")
    assert names(build(source)) == names(index)


def test_a_text_list(tmp_path, build):
    people = write_people(tmp_path / "people", 6)
    chosen = ["people/a/0000.jpg", str(people / "b" / "0001.jpg"), "people/c/../c/0002.jpg", "people/a/0000.jpg", "", "people/gone.jpg"]
    listing = tmp_path / "list.txt"
    listing.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(chosen).encode())
    index = build(listing)
    assert names(index) == [str(people / "b" / "0001.jpg"), "people/a/0000.jpg", "people/c/0002.jpg"]
    assert [index.path(sample).exists() for sample in range(3)] == [True] * 3
    assert index.rejected == [(str(tmp_path / "people/gone.jpg"), "cannot be read: No such file or directory")]


def test_the_users_mistakes(tmp_path, build):
    with pytest.raises(UserError, match="No such file"):
        build(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no JPEG"):
        build(tmp_path / "empty")
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(UserError, match="lists no image"):
        build(tmp_path / "empty.txt")
    (tmp_path / "image.jpg").write_bytes(encoded(picture(), "PNG"))
    with pytest.raises(UserError, match="neither a folder nor a text list"):
        build(tmp_path / "image.jpg")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "text.jpg").write_text("hello")
    with pytest.raises(UserError, match=r"none of the 1 images .*text\.jpg: not a JPEG"):
        build(tmp_path / "bad")


def test_one_image_is_a_source(tmp_path, build):
    index = build(write_people(tmp_path / "people", 1))
    assert len(index) == 1


def test_no_place_to_keep_it_is_said_and_nothing_lost(tmp_path, said):
    source = write_people(tmp_path / "people", 4)
    (source / "a" / "broken.jpg").write_bytes(b"nonsense")
    (tmp_path / "a file").write_text("where the cache folder should be")
    index = build_index(source, tmp_path / "a file", progress=False, announce=said.append)
    assert len(index) == 4
    assert index.rejected_file is None
    assert "first" in said[0]
    assert "broken.jpg" in said[0]
    assert "could not be kept" in said[1]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path, build):
    source = write_people(tmp_path / "people", 3)
    (source / "b").chmod(0)
    (source / "a" / "0000.jpg").chmod(0)
    try:
        index = build(source)
    finally:
        (source / "b").chmod(0o755)
    assert names(index) == ["c/0002.jpg"]
    assert [reason for _, reason in index.rejected] == ["cannot be read: Permission denied"] * 2


def test_the_cache_lies_with_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    source = write_people(tmp_path / "people", 2)
    before = sorted(path for path in source.rglob("*"))
    build_index(source, progress=False, announce=print)
    assert (default_cache_dir(source) / "index.npz").is_relative_to(tmp_path / "xdg")
    assert (default_cache_dir(source) / "index.npz").exists()
    assert sorted(path for path in source.rglob("*")) == before
    other = tmp_path / "elsewhere" / "people"
    shutil.copytree(source, other)
    assert default_cache_dir(other) != default_cache_dir(source)


def test_a_file_that_changes_is_told_from_the_indexed_one(tmp_path, build):
    source = write_people(tmp_path / "people", 3)
    index = build(source)
    path = index.path(1)
    content = path.read_bytes()
    for changed, reason in ((content[:-1], "changed"), (content[:-3] + b"x" + content[-2:], "same length"), (b"", "empty")):
        path.write_bytes(changed)
        with pytest.raises(UnreadableImage, match=reason):
            index.read(1)
    path.unlink()
    with pytest.raises(UnreadableImage, match="No such file") as caught:
        index.read(1)
    assert caught.value.by_system
    index.read(0)


def test_orientation_is_ignored(tmp_path, build):
    """The index, and so the plan and both loaders, count the pixels as they are stored."""
    source = tmp_path / "source"
    source.mkdir()
    orientation = Image.Exif()
    orientation[0x0112] = 6
    (source / "turned.jpg").write_bytes(encoded(picture(0, 90, 30), "JPEG", exif=orientation))
    index = build(source)
    assert (index.heights[0], index.widths[0]) == (90, 30)
