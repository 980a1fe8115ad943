"""One worker of draw_mannequins, a program: reads its job as JSON from standard input, prints a number for every few pictures drawn."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import cv2

from personmae.configs import from_plain
from personmae.data.mannequins.dataset import draw_share
from personmae.data.mannequins.pictures import MannequinsConfig


def main() -> None:
    """Draw the share of pictures that the job names."""
    job = json.load(sys.stdin)
    cv2.setNumThreads(1)
    config = from_plain(MannequinsConfig, job["config"])
    draw_share(Path(job["root"]), config, job["share"], job["num_shares"], lambda num_done: print(num_done, flush=True))


if __name__ == "__main__":
    main()
