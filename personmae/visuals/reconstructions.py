"""Reconstruction pictures: what the network saw of region A, region B as it is, and region B as predicted."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

PixelArray = npt.NDArray[np.uint8]
BoolArray = npt.NDArray[np.bool_]

HIDDEN_GREY = (128, 128, 128)
NOT_A_NUMBER = (255, 0, 255)
PAPER, INK = (255, 255, 255), (40, 40, 40)
# Blue and orange of Okabe & Ito's palette; region B's outline is dashed too, so that colour is not the only mark.
OUTLINE_A, OUTLINE_B = (0, 114, 178), (230, 120, 0)

CELL_HEIGHT_PX = 192
GAP_PX = 6
LABEL_PX = 100
TITLE_PX = 24


def reconstruction_picture(
    region_a: npt.ArrayLike,
    mask: npt.ArrayLike,
    region_b: npt.ArrayLike,
    predicted: npt.ArrayLike,
    patch_px: int,
    *,
    boxes: npt.ArrayLike | None = None,
    flips: npt.ArrayLike | None = None,
    title: str = "",
    target: str = "B",
) -> Image.Image:
    """A picture with a column for each sample; rows: places of A and B (given boxes), A masked, B true, B predicted.

    region_a, region_b: uint8 [N, H, W, 3] RGB. mask: bool [N, L], True = hidden, drawn grey; L patches of patch_px x
    patch_px in row order. predicted: [N, H, W, 3] like region_b, uint8, or float in [0, 1] (values outside are clipped,
    values that are not numbers drawn magenta). boxes: [N, 2, 4] = (y0, x0, y1, x1) of A and B in pixels of the stored
    image. flips: bool [N, 2], whether A and B are mirrored. target: what the predicted region is called.

    Returns an RGB image; `.save(path)` writes it. Raises ValueError if the shapes do not fit one another.
    """
    a, b, guess = _pixels("region_a", region_a), _pixels("region_b", region_b), _predicted_pixels(predicted)
    hidden = np.asarray(mask)
    num_samples, height, width = a.shape[:3]
    if num_samples == 0 or a.shape != b.shape or a.shape != guess.shape:
        raise ValueError(
            f"region_a {a.shape}, region_b {b.shape} and predicted {guess.shape} must be of one shape, not empty"
        )
    if patch_px < 1 or height % patch_px or width % patch_px:
        raise ValueError(f"patches of {patch_px} pixels do not tile a region of {height} x {width}")
    grid = (height // patch_px, width // patch_px)
    if hidden.dtype != bool or hidden.shape != (num_samples, grid[0] * grid[1]):
        raise ValueError(f"mask is {hidden.dtype} {hidden.shape}; bool ({num_samples}, {grid[0] * grid[1]}) is wanted")
    rows = [("A, as seen", _masked(a, hidden, grid, patch_px)), (f"{target}, true", b), (f"{target}, predicted", guess)]
    scale = max(1, round(CELL_HEIGHT_PX / height))
    cell = (width * scale, height * scale)
    columns = [
        [Image.fromarray(pixels[number]).resize(cell, Image.Resampling.NEAREST) for number in range(num_samples)]
        for _, pixels in rows
    ]
    labels = [label for label, _ in rows]
    if boxes is not None:
        places = np.asarray(boxes, np.float64)
        mirrored = np.zeros((num_samples, 2), bool) if flips is None else np.asarray(flips, bool)
        if places.shape != (num_samples, 2, 4) or mirrored.shape != (num_samples, 2):
            raise ValueError(
                f"boxes {places.shape} and flips {mirrored.shape} must be ({num_samples}, 2, 4) and ({num_samples}, 2)"
            )
        columns.insert(0, [_places(a[n], b[n], places[n], mirrored[n], cell) for n in range(num_samples)])
        labels.insert(0, "in the image:\nA solid,\nB dashed")
    return _sheet(columns, labels, cell, title)


def _masked(region: PixelArray, hidden: BoolArray, grid: tuple[int, int], patch_px: int) -> PixelArray:
    cells = hidden.reshape(-1, *grid).repeat(patch_px, axis=1).repeat(patch_px, axis=2)
    return np.where(cells[..., None], np.array(HIDDEN_GREY, np.uint8), region)


def _places(
    a: PixelArray, b: PixelArray, boxes: npt.NDArray[np.float64], flips: BoolArray, cell: tuple[int, int]
) -> Image.Image:
    """Both regions put back where they were cut out, with outlines."""
    top_left, bottom_right = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
    extent = np.maximum(bottom_right - top_left, 1)
    # One pixel is left at the border for the outlines.
    scale = min((cell[1] - 3) / extent[0], (cell[0] - 3) / extent[1])
    offset = (np.array([cell[1], cell[0]]) - extent * scale) / 2
    picture = Image.new("RGB", cell, PAPER)
    corners = []
    for region, box, flip in zip((a, b), boxes, flips, strict=True):
        y0, x0 = np.round((box[:2] - top_left) * scale + offset).astype(int).tolist()
        y1, x1 = np.round((box[2:] - top_left) * scale + offset).astype(int).tolist()
        corners.append((x0, y0, x1, y1))
        size = (max(x1 - x0, 1), max(y1 - y0, 1))
        picture.paste(Image.fromarray(region[:, ::-1] if flip else region).resize(size, Image.Resampling.BOX), (x0, y0))
    draw = ImageDraw.Draw(picture)
    draw.rectangle(corners[0], outline=OUTLINE_A, width=2)
    _dashed_rectangle(draw, corners[1], OUTLINE_B)
    return picture


def _dashed_rectangle(
    draw: ImageDraw.ImageDraw, corners: tuple[int, int, int, int], colour: tuple[int, int, int], dash_px: int = 5
) -> None:
    x0, y0, x1, y1 = corners
    for start in range(x0, x1, 2 * dash_px):
        for y in (y0, y1):
            draw.line((start, y, min(start + dash_px, x1), y), fill=colour, width=2)
    for start in range(y0, y1, 2 * dash_px):
        for x in (x0, x1):
            draw.line((x, start, x, min(start + dash_px, y1)), fill=colour, width=2)


def _sheet(rows: list[list[Image.Image]], labels: list[str], cell: tuple[int, int], title: str) -> Image.Image:
    top = TITLE_PX if title else 0
    width = LABEL_PX + len(rows[0]) * (cell[0] + GAP_PX)
    sheet = Image.new("RGB", (width, top + len(rows) * (cell[1] + GAP_PX) + GAP_PX), PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    if title:
        draw.text((GAP_PX, 5), title, fill=INK, font=font)
    for row, (pictures, label) in enumerate(zip(rows, labels, strict=True)):
        y = top + GAP_PX + row * (cell[1] + GAP_PX)
        draw.multiline_text((GAP_PX, y + 2), label, fill=INK, font=font, spacing=3)
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (LABEL_PX + column * (cell[0] + GAP_PX), y))
    return sheet


def _pixels(name: str, values: Any) -> PixelArray:
    array = np.asarray(values)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3:
        raise ValueError(f"{name} is {array.dtype} {array.shape}; uint8 [N, H, W, 3] is wanted")
    return array


def _predicted_pixels(values: Any) -> PixelArray:
    array = np.asarray(values)
    if array.ndim != 4 or array.shape[-1] != 3:
        raise ValueError(f"predicted has shape {array.shape}; [N, H, W, 3] is wanted")
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"predicted is {array.dtype}; uint8, or float in [0, 1] is wanted")
    broken = np.isnan(array).any(axis=-1, keepdims=True)
    rounded = np.round(np.clip(np.nan_to_num(array.astype(np.float64)), 0, 1) * 255).astype(np.uint8)
    return np.where(broken, np.array(NOT_A_NUMBER, np.uint8), rounded)
