"""Retrieval scores: how well features find the same person again.

personmae evaluate --checkpoint RUN --data SET [SET ...]      a run folder: scores before and after pre-training, into its report
personmae evaluate --checkpoint encoder.safetensors --data market1501=/data/market msmt17=/data/msmt17
personmae evaluate --features FILE.npz --as transreid          features that any other code has written
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from personmae.configs import UserError, from_plain
from personmae.data.image_index import as_files, build_index
from personmae.data.kept_index import read_kept_index
from personmae.data.reid import REID_SETS, ReidSet, num_splits, open_reid_set
from personmae.data.reid.checks import check_counts
from personmae.data.reid.published import PUBLISHED
from personmae.evaluation.colour_histogram import describe_colours
from personmae.evaluation.confidence import Bootstrap
from personmae.evaluation.conventions import Reranking, convention_of
from personmae.evaluation.expansion import QueryExpansion
from personmae.evaluation.feature_cache import FeatureCache
from personmae.evaluation.feature_files import SUFFIXES, read_feature_file
from personmae.evaluation.features import Describe
from personmae.evaluation.protocol import Evaluation, ScoringConfig, evaluate, score
from personmae.evaluation.score_files import score_table
from personmae.evaluation.scores import Scores
from personmae.interop.initial_weights import load_initial
from personmae.models.masked import PersonMAE
from personmae.models.vit import VisionTransformer, initialise
from personmae.models.weights import REID_FILE, is_encoder_file, is_reid_file, load_encoder, load_reid
from personmae.recipes.pretraining import PretrainConfig
from personmae.recipes.programs import RetrievalConfig
from personmae.tasks.model_scores import cameras_known, evaluate_model
from personmae.tasks.retrieval_results import draw_ranked_lists, write_browsing_page, write_evaluations, write_score_files, write_tables
from personmae.training.logbook import check_run_dir
from personmae.training.processes import choose_device
from personmae.visuals.report import write_report
from personmae.visuals.report_scores import HISTOGRAM, PRETRAINED, RANDOM
from personmae_kernels.launching import describe_operators

Say = Callable[[str], object]
Table = dict[tuple[str, str], Scores]  # (set, "model: feature") -> scores


def main(config: RetrievalConfig, say: Say = print) -> list[dict[str, Any]]:
    """Evaluate, print the table, write files; for a run folder also its report.

    Returns the rows of the table. Raises UserError for paths that do not hold what they should.
    """
    scoring = scoring_of(config)
    if config.output is not None:
        check_run_dir(config.output)
    say(f"operators: {describe_operators(choose_device(config.device, local_rank=None))}")
    table: Table = {}
    rows = score_feature_files(config, scoring, table, say)
    sets = open_sets(config.data, config.split) if config.checkpoint else []
    names = distinct_names([checkpoint.absolute() for checkpoint in config.checkpoint])
    for checkpoint, name in zip(config.checkpoint, names, strict=True):
        tuned = checkpoint / REID_FILE if checkpoint.is_dir() else checkpoint
        if is_reid_file(tuned):
            rows += score_tuned(tuned, checkpoint, name, sets, config, scoring, table, say)
            continue
        with tempfile.TemporaryDirectory() as scratch:
            rows += score_checkpoint(checkpoint, name, sets, config, scoring, table, Path(scratch), say)
    if len(table) > 1:
        say(score_table(table))
    say(f"rules: {scoring}. {scoring.convention.about}")
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
    for path, name in zip(config.features, distinct_names([path.absolute() for path in config.features]), strict=True):
        file = read_feature_file(path)
        for note in file.notes:
            say(f"{path.name}: {note}")
        notes = [f"{file.num_junk} junk images dropped"] if file.num_junk else []
        if not file.has_cameras:
            notes.append("no cameras, nothing left out")
        try:
            found = score(file.query_features, file.gallery_features, file.query, file.gallery, scoring=scoring, names=file.query_paths, notes=notes)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error
        table[name, "features"] = found
        rows.append({"set": name, **found.row("file", "features")})
        say(f"{name}: {found}")
        if config.output is not None:
            write_score_files(config.output / name, {"features": found}, "features", features=str(path))
            say(f"scores and the table of queries: {config.output / name}")
    return rows


def score_checkpoint(
    checkpoint: Path,
    own_name: str,
    sets: list[tuple[str, ReidSet]],
    config: RetrievalConfig,
    scoring: ScoringConfig,
    table: Table,
    scratch: Path,
    say: Say,
) -> list[dict[str, Any]]:
    """Scores of one encoder on all sets, written into its run if it is one; adds to the table, returns its rows. own_name: of the encoder in tables
    and folders. scratch: a folder for images that lie in a pack."""
    is_run = checkpoint.is_dir()
    if is_run:
        check_run_dir(checkpoint)
    run = read_run_config(checkpoint) if is_run else None
    encoder = read_encoder(checkpoint, config, say)
    unlabelled = choose_unlabelled(checkpoint, config, run, scratch, say)
    if config.page and not (is_run or config.output):
        raise UserError(f"the page of {checkpoint}, which is no run folder, has no place; give --output FOLDER")
    output = config.output / own_name if config.output is not None else checkpoint / "evaluation" if is_run else None

    # What is compared.
    device = choose_device(config.device, local_rank=None)
    candidates: dict[str, Describe] = {PRETRAINED: encoder.to(device).describe}
    if config.compare:
        candidates[RANDOM] = initial_encoder(encoder, run).to(device).describe
        candidates[HISTOGRAM] = describe_colours

    rows: list[dict[str, Any]] = []
    contents: list[dict[str, Any]] = []
    for label, reid_set in sets:
        say(reid_set.describe())
        for note in [*reid_set.notes, *count_warnings(reid_set)]:
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
                table[label, f"{own_name}{'' if name == PRETRAINED else f', {name}'}: {feature}"] = scores
                folder_of_set = label.removesuffix(reid_set.split).strip()
                of_set.append({"checkpoint": str(checkpoint), "set": label, "folder": folder_of_set, **scores.row(name, feature)})
                say(f"{name:22} {feature:16} {scores}")
        rows += of_set
        page = None
        if output is not None:
            # Other rules, other folder: neither takes the other's place.
            folder = output / "-".join([label, *scoring.words(), *(["flip"] if config.flip else [])]).replace(" ", "-")
            headline = evaluations[PRETRAINED].headline
            write_score_files(folder, evaluations[PRETRAINED].scores, headline, checkpoint=str(checkpoint), set=label)
            say(f"scores of all features and the table of queries ({headline}): {folder}")
            if config.page:
                page = write_browsing_page(folder / "ranked_lists", reid_set, evaluations[PRETRAINED], scoring, encoder if config.attention else None)
                say(f"ranked lists: {page}")
        if is_run:
            pictures = draw_ranked_lists(checkpoint, label, reid_set, evaluations)
            contents.append(content_of(label, encoder, of_set, pictures, page, checkpoint.resolve(), scoring, unlabelled))
    if config.split == "all":
        rows += mean_rows(rows, say)
    if is_run:
        write_evaluations(checkpoint, contents)
        say(f"report: {write_report(checkpoint)}")
    return rows


def score_tuned(
    weights: Path,
    checkpoint: Path,
    own_name: str,
    sets: list[tuple[str, ReidSet]],
    config: RetrievalConfig,
    scoring: ScoringConfig,
    table: Table,
    say: Say,
) -> list[dict[str, Any]]:
    """Scores of a fine-tuned model on all sets, of its own feature and by the cosine of the rules; adds to the table, returns its rows. weights: its
    file. checkpoint: as it was given, that file or its run folder. Files are written into --output alone: a run's report has its own scores."""
    if config.attention or config.unlabelled is not None:
        raise UserError(f"{weights} is a fine-tuned model, for which there is no --attention and no whitening (--unlabelled); leave it out")
    if config.page and config.output is None:
        raise UserError(f"the page of {checkpoint} has no place; give --output FOLDER")
    model = load_reid(weights)
    device = choose_device(config.device, local_rank=None)
    rows = []
    for label, reid_set in sets:
        say(reid_set.describe())
        for note in [*reid_set.notes, *count_warnings(reid_set)]:
            say(f"  {note}")
        found = evaluate_model(
            model.scored.to(device),
            reid_set,
            cameras_known(model.notes, reid_set),
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
        for feature, scores in found.scores.items():
            table[label, f"{own_name}: {feature}"] = scores
            folder_of_set = label.removesuffix(reid_set.split).strip()
            rows.append({"checkpoint": str(checkpoint), "set": label, "folder": folder_of_set, **scores.row("fine-tuned", feature)})
            say(f"{'fine-tuned':22} {feature:16} {scores}")
        if config.output is not None:
            folder = config.output / own_name / "-".join([label, *scoring.words(), *(["flip"] if config.flip else [])]).replace(" ", "-")
            write_score_files(folder, found.scores, found.headline, checkpoint=str(checkpoint), set=label)
            say(f"scores of all features and the table of queries ({found.headline}): {folder}")
            if config.page:
                say(f"ranked lists: {write_browsing_page(folder / 'ranked_lists', reid_set, found, scoring, None)}")
    return rows + mean_rows(rows, say) if config.split == "all" else rows


def distinct_names(paths: list[Path]) -> list[str]:
    """A name for each path: its last part without the suffix of a file, and as many folders above it as it takes to tell the paths apart."""
    parts = [[*path.parts[1:-1], path.stem if path.suffix in (".safetensors", *SUFFIXES) else path.name] for path in paths]
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = ["-".join(words[-length:]) for words in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"{next(path for path in paths if paths.count(path) > 1)} is given twice")


def count_warnings(reid_set: ReidSet) -> list[str]:
    """What differs from the counts that are published under the set's name, in one sentence."""
    wrong = [finding.text for finding in check_counts(reid_set.name, reid_set) if finding.level == "wrong"] if reid_set.name in PUBLISHED else []
    return [f"WARNING: this is not {reid_set.name} as published: {'; '.join(wrong)} (personmae data check says more)"] if wrong else []


def open_sets(data: Sequence[str], split: int | Literal["all"] = 0) -> list[tuple[str, ReidSet]]:
    """The sets that NAME=FOLDER or FOLDER name, with name and split in words; of those with several splits the ones asked for. Raises UserError for
    what is no set, before anything is computed."""
    folders = [given if Path(given).exists() else given.partition("=")[2] or given for given in data]
    own_names = distinct_names([Path(folder).expanduser().absolute() for folder in folders])
    opened = []
    for given, folder, own_name in zip(data, folders, own_names, strict=True):
        name = None if given == folder else given.partition("=")[0]
        root, first = Path(folder).expanduser(), 0 if split == "all" else split
        found = [open_reid_set(name, root, split=first)]
        if split == "all" and (name or found[0].name in REID_SETS):
            found += [open_reid_set(name, root, split=number) for number in range(1, num_splits(name or found[0].name))]
        opened += [(f"{reid_set.name if name else own_name} {reid_set.split}".strip(), reid_set) for reid_set in found]
    if len(dict(opened)) < len(opened):
        label = next(label for label, _ in opened if [other for other, _ in opened].count(label) > 1)
        raise UserError(f"{label} is given twice in --data; give folders without a name (NAME=) to tell them apart")
    return opened


def content_of(
    label: str,
    encoder: VisionTransformer,
    rows: list[dict[str, Any]],
    pictures: list[str],
    page: Path | None,
    run: Path,
    scoring: ScoringConfig,
    unlabelled: list[Path],
) -> dict[str, Any]:
    """An entry of evaluation.json, which the report shows; it links a page that lies in the run."""
    notes = [f"Rules: {scoring}. {scoring.convention.about}"]
    if unlabelled:
        notes.append(f"Whitening is fitted on {len(unlabelled)} unlabelled images.")
    page_link = page.relative_to(run).as_posix() if page and page.is_relative_to(run) else None
    return {
        "set": label,
        "rules": str(scoring),
        "size": list(encoder.config.image_size),
        "rows": rows,
        "ranked_lists": pictures,
        "page": page_link,
        "notes": notes,
    }


def mean_rows(rows: list[dict[str, Any]], say: Say) -> list[dict[str, Any]]:
    """Of sets with several splits: the mean of the splits and its standard deviation, said and as rows of the table."""
    means = []
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["checkpoint"], row["folder"], row["model"], row["feature"]), []).append(row)
    for (checkpoint, folder, model, feature), chosen in groups.items():
        if len(chosen) < 2:
            continue
        values = {name: np.array([row[name] for row in chosen]) for name in ("mAP", "rank1")}
        words = ", ".join(f"{name} {found.mean():.2%} +- {found.std():.2%}" for name, found in values.items())
        say(f"{folder} {model} {feature}: mean of {len(chosen)} splits: {words}")
        found = {name: float(found.mean()) for name, found in values.items()} | {f"{name}_std": float(found.std()) for name, found in values.items()}
        means.append({"checkpoint": checkpoint, "set": f"{folder}, mean of {len(chosen)} splits", "model": model, "feature": feature, **found})
    return means


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


def read_encoder(checkpoint: Path, config: RetrievalConfig, say: Say) -> VisionTransformer:
    """The encoder of a run folder, of a file of ours, or of other weights, whose keys are reported."""
    if checkpoint.is_dir():
        return load_encoder(checkpoint / "encoder.safetensors")
    if is_encoder_file(checkpoint):
        return load_encoder(checkpoint)
    foreign = config.foreign
    found = load_initial(
        str(checkpoint),
        foreign.part,
        image_size=foreign.image_size,
        grid=foreign.grid,
        num_heads=foreign.num_heads,
        normalisation=foreign.normalisation,
    )
    say(f"{checkpoint}: {found.report}")
    return found.encoder


def initial_encoder(encoder: VisionTransformer, run: PretrainConfig | None) -> VisionTransformer:
    """The same network before training: as the run began, or for a lone file a fresh draw with seed 0."""
    if run is not None:
        return PersonMAE(run.model, feature_width=1, seed=run.seed).encoder.eval()
    fresh = VisionTransformer(encoder.config)
    initialise(fresh, torch.Generator().manual_seed(0))
    return fresh.eval()
