"""The plan of fine-tuning: P people with K images each in a batch, and how each image is shown. Pure functions of (seed, epoch, sample number)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from personmae.configs import UserError
from personmae.data.labelled import LabelledImages
from personmae.data.plan import BatchPlan, Plan
from personmae.data.region_draws import RegionConfig
from personmae_kernels.sample_random import Stream, draws, integers_below, sample_seeds, uniforms

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """How a training image is shown: whole, resized, and then changed. The defaults are TransReID's.

    flip_prob: share mirrored left to right. pad_px: the resized image is padded with black by so many pixels on each side, and cut to its size again
    at a random place. erasing_prob, erasing_scale: share with an erased box, which gets the mean colour, and its (least, most) area fraction.
    brightness, contrast, saturation, hue, colour_jitter_prob, grey_prob: as in pre-training.
    """

    flip_prob: float = 0.5
    pad_px: int = 10
    erasing_prob: float = 0.5
    erasing_scale: tuple[float, float] = (0.02, 0.4)
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    colour_jitter_prob: float = 1.0
    grey_prob: float = 0.0

    def __post_init__(self) -> None:
        if self.pad_px < 0:
            raise UserError(f"pad_px is {self.pad_px}; it is a number of pixels, 0 for none")
        self.regions()

    def regions(self) -> RegionConfig:
        """The same for the plan that this one stands on. Raises UserError for what is out of range."""
        shared = ("flip_prob", "erasing_prob", "erasing_scale", "brightness", "contrast", "saturation", "hue", "colour_jitter_prob", "grey_prob")
        return RegionConfig(**{name: getattr(self, name) for name in shared})


class IdentityPlan(Plan):
    """Batches of P people with K images each (Hermans et al., "In Defense of the Triplet Loss", 2017); the images of a person stand side by side.

    In an epoch each person's images are shuffled and dealt in groups of K; who has fewer is filled up with repetitions, and what is left over of a
    person sits out. Each batch takes a group of P different people, drawn by how many groups they have left, so that those with many images do not
    remain among themselves at the end; when fewer than P have any left, everybody is dealt again. An epoch has N // (P K) steps, at least 1.

    first_half: who makes the first half of each batch, bool [people], the others make the second; as two domains that are learned together.

    cross_camera: a person's images are dealt such that a group holds as many cameras as it can. A sample that cannot be read is replaced by another
    image of the same person where there is one. Samples of label -1, of nobody, are left out.
    """

    num_regions = 1

    def __init__(
        self,
        images: LabelledImages,
        num_people: int,
        images_each: int,
        seed: int,
        views: ViewConfig,
        *,
        cross_camera: bool = False,
        steps: int | None = None,
        first_half: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """num_people, images_each: P and K. steps: of an epoch, by default as above. Raises UserError for fewer people than P (or than P / 2 in a
        half), and if nobody has two images."""
        if num_people < 2 or images_each < 2:
            raise UserError(f"a batch of {num_people} people with {images_each} images each holds no triplets; both are at least 2")
        if images.num_people < num_people:
            raise UserError(
                f"a batch has {num_people} people, and the training part only {images.num_people}; set --num-people {images.num_people} or lower"
            )
        known = np.flatnonzero(images.labels >= 0)
        counts = np.bincount(images.labels[known], minlength=images.num_people)
        if counts.max() < 2:
            raise UserError("every person has one image alone: there is nothing to learn who is the same from; is this a training set?")
        # The plan below knows a batch only as so many samples of a set, and would refuse a small set here.
        size = num_people * images_each
        super().__init__(images.index.heights, images.index.widths, min(size, len(images)), seed, views.regions(), order=self._deal)
        self.batch_size = size
        self.num_people, self.images_each = num_people, images_each
        self.views, self.cross_camera = views, cross_camera
        # The kinds of people, and how many of each a batch has.
        self._kinds = [(np.arange(images.num_people), num_people)]
        if first_half is not None:
            self._kinds = [(np.flatnonzero(first_half), num_people // 2), (np.flatnonzero(~first_half), num_people // 2)]
            fewest = min(len(people) for people, _ in self._kinds)
            if num_people % 2 or fewest < num_people // 2:
                raise UserError(f"half of {num_people} people come from each set, and one has {fewest}; set --num-people {2 * fewest} or lower")
        self._labels, self._cameras = images.labels, images.cameras
        # Whole groups alone, but for people who have less than one.
        self._groups = np.maximum(counts // images_each, 1)
        self._steps = steps or max(1, len(known) // self.batch_size)
        by_person = known[np.argsort(images.labels[known], kind="stable")]
        self._of_person = np.split(by_person, np.cumsum(counts)[:-1])

    @property
    def has_shifts(self) -> bool:  # type: ignore[override]
        """Whether images are shifted."""
        return self.views.pad_px > 0

    @property
    def steps_per_epoch(self) -> int:
        return self._steps

    def for_samples(self, epoch: int, samples: npt.ArrayLike, copies: npt.ArrayLike | None = None) -> BatchPlan:
        """Views of these samples (integers [B], repetition allowed): whole images, their flips, shifts, colour and erased boxes. copies: integers
        [B], which showing of its sample in its batch each is; None = the first."""
        drawn = super().for_samples(epoch, samples, copies)

        def first(values: npt.NDArray | None) -> npt.NDArray | None:
            return None if values is None else np.ascontiguousarray(values[:, :1])

        boxes = np.zeros((len(drawn), 1, 4), dtype=np.int32)
        boxes[:, 0, 2], boxes[:, 0, 3] = self.heights[drawn.samples], self.widths[drawn.samples]
        shifts = None
        if self.has_shifts:
            words = draws(sample_seeds(self.seed, epoch, drawn.samples, Stream.SHIFTS, drawn.copies), 2)
            shifts = (integers_below(words, 2 * self.views.pad_px + 1) - self.views.pad_px).astype(np.int32)[:, None]
        return replace(
            drawn,
            boxes=boxes,
            flips=np.ascontiguousarray(drawn.flips[:, :1]),
            colour=first(drawn.colour),
            shifts=shifts,
            erase_fractions=first(drawn.erase_fractions),
        )

    def batch(self, step: int, part: int, num_parts: int) -> BatchPlan:
        """Part `part` (from 0) of `num_parts` contiguous parts of the batch of a step, each of whole people. Raises UserError if that does not go."""
        if num_parts < 1 or self.num_people % num_parts:
            raise UserError(
                f"{self.num_people} people cannot be shared among {num_parts} equal parts (processes x accumulation): "
                f"set --num-people to a multiple of {num_parts}"
            )
        planned = super().batch(step, part, num_parts)
        # Who has fewer images than K is shown some twice, each time in another way.
        rows = planned.samples.reshape(-1, self.images_each)
        earlier = np.tril(rows[:, :, None] == rows[:, None, :], -1).sum(2)
        return self.for_samples(planned.epoch, planned.samples, earlier.ravel()) if earlier.any() else planned

    def replacement(self, epoch: int, sample: int, attempt: int) -> int:
        """Another image of the same person, at attempt 1, 2, 3, ...; the sample itself, if there is none."""
        others = self._of_person[self._labels[sample]]
        others = others[others != sample]
        if len(others) == 0:
            return sample
        start = integers_below(draws(sample_seeds(self.seed, epoch, [sample], Stream.REPLACEMENT), 1), len(others))[0, 0]
        return int(others[(int(start) + attempt - 1) % len(others)])

    def _deal(self, epoch: int) -> Int64Array:
        """The samples of an epoch in their order, int64 [steps * P * K]."""
        wanted = self.steps_per_epoch
        people = np.empty((0, self.num_people), dtype=np.int64)
        rows = np.empty((0, self.images_each), dtype=np.int64)
        deal = 0
        while len(people) < wanted:
            chosen = self._choose_people(epoch, deal, wanted - len(people))
            groups = self._groups_of(epoch, deal)
            turns = _occurrences(chosen.ravel())
            starts = np.cumsum(self._groups) - self._groups
            people = np.concatenate([people, chosen])
            rows = np.concatenate([rows, groups[starts[chosen.ravel()] + turns]])
            deal += 1
        return rows.ravel()

    def _choose_people(self, epoch: int, deal: int, most: int) -> Int64Array:
        """The people of one dealing's batches, int64 [at most `most`, P]."""
        left = self._groups.copy()
        seeds = sample_seeds(self.seed, epoch, np.arange(len(left)), Stream.IDENTITIES, np.full(len(left), deal))
        batches: list[Int64Array] = []
        while len(batches) < most and all(np.count_nonzero(left[people]) >= number for people, number in self._kinds):
            # The P smallest of exponential times at rate `left`: without replacement, by weight.
            times = -np.log1p(-uniforms(draws(seeds, 1, first=len(batches)))[:, 0])
            with np.errstate(divide="ignore"):
                times = np.where(left > 0, times / left, np.inf)
            chosen = np.concatenate([people[np.argsort(times[people], kind="stable")[:number]] for people, number in self._kinds])
            left[chosen] -= 1
            batches.append(chosen.astype(np.int64))
        return np.array(batches, dtype=np.int64).reshape(-1, self.num_people)

    def _groups_of(self, epoch: int, deal: int) -> Int64Array:
        """The groups of K of everybody, one person's after the other's, int64 [sum of groups, K]."""
        samples = np.arange(self.num_samples)
        keys = uniforms(draws(sample_seeds(self.seed, epoch, samples, Stream.ORDER, np.full(len(samples), deal)), 1))[:, 0]
        found = []
        for own, number in zip(self._of_person, self._groups.tolist(), strict=True):
            shuffled = own[np.argsort(keys[own], kind="stable")]
            if self.cross_camera:
                # First one image of each camera, then the second of each, and so on.
                shuffled = shuffled[np.argsort(_occurrences(self._cameras[shuffled]), kind="stable")]
            found.append(np.resize(shuffled, number * self.images_each))
        return np.concatenate(found).reshape(-1, self.images_each)


def _occurrences(values: Int64Array) -> Int64Array:
    """How often each entry's value came before it: [5, 3, 5, 5] -> [0, 0, 1, 2]."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    counts = np.diff(np.r_[starts, len(values)])
    result = np.empty(len(values), dtype=np.int64)
    result[order] = np.arange(len(values)) - np.repeat(starts, counts)
    return result
