"""The files that could not be read while training: listed with the reason, counted over all processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path

from personmae.configs import UserError
from personmae.whole_files import explained_write, write_whole


class Quarantine:
    """Keeps run_dir/quarantine.tsv (step, path, reason) and the count. Every process counts alike; the main one writes and speaks."""

    def __init__(
        self, run_dir: Path, num_images: int, max_bad_ratio: float, is_main: bool, announce: Callable[[str], object], *, resume_step: int = 0
    ) -> None:
        """num_images: of the whole set. max_bad_ratio: the run stops when more than this share of them has gone bad. resume_step: steps done before;
        what an interrupted run met later is dropped from the list, as it will be met again."""
        self.file = run_dir / "quarantine.tsv"
        self._num_images, self._max_bad_ratio = num_images, max_bad_ratio
        self._is_main, self._announce = is_main, announce
        self._paths: set[str] = set()
        if self.file.exists():
            # Not splitlines, which would end a line at other characters of a path too.
            lines = self.file.read_bytes().decode(errors="surrogateescape").removesuffix("\n").split("\n")
            kept = [line for line in lines if line.count("\t") >= 2 and line.split("\t")[0].isdecimal() and int(line.split("\t")[0]) <= resume_step]
            self._paths = {line.split("\t")[1] for line in kept}
            if is_main and kept != lines:
                write_whole(self.file, "".join(line + "\n" for line in kept))

    def __len__(self) -> int:
        return len(self._paths)

    def add(self, step: int, entries: Iterable[tuple[str, str]]) -> None:
        """Take (path, reason) of files met at or before this step, the same ones in every process; known paths are passed over.

        Raises UserError when more than the allowed share of the set has gone bad.
        """
        new: dict[str, str] = {}
        for path, reason in entries:
            field = path.replace("\t", "\\t").replace("\n", "\\n")
            if field not in self._paths:
                new.setdefault(field, " ".join(reason.split()))
        self._paths |= new.keys()
        if new and self._is_main:
            lines = "".join(f"{step}\t{path}\t{reason}\n" for path, reason in new.items())
            with explained_write(self.file), open(self.file, "a", encoding="utf-8", errors="surrogateescape") as file:
                file.write(lines)
            for path, reason in new.items():
                self._announce(f"replaced by another image from now on: {path}: {reason} (listed in {self.file})")
        if len(self) > math.ceil(self._max_bad_ratio * self._num_images):
            raise UserError(
                f"{len(self)} of {self._num_images} images can no longer be read, more than data.loader.max_bad_ratio = {self._max_bad_ratio:g} "
                f"allows; they are listed in {self.file}. Mend the files, then start the same command again"
            )
