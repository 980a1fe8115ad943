"""The teacher as a moving average of the student."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


class MovingAverage:
    """Keeps `average` = momentum * average + (1 - momentum) * `source`, parameter by parameter."""

    def __init__(self, average: nn.Module, source: nn.Module) -> None:
        """Raises ValueError naming the first parameter that only one of the two has: an empty or partial match would never move."""
        theirs, ours = dict(source.named_parameters()), dict(average.named_parameters())
        odd = sorted(theirs.keys() ^ ours.keys())
        if odd or not ours:
            raise ValueError(f"teacher and student do not match: {odd[0] if odd else 'there are no parameters'}")
        self._average: list[Tensor] = list(ours.values())
        self._source: list[Tensor] = [theirs[name] for name in ours]

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each parameter of the source with its average."""
        return zip(self._source, self._average, strict=True)

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """One step, after the optimiser's."""
        torch._foreach_lerp_(self._average, self._source, 1.0 - momentum)
