"""Pieces of the report's HTML: escaped text, notes on what is missing, figures with the picture inside, the style."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

MIME = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".svg": "image/svg+xml",
}


def text(value: Any) -> str:
    """The value as text that is safe in HTML, in attributes too."""
    return html.escape(str(value), quote=True)


def missing(sentence: str) -> str:
    """A paragraph that says what is not there."""
    return f'<p class="missing">{text(sentence)}</p>'


def definitions(rows: Sequence[tuple[str, Any]]) -> str:
    """A list of names and values."""
    return f"<dl>{''.join(f'<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>' for name, value in rows)}</dl>"


def figure(path: Path, caption: str, description: str, *, wide: bool = True) -> str:
    """A picture from a file, inlined, or a sentence if there is no such file.

    description: for those who do not see the picture. wide: on its own line, to be scrolled on a narrow screen.
    """
    if not path.is_file():
        return missing(f"{path.name} is missing.")
    image = f'<img alt="{text(description)}" src="{data_uri(path.read_bytes(), path.suffix)}">'
    if wide:
        return (
            f'<figure class="wide"><figcaption>{text(caption)}</figcaption><div class="scroll">{image}</div></figure>'
        )
    return f"<figure><figcaption>{text(caption)}</figcaption>{image}</figure>"


def data_uri(content: bytes, suffix: str) -> str:
    """A picture's bytes as an address that holds them."""
    return f"data:{MIME[suffix]};base64,{base64.b64encode(content).decode('ascii')}"


def is_number(value: Any) -> TypeGuard[float]:
    """Whether the value is a finite number (true and false are none)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def setting(config: Any, path: str) -> Any:
    """The value at a dotted path of nested mappings, or None."""
    for key in path.split("."):
        if not isinstance(config, Mapping):
            return None
        config = config.get(key)
    return config


def entries(content: Any, key: str) -> list[Any]:
    """The list under a key, or an empty one if there is none."""
    value = setting(content, key)
    return value if isinstance(value, list) else []


# Light and dark by the reader's preference, narrow screens, print.
STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1d2127; --quiet: #5b6470; --line: #dfe3e8; --accent: #0065a3;
  --bar: #cfe4f4; --up: #00694c; --down: #b03a00; --warn: #fff6e0; --warn-ink: #6b4a00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --card: #1d2127; --ink: #e6e9ee; --quiet: #9aa4b1; --line: #343a43; --accent: #6cbaf0;
    --bar: #1f4764; --up: #3fd0a0; --down: #ff9a66; --warn: #3a3118; --warn-ink: #f2d58c;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body {
  margin: 0 auto; max-width: 76rem; padding: 0 clamp(.9rem, 3vw, 2.2rem) 3rem;
  background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
header { padding: 2.6rem 0 .6rem; }
.kind { margin: 0; color: var(--accent); font-weight: 650; letter-spacing: .02em; }
h1 {
  margin: .1rem 0 .3rem; font-size: clamp(1.7rem, 4vw, 2.5rem); line-height: 1.15; letter-spacing: -.02em;
  overflow-wrap: anywhere;
}
h2 { margin: 0 0 .9rem; font-size: 1.25rem; letter-spacing: -.01em; }
.subtitle { margin: 0; color: var(--quiet); font-size: 1.05rem; }
nav {
  position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .15rem 1.2rem; padding: .7rem 0;
  margin-bottom: 1rem; background: var(--page); border-bottom: 1px solid var(--line); font-size: .93rem;
}
a { color: var(--accent); text-decoration: none; }
a:hover, a:focus-visible { text-decoration: underline; }
section {
  margin: 0 0 1.2rem; padding: 1.3rem clamp(.9rem, 2.2vw, 1.6rem) 1.4rem; background: var(--card);
  border: 1px solid var(--line); border-radius: .7rem; scroll-margin-top: 4rem;
}
section > :last-child { margin-bottom: 0; }
.quiet { color: var(--quiet); font-weight: 400; }
.small { color: var(--quiet); font-size: .88rem; max-width: 62rem; }
.missing {
  margin: .3rem 0 .8rem; padding: .55rem .8rem; border-radius: .4rem; background: var(--warn);
  color: var(--warn-ink); overflow-wrap: anywhere;
}
.tiles {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr)); gap: .8rem;
  margin-bottom: 1.2rem;
}
.tile {
  display: flex; flex-direction: column; gap: .1rem; padding: .8rem 1rem; border: 1px solid var(--line);
  border-radius: .6rem;
}
.tile .label { font-size: .92rem; font-weight: 600; }
.tile .value { font-size: 1.65rem; letter-spacing: -.02em; font-variant-numeric: tabular-nums; }
.arrow { color: var(--quiet); font-weight: 400; }
.gain { color: var(--quiet); font-size: .92rem; }
.gain.up { color: var(--up); font-weight: 600; }
.gain.down { color: var(--down); font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--quiet); font-size: .9rem; padding-bottom: .5rem; }
th, td { padding: .36rem .55rem; text-align: left; white-space: nowrap; }
thead th { border-bottom: 1px solid var(--line); color: var(--quiet); font-weight: 600; font-size: .9rem; }
tbody th { font-weight: 600; }
tbody tr:not(.first) th { color: transparent; }
tbody tr.first:not(:first-child) > * { border-top: 1px solid var(--line); }
tbody tr.pretrained th { border-left: 3px solid var(--accent); }
th.number, td.number { text-align: right; }
.interval { display: block; color: var(--quiet); font-size: .78rem; font-weight: 400; }
.bar {
  min-width: 7rem; print-color-adjust: exact; -webkit-print-color-adjust: exact;
  background: linear-gradient(var(--bar) 0 0) left center / calc(var(--share) * .42) 100% no-repeat;
}
dl {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(15rem, 100%), 1fr)); gap: .55rem 1.4rem;
  margin: 0 0 1rem;
}
dl div { min-width: 0; }
dt { color: var(--quiet); font-size: .86rem; }
dd { margin: 0; overflow-wrap: anywhere; }
ul { margin: 0; padding-left: 1.2rem; }
summary { cursor: pointer; color: var(--accent); padding: .25rem 0; }
pre {
  overflow-x: auto; padding: .9rem 1rem; border: 1px solid var(--line); border-radius: .5rem; font-size: .84rem;
  line-height: 1.45;
}
figure { margin: 0; min-width: 0; }
figcaption { font-weight: 600; font-size: .93rem; margin-bottom: .3rem; }
.charts {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: 1.3rem 1.6rem;
}
.charts img { width: 100%; height: auto; display: block; }
.wide { margin: .4rem 0 1.3rem; }
.wide img {
  display: block; max-width: 100%; min-width: min(40rem, 200%); height: auto; border-radius: .4rem; background: #fff;
}
.earlier {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(24rem, 100%), 1fr)); gap: 1.1rem 1.6rem;
}
.earlier img { display: block; width: 100%; height: auto; border-radius: .4rem; }
footer { color: var(--quiet); font-size: .88rem; padding-top: .4rem; }
@media (max-width: 40rem) {
  nav { position: static; }
  dl { grid-template-columns: repeat(2, 1fr); }
  table { font-size: .84rem; }
  th, td { padding: .34rem .36rem; }
  tbody th, tbody td:nth-child(2) { white-space: normal; }
  .bar { min-width: 0; background: none; }
}
@media print {
  :root {
    --page: #fff; --card: #fff; --ink: #000; --quiet: #444; --line: #ccc; --accent: #004a7a; --bar: #cfe4f4;
    --up: #00543c; --down: #8a2d00; --warn: #fff6e0; --warn-ink: #6b4a00;
  }
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav { display: none; }
  header { padding-top: 0; }
  section { border: 0; padding: 0 0 .6rem; }
  .charts { grid-template-columns: repeat(3, 1fr); }
  .earlier { grid-template-columns: repeat(2, 1fr); }
  figure, .tile, tr { break-inside: avoid; }
  .wide img { min-width: 0; }
  h2 { break-after: avoid; }
}
"""
