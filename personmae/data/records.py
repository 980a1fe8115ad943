"""One labelled person crop, as every data set, the evaluator and the pictures know it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class PersonImage:
    """path: image file. person: from 0, which is a distractor in Market-1501. camera: as the set numbers it."""

    path: Path
    person: int
    camera: int
