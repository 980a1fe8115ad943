"""Random draws of one thing (an image, a person, a camera, ...): a pure function of (seed, what it is, its number)."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from typing import TypeVar

from personmae_kernels.sample_random import Stream, draws, sample_seeds, uniforms

Item = TypeVar("Item")
_NUM_AT_ONCE = 96


class Domain(enum.IntEnum):
    """Kinds of things that have draws of their own. Values are part of a data set's identity: never renumber."""

    IMAGE = 1
    PERSON = 2
    CAMERA = 3
    TRACK = 4
    ATTENDANCE = 5
    SCENE = 6
    FRAMING = 7
    NOISE = 8
    OTHERS = 9


class Dice:
    """Draws in the order in which they are asked for. Two Dice of the same seed, domain and number give the same sequence."""

    def __init__(self, seed: int, domain: Domain, number: int) -> None:
        self._seeds = sample_seeds(seed, int(domain), [number], Stream.MANNEQUIN)
        self._drawn: list[float] = []
        self._first = 0

    def unit(self) -> float:
        """Uniform in [0, 1)."""
        if not self._drawn:
            self._drawn = uniforms(draws(self._seeds, _NUM_AT_ONCE, self._first))[0, ::-1].tolist()
            self._first += _NUM_AT_ONCE
        return self._drawn.pop()

    def uniform(self, low: float, high: float) -> float:
        """Uniform in [low, high)."""
        return low + (high - low) * self.unit()

    def normal(self, sigma: float = 1.0) -> float:
        """About normal with mean 0 and cut at 3 sigma: four uniforms, so that no transcendental function decides a draw."""
        return sigma * math.sqrt(3.0) * (self.unit() + self.unit() + self.unit() + self.unit() - 2.0)

    def chance(self, prob: float) -> bool:
        """True with the given probability."""
        return self.unit() < prob

    def below(self, bound: int) -> int:
        """An integer in [0, bound)."""
        return min(int(self.unit() * bound), bound - 1)

    def sign(self) -> float:
        """-1.0 or 1.0."""
        return 1.0 if self.unit() < 0.5 else -1.0

    def pick(self, items: Sequence[Item], weights: Sequence[float] | None = None) -> Item:
        """One of the items, with probability proportional to its weight (equal by default)."""
        if weights is None:
            return items[self.below(len(items))]
        left = self.unit() * math.fsum(weights)
        for item, weight in zip(items, weights, strict=True):
            left -= weight
            if left < 0.0:
                return item
        return items[-1]
