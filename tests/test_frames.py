"""Frames by number and by name, ambiguities named; videos in order, damaged and ending early."""

import os

import cv2
import numpy as np
import pytest
from PIL import Image

from personmae.configs import UserError
from personmae.data.frames import FrameFolder, FrameVideo, open_frames
from personmae.data.images import UnreadableImage
from tests.frame_sets import HEIGHT, WIDTH, damage_video_frame, frame_pixels, write_frames, write_video


@pytest.mark.parametrize("name", ["{:06d}.png", "{}.png", "frame_{}.png", "frame{:04d}_left.png", "cam3_{:05d}.png", "2024-01-02_{:04d}_x7.png"])
def test_numbers_of_files(tmp_path, name):
    frames = FrameFolder(write_frames(tmp_path / "frames 1", [3, 12, 7], name))
    assert frames.first == 3
    indexes = frames.find([12, 3, 4, 7])
    assert [frames.number(index) if index >= 0 else None for index in indexes.tolist()] == [12, 3, None, 7]
    assert frames.source(int(indexes[0])) == str(tmp_path / "frames 1" / name.format(12))
    assert np.array_equal(frames.deliver(int(indexes[0]))(), frame_pixels(12))
    sizes = frames.sizes(indexes[[0, 1, 3]], 2)
    assert (sizes.heights.tolist(), sizes.widths.tolist(), sizes.unreadable) == ([HEIGHT] * 3, [WIDTH] * 3, {})


def test_files_without_a_number_are_no_frames(tmp_path):
    folder = write_frames(tmp_path / "frames", [1, 2])
    write_frames(folder, [0], "background.png")
    assert FrameFolder(folder).find([0, 1, 2]).tolist() == [-1, 0, 1]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["1.png", "01.png"], "01.png and 1.png are both frame 1"),
        (["frame_1.png", "mask_1.png"], "frame_1.png and mask_1.png are both frame 1"),
        (["a/1.png", "b/1.png"], "a/1.png and b/1.png are both frame 1"),
        (["c1_1.png", "c2_2.png"], "c1_1.png and c2_2.png differ in more than one number"),
        (["a.png", "b.png"], "none of its 2 images has a number"),
    ],
)
def test_ambiguous_names(tmp_path, names, message):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_frames(tmp_path, [0], name)
    with pytest.raises(UserError, match=message):
        FrameFolder(tmp_path)


def test_frame_pattern(tmp_path):
    for name in ("c1_f5.png", "c2_f6.png", "mask_5.png"):
        write_frames(tmp_path, [0], name)
    assert FrameFolder(tmp_path, pattern=r"_f(\d+)").find([5, 6]).tolist() == [0, 1]
    for pattern, message in ((r"_f\d+", "0 groups"), ("(", "no regular expression"), (r"_(f)", "no number"), (r"z(\d)", "none of its 3 images")):
        with pytest.raises(UserError, match=message):
            FrameFolder(tmp_path, pattern=pattern)


def test_frames_by_name(tmp_path):
    for name in ("a/x.png", "b/x.png", "b/y z.png", "b/y z.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    frames = FrameFolder(tmp_path, by_name=True)
    # Sorted: a/x.png, b/x.png, b/y z.jpg, b/y z.png.
    assert frames.find(["b/x.png", "./a/x.png", "b\\x.png", "y z.jpg", "../../etc/passwd", "q"]).tolist() == [1, 0, 1, 2, -1, -1]
    # Folders of another machine are passed over where none of them is one of ours, else a namesake is another image.
    assert frames.find(["else/y z.jpg", "q"]).tolist() == [2, -1]
    assert frames.find(["else/y z.jpg", "a/x.png"]).tolist() == [-1, 0]
    for name, both in (("x.png", "a/x.png or .*b/x.png"), ("y z", "y z.jpg or .*y z.png")):
        with pytest.raises(UserError, match=both):
            frames.find([name])


def test_numbers_of_too_many_digits(tmp_path):
    write_frames(tmp_path, [0], "2023010112000012345678.png")
    with pytest.raises(UserError, match="too many digits; say by --frame-pattern"):
        FrameFolder(tmp_path)


def test_turned_frames_are_shown_upright(tmp_path):
    pixels = frame_pixels(0)
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees, clockwise
    Image.fromarray(pixels).save(tmp_path / "1.png", exif=exif)
    frames = FrameFolder(tmp_path)
    sizes = frames.sizes(np.array([0]), 1)
    assert (sizes.heights[0], sizes.widths[0]) == (WIDTH, HEIGHT)
    assert np.array_equal(frames.deliver(0)(), np.rot90(pixels, -1))


def test_names_that_are_no_text(tmp_path):
    name = os.fsencode(tmp_path) + b"/fa\xe7ade 1.png"
    write_frames(tmp_path, [0], "x.png").joinpath("x.png").rename(os.fsdecode(name))
    frames = FrameFolder(tmp_path, by_name=True)
    assert frames.find(["fa\udce7ade 1.png"]).tolist() == [0]
    assert np.array_equal(frames.deliver(0)(), frame_pixels(0))


def test_video(tmp_path):
    frames = open_frames(write_video(tmp_path / "a: %03d.avi", 12), by_name=False, first=1)
    assert frames.find([1, 12, 0]).tolist() == [0, 11, -1]
    assert frames.sizes(np.array([0, 5]), 1).heights.tolist() == [HEIGHT] * 2
    for _ in range(2):
        levels = [round(float(frames.deliver(index)().mean())) for index in (0, 3, 4, 11)]
        assert np.abs(np.subtract(levels, [0, 30, 40, 110])).max() <= 2
        with pytest.raises(UnreadableImage, match="ends early: it has 12 frames and says 12"):
            frames.deliver(12)
        # What is asked for after closing opens it again.
        frames.close()
    assert frames.notes() == []


def test_damaged_frames_of_a_video_keep_their_number(tmp_path):
    path = write_video(tmp_path / "video.avi", 12)
    damage_video_frame(path, 4)
    frames = FrameVideo(path, 0)
    assert abs(float(frames.deliver(3)().mean()) - 30) <= 2
    with pytest.raises(UnreadableImage, match="frame 4: damaged"):
        frames.deliver(4)
    assert abs(float(frames.deliver(5)().mean()) - 50) <= 2
    assert frames.notes() == []
    frames.close()


class DroppingVideo:
    """Stands in for an OpenCV video of 10 frames a second, numbered from 1, whose decoder leaves out frames before the sixth without a word."""

    def __init__(self, num_dropped: int) -> None:
        self.time, self.count, self.num_dropped = 300, 0, num_dropped

    def grab(self) -> bool:
        self.count += 1
        self.time += 100 * (1 + self.num_dropped * (self.count == 6))
        return True

    def get(self, what: int) -> float:
        return {cv2.CAP_PROP_FPS: 10.0, cv2.CAP_PROP_POS_MSEC: float(self.time)}[what]

    def retrieve(self) -> tuple[bool, np.ndarray]:
        return True, np.zeros((HEIGHT, WIDTH, 3), np.uint8)

    def release(self) -> None:
        """Nothing is held."""


@pytest.mark.parametrize("num_dropped", [0, 1, 5])
def test_left_out_frames_are_noticed_by_their_times(tmp_path, monkeypatch, num_dropped):
    frames = FrameVideo(write_video(tmp_path / "video.avi", 12), 1)
    monkeypatch.setattr(frames, "_video", DroppingVideo(num_dropped))
    frames.deliver(9)
    assert ["from frame 6 on, times do not fit" in note for note in frames.notes()] == ([True] if num_dropped else [])


def test_what_is_no_source_of_frames(tmp_path):
    (tmp_path / "text.avi").write_text("no video")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.avi")
    for path, by_name, message in (
        (tmp_path / "text.avi", False, "no video that OpenCV can read"),
        (tmp_path / "nothing", False, "no such frames"),
        (tmp_path / "empty", False, "holds no JPEG"),
        (tmp_path / "pipe.avi", False, "neither a folder of images nor a video file"),
        (write_video(tmp_path / "video.avi", 3), True, "name images"),
    ):
        with pytest.raises(UserError, match=message):
            open_frames(path, by_name=by_name, first=0)
