"""One worker of packing, a program: takes jobs from a socket that it inherits, whose number is its argument, until that is closed or the parent dies.

It answers counts of images done, then None; or a sentence, if the user has to mend something.
"""

from __future__ import annotations

import sys
from multiprocessing.connection import Connection

import cv2

from personmae.configs import UserError
from personmae.data.packs.jobs import do_job


def main() -> None:
    """Do jobs."""
    cv2.setNumThreads(1)
    connection = Connection(int(sys.argv[1]))
    try:
        while True:
            job = connection.recv()
            try:
                do_job(job, connection.send)
                connection.send(None)
            except UserError as error:
                connection.send(str(error))
    # The parent is gone, or has told all of us to stop.
    except (EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        return


if __name__ == "__main__":
    main()
