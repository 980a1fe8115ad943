"""Scores of a re-identification model on a set, whether or not it asks for the cameras of the images."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from personmae.data.labelled import TrainingSets
from personmae.data.records import PersonImage
from personmae.data.reid.sets import ReidSet
from personmae.evaluation.features import FeatureArray, extract_features
from personmae.evaluation.inputs import labels_of_set
from personmae.evaluation.protocol import Evaluation, ScoringConfig, evaluate, score_variants
from personmae.models.identity_head import NeckedEncoder, describe_of_camera
from personmae.models.reid import ReidEncoder
from personmae.training.blocks import uncompiled

Scored = ReidEncoder | NeckedEncoder


def evaluate_model(
    model: Scored, reid_set: ReidSet, cameras: Mapping[int, int], *, scoring: ScoringConfig, announce: Callable[[str], object], **options: Any
) -> Evaluation:
    """Features and scores of a model, in eval mode, in which it is left. cameras: the set's cameras -> numbers of the training set's; others get the
    mean of the embeddings; ignored by models without them. options: those of `evaluate`. Raises UserError if an image cannot be read."""
    model.eval()
    with uncompiled():
        return _evaluate(model, reid_set, cameras, scoring, announce, options)


def _evaluate(
    model: Scored, reid_set: ReidSet, cameras: Mapping[int, int], scoring: ScoringConfig, announce: Callable[[str], object], options: dict[str, Any]
) -> Evaluation:
    if not model.num_cameras:
        return evaluate(model.describe, reid_set, size=model.config.image_size, scoring=scoring, announce=announce, **options)
    if options.pop("flip", False):
        options["flip_test"] = scoring.convention.flip
    options = {**options, "size": model.config.image_size, "cache": None, "announce": announce}
    metrics = options.pop("metrics", ("cosine",))
    query, gallery = (_extract_by_camera(model, images, cameras, options) for images in (reid_set.query, reid_set.gallery))
    names = [str(image.path) for image in reid_set.query]
    scores = score_variants(query, gallery, *labels_of_set(reid_set), metrics=metrics, scoring=scoring, names=names)
    return Evaluation(scores, query, gallery, None)


def _extract_by_camera(
    model: Scored, images: Sequence[PersonImage], cameras: Mapping[int, int], options: dict[str, Any]
) -> dict[str, FeatureArray]:
    """The features of a model with camera embeddings: the images of one camera after the other's, put back into their order."""
    names = np.array([image.camera for image in images])
    features: dict[str, FeatureArray] = {}
    for name in np.unique(names).tolist():
        rows = np.flatnonzero(names == name).tolist()
        describe = functools.partial(describe_of_camera, model, cameras.get(name, -1))
        for key, found in extract_features(describe, [images[row] for row in rows], progress=False, **options).items():
            features.setdefault(key, np.empty((len(images), found.shape[1]), dtype=found.dtype))[rows] = found
    return features


def camera_notes(sets: TrainingSets) -> dict[str, str]:
    """What the file of a model says of the set that it was trained on, for `cameras_known`."""
    return {"set": sets.name, "cameras": json.dumps(sets.train.camera_names.tolist())}


def cameras_known(notes: Mapping[str, str], reid_set: ReidSet) -> dict[int, int]:
    """The set's cameras that the model was trained with, and their numbers there; none of another set, where the same number is another camera.

    notes: of the model's file, or of `camera_notes`."""
    if notes.get("set") != reid_set.name.removesuffix(" held out"):
        return {}
    return {name: number for number, name in enumerate(json.loads(notes.get("cameras", "[]")))}
