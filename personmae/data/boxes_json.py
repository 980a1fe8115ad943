"""Boxes of people from JSON: COCO's annotations and detections, or a plain list of objects.

COCO: {"images": [{"id", "file_name"}], "annotations": [{"image_id", "bbox": [x, y, w, h], "category_id", optional "score", "track_id", "iscrowd"}],
"categories": [{"id", "name"}]}. Without categories, 1 is the person, as in COCO.

A plain list: objects with the keys of the CSV columns (see `boxes_text.py`), or with "bbox": [x, y, w, h] in place of a box's four, "image_id" in
place of a frame (a number is the frame's number, a text the image's name) and "category_id", as COCO's results are written.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from personmae.configs import UserError
from personmae.data.boxes import PERSON, BadRow, Boxes, BoxTable, Row, identity_of, labels_of, moved, number
from personmae.data.boxes_text import BoxColumns

_COCO_PERSON = 1


def read_json(path: Path, text: str, origin: int, relative: bool) -> Boxes:
    """The boxes of a JSON file's text. Raises UserError if it is no JSON, or neither of the two forms."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: {' '.join(str(error).split())}") from error
    if isinstance(content, list):
        return _read_list(path, content, origin, relative)
    if isinstance(content, dict) and isinstance(content.get("annotations"), list) and isinstance(content.get("images"), list):
        return _read_coco(path, content, origin, relative)
    raise UserError(f"{path} is neither a list of objects nor COCO (an object with the lists 'images' and 'annotations')")


def _read_coco(path: Path, content: dict[str, Any], origin: int, relative: bool) -> Boxes:
    names: dict[object, str] = {}
    for position, image in enumerate(content["images"]):
        try:
            key, name = image["id"], image["file_name"]
            known = names.setdefault(key, name)
        except (TypeError, KeyError, IndexError):
            raise UserError(f"{path}, images[{position}]: an object with 'id' and 'file_name' should stand here") from None
        if not isinstance(name, str) or not name:
            raise UserError(f"{path}, images[{position}]: 'file_name' is {name!r}, not the name of a file")
        if known != name:
            raise UserError(f"{path}, images[{position}]: the id {key!r} is that of {known!r} as well as of {name!r}")
    categories: dict[object, Any] | None = None
    if content.get("categories"):
        try:
            categories = {category["id"]: category["name"] for category in content["categories"]}
        except (TypeError, KeyError, IndexError):
            raise UserError(f"{path}: 'categories' should be a list of objects with 'id' and 'name'") from None

    def row(annotation: Any) -> Row:
        if not isinstance(annotation, dict):
            raise BadRow(f"{annotation!r:.60} is no object")
        image, category = annotation.get("image_id"), annotation.get("category_id")
        try:
            if image not in names:
                raise BadRow(f"image_id {image!r} is not among the images")
            if categories is not None and category is not None and category not in categories:
                raise BadRow(f"category_id {category!r} is not among the categories")
            name = categories[category] if categories is not None and category is not None else None
        except TypeError:
            raise BadRow(f"image_id {image!r:.60} or category_id {category!r:.60} is neither a number nor a text") from None
        return Row(
            frame=names[image],
            edges=moved(_bbox(annotation.get("bbox")), origin),
            identity=identity_of(annotation.get("track_id")),
            score=_optional(annotation, "score"),
            visibility=_optional(annotation, "visibility"),
            labels=_coco_labels(category, name, categories is None),
            ignored=_optional(annotation, "iscrowd") == 1 or _optional(annotation, "ignore") == 1,
        )

    table = BoxTable(path, "annotations[{}]", relative)
    for position, annotation in enumerate(content["annotations"]):
        table.add(position, lambda annotation=annotation: row(annotation))  # type: ignore[misc]
    return table.boxes()


def _read_list(path: Path, content: list[Any], origin: int, relative: bool) -> Boxes:
    known: dict[tuple[str, ...], BoxColumns] = {}

    def row(item: Any) -> Row:
        if not isinstance(item, dict):
            raise BadRow(f"{item!r:.60} is no object")
        item = dict(item)
        if "bbox" in item:
            item.update(zip(("x0", "y0", "x1", "y1"), _bbox(item.pop("bbox")), strict=True))
        if "image_id" in item:
            place = item.pop("image_id")
            item["image" if isinstance(place, str) else "frame"] = place
            # An annotation's own number in COCO, not a person's.
            item.pop("id", None)
        names = tuple(item)
        if names not in known:
            known[names] = BoxColumns(names)
        found = known[names].row(list(item.values()), origin)
        category = item.get("category_id")
        return found._replace(labels=_coco_labels(category, None, True)) if category is not None else found

    table = BoxTable(path, "item [{}]", relative)
    for position, item in enumerate(content):
        table.add(position, lambda item=item: row(item))  # type: ignore[misc]
    return table.boxes()


def _coco_labels(category: object, name: object, coco_numbers: bool) -> frozenset[str]:
    if category is None:
        return frozenset()
    return labels_of(category, name, PERSON if coco_numbers and category == _COCO_PERSON else None)


def _bbox(value: object) -> tuple[float, float, float, float]:
    """Edges of COCO's [x, y, w, h]."""
    if not isinstance(value, list) or len(value) != 4:
        raise BadRow(f"bbox is {value!r:.60}; four numbers x, y, w, h should stand there")
    x, y, width, height = (number(part, f"bbox {name}") for part, name in zip(value, "xywh", strict=True))
    return x, y, x + width, y + height


def _optional(item: dict[str, Any], name: str) -> float:
    value = item.get(name)
    if isinstance(value, bool):
        return float(value)
    return math.nan if value is None else number(value, name)
