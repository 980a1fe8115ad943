"""Attention maps over a query and its ranked list: which patches an encoder's features of each image are made of.

A map gives each patch its share of what the class token (or the mean of the patch tokens) takes from the patches; 1/L for
each of L patches says nothing, so that colours stand for multiples of that.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont

from personmae.data.images import read_image, resize
from personmae.data.records import PersonImage
from personmae.models.attention_rollout import MapKind, MapToken, attention_maps
from personmae.models.vit import VisionTransformer
from personmae.visuals.ranked_lists import BORDER_PX, FAINT, GAP_PX, INK, LINE_PX, PAPER, QUERY_FRAME, RIGHT, WRONG, mark

FloatArray = npt.NDArray[np.float32]
UInt8Array = npt.NDArray[np.uint8]

# Perceptually even, also without colour; how opaque the map lies over the image at no and at full attention.
COLOUR_MAP, OPACITY = "inferno", (0.25, 0.8)
LEGEND_PX = (180, 12)


def maps_of_files(
    encoder: VisionTransformer, paths: Sequence[Path], kind: MapKind = "rollout", token: MapToken = "class", batch_size: int = 32
) -> FloatArray:
    """The maps of image files, float32 [N, rows, columns], each summing to 1; see `personmae.models.attention_rollout.attention_maps`.

    Raises UnreadableImage for a file that cannot be read.
    """
    size, device = encoder.config.image_size, next(encoder.parameters()).device
    maps = [np.zeros((0, *encoder.config.grid), np.float32)]
    for start in range(0, len(paths), batch_size):
        pixels = np.stack([resize(read_image(path), size) for path in paths[start : start + batch_size]])
        maps.append(attention_maps(encoder, torch.from_numpy(pixels).to(device), kind, token).cpu().numpy())
    return np.concatenate(maps)


def colour_levels(num_levels: int = 256) -> UInt8Array:  # -> [num_levels, 4]
    """The colours of a map from no to full attention, uint8 RGBA: the last says how opaque they lie over the image."""
    colours = matplotlib.colormaps[COLOUR_MAP](np.linspace(0, 1, num_levels))
    colours[:, 3] = np.linspace(*OPACITY, num_levels)
    return (colours * 255).round().astype(np.uint8)


def overlay(image: UInt8Array, shares: FloatArray, full: float) -> UInt8Array:  # [H, W, 3], [rows, columns] -> [H, W, 3]
    """An image under its map. full: the multiple of an even share from which the colour is the last one."""
    multiples = np.clip(np.asarray(shares, np.float32) * shares.size / full, 0, 1)
    smooth = Image.fromarray(multiples).resize((image.shape[1], image.shape[0]), Image.Resampling.BICUBIC)
    colours = colour_levels()[(np.clip(np.asarray(smooth), 0, 1) * 255).round().astype(np.int64)].astype(np.float32)
    opacity = colours[..., 3:] / 255
    return (image * (1 - opacity) + colours[..., :3] * opacity).round().astype(np.uint8)


def attention_picture(
    query: PersonImage,
    found: Sequence[PersonImage | None],
    maps: FloatArray,
    *,
    title: str = "",
    size: tuple[int, int] = (192, 96),
) -> Image.Image:
    """A query and its ranked list, plain above and under their maps below, with a legend; one scale for all of them.

    found: gallery images by rank, None where there is none. maps: [1 + K, rows, columns], of the query first and then of
    each rank, anything where there is no image. size: (height, width) in pixels of each image.

    Returns an RGB image; `.save(path)` writes it. Raises ValueError if there are not as many maps as images.
    """
    if maps.ndim != 3 or len(maps) != 1 + len(found):
        raise ValueError(f"maps have shape {maps.shape}; [{1 + len(found)}, rows, columns] is wanted, the query's first")
    images = [query, *found]
    there = [place for place, image in enumerate(images) if image is not None]
    full = max(float(maps[there].max()) * maps[0].size, 1e-6)
    places = [GAP_PX + place * (size[1] + GAP_PX) + (2 * GAP_PX if place else 0) for place in range(len(images))]
    width = max(places[-1] + size[1] + GAP_PX, LEGEND_PX[0] + 280)
    header = textwrap.wrap(title, width // 7)
    top = GAP_PX + len(header) * LINE_PX + (GAP_PX if header else 0)
    rows = [top + LINE_PX, top + LINE_PX + size[0] + GAP_PX]
    sheet = Image.new("RGB", (width, rows[1] + size[0] + 2 * GAP_PX + 2 * LINE_PX), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(header):
        draw.text((GAP_PX, GAP_PX + number * LINE_PX), line, fill=INK, font=ImageFont.load_default(13))
    for place, (image, x) in enumerate(zip(images, places, strict=True)):
        draw.text((x, top - 2), str(place) if place else "query", fill=INK, font=ImageFont.load_default(12))
        if image is None:
            for y in rows:
                draw.rectangle((x, y, x + size[1] - 1, y + size[0] - 1), outline=FAINT)
            continue
        pixels = resize(read_image(image.path), size)
        is_right = image.person == query.person
        for y, content in zip(rows, (pixels, overlay(pixels, maps[place], full)), strict=True):
            sheet.paste(Image.fromarray(content), (x, y))
            colour = QUERY_FRAME if place == 0 else RIGHT if is_right else WRONG
            draw.rectangle((x, y, x + size[1] - 1, y + size[0] - 1), outline=colour, width=BORDER_PX)
        if place:
            mark(draw, x + size[1] - 1, rows[0], is_right)
    _draw_legend(sheet, rows[1] + size[0] + GAP_PX, full)
    return sheet


def _draw_legend(sheet: Image.Image, y: int, full: float) -> None:
    draw = ImageDraw.Draw(sheet)
    colours = colour_levels(LEGEND_PX[0])[None, :, :3].repeat(LEGEND_PX[1], axis=0)
    sheet.paste(Image.fromarray(np.ascontiguousarray(colours)), (GAP_PX, y))
    font = ImageFont.load_default(12)
    draw.text((GAP_PX, y + LEGEND_PX[1] + 2), "0", fill=INK, font=font)
    draw.text((GAP_PX + LEGEND_PX[0], y + LEGEND_PX[1] + 2), f"{full:.1f}", fill=INK, font=font, anchor="ra")
    draw.text((GAP_PX + LEGEND_PX[0] + 12, y - 2), "attention to a patch, as a multiple", fill=INK, font=font)
    draw.text((GAP_PX + LEGEND_PX[0] + 12, y - 2 + LINE_PX), "of what each would get if all got the same", fill=INK, font=font)
