"""The scores of the report: tiles with the gain of pre-training, and the table of evaluation.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from personmae.visuals.report_parts import entries, is_number, missing, text

# The rows of evaluation.json that the tiles compare, by the names that `tasks/retrieval.py` gives them.
PRETRAINED, RANDOM, HISTOGRAM = "pre-trained", "random initialisation", "colour histogram"
# And those of fine-tuning.
START, LAST = "initial weights", "last epoch"
RATE_COLUMNS = tuple((f"TPR@FPR={rate}", f"TPR at FPR {rate}") for rate in ("1e-04", "1e-03", "1e-02", "1e-01"))
SCORE_COLUMNS = (("mAP", "mAP"), ("rank1", "rank-1"), ("rank5", "rank-5"), ("rank10", "rank-10"), ("mINP", "mINP"), *RATE_COLUMNS)

_EXPLANATION = (
    "mAP: mean average precision. rank-k: share of queries with a right image among the k nearest. mINP: mean inverse "
    "negative penalty. Images of the query's person from the query's own camera are left out; distractors "
    "stay. Ties and all else by the rules that the notes name. Whitened: after a PCA fitted on images "
    "without labels. In brackets: 95 % confidence interval by bootstrap over people."
)


def score_section(evaluation: Any, problem: str) -> str:
    """HTML of the scores. evaluation: the content of evaluation.json; problem: why there is none, or nothing."""
    if problem:
        return missing(problem)
    rows = [row for row in entries(evaluation, "rows") if isinstance(row, Mapping)]
    if not rows:
        return missing("evaluation.json holds no scores.")
    tuned = any(row.get("model") == LAST for row in rows)
    caption = f"{'Retrieval' if tuned else 'Zero-shot retrieval'}{_details(evaluation, rows[0])}. All in percent; bold: the best of a column."
    return (
        f'{_headline(rows)}<div class="scroll"><table><caption>{caption}</caption>{_table(rows)}</table></div>'
        f'<p class="small">{text(_EXPLANATION)}</p>'
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    best = {}
    for key, _ in SCORE_COLUMNS:
        known = [row[key] for row in rows if is_number(row.get(key))]
        if known:
            best[key] = max(known)
    columns = "".join(f'<th scope="col" class="number">{label}</th>' for key, label in SCORE_COLUMNS if key in best)
    head = f'<thead><tr><th scope="col">model</th><th scope="col">feature</th>{columns}</tr></thead>'
    body, previous = [], None
    for row in rows:
        model, feature = row.get("model", "?"), row.get("feature", "?")
        kinds = [kind for kind, holds in (("pretrained", model in (PRETRAINED, LAST)), ("first", model != previous)) if holds]
        cells = "".join(_cell(row.get(key), best[key], entries(row, f"intervals.{key}"), bar=key == "mAP") for key in best)
        # The name stands in every row for screen readers; the style shows it once for each group.
        names = f'<th scope="row">{text(model)}</th><td>{text(feature)}</td>'
        body.append(f'<tr class="{" ".join(kinds)}">{names}{cells}</tr>')
        previous = model
    return f"{head}<tbody>{''.join(body)}</tbody>"


def _cell(value: Any, best: float, interval: Sequence[Any], *, bar: bool) -> str:
    if not is_number(value):
        return '<td class="number">&ndash;</td>'
    number = f"<strong>{100 * value:.1f}</strong>" if value == best else f"{100 * value:.1f}"
    if ends := _interval(interval):
        number += f'<span class="interval">{ends}</span>'
    if not bar:
        return f'<td class="number">{number}</td>'
    share = 100 * value / best if best > 0 else 0
    return f'<td class="number bar" style="--share:{share:.1f}%">{number}</td>'


def _interval(ends: Sequence[Any]) -> str:
    if len(ends) != 2 or not all(is_number(end) for end in ends):
        return ""
    return f"[{100 * ends[0]:.1f},&nbsp;{100 * ends[1]:.1f}]"


def _headline(rows: Sequence[Mapping[str, Any]]) -> str:
    """Tiles: one feature before and after training; the whitened mean if there is one, else the first both have."""
    first, last = (START, LAST) if any(row.get("model") == LAST for row in rows) else (RANDOM, PRETRAINED)
    before = {row.get("feature"): row for row in rows if row.get("model") == first}
    after = {row.get("feature"): row for row in rows if row.get("model") == last}
    shared = [feature for feature in after if feature in before]
    if not shared:
        return missing("There is no score both before and after pre-training, so there is no gain to state.")
    # The class token of an encoder that was never fine-tuned gets no loss of its own.
    means = [feature for feature in shared if str(feature).split(", ")[0] == "mean"] or shared
    feature = next((feature for feature in means if "whitened" in str(feature)), means[0])
    tiles = []
    for key, label in (("mAP", "mAP"), ("rank1", "rank-1")):
        low, high = before[feature].get(key), after[feature].get(key)
        if is_number(low) and is_number(high):
            gain = 100 * (high - low)
            title = f'{label} <span class="quiet">({text(feature)})</span>'
            change = f'{_percent(low)} <span class="arrow">&rarr;</span> <strong>{_percent(high)}</strong>'
            words = f"{abs(gain):.1f} points {'above' if gain >= 0 else 'below'} {first}"
            tiles.append(_tile(title, change, words, "up" if gain >= 0 else "down"))
    colours = [row["mAP"] for row in rows if row.get("model") == HISTOGRAM and is_number(row.get("mAP"))]
    if colours:
        tiles.append(_tile("mAP of the colour histogram", _percent(max(colours)), "a yardstick that learns nothing"))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _tile(title: str, value: str, words: str, kind: str = "") -> str:
    return (
        f'<div class="tile"><span class="label">{title}</span><span class="value">{value}</span>'
        f'<span class="gain {kind}">{words}</span></div>'
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f}&nbsp;%"


def _details(evaluation: Any, row: Mapping[str, Any]) -> str:
    """Which set, at which size, how many queries: what is known of it."""
    known = ""
    if evaluation.get("set"):
        known += f" on {text(evaluation['set'])}"
    if row.get("convention"):
        said = [row["convention"], row.get("metric"), row.get("processing")]
        known += f", rules: {text(', '.join(str(word) for word in said if word))}"
    size = entries(evaluation, "size")
    if len(size) == 2:
        known += f", {text(size[0])} x {text(size[1])} px (height x width)"
    queries, valid, gallery = (row.get(key) for key in ("num_queries", "num_valid", "num_gallery"))
    if isinstance(queries, int) and isinstance(gallery, int):
        known += f": {queries:,} queries"
        if isinstance(valid, int) and valid < queries:
            known += f" ({queries - valid:,} without a match, not scored)"
        known += f", gallery of {gallery:,}"
    return known
