"""One worker of draw_mannequins, a program: reads its job as JSON from standard input, prints a number for every few pictures drawn."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import cv2

from personmae.configs import UserError, from_plain
from personmae.data.mannequins.dataset import USERS_MISTAKE, draw_share
from personmae.data.mannequins.pictures import MannequinsConfig


def main() -> None:
    """Draw the share of pictures that the job names."""
    job = json.load(sys.stdin)
    cv2.setNumThreads(1)
    config = from_plain(MannequinsConfig, job["config"])
    try:
        draw_share(Path(job["root"]), config, job["share"], job["num_shares"], lambda num_done: print(num_done, flush=True))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(USERS_MISTAKE)


if __name__ == "__main__":
    main()
