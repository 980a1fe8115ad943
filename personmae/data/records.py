"""One labelled person crop, as every data set, the evaluator and the pictures know it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# Of a detection that shows nobody in particular: not ranked, by Market-1501's own scripts.
JUNK_PERSON = -1
# Cameras of a set that does not tell them: no gallery image is then from the camera of a query.
QUERY_CAMERA, GALLERY_CAMERA = 0, 1


@dataclass(frozen=True, slots=True)
class PersonImage:
    """path: image file. person: from 0, which is a distractor in Market-1501. camera: as the set numbers it."""

    path: Path
    person: int
    camera: int
