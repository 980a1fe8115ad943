"""Which boxes become crops, and their pixels: a plan of rectangles made before any frame is decoded, and the cutting itself.

Edges are rounded to the nearest whole pixel (halves up) after padding, so a box in whole pixels without padding is exactly
`frame[y0:y1, x0:x1]`. Sizes, shape and the share inside the frame are those of the box itself, not of its padding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt

from personmae.configs import UserError
from personmae.data.boxes import PERSON, Boxes, Rejected
from personmae.data.frames import Frames
from personmae.data.image_index import MAX_PIXELS, MAX_SIDE_PX
from personmae.data.images import UInt8Array, UnreadableImage

BorderKind = Literal["clip", "replicate"]
ALL_CLASSES = "all"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CropRules:
    """Which boxes become crops, and how they are cut."""

    padding: float = 0.0  # added on every side, as a share of the box's width (left, right) and height (above, below)
    border: BorderKind = "clip"  # of the frame: clip makes the crop smaller, replicate repeats the outermost pixels
    min_height: int = 32  # pixels of the box inside the frame
    min_width: int = 16  # likewise
    min_area: int = 0  # likewise, in pixels
    min_aspect: float = 0.0  # height / width of the box
    max_aspect: float | None = None
    min_inside: float = 0.5  # share of the box's area that lies inside the frame
    min_confidence: float | None = None  # of the box's score, in the box file's own scale
    min_visibility: float | None = None  # 0 to 1, where the box file says it
    classes: tuple[str, ...] = (PERSON,)  # names or numbers, where the box file says them; all: every class
    keep_ignored: bool = False  # also boxes that MOT ground truth or COCO marks as not to be considered: static persons, crowds
    every: int = 1  # of the frames, counted from the sequence's first
    max_per_track: int | None = None  # crops of a person in a sequence, spread evenly over their frames
    max_side: int | None = None  # longest side of a crop in pixels; longer ones are shrunk by averaging, none is enlarged

    def __post_init__(self) -> None:
        for name in ("min_height", "min_width", "every", "max_per_track", "max_side"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        # NaN fails as well.
        for name, highest in (("padding", 10.0), ("min_inside", 1.0), ("min_aspect", np.inf), ("min_area", np.inf)):
            if not 0 <= getattr(self, name) <= highest:
                raise UserError(f"{name} is {getattr(self, name)}; it must lie between 0 and {highest:g}")
        if self.max_aspect is not None and not self.max_aspect >= max(self.min_aspect, 1e-9):
            raise UserError(f"max_aspect is {self.max_aspect}, below min_aspect ({self.min_aspect}) or 0")
        if not self.classes:
            raise UserError(f"classes is empty; name some, or {ALL_CLASSES!r}")


@dataclass(frozen=True)
class CropPlan:
    """The N crops of a sequence, by frame and then in the order of the box file.

    boxes: N of them, edges in pixels. frames: int64 [N], index of the frame. numbers: int64 [N], its number in names. ordinals: int64 [N], position
    of the box among all of its frame in the file, from 0. rectangles: int32 [N, 4], x0, y0, x1, y1 to cut; outside the frame only where the border is
    replicated. sizes: int32 [N, 2], height and width of the frame. left_out: reason -> boxes. unreadable: frame -> why. rejected: rows that cannot be
    used, those of the file included.
    """

    boxes: Boxes
    frames: npt.NDArray[np.int64]
    numbers: npt.NDArray[np.int64]
    ordinals: npt.NDArray[np.int64]
    rectangles: npt.NDArray[np.int32]
    sizes: npt.NDArray[np.int32]
    left_out: dict[str, int]
    unreadable: dict[int, UnreadableImage]
    rejected: list[Rejected]

    def __len__(self) -> int:
        return len(self.frames)


def plan_crops(boxes: Boxes, frames: Frames, rules: CropRules, num_threads: int, *, frame_offset: int = 0) -> CropPlan:
    """What is to be cut from a sequence; reads the headers of its frames.

    frame_offset: added to the box file's numbers of frames. Raises UserError if a rule asks for what the box file does not say.
    """
    choice = _Choice(boxes)
    _choose_by_file(choice, rules)
    keys, key_of = np.unique(boxes.frames, return_inverse=True)
    asked: list[int | str] = [boxes.images[key] for key in keys.tolist()] if boxes.images is not None else (keys + frame_offset).tolist()
    found = frames.find(asked)
    choice.reject((found < 0)[key_of], lambda row: f"there is no frame {asked[key_of[row]]!r}: {frames.path} holds {frames.extent()}")
    indexes = found[key_of]
    called = np.array([frames.number(index) if index >= 0 else 0 for index in found.tolist()], dtype=np.int64)
    numbers = called[key_of]
    choice.leave_out((numbers - frames.first) % rules.every != 0, "between every n-th frame")
    choice.reject(_repeated(indexes, boxes.ids, choice.kept), lambda row: f"the id {boxes.identities[boxes.ids[row]]!r} stands twice in this frame")

    wanted, place = np.unique(indexes[choice.kept], return_inverse=True)
    found_sizes = frames.sizes(wanted, num_threads)
    sizes = np.zeros((len(boxes), 2), dtype=np.int32)
    sizes[choice.kept] = np.stack([found_sizes.heights, found_sizes.widths], axis=1)[place]
    choice.leave_out(sizes[:, 0] == 0, "in frames that cannot be read")
    edges = boxes.edges * sizes[:, [1, 0, 1, 0]] if boxes.relative else boxes.edges
    _choose_by_place(choice, rules, edges, sizes)
    rectangles = _rectangles(edges, sizes, rules)
    sides = (rectangles[:, 2:] - rectangles[:, :2]).astype(np.int64)
    choice.reject(
        (sides.max(axis=1, initial=0) > MAX_SIDE_PX) | (sides.prod(axis=1) > MAX_PIXELS),
        lambda row: (
            f"with its padding the box is {sides[row, 0]} x {sides[row, 1]} pixels (w x h); {MAX_SIDE_PX} a side and {MAX_PIXELS} in all are allowed"
        ),
    )
    if rules.max_per_track is not None:
        choice.leave_out(~_spread(indexes, boxes.ids, choice.kept, rules.max_per_track), "beyond max_per_track")

    rows = np.flatnonzero(choice.kept)
    rows = rows[np.argsort(indexes[rows], kind="stable")]
    return CropPlan(
        boxes=dataclasses.replace(boxes.take(rows), edges=edges[rows]),
        frames=indexes[rows],
        numbers=numbers[rows],
        ordinals=_ordinals(indexes)[rows],
        rectangles=rectangles[rows].astype(np.int32),
        sizes=sizes[rows],
        left_out=choice.left_out,
        unreadable=found_sizes.unreadable,
        rejected=[*boxes.rejected, *choice.rejected],
    )


def cut(frame: UInt8Array, rectangle: Sequence[int], max_side: int | None = None) -> UInt8Array:  # [H, W, C] -> [height, width, C]
    """A rectangle (x0, y0, x1, y1) of a frame; what lies outside repeats the outermost pixels. Longer than max_side: shrunk by averaging."""
    x0, y0, x1, y1 = (int(edge) for edge in rectangle)
    height, width = frame.shape[:2]
    inside = frame[max(y0, 0) : min(y1, height), max(x0, 0) : min(x1, width)]
    outside = (max(-y0, 0), max(y1 - height, 0), max(-x0, 0), max(x1 - width, 0))
    pixels = cv2.copyMakeBorder(inside, *outside, borderType=cv2.BORDER_REPLICATE) if any(outside) else inside
    size = crop_size(rectangle, max_side)
    if size != (y1 - y0, x1 - x0):
        pixels = cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(pixels, dtype=np.uint8)


def crop_size(rectangle: Sequence[int], max_side: int | None) -> tuple[int, int]:
    """(height, width) of the crop of a rectangle: its own, or shrunk such that the longer side is max_side."""
    width, height = int(rectangle[2]) - int(rectangle[0]), int(rectangle[3]) - int(rectangle[1])
    longest = max(width, height)
    if max_side is None or longest <= max_side:
        return height, width
    # Whole numbers: the same everywhere, halves rounded up.
    return tuple(max(1, (2 * side * max_side + longest) // (2 * longest)) for side in (height, width))  # type: ignore[return-value]


class _Choice:
    """The boxes still to be cut, and why the others are not."""

    def __init__(self, boxes: Boxes) -> None:
        self.boxes = boxes
        self.kept: npt.NDArray[np.bool_] = np.ones(len(boxes), dtype=bool)
        self.left_out: dict[str, int] = {}
        self.rejected: list[Rejected] = []

    def leave_out(self, which: npt.NDArray[np.bool_], reason: str) -> None:
        """Of those that are left, the ones that a rule leaves out."""
        if count := int((which & self.kept).sum()):
            self.left_out[reason] = count
        self.kept &= ~which

    def reject(self, which: npt.NDArray[np.bool_], reason: Callable[[int], str]) -> None:
        """Of those that are left, the ones that are mistakes."""
        self.rejected += [self.boxes.reject(row, reason(row)) for row in np.flatnonzero(which & self.kept).tolist()]
        self.kept &= ~which


def _choose_by_file(choice: _Choice, rules: CropRules) -> None:
    """Leaves out by what the box file says of a box, and not by where it lies."""
    boxes = choice.boxes
    asked = {name.strip().lower() for name in rules.classes}
    if ALL_CLASSES not in asked and boxes.labels:
        if all(label.isdecimal() for labels in boxes.labels for label in labels) and not any(map(str.isdecimal, asked)):
            shown = ", ".join(sorted({label for labels in boxes.labels for label in labels}, key=int)[:12])
            raise UserError(f"{boxes.path}: its classes are numbers ({shown}); say by --classes which are people, or --classes {ALL_CLASSES}")
        accepted = np.array([bool(labels & asked) for labels in boxes.labels], dtype=bool)
        choice.leave_out((boxes.classes >= 0) & ~accepted[boxes.classes], "of other classes")
    if not rules.keep_ignored:
        choice.leave_out(boxes.ignored, "marked as not to be considered")
    for limit, values, name in (
        (rules.min_confidence, boxes.scores, "min_confidence"),
        (rules.min_visibility, boxes.visibility, "min_visibility"),
    ):
        if limit is not None:
            if len(boxes) and np.isnan(values).all():
                raise UserError(f"{boxes.path} says no {name.removeprefix('min_')} of any box, so {name} cannot choose among them; leave it out")
            choice.leave_out(~(values >= limit), f"below {name}")
    if rules.max_per_track is not None and len(boxes) and (boxes.ids < 0).all():
        raise UserError(f"{boxes.path} has no ids, so there are no tracks to take max_per_track crops of; leave it out, or take every n-th frame")


def _choose_by_place(choice: _Choice, rules: CropRules, edges: npt.NDArray[np.float64], sizes: npt.NDArray[np.int32]) -> None:
    """Leaves out by where a box lies in its frame. edges: in pixels."""
    frame = sizes[:, [1, 0]].astype(np.float64)
    inside = np.minimum(edges[:, 2:], frame) - np.maximum(edges[:, :2], 0)
    whole = edges[:, 2:] - edges[:, :2]

    def outside(row: int) -> str:
        x0, y0, x1, y1 = edges[row]
        return f"the box lies outside the frame: x {x0:g} to {x1:g}, y {y0:g} to {y1:g} of {sizes[row, 1]} x {sizes[row, 0]} pixels (w x h)"

    choice.reject(np.any(inside <= 0, axis=1), outside)
    choice.leave_out(inside.prod(axis=1) < rules.min_inside * whole.prod(axis=1), "inside the frame by less than min_inside")
    choice.leave_out(inside[:, 1] < rules.min_height, "below min_height")
    choice.leave_out(inside[:, 0] < rules.min_width, "below min_width")
    choice.leave_out(inside.prod(axis=1) < rules.min_area, "below min_area")
    # A box without width, which `inside` has rejected above, has no aspect.
    aspect = np.divide(whole[:, 1], whole[:, 0], out=np.full(len(whole), np.inf), where=whole[:, 0] > 0)
    choice.leave_out(aspect < rules.min_aspect, "below min_aspect")
    if rules.max_aspect is not None:
        choice.leave_out(aspect > rules.max_aspect, "above max_aspect")


def _rectangles(edges: npt.NDArray[np.float64], sizes: npt.NDArray[np.int32], rules: CropRules) -> npt.NDArray[np.int64]:
    margin = rules.padding * (edges[:, 2:] - edges[:, :2])
    padded = np.concatenate([edges[:, :2] - margin, edges[:, 2:] + margin], axis=1)
    rectangles = np.floor(padded + 0.5)
    if rules.border == "clip":
        rectangles = np.clip(rectangles, 0, sizes[:, [1, 0, 1, 0]])
    return rectangles.astype(np.int64)


def _repeated(frames: npt.NDArray[np.int64], ids: npt.NDArray[np.int64], kept: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The boxes of a person after the first in a frame."""
    rows = np.flatnonzero(kept & (ids >= 0))
    order = rows[np.lexsort((ids[rows], frames[rows]))]
    repeated = np.zeros(len(kept), dtype=bool)
    repeated[order[1:]] = (frames[order[1:]] == frames[order[:-1]]) & (ids[order[1:]] == ids[order[:-1]])
    return repeated


def _spread(frames: npt.NDArray[np.int64], ids: npt.NDArray[np.int64], kept: npt.NDArray[np.bool_], most: int) -> npt.NDArray[np.bool_]:
    """The boxes to keep, at most so many of a person: the middles of equal parts of its row of frames. Boxes without an id are kept."""
    chosen = ids < 0
    rows = np.flatnonzero(kept & ~chosen)
    rows = rows[np.lexsort((frames[rows], ids[rows]))]
    starts = np.flatnonzero(np.diff(ids[rows], prepend=-1))
    for first, end in zip(starts.tolist(), [*starts[1:].tolist(), len(rows)], strict=True):
        count = end - first
        taken = np.arange(count) if count <= most else (2 * np.arange(most) + 1) * count // (2 * most)
        chosen[rows[first + taken]] = True
    return chosen


def _ordinals(groups: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Position of each entry among those of the same group, from 0."""
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=groups.min(initial=0) - 1))
    counts = np.diff(np.append(starts, len(order)))
    ordinals = np.empty(len(groups), dtype=np.int64)
    ordinals[order] = np.arange(len(order)) - np.repeat(starts, counts)
    return ordinals
