"""A local web page to search a gallery: drop a picture, browse results. Bound to this machine alone unless --host says otherwise.

personmae serve GALLERY --checkpoint runs/small
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from personmae.recipes.programs import ServeConfig
from personmae.search_server import LOOPBACK, SearchServer
from personmae.tasks.extracting import open_extractor
from personmae.tasks.searching import build_gallery

Say = Callable[[str], object]


def main(config: ServeConfig, say: Say = print) -> None:
    """Index what is new, then serve until Ctrl-C. Raises UserError for paths that do not hold what they should, and a port that cannot be had."""
    extractor = open_extractor(config)
    with SearchServer(build_gallery(config, extractor, say), extractor, config.host, config.port, config.top) as server:
        if config.host not in LOOPBACK:
            say(f"anybody who reaches {config.host} can search this gallery and see its pictures: there is no password")
        say(f"{server.url} (Ctrl-C ends it)")
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
