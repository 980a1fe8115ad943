"""A page of search results: each query with the pictures found, nearest first; one HTML file with all pictures inside."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from personmae.data.images import UnreadableImage, read_image, resize
from personmae.visuals.report_parts import data_uri, missing, text
from personmae.whole_files import write_whole

THUMBNAIL = (160, 80)  # height, width in pixels
JPEG_QUALITY = 85
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 1.5rem auto; max-width: 84rem; padding: 0 1rem; color: #1a1a1a; background: #fff }
h1 { font-size: 1.4rem } p.note { color: #555 } .row { display: flex; gap: .75rem; overflow-x: auto; padding: .75rem 0; border-top: 1px solid #ddd }
figure { margin: 0; flex: none; width: 80px } figure.query { border-right: 2px solid #999; padding-right: .75rem; width: auto }
figcaption { font-size: .75rem; overflow-wrap: anywhere } .missing { width: 80px; height: 160px; font-size: .75rem; color: #a00 }
@media (prefers-color-scheme: dark) { body { color: #eee; background: #181818 } p.note { color: #aaa } .row { border-color: #444 } }
"""


class SheetRow(NamedTuple):
    """A query and what was found."""

    query: Path
    found: list[tuple[Path, str, float]]  # file, name, cosine similarity


def write_contact_sheet(path: Path, rows: Sequence[SheetRow], title: str, note: str = "") -> Path:
    """Write the page; returns its path. Pictures that cannot be read are told in their place. Raises UserError if the disk refuses."""
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{text(title)}</title><style>{STYLE}</style></head><body><h1>{text(title)}</h1>",
        f'<p class="note">{text(note)}</p>' if note else "",
    ]
    for row in rows:
        figures = [_figure(row.query, "query", row.query.name, "query")]
        figures += [_figure(file, f"{rank}", f"{similarity:.3f} {name}", "") for rank, (file, name, similarity) in enumerate(row.found, 1)]
        parts.append(f'<div class="row">{"".join(figures)}</div>')
    write_whole(path, "".join([*parts, "</body></html>"]).encode("utf-8", errors="backslashreplace"))
    return path


def _figure(file: Path, label: str, caption: str, kind: str) -> str:
    inside = f"<figcaption>{text(label)}: {text(caption)}</figcaption>"
    try:
        picture = f'<img alt="{text(caption)}" width="{THUMBNAIL[1]}" height="{THUMBNAIL[0]}" src="{data_uri(thumbnail(file), ".jpg")}">'
    except UnreadableImage as error:
        picture = missing(str(error))
    return f'<figure class="{kind}">{picture}{inside}</figure>'


def thumbnail(file: Path) -> bytes:
    """A picture file, small, as the content of a JPEG. Raises UnreadableImage."""
    buffer = io.BytesIO()
    Image.fromarray(resize(read_image(file), THUMBNAIL)).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()
