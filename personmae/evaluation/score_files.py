"""Scores written down: scores.json, a CSV table of the queries, and a text table of several sets and features."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from personmae.evaluation.scores import REPORTED_RANKS, Scores
from personmae.whole_files import write_whole

QUERY_COLUMNS = ("query", "person", "camera", "average_precision", "inverse_negative_penalty", "first_match_rank", "num_matches")


def write_scores(path: Path, scores: Mapping[str, Scores], **about: Any) -> None:
    """scores.json: {**about, "scores": {name: numbers, intervals, convention, what was left out}}. about: JSON-ready, such as the set and
    checkpoint."""
    content = {**about, "scores": {name: found.plain() for name, found in scores.items()}}
    write_whole(path, json.dumps(content, indent=2, allow_nan=False, default=_refuse) + "\n", parents=True)


def query_rows(scores: Scores) -> list[dict[str, Any]]:
    """Each query's own scores, in order, by `QUERY_COLUMNS`: query is its path, or its number; what it does not have is None; ranks are from 1."""
    measures = scores.measures
    rows: list[dict[str, Any]] = []
    for q in range(len(measures)):
        matched = bool(measures.num_matches[q])
        values = (
            scores.names[q] if scores.names is not None else q,
            int(scores.query.people[q]),
            int(scores.query.cameras[q]),
            float(measures.average_precision[q]) if matched else None,
            float(measures.inverse_negative_penalty[q]) if matched else None,
            int(measures.first_match[q]) + 1 if matched else None,
            int(measures.num_matches[q]),
        )
        rows.append(dict(zip(QUERY_COLUMNS, values, strict=True)))
    return rows


def write_query_table(path: Path, scores: Scores) -> None:
    """The rows of `query_rows` as CSV, or as JSON where the path ends in .json."""
    rows = query_rows(scores)
    if path.suffix == ".json":
        write_whole(path, json.dumps(rows, indent=1, allow_nan=False) + "\n", parents=True)
        return
    write_csv(path, QUERY_COLUMNS, rows)


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """A CSV table with a line of names; entries of a row that are no column are left out."""
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, table.getvalue(), parents=True)


def score_table(scores: Mapping[tuple[str, str], Scores]) -> str:
    """A text table, a line for each (set, feature), percentages; intervals of mAP and rank-1 where there are any."""
    header = ["set", "feature", "mAP", "mINP", *(f"rank-{k}" for k in REPORTED_RANKS), "queries", "gallery", "rules"]
    lines = [header]
    for (reid_set, feature), found in scores.items():
        ranks = [_percent(found, f"rank{k}", found.rank(k)) if k <= len(found.cmc) else "" for k in REPORTED_RANKS]
        queries = f"{found.num_valid:,}" + (f" of {found.num_queries:,}" if found.num_valid < found.num_queries else "")
        means = [_percent(found, "mAP", found.mAP), f"{found.mINP:.2%}".rstrip("%")]
        rules = "; ".join([f"{found.convention.name}, {found.metric}", *found.notes])
        lines.append([reid_set, feature, *means, *ranks, queries, f"{found.num_gallery:,}", rules])
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    texts = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    rule = "  ".join("-" * width for width in widths)
    confidence = next((found.confidence for found in scores.values() if found.confidence), None)
    level = [f"[...]: {confidence.bootstrap.level:.0%} confidence interval, bootstrap over identities"] if confidence else []
    return "\n".join([texts[0], rule, *texts[1:], *level])


def _percent(scores: Scores, name: str, value: float) -> str:
    text = f"{100 * value:.2f}"
    ends = scores.interval(name) if name in ("mAP", "rank1") else None
    return f"{text} [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]" if ends else text


def _refuse(value: object) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{value!r} cannot stand in a JSON file")
