"""What fine-tuning is judged by and leaves: scores on held-out people and on the test sets, the best epoch's weights, files, the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from personmae.data.labelled import TrainingSets
from personmae.data.reid import ReidSet
from personmae.evaluation.protocol import Evaluation, ScoringConfig
from personmae.models.identity_head import IdentityHead
from personmae.models.reid import ReidEncoder, plain_encoder
from personmae.models.weights import REID_FILE, load_reid, save_encoder, save_reid
from personmae.recipes.finetuning import TrainConfig
from personmae.tasks.model_scores import Scored, camera_notes, cameras_known, evaluate_model
from personmae.tasks.retrieval_results import draw_ranked_lists, write_evaluations, write_score_files
from personmae.training.best_epoch import BestEpoch
from personmae.visuals.report import write_report
from personmae.visuals.report_scores import LAST, START

Say = Callable[[str], object]
# On the way, without intervals.
QUICK = ScoringConfig(bootstrap=None)


def score_model(
    model: Scored, reid_set: ReidSet, notes: Mapping[str, str], config: TrainConfig, device: torch.device, scoring: ScoringConfig, say: Say
) -> Evaluation:
    """Features and scores of a run's model. notes: what `camera_notes` says of the training set."""
    return evaluate_model(
        model,
        reid_set,
        cameras_known(notes, reid_set),
        scoring=scoring,
        announce=say,
        batch_size=128,
        num_threads=config.loader.num_threads or 2,
        device=device,
        precision=config.precision,
    )


def mean_average_precision(model: Scored, chosen: Sequence[ReidSet], sets: TrainingSets, config: TrainConfig, device: torch.device) -> float:
    """The mean over the chosen sets of the model's mAP, by which the best epoch is found."""
    found = [score_model(model, reid_set, camera_notes(sets), config, device, QUICK, _silence) for reid_set in chosen]
    return float(np.mean([evaluation.scores[evaluation.headline].mAP for evaluation in found]))


def write_weights(
    config: TrainConfig, encoder: ReidEncoder, head: IdentityHead, sets: TrainingSets, step: int, more: Mapping[str, str]
) -> Path:
    """reid.safetensors of the run, and encoder.safetensors where the encoder by itself is one of timm's terms; returns the first. more: notes."""
    notes = {"run": str(config.run_dir), "preset": config.preset, "step": str(step), **camera_notes(sets), **more}
    path = config.run_dir / REID_FILE
    save_reid(path, encoder, head, notes)
    plain = plain_encoder(encoder)
    if plain is not None:
        save_encoder(config.run_dir / "encoder.safetensors", plain, notes)
    return path


def score_run(
    config: TrainConfig,
    candidates: dict[str, Scored],
    sets: TrainingSets,
    device: torch.device,
    say: Say,
    notes: Sequence[str],
) -> list[dict[str, Any]]:
    """Scores of models on the test sets: said, and written as scores.json, queries.csv, evaluation.json and pictures of ranked lists. Returns the
    rows. candidates: name -> model, LAST among them."""
    scoring = ScoringConfig()
    contents, rows = [], []
    for label, reid_set in sets.tests:
        say(reid_set.describe())
        found = {}
        for name, model in candidates.items():
            evaluation = score_model(model.to(device), reid_set, camera_notes(sets), config, device, scoring, say)
            found[name] = evaluation
            scores = evaluation.scores[evaluation.headline]
            rows.append({"set": label, **scores.row(name, evaluation.headline)})
            say(f"{name:22} {scores}")
        pictures = draw_ranked_lists(config.run_dir, label, reid_set, found, {START: "before training", LAST: "after training"})
        folder = config.run_dir / "evaluation" / label.replace(" ", "-")
        write_score_files(folder, found[LAST].scores, found[LAST].headline, checkpoint=str(config.run_dir / REID_FILE), set=label)
        contents.append({
            "set": label,
            "rules": str(scoring),
            "size": list(config.model.image_size),
            "rows": [row for row in rows if row["set"] == label],
            "ranked_lists": pictures,
            "page": None,
            "notes": [f"Rules: {scoring}. {scoring.convention.about}", *notes],
        })
    write_evaluations(config.run_dir, contents, REID_FILE)
    return rows


def finish(
    config: TrainConfig,
    encoder: ReidEncoder,
    head: IdentityHead,
    start: Scored,
    best: BestEpoch,
    sets: TrainingSets,
    device: torch.device,
    step: int,
    total: int,
    say: Say,
    scored: Scored | None = None,
    more: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Write weights, scores and report; returns the sentence that says how the run ended. start: the model as the run began. scored: what is scored
    of the model; None: the encoder. more: notes for the file of the weights."""
    path = write_weights(config, encoder, head, sets, step, more)
    if step < total:
        write_report(config.run_dir)
        return f"stopped at step {step} of {total}; the same command continues from there"
    candidates: dict[str, Scored] = {START: start, LAST: scored or encoder}
    notes = []
    if best.score is not None:
        candidates[f"best epoch ({best.epoch})"] = load_reid(best.path).scored
        of = "held-out training people" if sets.held_out is not None else "the test sets themselves: a score to compare, not to report"
        notes.append(f"The best epoch is the one with the highest mAP ({best.score:.2%}) on {of}.")
    score_run(config, candidates, sets, device, say, notes)
    return f"done: {path}, report {write_report(config.run_dir)}"


def _silence(text: str) -> None:
    """What is evaluated on the way says nothing."""
