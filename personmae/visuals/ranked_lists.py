"""Ranked lists: queries with their nearest gallery images, right and wrong told by colour and by tick and cross."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from personmae.data.images import read_image, resize
from personmae.data.records import PersonImage
from personmae.evaluation.distances import Metric
from personmae.evaluation.measures import measure_queries
from personmae.evaluation.ranking import labels_of, match_ranks, nearest_gallery

# Bluish green and vermilion of Okabe & Ito's palette, told apart with any colour vision; the marks do not need colour
# at all.
RIGHT, WRONG = (0, 140, 100), (213, 70, 0)
QUERY_FRAME, PAPER, INK, FAINT = (60, 60, 60), (255, 255, 255), (40, 40, 40), (200, 200, 200)

BORDER_PX = 4
GAP_PX = 8
LABEL_PX = 104
LINE_PX = 17


def choose_queries(average_precision: npt.ArrayLike, num_queries: int = 6) -> list[int]:
    """Queries spread evenly over the quantiles of average precision, worst first: a fair sample, not hand-picked.

    average_precision: [Q], NaN for queries that were not scored, which are not chosen. Of equal queries the first is
    taken. Returns at most num_queries indices, in ascending order of average precision. Raises ValueError if
    num_queries is less than 1.
    """
    if num_queries < 1:
        raise ValueError(f"num_queries is {num_queries}; at least 1 is wanted")
    precision = np.asarray(average_precision, np.float64)
    order = np.argsort(precision, kind="stable")
    order = order[~np.isnan(precision[order])]
    num_chosen = min(num_queries, len(order))
    return [int(order[(2 * number + 1) * len(order) // (2 * num_chosen)]) for number in range(num_chosen)]


def ranked_list_picture(
    query: Sequence[PersonImage],
    gallery: Sequence[PersonImage],
    query_features: npt.ArrayLike,
    gallery_features: npt.ArrayLike,
    *,
    chosen: Sequence[int] | None = None,
    chosen_by: str = "these features",
    title: str = "",
    num_queries: int = 6,
    num_nearest: int = 10,
    size: tuple[int, int] = (128, 64),
    metric: Metric = "cosine",
    average_precision: npt.ArrayLike | None = None,
) -> Image.Image:
    """A row for each chosen query: the query, and its nearest gallery images by the evaluation's own ranking.

    query, gallery: all images, with features [Q, D] and [G, D] in their order. chosen: query indices; by default
    `choose_queries` of these features' own average precision. For a comparison give both pictures the same ones, and
    name in `chosen_by` whose average precision they were chosen by: the caption says it. size: (height, width) in
    pixels of each image. average_precision: [Q] as it was scored, by whatever rules; by default that of the lists.

    Returns an RGB image; `.save(path)` writes it. Raises ValueError for features that do not fit the images.
    """
    query_labels, gallery_labels = labels_of(query), labels_of(gallery)
    if average_precision is None:
        average_precision = measure_queries(match_ranks(query_features, gallery_features, query_labels, gallery_labels, metric)).average_precision
    if chosen is None:
        chosen = choose_queries(average_precision, num_queries)
    caption = (
        f"{len(chosen)} of {len(query):,} queries, spread evenly over the quantiles of average precision (AP) by "
        f"{chosen_by}, worst first; not hand-picked. Green with a tick: the same person, from another camera. "
        "Red with a cross: somebody else."
    )
    width = LABEL_PX + size[1] + 3 * GAP_PX + num_nearest * (size[1] + GAP_PX)
    header = textwrap.wrap(title, width // 7)
    num_title_lines = len(header)
    header += textwrap.wrap(caption, width // 6)
    top = 2 * GAP_PX + len(header) * LINE_PX
    sheet = Image.new("RGB", (width, top + LINE_PX + len(chosen) * (size[0] + GAP_PX) + GAP_PX), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(header):
        font = ImageFont.load_default(13 if number < num_title_lines else 12)
        draw.text((GAP_PX, GAP_PX + number * LINE_PX), line, fill=INK, font=font)
    rank_places = [LABEL_PX + size[1] + 3 * GAP_PX + rank * (size[1] + GAP_PX) for rank in range(num_nearest)]
    for text, x in (("query", LABEL_PX), *((str(rank + 1), x) for rank, x in enumerate(rank_places))):
        draw.text((x, top - 2), text, fill=INK, font=ImageFont.load_default(12))
    if not chosen:
        return sheet
    picked = np.asarray(query_features)[list(chosen)]
    picked_labels = labels_of([query[row] for row in chosen])
    precision = np.asarray(average_precision, np.float64)[list(chosen)]
    nearest = nearest_gallery(picked, gallery_features, picked_labels, gallery_labels, num_nearest, metric)
    for row, index in enumerate(chosen):
        y = top + LINE_PX + row * (size[0] + GAP_PX)
        found = [gallery[column] if column >= 0 else None for column in nearest[row]]
        _draw_row(sheet, y, query[index], float(precision[row]), found, rank_places, size)
    return sheet


def _draw_row(
    sheet: Image.Image,
    y: int,
    query: PersonImage,
    precision: float,
    found: Sequence[PersonImage | None],
    rank_places: Sequence[int],
    size: tuple[int, int],
) -> None:
    draw = ImageDraw.Draw(sheet)
    score = "not scored" if np.isnan(precision) else f"AP {precision:.1%}"
    label = f"person {query.person}\ncamera {query.camera}\n{score}"
    draw.multiline_text((GAP_PX, y + 2), label, fill=INK, font=ImageFont.load_default(12), spacing=4)
    sheet.paste(_framed(query, size, QUERY_FRAME), (LABEL_PX, y))
    for x, image in zip(rank_places, found, strict=True):
        if image is None:
            draw.rectangle((x, y, x + size[1] - 1, y + size[0] - 1), outline=FAINT)
        else:
            right = image.person == query.person
            sheet.paste(_framed(image, size, RIGHT if right else WRONG), (x, y))
            mark(draw, x + size[1] - 1, y, right)


def _framed(image: PersonImage, size: tuple[int, int], colour: tuple[int, int, int]) -> Image.Image:
    picture = Image.fromarray(resize(read_image(image.path), size))
    ImageDraw.Draw(picture).rectangle((0, 0, size[1] - 1, size[0] - 1), outline=colour, width=BORDER_PX)
    return picture


def mark(draw: ImageDraw.ImageDraw, right_px: int, top_px: int, right: bool) -> None:
    """A tick or a cross on a badge in the upper right corner."""
    x, y = right_px - 18, top_px
    draw.rectangle((x, y, right_px, y + 18), fill=RIGHT if right else WRONG)
    if right:
        draw.line((x + 4, y + 9, x + 8, y + 13, x + 14, y + 5), fill=PAPER, width=3)
    else:
        draw.line((x + 5, y + 5, x + 13, y + 13), fill=PAPER, width=3)
        draw.line((x + 13, y + 5, x + 5, y + 13), fill=PAPER, width=3)
