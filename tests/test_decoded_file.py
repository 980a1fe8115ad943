"""The file of decoded images: the pixels of the index, written once, by whichever process comes first."""

import multiprocessing
import os
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from personmae.configs import UserError
from personmae.data import decoded_file
from personmae.data.decoded_file import open_decoded
from personmae.data.delivery import LoaderConfig
from personmae.data.image_index import build_index
from personmae.data.images import UnreadableImage
from tests.bad_images import write_people
from tests.packing import ignore
from tests.test_loaders import assert_equal_batches, batches, config_of, plan_of


@pytest.fixture
def people(tmp_path) -> Path:
    return write_people(tmp_path / "people", 70)


@pytest.fixture
def index(tmp_path, people):
    return build_index(people, tmp_path / "index", progress=False, announce=ignore)


def opened(index, folder, said=None):
    return open_decoded(index, folder, 2, ignore if said is None else said.append, progress=False)


def test_pixels_are_those_of_the_index(index, tmp_path):
    said: list[str] = []
    decoded = opened(index, tmp_path / "decoded", said)
    for sample in range(len(index)):
        image = decoded.image(sample)
        assert np.array_equal(image, index.image(sample))
        image[:] = 7
    again = opened(index, tmp_path / "decoded")
    assert np.array_equal(again.image(3), index.image(3))
    assert "decoded now" in said[0]
    assert sorted(path.suffix for path in (tmp_path / "decoded").iterdir()) == [".lock", ".u8"]


def test_batches_are_those_of_the_files(index, tmp_path):
    expected = batches(index, plan_of(index), config_of("threads"), last=8)
    config = config_of("auto", decoded_dir=tmp_path / "decoded")
    assert_equal_batches(batches(index, plan_of(index), config, last=8), expected)


def test_it_is_written_once_and_anew_for_other_images_or_a_cut_file(index, people, tmp_path, monkeypatch):
    opened(index, tmp_path / "decoded")
    file = next((tmp_path / "decoded").glob("*.u8"))
    with monkeypatch.context() as patch:
        patch.setattr(decoded_file, "_write", None)
        said: list[str] = []
        opened(index, tmp_path / "decoded", said)
        assert "as they were decoded before" in said[0]
    os.truncate(file, 1000)
    assert np.array_equal(opened(index, tmp_path / "decoded").image(69), index.image(69))
    names = sorted(people.rglob("*.jpg"))
    shutil.copy(names[0], names[1])
    other = build_index(people, tmp_path / "other", progress=False, announce=ignore)
    assert np.array_equal(opened(other, tmp_path / "decoded").image(1), other.image(1))
    assert len(list((tmp_path / "decoded").glob("*.u8"))) == 2


def test_what_cannot_be_decoded_is_asked_for_each_time(index, tmp_path):
    path = Path(index.path(5))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    decoded = opened(index, tmp_path / "decoded")
    with pytest.raises(UnreadableImage):
        decoded.image(5)
    path.write_bytes(content)
    for sample in (4, 5, 6):
        assert np.array_equal(decoded.image(sample), index.image(sample))


def decode_in_a_process(index, folder, queue):
    said: list[str] = []
    opened(index, folder, said)
    queue.put(said[0])


def test_processes_that_start_together_decode_once(index, tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=decode_in_a_process, args=(index, tmp_path / "decoded", queue)) for _ in range(3)]
    for child in children:
        child.start()
    said = [queue.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    assert sum("decoded now" in line for line in said) == 1


def test_mistakes(index, tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*taken.*--data\.loader\.decoded-dir"):
        opened(index, tmp_path / "taken")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(1000))
    with pytest.raises(UserError, match=r"has 0\.00 GiB free, and the decoded images take 0\.\d+ GiB: make room"):
        opened(index, tmp_path / "decoded")
    with pytest.raises(UserError, match="decoded_dir is for the threads and processes loaders"):
        LoaderConfig(kind="dali", decoded_dir=tmp_path)
