"""What every reader returns: the three lists of a labelled set, and what a user should know about them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from personmae.data.records import PersonImage


@dataclass(frozen=True)
class ReidSet:
    """A labelled set. The gallery keeps distractors (person 0 in Market-1501); junk (person -1) is dropped, counted.

    train, query, gallery: each sorted by file name; train may be empty. Train and test people have different numbers.
    An image may stand in query and gallery (CUHK03's classic protocol): the rule of the same camera leaves it out.
    has_cameras: False for sets whose cameras are not told; then all queries have camera 0 and the gallery camera 1, the convention of the code bases
    that read them. single_gallery_shot: scored with one random gallery image a person. split: which of several splits, in words.
    notes: what was found out or decided while reading, to be printed.
    """

    name: str
    train: list[PersonImage]
    query: list[PersonImage]
    gallery: list[PersonImage]
    num_junk: int = 0
    has_cameras: bool = True
    single_gallery_shot: bool = False
    split: str = ""
    notes: tuple[str, ...] = ()

    def parts(self) -> dict[str, list[PersonImage]]:
        """The three lists by name, in the order train, query, gallery."""
        return {"train": self.train, "query": self.query, "gallery": self.gallery}

    def describe(self) -> str:
        """One line with the number of images, people and cameras of each part."""
        parts = []
        for part, images in self.parts().items():
            num_people = len({image.person for image in images})
            num_cameras = len({image.camera for image in images})
            cameras = f"from {num_cameras} cameras" if self.has_cameras else "(cameras not told)"
            parts.append(f"{part} {len(images):,} images of {num_people:,} people {cameras}")
        split = f" ({self.split})" if self.split else ""
        return f"{self.name}{split}: {'; '.join(parts)}; {self.num_junk:,} junk images dropped"


def by_name(images: Iterable[PersonImage]) -> list[PersonImage]:
    """Sorted by file name (then by folder), so that a list is the same on every machine."""
    return sorted(images, key=lambda image: (image.path.name, str(image.path)))
