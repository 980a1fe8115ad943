"""Frames, videos and box files of known content, for the tests of `personmae crop`."""

from pathlib import Path

import cv2
import numpy as np
from PIL import Image

HEIGHT, WIDTH = 120, 160


def frame_pixels(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Noise that is another one for each number, RGB."""
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_frames(folder: Path, numbers, name="{:06d}.png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        Image.fromarray(frame_pixels(number)).save(folder / name.format(number))
    return folder


def write_video(path: Path, num_frames: int, height: int = HEIGHT, width: int = WIDTH) -> Path:
    """A Motion JPEG video whose frame i is grey of level 10 * i."""
    video = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (width, height))  # type: ignore[attr-defined]
    assert video.isOpened()
    for number in range(num_frames):
        video.write(np.full((height, width, 3), 10 * number, np.uint8))
    video.release()
    return path


def damage_video_frame(path: Path, number: int) -> None:
    """Overwrites the JPEG of a frame of such a video with zeros."""
    content = bytearray(path.read_bytes())
    # The list of the frames begins here; the header names the chunk too.
    position = content.index(b"movi")
    for _ in range(number + 1):
        position = content.index(b"00dc", position + 1)
    length = int.from_bytes(content[position + 4 : position + 8], "little")
    content[position + 8 : position + 8 + length] = bytes(length)
    path.write_bytes(content)


def write_mot_sequence(root: Path, name: str, tracks: dict[int, range], kind: str = "gt") -> Path:
    """A sequence in MOTChallenge's layout; the person with id i stands in x = 10 * i, 40 x 64 pixels, in the frames of its range."""
    frames = sorted({frame for some in tracks.values() for frame in some})
    write_frames(root / name / "img1", frames)
    end = "1,1,1" if kind == "gt" else "0.9"
    lines = [f"{frame},{person},{10 * person + 1},{6},40,64,{end}" for person, some in tracks.items() for frame in some]
    path = root / name / kind / f"{kind}.txt"
    path.parent.mkdir()
    path.write_text("\n".join(lines) + "\n")
    return root / name
