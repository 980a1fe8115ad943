"""Zero-shot retrieval: how well the features of an encoder that has seen no label find the same person again.

personmae evaluate RUN --data SET            a run folder: scores before and after pre-training, into its report
personmae evaluate encoder.safetensors --data SET
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from personmae.configs import UserError, from_plain
from personmae.data.image_index import as_files, build_index
from personmae.data.kept_index import read_kept_index
from personmae.data.reid import ReidSet, read_market_layout
from personmae.evaluation.colour_histogram import describe_colours
from personmae.evaluation.features import Describe
from personmae.evaluation.protocol import Evaluation, evaluate, whitened
from personmae.models.masked import PersonMAE
from personmae.models.vit import VisionTransformer, initialise
from personmae.models.weights import load_encoder
from personmae.recipes import PretrainConfig, RetrievalConfig
from personmae.training.logbook import check_run_dir, write_whole
from personmae.training.processes import choose_device
from personmae.visuals.ranked_lists import choose_queries, ranked_list_picture
from personmae.visuals.report import write_report
from personmae.visuals.report_scores import HEADLINE, HISTOGRAM, PRETRAINED, RANDOM


def main(config: RetrievalConfig, say: Callable[[str], object] = print) -> list[dict[str, Any]]:
    """Evaluate, print the table, and for a run folder write evaluation.json, ranked lists and the report.

    Returns the rows of the table. Raises UserError for paths that do not hold what they should.
    """
    with tempfile.TemporaryDirectory() as scratch:
        return compare(config, Path(scratch), say)


def compare(config: RetrievalConfig, scratch: Path, say: Callable[[str], object]) -> list[dict[str, Any]]:
    """The same; images that lie in a pack become files in `scratch`."""
    is_run = config.weights.is_dir()
    if is_run:
        check_run_dir(config.weights)
    run_config = read_run_config(config.weights) if is_run else None
    encoder = load_encoder(config.weights / "encoder.safetensors" if is_run else config.weights)
    reid_set = read_market_layout(config.data)
    say(reid_set.describe())
    unlabelled = choose_unlabelled(config, run_config, scratch, say)

    # What is compared.
    device = choose_device(config.device, local_rank=None)
    size = encoder.config.image_size
    candidates: dict[str, Describe] = {PRETRAINED: encoder.to(device).describe}
    if config.compare:
        candidates[RANDOM] = initial_encoder(encoder, run_config).to(device).describe
        candidates[HISTOGRAM] = describe_colours

    # Features and scores, by the project's one protocol.
    rows: list[dict[str, Any]] = []
    evaluations: dict[str, Evaluation] = {}
    for name, describe in candidates.items():
        found = evaluate(
            describe,
            reid_set,
            size=size,
            unlabelled=unlabelled if name != HISTOGRAM else (),
            batch_size=config.batch_size,
            num_threads=config.num_threads,
            device=device,
        )
        evaluations[name] = found
        for feature, scores in found.scores.items():
            rows.append(scores.row(name, feature))
            say(f"{name:22} {feature:16} {scores}")

    if is_run:
        pictures = draw_ranked_lists(config.weights, reid_set, evaluations) if unlabelled else []
        notes = ["Zero-shot: nothing was trained on a label. Single query, whole gallery, same camera left out."]
        if unlabelled:
            notes.append(f"Whitening is fitted on {len(unlabelled)} unlabelled images.")
        content = {
            "set": reid_set.name,
            "size": list(size),
            "rows": rows,
            "ranked_lists": pictures,
            "notes": notes,
        }
        write_whole(config.weights / "evaluation.json", json.dumps(content, indent=2) + "\n")
        say(f"report: {write_report(config.weights)}")
    return rows


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


def choose_unlabelled(config: RetrievalConfig, run: PretrainConfig | None, scratch: Path, say: Callable[[str], object]) -> list[Path]:
    """The images that whitening is fitted on, spread evenly over the source; none if there is no source."""
    if config.unlabelled is not None:
        index = build_index(config.unlabelled, progress=False)
        if len(index) < 2:
            raise UserError(f"{config.unlabelled} holds 1 image; whitening needs at least 2")
    elif run is not None and (config.weights / "index.npz").exists():
        index = read_kept_index(config.weights / "index.npz").index
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


def draw_ranked_lists(run: Path, reid_set: ReidSet, evaluations: dict[str, Evaluation]) -> list[str]:
    """Ranked lists of the headline feature after and before pre-training, for the same queries; paths within the run."""
    name = HEADLINE.split(",")[0]
    chosen = choose_queries(evaluations[PRETRAINED].scores[HEADLINE].average_precision)
    pictures = []
    for model, label in ((RANDOM, "before"), (PRETRAINED, "after")):
        if model not in evaluations:
            continue
        found = evaluations[model]
        assert found.unlabelled_features is not None
        query, gallery = whitened(
            {name: found.query_features[name]},
            {name: found.gallery_features[name]},
            {name: found.unlabelled_features[name]},
        )
        picture = ranked_list_picture(
            reid_set.query,
            reid_set.gallery,
            query[name],
            gallery[name],
            chosen=chosen,
            chosen_by="the pre-trained network",
            title=f"{label} pre-training",
        )
        relative = f"pictures/ranked_lists_{label}.png"
        (run / "pictures").mkdir(exist_ok=True)
        picture.save(run / relative)
        pictures.append(relative)
    return pictures
