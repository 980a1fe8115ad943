"""What an evaluation leaves: files of scores, a page to browse ranked lists, pictures for the report of a run."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from personmae.data.reid import ReidSet
from personmae.evaluation.inputs import labels_of_set
from personmae.evaluation.protocol import Evaluation, ScoringConfig
from personmae.evaluation.score_files import score_table, write_csv, write_query_table, write_scores
from personmae.evaluation.scores import Scores
from personmae.models.vit import VisionTransformer
from personmae.visuals.attention_maps import maps_of_files
from personmae.visuals.ranked_lists import choose_queries, ranked_list_picture
from personmae.visuals.ranked_page import rank_queries, write_ranked_page
from personmae.visuals.report_scores import PRETRAINED, RANDOM
from personmae.whole_files import write_whole


def write_score_files(folder: Path, scores: Mapping[str, Scores], headline: str, **about: Any) -> None:
    """scores.json of all features, and queries.csv of the headline's. about: what stands beside the scores. Raises UserError if the disk refuses."""
    write_scores(folder / "scores.json", scores, **about)
    write_query_table(folder / "queries.csv", scores[headline])


def write_tables(folder: Path, table: Mapping[tuple[str, str], Scores], rows: Sequence[Mapping[str, Any]]) -> None:
    """table.txt and scores.csv of all sets and features. rows: of one evaluation each. Raises UserError if the disk refuses."""
    columns = list(dict.fromkeys(name for row in rows for name in row if name != "intervals"))
    write_whole(folder / "table.txt", score_table(table) + "\n", parents=True)
    write_csv(folder / "scores.csv", columns, rows)


def write_evaluations(run: Path, contents: Sequence[Mapping[str, Any]], weights: str = "encoder.safetensors") -> None:
    """Puts evaluations into the run's evaluation.json. Those of other sets or rules stay in it, as long as they are of the same weights, a file of
    the run."""
    path = run / "evaluation.json"
    encoder = hashlib.sha256((run / weights).read_bytes()).hexdigest()[:16]
    try:
        before = [one for one in json.loads(path.read_text())["evaluations"] if one["encoder"] == encoder]
        keys = [(one["set"], one["rules"]) for one in before]
    except (OSError, ValueError, KeyError, TypeError):
        before, keys = [], []
    new = {(one["set"], one["rules"]) for one in contents}
    kept = [one for one, key in zip(before, keys, strict=True) if key not in new]
    write_whole(path, json.dumps({"evaluations": [*({**one, "encoder": encoder} for one in contents), *kept]}, indent=2) + "\n")


def write_browsing_page(
    folder: Path, reid_set: ReidSet, evaluation: Evaluation, scoring: ScoringConfig, encoder: VisionTransformer | None
) -> Path:
    """The page of the headline feature's ranked lists. encoder: lays over the images where it looks; None for a page without that."""
    scores = evaluation.scores[evaluation.headline]
    query, gallery = evaluation.headline_features()
    lists = rank_queries(query, gallery, *labels_of_set(reid_set), metric=scores.metric, measures=scores.measures)
    notes = []
    if scoring.reranking or scoring.expansion:
        notes.append("The lists are those of the features themselves; average precision is that of the scores, re-ranked or expanded.")
    # Its class token gets no loss of its own, so the mean of the patches is asked where it looks.
    maps = functools.partial(maps_of_files, encoder, token="mean") if encoder is not None else None
    return write_ranked_page(
        folder, reid_set.query, reid_set.gallery, lists, title=reid_set.name, subtitle=f"{evaluation.headline}: {scores}", notes=notes, maps=maps
    )


def draw_ranked_lists(
    run: Path,
    label: str,
    reid_set: ReidSet,
    evaluations: Mapping[str, Evaluation],
    moments: Mapping[str, str] = MappingProxyType({RANDOM: "before pre-training", PRETRAINED: "after pre-training"}),
) -> list[str]:
    """Ranked lists of the headline feature, for the same queries; paths within the run. moments: which evaluations, in order, and when that was; the
    last one chooses the queries."""
    *_, last = moments
    after = evaluations[last]
    chosen = choose_queries(after.scores[after.headline].average_precision)
    pictures = []
    for model, moment in moments.items():
        if model not in evaluations:
            continue
        query, gallery = evaluations[model].headline_features()
        picture = ranked_list_picture(
            reid_set.query,
            reid_set.gallery,
            query,
            gallery,
            chosen=chosen,
            chosen_by=f"the network {moments[last]}",
            title=f"{label}: {moment}",
            metric=after.scores[after.headline].metric,
            average_precision=evaluations[model].scores[after.headline].average_precision,
        )
        relative = f"pictures/ranked_lists_{label.replace(' ', '-')}_{moment.split()[0]}.png"
        (run / "pictures").mkdir(exist_ok=True)
        picture.save(run / relative)
        pictures.append(relative)
    return pictures
