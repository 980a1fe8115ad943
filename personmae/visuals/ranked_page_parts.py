"""The HTML and the style of the page that browses ranked lists; its program is in `ranked_page_script`."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence

import personmae
from personmae.visuals.ranked_lists import RIGHT, WRONG
from personmae.visuals.ranked_page_script import SCRIPT
from personmae.visuals.report_parts import STYLE, text

_SORTS = (
    ("ap-worst", "worst average precision first"),
    ("ap-best", "best average precision first"),
    ("first-worst", "latest first match first"),
    ("first-best", "earliest first match first"),
    ("set", "as in the set"),
)
_OUTCOMES = (
    ("all", "all"),
    ("wrong", "rank 1 is wrong"),
    ("right", "rank 1 is right"),
    ("none", "without a match"),
)

_PAGE_STYLE = """
body { max-width: 100rem; }
header { padding-top: 1.6rem; }
.controls {
  position: sticky; top: 0; z-index: 2; display: flex; flex-wrap: wrap; align-items: end; gap: .6rem 1rem; padding: .7rem 0;
  background: var(--page); border-bottom: 1px solid var(--line);
}
.controls label { display: flex; flex-direction: column; gap: .1rem; font-size: .82rem; color: var(--quiet); }
.controls .check { flex-direction: row; align-items: center; gap: .4rem; padding-bottom: .35rem; color: var(--ink); font-size: .9rem; }
.controls .check:has(:disabled) { color: var(--quiet); }
input, select, .controls button, .turn button {
  font: inherit; font-size: .92rem; padding: .25rem .5rem; color: var(--ink); background: var(--card);
  border: 1px solid var(--line); border-radius: .35rem;
}
.controls button, .turn button { cursor: pointer; }
button:disabled { opacity: .45; cursor: default; }
#person { width: 6rem; }
.controls input:not([type=checkbox]), .controls select, .controls button { height: 2.1rem; }
.page-number { width: 5.2rem; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
.turn { display: flex; flex-wrap: wrap; align-items: center; gap: .5rem; margin: .9rem 0; }
.turn h2 { margin: 0 auto 0 0; scroll-margin-top: 6rem; }
.grow { margin-right: auto; }
#status { font-weight: 400; color: var(--quiet); font-size: 1rem; margin-left: .5rem; }
#legend { display: flex; flex-wrap: wrap; align-items: center; gap: .2rem .5rem; font-size: .85rem; color: var(--quiet); }
#legend[hidden] { display: none; }
#legend-bar { width: 9rem; height: .8rem; border-radius: .2rem; }
article {
  display: grid; grid-template-columns: 18.5rem minmax(0, 1fr); gap: 1rem; margin: 0 0 .8rem; padding: .9rem 1rem;
  background: var(--card); border: 1px solid var(--line); border-radius: .7rem;
}
.who { display: flex; gap: .8rem; align-items: start; }
.who > div { min-width: 0; flex: 1; }
.who p { margin: .15rem 0; font-size: .86rem; color: var(--quiet); overflow-wrap: anywhere; }
.who .score { color: var(--ink); font-weight: 650; font-size: 1rem; font-variant-numeric: tabular-nums; }
h3 { margin: 0 0 .2rem; font-size: .95rem; line-height: 1.3; }
.meter { height: .4rem; border-radius: .2rem; background: var(--line); overflow: hidden; margin: .2rem 0 .35rem; }
.meter i { display: block; height: 100%; background: var(--accent); }
ol { display: flex; gap: .55rem; margin: 0; padding: 0 .2rem .3rem; overflow-x: auto; list-style: none; }
li { display: flex; flex-direction: column; align-items: center; font-variant-numeric: tabular-nums; }
.rank { font-size: .8rem; color: var(--quiet); line-height: 1.4; }
.under { font-size: .76rem; color: var(--quiet); line-height: 1.35; white-space: nowrap; }
.frame {
  position: relative; display: block; flex: none; padding: 0; line-height: 0; cursor: zoom-in; background: var(--line);
  border: 4px solid var(--frame); border-radius: .3rem; overflow: hidden;
}
.query { --frame: #6a717c; }
.right { --frame: RIGHT; }
.wrong { --frame: WRONG; }
.own { --frame: #a3a9b2; }
.frame.own { border-style: dashed; }
.own img { filter: grayscale(1); opacity: .55; }
.frame canvas { position: absolute; inset: 0; width: 100%; height: 100%; }
.mark {
  position: absolute; top: 0; right: 0; width: 1.3rem; height: 1.3rem; display: grid; place-items: center; color: #fff;
  background: var(--frame); font: 700 .9rem/1 system-ui, sans-serif; border-bottom-left-radius: .3rem;
}
dialog { border: 1px solid var(--line); border-radius: .7rem; background: var(--card); color: var(--ink); max-width: min(46rem, 94vw); }
dialog::backdrop { background: rgb(0 0 0 / .55); }
dialog > div { display: flex; flex-wrap: wrap; gap: 1.2rem; }
dialog img { height: min(26rem, 60vh); width: auto; border: 5px solid var(--frame); border-radius: .4rem; filter: none; opacity: 1; }
dialog dl { display: block; flex: 1; min-width: 14rem; }
dialog dl div { margin-bottom: .5rem; }
dialog button { font: inherit; padding: .3rem .9rem; margin-top: .8rem; }
kbd { border: 1px solid var(--line); border-radius: .25rem; padding: 0 .3rem; font-size: .85em; }
@media (max-width: 60rem) { article { grid-template-columns: minmax(0, 1fr); } .controls { position: static; } }
@media print { .controls, .turn button, .turn label { display: none; } article { break-inside: avoid; } ol { flex-wrap: wrap; } }
""".replace("RIGHT", f"rgb{RIGHT}").replace("WRONG", f"rgb{WRONG}")


def page(title: str, subtitle: str, notes: Sequence[str], data: str) -> str:
    """The whole page. data: JSON, in which no `<` may stand as itself. The other texts are escaped here."""
    # What may run is this one script; nothing is requested but the pictures beside the page, whatever text has got into it.
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode("ascii")
    policy = (
        f"default-src 'none'; img-src 'self' data:; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    )
    said = "".join(f"<p>{text(note)}</p>" for note in notes)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="generator" content="personmae ranked lists">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{text(title)} - ranked lists</title>
<style>{STYLE}{_PAGE_STYLE}</style>
</head>
<body>
<header><p class="kind">Ranked lists</p><h1>{text(title)}</h1><p class="subtitle">{text(subtitle)}</p></header>
<main>
<noscript><p class="missing">This page draws its lists with a script of its own, which is switched off in this browser.</p></noscript>
<div class="controls" role="group" aria-label="Which queries, in which order">
<label>order <select id="sort">{_options(_SORTS)}</select></label>
<label>queries <select id="outcome">{_options(_OUTCOMES)}</select></label>
<label>person <input id="person" list="people" inputmode="numeric" autocomplete="off" placeholder="any"></label>
<datalist id="people"></datalist>
<label>camera of the query <select id="camera"><option value="">any</option></select></label>
<label>on a page <select id="per">{_options([(str(number), str(number)) for number in (5, 10, 25, 50)])}</select></label>
<label class="check"><input type="checkbox" id="own"> images left out</label>
<label class="check"><input type="checkbox" id="map"> attention maps</label>
<button type="button" id="reset">reset</button>
</div>
<div class="turn"><h2 id="queries-title">Queries <span id="status" role="status" aria-live="polite"></span></h2>
<div id="legend" hidden><span>attention, as a multiple of an even share:</span>
<span>0</span><span id="legend-bar"></span><span id="legend-full"></span></div>
{_turn("above")}</div>
<div id="queries"></div>
<div class="turn"><span class="grow"></span>{_turn("below")}</div>
<dialog id="details" aria-label="An image of the list"><div><div id="details-picture"></div><dl id="details-list"></dl></div>
<form method="dialog"><button autofocus>close</button></form></dialog>
<section class="small">
<p>Green with a tick: the query's person, from another camera. Red with a cross: somebody else. Under each image its distance to the query, person and
camera. Images of the query's person from its own camera are left out of the ranking; they can be shown grey, at their distance, without a rank.</p>
<p>Keys: <kbd>&larr;</kbd> <kbd>&rarr;</kbd> turn the page, <kbd>Tab</kbd> goes from image to image, <kbd>Enter</kbd> shows one.
The address keeps the view.</p>{said}</section>
</main>
<footer>Written by personmae {text(personmae.__version__)}.</footer>
<script type="application/json" id="data">{data}</script>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _options(rows: Sequence[tuple[str, str]]) -> str:
    return "".join(f'<option value="{value}">{label}</option>' for value, label in rows)


def _turn(place: str) -> str:
    return (
        f'<button type="button" class="previous">previous</button><label>page <input type="number" class="page-number" id="page-{place}" min="1" '
        f'value="1"></label><span class="pages"></span><button type="button" class="next">next</button>'
    )
