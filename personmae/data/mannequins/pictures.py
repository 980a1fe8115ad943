"""Which pictures a data set holds: who is seen where, when, how occluded, and under which file name. Pure functions of the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from personmae.configs import UserError
from personmae.data.mannequins.dice import Dice, Domain
from personmae.data.mannequins.wardrobe import City

Kind = Literal["person", "distractor", "junk"]
Occlusion = Literal["none", "light", "strong"]
TRAIN, QUERY, GALLERY, UNLABELLED, OCCLUDED = "bounding_box_train", "query", "bounding_box_test", "unlabelled", "occluded"

# People are numbered in blocks, so that no two parts of a data set can share one.
_BLOCK = 1_000_000
_TRAIN_PEOPLE, _TEST_PEOPLE, _OCCLUDED_TRAIN_PEOPLE, _OCCLUDED_TEST_PEOPLE, _UNLABELLED_PEOPLE, _DISTRACTORS, BYSTANDERS = (
    k * _BLOCK for k in range(7)
)
_FRAMES_PER_PICTURE = 8


@dataclass(frozen=True, kw_only=True)
class MannequinsConfig:
    """A data set of drawn people. The defaults make one of about 16,000 pictures, about as hard as Market-1501 for colours alone.

    size_px: (height, width) of each picture. Each person of the labelled parts is seen by 2 to num_cameras cameras, with pictures_per_camera[0] to
    [1] pictures each, and as many queries as cameras. The occluded parts have people of their own; 0 ids leave them out. Distractors (person 0) and
    junk (person -1) are given as shares of the gallery's pictures of people.
    """

    size_px: tuple[int, int] = (256, 128)
    num_train_ids: int = 150
    num_test_ids: int = 250
    num_occluded_train_ids: int = 50
    num_occluded_test_ids: int = 50
    num_unlabelled: int = 5000
    num_cameras: int = 6
    pictures_per_camera: tuple[int, int] = (2, 5)
    distractor_ratio: float = 0.12
    junk_ratio: float = 0.08
    city: City = "rivermouth"
    seed: int = 0

    def __post_init__(self) -> None:
        height, width = self.size_px
        low, high = self.pictures_per_camera
        checks = {
            f"size_px={self.size_px}: both sides must lie in 32..1024": 32 <= height <= 1024 and 32 <= width <= 1024,
            f"num_cameras={self.num_cameras}: a test person must be seen by two cameras or more; give 2 to 99": 2 <= self.num_cameras <= 99,
            f"pictures_per_camera={self.pictures_per_camera}: give (fewest, most) with 1 <= fewest <= most <= 50": 1 <= low <= high <= 50,
            f"city={self.city!r}; there are: {', '.join(get_args(City))}": self.city in get_args(City),
            "numbers of people and pictures must lie in 0..999999": all(0 <= count < _BLOCK for count in (
                self.num_train_ids, self.num_test_ids, self.num_occluded_train_ids, self.num_occluded_test_ids, self.num_unlabelled)),
            "distractor_ratio and junk_ratio must lie in 0..10": 0 <= self.distractor_ratio <= 10 and 0 <= self.junk_ratio <= 10,
        }  # fmt: skip
        for message, holds in checks.items():
            if not holds:
                raise UserError(message)

    @property
    def draw_seed(self) -> int:
        """The seed of all draws: cities of one seed share nothing."""
        return 2 * self.seed + get_args(City).index(self.city)


@dataclass(frozen=True)
class Picture:
    """One picture to draw."""

    path: str  # under the data set's root, with "/"
    number: int  # in the data set: its own draws come from it
    kind: Kind
    person: int  # the person's number: equal in two pictures if and only if it is the same person
    camera: int  # from 1
    moment: int  # video frame within the person's passage before the camera
    occlusion: Occlusion


def plan_pictures(config: MannequinsConfig) -> list[Picture]:
    """All pictures of the data set, in a fixed order."""
    plan: list[Picture] = []
    _plan_labelled(plan, config, "", config.num_train_ids, config.num_test_ids, (_TRAIN_PEOPLE, _TEST_PEOPLE))
    _plan_labelled(
        plan, config, OCCLUDED + "/", config.num_occluded_train_ids, config.num_occluded_test_ids, (_OCCLUDED_TRAIN_PEOPLE, _OCCLUDED_TEST_PEOPLE)
    )
    person, count = _UNLABELLED_PEOPLE, 0
    while count < config.num_unlabelled:
        for camera, num_pictures in _attendance(config, person):
            for k in range(min(num_pictures, config.num_unlabelled - count)):
                occlusion = _light_or_none(config, person, camera, k)
                plan.append(Picture(f"{UNLABELLED}/{count:06d}.jpg", len(plan), "person", person, camera, k * _FRAMES_PER_PICTURE, occlusion))
                count += 1
        person += 1
    return plan


def _plan_labelled(plan: list[Picture], config: MannequinsConfig, prefix: str, num_train: int, num_test: int, people: tuple[int, int]) -> None:
    duke = bool(prefix)
    digits = max(4, len(str(num_train + num_test)))

    def add(folder: str, kind: Kind, label: str, person: int, camera: int, moment: int, detection: int, occlusion: Occlusion) -> None:
        frame = 1 + (person % _BLOCK) * 150 + camera * 11 + moment
        name = f"{label}_c{camera}_f{frame:07d}.jpg" if duke else f"{label}_c{camera}s{1 + person % 3}_{frame:06d}_{detection:02d}.jpg"
        plan.append(Picture(f"{prefix}{folder}/{name}", len(plan), kind, person, camera, moment, occlusion))

    for i in range(num_train):
        person = people[0] + i
        for camera, num_pictures in _attendance(config, person):
            for k in range(num_pictures):
                add(TRAIN, "person", f"{1 + i:0{digits}d}", person, camera, k * _FRAMES_PER_PICTURE, 1, _light_or_none(config, person, camera, k))
    num_gallery = 0
    for i in range(num_test):
        person, label = people[1] + i, f"{1 + num_train + i:0{digits}d}"
        for camera, num_pictures in _attendance(config, person):
            add(QUERY, "person", label, person, camera, 0, 0, "strong" if duke else "none")
            for k in range(1, 1 + num_pictures):
                add(GALLERY, "person", label, person, camera, k * _FRAMES_PER_PICTURE, 1, _light_or_none(config, person, camera, k))
            num_gallery += num_pictures
    # Duke's sets have neither distractors labelled 0 nor junk.
    extras: tuple[tuple[Kind, str, float], ...] = () if duke else (("distractor", "0000", config.distractor_ratio), ("junk", "-1", config.junk_ratio))
    first = 0
    for kind, label, ratio in extras:
        for k in range(first, first + round(ratio * num_gallery)):
            add(GALLERY, kind, label, _DISTRACTORS + k, 1 + k % config.num_cameras, 0, 2, "none")
        first += round(ratio * num_gallery)


def _attendance(config: MannequinsConfig, person: int) -> list[tuple[int, int]]:
    """(camera, number of pictures) of the cameras that see the person: at least two, most of them."""
    dice = Dice(config.draw_seed, Domain.ATTENDANCE, person)
    cameras = list(range(1, config.num_cameras + 1))
    num_seen = min(config.num_cameras, 2 + dice.below(config.num_cameras - 1) if dice.chance(0.6) else config.num_cameras)
    for k in range(num_seen):
        other = k + dice.below(len(cameras) - k)
        cameras[k], cameras[other] = cameras[other], cameras[k]
    low, high = config.pictures_per_camera
    return [(camera, low + dice.below(high - low + 1)) for camera in sorted(cameras[:num_seen])]


def _light_or_none(config: MannequinsConfig, person: int, camera: int, k: int) -> Occlusion:
    """One picture in ten is partly hidden, as detectors find them."""
    dice = Dice(config.draw_seed, Domain.FRAMING, person * 10_000 + camera * 100 + k)
    draw = dice.unit()
    return "strong" if draw < 0.03 else "light" if draw < 0.10 else "none"
