"""The epoch of a fine-tuning run that scored best, and its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from personmae.models.identity_head import IdentityHead
from personmae.models.reid import ReidEncoder
from personmae.models.weights import save_reid


class BestEpoch:
    """The epoch with the highest score so far, whose weights stand in a file; of equal ones the first.

    path: of the file. score: None before the first. epoch: from 1.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.score: float | None = None
        self.epoch = 0

    def is_better(self, score: float, epoch: int) -> bool:
        """Whether an epoch is the best so far; it then is."""
        if self.score is not None and score <= self.score:
            return False
        self.score, self.epoch = score, epoch
        return True

    def save(self, encoder: ReidEncoder, head: IdentityHead, notes: Mapping[str, str]) -> None:
        """Write its weights. notes: strings kept in the file's header. Raises UserError if the disk refuses."""
        save_reid(self.path, encoder, head, {**notes, "epoch": str(self.epoch), "score": f"{self.score:.6f}"})

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"score": self.score, "epoch": self.epoch}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's."""
        self.score, self.epoch = state["score"], state["epoch"]
