"""Retrieval scores: how well features find the same person again.

personmae evaluate --checkpoint RUN --data SET [SET ...]      a run folder: scores before and after pre-training, into its report
personmae evaluate --checkpoint encoder.safetensors --data market1501=/data/market msmt17=/data/msmt17
personmae evaluate --features FILE.npz --as transreid          features that any other code has written
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from personmae.configs import UserError, from_plain
from personmae.data.image_index import as_files, build_index
from personmae.data.kept_index import read_kept_index
from personmae.data.reid import ReidSet, num_splits, open_reid_set
from personmae.evaluation.colour_histogram import describe_colours
from personmae.evaluation.confidence import Bootstrap
from personmae.evaluation.conventions import Reranking, convention_of
from personmae.evaluation.expansion import QueryExpansion
from personmae.evaluation.feature_cache import FeatureCache
from personmae.evaluation.feature_files import read_feature_file
from personmae.evaluation.features import Describe
from personmae.evaluation.protocol import Evaluation, ScoringConfig, evaluate, score
from personmae.evaluation.score_files import score_table
from personmae.evaluation.scores import Scores
from personmae.models.masked import PersonMAE
from personmae.models.vit import VisionTransformer, initialise
from personmae.models.weights import load_encoder
from personmae.recipes import PretrainConfig, RetrievalConfig
from personmae.tasks.retrieval_results import draw_ranked_lists, write_browsing_page, write_score_files, write_tables
from personmae.training.logbook import check_run_dir, write_whole
from personmae.training.processes import choose_device
from personmae.visuals.report import write_report
from personmae.visuals.report_scores import HISTOGRAM, PRETRAINED, RANDOM

Say = Callable[[str], object]
Table = dict[tuple[str, str], Scores]  # (set, "model: feature") -> scores


def main(config: RetrievalConfig, say: Say = print) -> list[dict[str, Any]]:
    """Evaluate, print the table, write files; for a run folder also its report.

    Returns the rows of the table. Raises UserError for paths that do not hold what they should.
    """
    scoring = scoring_of(config)
    say(f"scores as {scoring.convention.name}: {scoring.convention.about}")
    table: Table = {}
    rows = score_feature_files(config, scoring, table, say)
    for checkpoint in config.checkpoint:
        with tempfile.TemporaryDirectory() as scratch:
            rows += score_checkpoint(checkpoint, config, scoring, table, Path(scratch), say)
    if len(table) > 1:
        say(score_table(table))
    if config.output is not None:
        write_tables(config.output, table, rows)
    return rows


def scoring_of(config: RetrievalConfig) -> ScoringConfig:
    """The rules that the flags ask for. Raises UserError for a convention that there is not."""
    convention = convention_of(config.convention)
    rerank = {"no": None, "own": convention.reranking, "classic": Reranking(), "fast-reid": Reranking(definition="fast-reid")}
    return ScoringConfig(
        convention=convention,
        metric=None if config.metric == "auto" else config.metric,
        reranking=rerank[config.rerank],
        expansion=QueryExpansion() if config.expand else None,
        bootstrap=Bootstrap(num_resamples=config.num_resamples) if config.num_resamples else None,
        roc=config.roc,
    )


def score_feature_files(config: RetrievalConfig, scoring: ScoringConfig, table: Table, say: Say) -> list[dict[str, Any]]:
    """Scores of files of features; adds to the table, returns its rows."""
    rows = []
    for path in config.features:
        file = read_feature_file(path)
        for note in file.notes:
            say(f"{path.name}: {note}")
        notes = [f"{file.num_junk} junk images dropped"] if file.num_junk else []
        if not file.has_cameras:
            notes.append("no cameras, nothing left out")
        try:
            found = score(file.query_features, file.gallery_features, file.query, file.gallery, scoring=scoring, names=file.query_paths, notes=notes)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        table[path.name, "features"] = found
        rows.append({"set": path.name, **found.row("file", "features")})
        say(f"{path.name}: {found}")
        if config.output is not None:
            write_score_files(config.output / path.stem, {"features": found}, "features", features=str(path))
    return rows


def score_checkpoint(
    checkpoint: Path, config: RetrievalConfig, scoring: ScoringConfig, table: Table, scratch: Path, say: Say
) -> list[dict[str, Any]]:
    """Scores of one encoder on all sets, written into its run if it is one; adds to the table, returns its rows. scratch: a folder for images that
    lie in a pack."""
    is_run = checkpoint.is_dir()
    if is_run:
        check_run_dir(checkpoint)
    run = read_run_config(checkpoint) if is_run else None
    encoder = load_encoder(checkpoint / "encoder.safetensors" if is_run else checkpoint)
    unlabelled = choose_unlabelled(checkpoint, config, run, scratch, say)
    output = config.output / checkpoint.stem if config.output is not None else checkpoint / "evaluation" if is_run else None

    # What is compared.
    device = choose_device(config.device, local_rank=None)
    candidates: dict[str, Describe] = {PRETRAINED: encoder.to(device).describe}
    if config.compare:
        candidates[RANDOM] = initial_encoder(encoder, run).to(device).describe
        candidates[HISTOGRAM] = describe_colours

    rows: list[dict[str, Any]] = []
    contents: list[dict[str, Any]] = []
    for label, reid_set in open_sets(config):
        say(reid_set.describe())
        for note in reid_set.notes:
            say(f"  {note}")
        evaluations: dict[str, Evaluation] = {}
        of_set: list[dict[str, Any]] = []
        for name, describe in candidates.items():
            found = evaluate(
                describe,
                reid_set,
                size=encoder.config.image_size,
                unlabelled=unlabelled if name != HISTOGRAM else (),
                metrics=(scoring.metric or scoring.convention.metric,),
                scoring=scoring,
                flip=config.flip,
                batch_size=config.batch_size,
                num_threads=config.num_threads,
                device=device,
                precision=config.precision,
                cache=FeatureCache() if config.cache else None,
                announce=say,
            )
            evaluations[name] = found
            for feature, scores in found.scores.items():
                table[label, f"{checkpoint.name if name == PRETRAINED else name}: {feature}"] = scores
                of_set.append({"checkpoint": str(checkpoint), "set": label, **scores.row(name, feature)})
                say(f"{name:22} {feature:16} {scores}")
        rows += of_set
        page = None
        if output is not None:
            folder = output / label.replace(" ", "-")
            headline = evaluations[PRETRAINED].headline
            write_score_files(folder, evaluations[PRETRAINED].scores, headline, checkpoint=str(checkpoint), set=label)
            say(f"scores of all features and the table of queries ({headline}): {folder}")
            if config.page:
                page = write_browsing_page(folder / "ranked_lists", reid_set, evaluations[PRETRAINED], scoring, encoder if config.attention else None)
                say(f"ranked lists: {page}")
        if is_run:
            pictures = draw_ranked_lists(checkpoint, label, reid_set, evaluations)
            contents.append(content_of(label, encoder, of_set, pictures, page and page.relative_to(checkpoint.resolve()), scoring, unlabelled))
    if config.split == "all":
        say_means(rows, say)
    if is_run:
        write_whole(checkpoint / "evaluation.json", json.dumps({"evaluations": contents}, indent=2) + "\n")
        say(f"report: {write_report(checkpoint)}")
    return rows


def open_sets(config: RetrievalConfig) -> Iterator[tuple[str, ReidSet]]:
    """The sets of --data one after another, with name and split in words; of those with several splits the ones asked for. Raises UserError for
    what is no set."""
    for given in config.data:
        name, separator, root = given.partition("=")
        known, where = (name, Path(root)) if separator and not Path(given).exists() else (None, Path(given))
        splits = range(num_splits(known)) if config.split == "all" and known else [0 if config.split == "all" else config.split]
        for split in splits:
            reid_set = open_reid_set(known, where.expanduser(), split=split)
            yield f"{reid_set.name} {reid_set.split}".strip(), reid_set


def content_of(
    label: str,
    encoder: VisionTransformer,
    rows: list[dict[str, Any]],
    pictures: list[str],
    page: Path | None,
    scoring: ScoringConfig,
    unlabelled: list[Path],
) -> dict[str, Any]:
    """An entry of evaluation.json, which the report shows."""
    notes = [f"Nothing was trained on a label of this set by personmae evaluate. Rules: {scoring.convention.name}. {scoring.convention.about}"]
    if unlabelled:
        notes.append(f"Whitening is fitted on {len(unlabelled)} unlabelled images.")
    page_link = page.as_posix() if page else None
    return {"set": label, "size": list(encoder.config.image_size), "rows": rows, "ranked_lists": pictures, "page": page_link, "notes": notes}


def say_means(rows: list[dict[str, Any]], say: Say) -> None:
    """Means over the splits, with their standard deviation."""
    for model, feature in dict.fromkeys((row["model"], row["feature"]) for row in rows):
        chosen = [row for row in rows if (row["model"], row["feature"]) == (model, feature)]
        values = {name: np.array([row[name] for row in chosen]) for name in ("mAP", "rank1")}
        words = ", ".join(f"{name} {found.mean():.2%} +- {found.std():.2%}" for name, found in values.items())
        say(f"{model:22} {feature:16} mean of {len(chosen)} splits: {words}")


def read_run_config(run: Path) -> PretrainConfig:
    """The settings of a pre-training run. Raises UserError if the folder holds none."""
    try:
        content = json.loads((run / "config.json").read_text())
    except FileNotFoundError as error:
        raise UserError(f"{run} is no run folder: it has no config.json") from error
    except ValueError as error:
        raise UserError(f"{run / 'config.json'} is damaged: {error}") from error
    content.pop("started", None)
    return from_plain(PretrainConfig, content)


def choose_unlabelled(checkpoint: Path, config: RetrievalConfig, run: PretrainConfig | None, scratch: Path, say: Say) -> list[Path]:
    """The images that whitening is fitted on, spread evenly over the source; none if there is no source."""
    if config.unlabelled is not None:
        index = build_index(config.unlabelled, progress=False)
        if len(index) < 2:
            raise UserError(f"{config.unlabelled} holds 1 image; whitening needs at least 2")
    elif run is not None and (checkpoint / "index.npz").exists():
        index = read_kept_index(checkpoint / "index.npz").index
        if not index.is_there(0):
            say(f"no whitened scores: the images of the run are no longer at {index.root}; give --unlabelled FOLDER")
            return []
    else:
        say("no whitened scores: give --unlabelled FOLDER to fit the whitening on")
        return []
    chosen = np.unique(np.linspace(0, len(index) - 1, min(config.num_unlabelled, len(index))).round().astype(int))
    return as_files(index, chosen.tolist(), scratch)


def initial_encoder(encoder: VisionTransformer, run: PretrainConfig | None) -> VisionTransformer:
    """The same network before training: as the run began, or for a lone file a fresh draw with seed 0."""
    if run is not None:
        return PersonMAE(run.model, feature_width=1, seed=run.seed).encoder.eval()
    fresh = VisionTransformer(encoder.config)
    initialise(fresh, torch.Generator().manual_seed(0))
    return fresh.eval()
