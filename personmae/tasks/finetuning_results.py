"""What fine-tuning is judged by and leaves: scores on held-out people and on the test sets, the best epoch's weights, files, the report."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from personmae.data.labelled import LabelledImages
from personmae.data.records import PersonImage
from personmae.data.reid import ReidSet
from personmae.evaluation.features import FeatureArray, extract_features
from personmae.evaluation.inputs import labels_of_set
from personmae.evaluation.protocol import Evaluation, ScoringConfig, evaluate, score_variants
from personmae.models.identity_head import IdentityHead
from personmae.models.reid import ReidEncoder, plain_encoder
from personmae.models.weights import load_reid, save_encoder, save_reid
from personmae.recipes.finetuning import FinetuneConfig
from personmae.tasks.retrieval_results import draw_ranked_lists, write_evaluations, write_score_files
from personmae.training.best_epoch import BestEpoch
from personmae.training.logbook import explained_write
from personmae.visuals.report import write_report
from personmae.visuals.report_scores import LAST, START

Say = Callable[[str], object]
LAST_FILE = "reid.safetensors"
# On the way, without intervals.
QUICK = ScoringConfig(bootstrap=None)


def evaluate_model(
    model: ReidEncoder,
    reid_set: ReidSet,
    camera_names: Sequence[int],
    config: FinetuneConfig,
    device: torch.device,
    scoring: ScoringConfig,
    say: Say,
) -> Evaluation:
    """Features and scores of a model on a set, by cosine, in eval mode, in which it is left. camera_names: what the training set calls its cameras;
    others get the mean of the embeddings. Raises UserError if an image cannot be read."""
    model.eval()
    options: dict[str, Any] = {
        "size": config.model.image_size,
        "batch_size": 128,
        "num_threads": config.loader.num_threads or 2,
        "device": device,
        "precision": config.precision,
        "announce": say,
    }
    if not model.num_cameras:
        return evaluate(model.describe, reid_set, scoring=scoring, **options)
    query, gallery = (_extract_by_camera(model, images, camera_names, options) for images in (reid_set.query, reid_set.gallery))
    names = [str(image.path) for image in reid_set.query]
    return Evaluation(score_variants(query, gallery, *labels_of_set(reid_set), scoring=scoring, names=names), query, gallery, None)


def _extract_by_camera(
    model: ReidEncoder, images: Sequence[PersonImage], camera_names: Sequence[int], options: dict[str, Any]
) -> dict[str, FeatureArray]:
    """The features of a model with camera embeddings: the images of one camera after the other's, put back into their order."""
    numbers = {name: number for number, name in enumerate(camera_names)}
    cameras = np.array([image.camera for image in images])
    features: dict[str, FeatureArray] = {}
    for camera in np.unique(cameras).tolist():
        rows = np.flatnonzero(cameras == camera).tolist()
        describe = functools.partial(_describe_of_camera, model, numbers.get(camera, -1))
        for name, found in extract_features(describe, [images[row] for row in rows], progress=False, **options).items():
            features.setdefault(name, np.empty((len(images), found.shape[1]), dtype=found.dtype))[rows] = found
    return features


def _describe_of_camera(model: ReidEncoder, camera: int, images: Tensor) -> dict[str, Tensor]:
    return model.describe(images, torch.full((len(images),), camera, device=images.device))


def mean_average_precision(
    model: ReidEncoder, sets: Sequence[ReidSet], train: LabelledImages, config: FinetuneConfig, device: torch.device
) -> float:
    """The mean over the sets of the model's mAP, by which the best epoch is chosen."""
    names = train.camera_names.tolist()
    found = [evaluate_model(model, reid_set, names, config, device, QUICK, _silence) for reid_set in sets]
    return float(np.mean([evaluation.scores[evaluation.headline].mAP for evaluation in found]))


def write_weights(config: FinetuneConfig, encoder: ReidEncoder, head: IdentityHead, step: int) -> Path:
    """reid.safetensors of the run, and encoder.safetensors where the encoder by itself is one of timm's terms; returns the first."""
    notes = {"run": str(config.run_dir), "preset": config.preset, "step": str(step)}
    path = config.run_dir / LAST_FILE
    with explained_write(config.run_dir):
        save_reid(path, encoder, head, notes)
        plain = plain_encoder(encoder)
        if plain is not None:
            save_encoder(config.run_dir / "encoder.safetensors", plain, notes)
    return path


def score_run(
    config: FinetuneConfig,
    candidates: dict[str, ReidEncoder],
    tests: Sequence[tuple[str, ReidSet]],
    train: LabelledImages,
    device: torch.device,
    say: Say,
    notes: Sequence[str],
) -> list[dict[str, Any]]:
    """Scores of models on the test sets: said, and written as scores.json, queries.csv, evaluation.json and pictures of ranked lists. Returns the
    rows. candidates: name -> model, LAST among them."""
    scoring = ScoringConfig()
    contents, rows = [], []
    for label, reid_set in tests:
        say(reid_set.describe())
        found = {}
        for name, model in candidates.items():
            evaluation = evaluate_model(model.to(device), reid_set, train.camera_names.tolist(), config, device, scoring, say)
            found[name] = evaluation
            scores = evaluation.scores[evaluation.headline]
            rows.append({"set": label, **scores.row(name, evaluation.headline)})
            say(f"{name:22} {scores}")
        pictures = draw_ranked_lists(config.run_dir, label, reid_set, found, {START: "before training", LAST: "after training"})
        folder = config.run_dir / "evaluation" / label.replace(" ", "-")
        write_score_files(folder, found[LAST].scores, found[LAST].headline, checkpoint=str(config.run_dir / LAST_FILE), set=label)
        contents.append({
            "set": label,
            "rules": str(scoring),
            "size": list(config.model.image_size),
            "rows": [row for row in rows if row["set"] == label],
            "ranked_lists": pictures,
            "page": None,
            "notes": [f"Rules: {scoring}. {scoring.convention.about}", *notes],
        })
    write_evaluations(config.run_dir, contents, LAST_FILE)
    return rows


def finish(
    config: FinetuneConfig,
    encoder: ReidEncoder,
    head: IdentityHead,
    start: ReidEncoder,
    best: BestEpoch,
    tests: Sequence[tuple[str, ReidSet]],
    train: LabelledImages,
    device: torch.device,
    step: int,
    total: int,
    say: Say,
) -> str:
    """Write weights, scores and report; returns the sentence that says how the run ended. start: the model as the run began."""
    path = write_weights(config, encoder, head, step)
    if step < total:
        write_report(config.run_dir)
        return f"stopped at step {step} of {total}; the same command continues from there"
    candidates = {START: start, LAST: encoder}
    notes = []
    if best.score is not None:
        candidates[f"best epoch ({best.epoch})"] = load_reid(best.path).encoder
        of = "held-out training people" if config.best_by == "held-out" else "the test sets themselves: a score to compare, not to report"
        notes.append(f"The best epoch is the one with the highest mAP ({best.score:.2%}) on {of}.")
    score_run(config, candidates, tests, train, device, say, notes)
    return f"done: {path}, report {write_report(config.run_dir)}"


def _silence(text: str) -> None:
    """What is evaluated on the way says nothing."""
