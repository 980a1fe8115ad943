"""The pseudo labels of an epoch of unsupervised training: features of all images, each process a share, clustered, said and pictured."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from personmae.configs import UserError
from personmae.data.labelled import LabelledImages
from personmae.evaluation.clustering import Clusters
from personmae.evaluation.features import extract_features
from personmae.evaluation.pseudo_labels import advice, eps_around, eps_table, find_clusters, find_each, label_quality
from personmae.models.identity_head import NeckedEncoder, calibrate_necks
from personmae.recipes.unsupervised import UnsupervisedConfig
from personmae.tasks.model_scores import Scored
from personmae.training.blocks import uncompiled
from personmae.training.cluster_memory import ClusterMemory, cluster_means
from personmae.training.processes import Processes
from personmae.visuals.cluster_sheets import cluster_sheet
from personmae.whole_files import explained_write, write_whole

Say = Callable[[str], object]
# Added to people and cameras of a source that is trained on jointly, so that the target's numbers mean other ones.
SOURCE_OFFSET = 1_000_000


def find_labels(
    model: NeckedEncoder, epoch: int, train: LabelledImages, config: UnsupervisedConfig, processes: Processes, say: Say
) -> tuple[npt.NDArray[np.int64], ClusterMemory]:
    """The pseudo labels of an epoch, int64 [N] with -1 for outliers, and the memory of their clusters, on the device; in all processes."""
    device, source = processes.device, of_source(train)
    target = np.flatnonzero(~source)
    if source.any():
        # Each set by its own statistics; those of the target stay.
        raw = extract_all(model.encoder, train, config, processes)
        features = np.empty_like(raw)
        for rows in (np.flatnonzero(source), target):
            calibrate_necks(model.head, [torch.from_numpy(raw[rows]).to(device)])
            necked = model.head.eval()((torch.from_numpy(raw[rows]).to(device),)).necked[0].detach()
            features[rows] = F.normalize(necked, dim=1).cpu().numpy()
    else:
        if epoch == 0 and config.calibrate_neck:
            settle_neck(model, train, config, processes, always=True)
        features = extract_all(model, train, config, processes)
    found = processes.from_main(lambda: cluster_images(features[target], target, epoch, train, config, say))
    # The people of the source, then the clusters.
    _, known = np.unique(train.labels[source], return_inverse=True)
    labels = np.empty(len(train), dtype=np.int64)
    labels[source] = known
    labels[target] = np.where(found.labels >= 0, found.labels + known.max(initial=-1) + 1, -1)
    return labels, ClusterMemory(cluster_means(features, labels), config.memory).to(device)


def of_source(train: LabelledImages) -> npt.NDArray[np.bool_]:
    """Which samples are of a source that is trained on jointly, bool [N]."""
    return train.people[train.labels] >= SOURCE_OFFSET


def settle_neck(model: NeckedEncoder, train: LabelledImages, config: UnsupervisedConfig, processes: Processes, *, always: bool = False) -> None:
    """Sets the neck's statistics to those of the target's images: always, or where a source has had its part in them."""
    target = ~of_source(train)
    if always or not target.all():
        raw = extract_all(model.encoder, train, config, processes)[target]
        calibrate_necks(model.head, [torch.from_numpy(raw).to(processes.device)])


def extract_all(model: Scored, train: LabelledImages, config: UnsupervisedConfig, processes: Processes) -> npt.NDArray[np.float32]:
    """The features of all training images, float32 [N, D], each process a share, in all of them."""
    model.eval()
    own = np.arange(processes.rank, len(train), processes.world_size)
    options: dict[str, Any] = {
        "size": config.model.image_size,
        "batch_size": 128,
        "num_threads": config.loader.num_threads or 2,
        "device": processes.device,
        "precision": config.precision,
        "progress": False,
    }
    with uncompiled():
        parts = _extract_share(model, train, own, options)
    features: npt.NDArray[np.float32] | None = None
    for gathered in processes.all_gather(parts):
        for rows, values in gathered:
            features = np.empty((len(train), values.shape[1]), dtype=np.float32) if features is None else features
            features[rows] = values
    assert features is not None
    return features


def _extract_share(
    model: Scored, train: LabelledImages, own: npt.NDArray[np.intp], options: dict[str, Any]
) -> list[tuple[npt.NDArray[np.intp], npt.NDArray[np.float32]]]:
    """The features of some samples: (samples, features) of each camera, or of all where the model does not ask for cameras."""
    parts: list[tuple[npt.NDArray[np.intp], npt.NDArray[np.float32]]] = []
    if model.num_cameras:
        for camera in np.unique(train.cameras[own]).tolist():
            rows = own[train.cameras[own] == camera]

            def describe(images: Tensor, camera: int = camera) -> dict[str, Tensor]:
                return model.describe(images, torch.full((len(images),), camera, device=images.device))

            parts.append((rows, extract_features(describe, paths_of(train, rows), **options)["feature"]))
    elif len(own):
        parts.append((own, extract_features(model.describe, paths_of(train, own), **options)["feature"]))
    return parts


def paths_of(train: LabelledImages, rows: npt.NDArray[np.intp]) -> list[Any]:
    """The files of samples."""
    return [train.index.path(row) for row in rows.tolist()]


def cluster_images(
    features: npt.NDArray[np.float32], samples: npt.NDArray[np.intp], epoch: int, train: LabelledImages, config: UnsupervisedConfig, say: Say
) -> Clusters:
    """The clusters of an epoch: said, written down and pictured. Before the first, a table says what other eps give. features: float32 [N, D] of the
    samples [N]. Raises UserError with advice where there are too few for a batch."""
    pseudo, people = config.pseudo, train.labels[samples]
    has_labels = len(np.unique(people)) > 1
    wanted = config.num_people // 2 if of_source(train).any() else config.num_people
    if epoch == 0:
        each = find_each(features, eps_around(pseudo.eps), pseudo)
        table = eps_table(each)
        say(f"what eps gives before the first epoch (eps is {pseudo.eps:g}):\n{table}")
        write_whole(config.run_dir / "eps.txt", table + "\n")
        found = next(one for one in each if one.eps == round(pseudo.eps, 4))
    else:
        found = find_clusters(features, pseudo)
    while (problem := advice(found, wanted)) is not None:
        wider = round(found.eps + 0.05, 4)
        if config.if_too_few == "stop" or wider >= 1:
            raise UserError(f"epoch {epoch + 1}: {problem}")
        say(f"epoch {epoch + 1}: {problem}; trying eps {wider:g}")
        found = find_clusters(features, replace(pseudo, eps=wider))
    quality = label_quality(found.labels, people)
    words = f"NMI {quality.nmi:.3f}, ARI {quality.ari:.3f}, purity {quality.purity:.1%}" if has_labels else "no labels to compare with"
    say(f"epoch {epoch + 1}: {found} ({words})")
    row = {"epoch": epoch + 1, "eps": found.eps, "clusters": found.num_clusters, "outliers": found.num_outliers, **asdict(quality)}
    with explained_write(config.run_dir / "clusters.jsonl"):
        append_row(config, row)
        sheet = cluster_sheet(lambda row: train.index.image(int(samples[row])), found.labels, people if has_labels else None, config.num_sheets)
        if sheet is not None and config.num_sheets:
            (config.run_dir / "pictures").mkdir(exist_ok=True)
            sheet.save(config.run_dir / "pictures" / f"clusters_{epoch + 1:04d}.png")
    return found


def append_row(config: UnsupervisedConfig, row: dict[str, Any]) -> None:
    """A line of clusters.jsonl; lines of the same epoch or later, of a run that was interrupted, are dropped."""
    path = config.run_dir / "clusters.jsonl"
    lines = []
    with contextlib.suppress(FileNotFoundError):
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if json.loads(line)["epoch"] < row["epoch"]]
    finite = {name: None if isinstance(value, float) and np.isnan(value) else value for name, value in row.items()}
    write_whole(path, "\n".join([*lines, json.dumps(finite)]) + "\n")
