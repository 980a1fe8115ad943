"""Seconds and peak memory of pseudo-labels (Jaccard distance and DBSCAN) and of re-ranking, ours and dense, each in a process of its own.

    python benchmarks/_jaccard_cases.py --num 2000                     pseudo-labels of 2,000 images, ours and dense
    python benchmarks/_jaccard_cases.py --num 32621 --ways sparse      ours alone, at the size of MSMT17's training set
    python benchmarks/_jaccard_cases.py --num-query 11659 --num-gallery 82161 --ways reranking

Features are drawn, not real: identities of about 31 images in 64 latent dimensions, seen by cameras, mapped to 768. The time counts from the features
in memory to the labels (or the last tile of distances); the memory is the peak of the whole process, Python, torch and the features with it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# A program's own folder is on the path, the root is not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._measure import ROOT

K1, K2, EPS, MIN_SAMPLES = 30, 6, 0.6, 4
LATENT, IMAGES_PER_PERSON, NUM_CAMERAS = 64, 31, 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=2000, help="images to cluster")
    parser.add_argument("--num-query", type=int, default=336)
    parser.add_argument("--num-gallery", type=int, default=1591)
    parser.add_argument("--dimensions", type=int, default=768)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=["sparse", "dense"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--inside", action="store_true", help="measure in this process, and print JSON")
    options = parser.parse_args()
    if options.inside:
        print(json.dumps(measure(options.ways[0], vars(options))))
        return
    for row in rows_of(options.ways, vars(options)):
        print(json.dumps(row), flush=True)


def jaccard_rows(num: int, *, ways: Sequence[str] = ("sparse", "dense"), dimensions: int = 768, device: str = "cpu") -> list[dict[str, Any]]:
    """One row for each way: seconds, peak_gib, clusters, outliers, and whether the labels are those of the first way."""
    return list(rows_of(ways, {"num": num, "dimensions": dimensions, "device": device}))


def reranking_rows(num_query: int, num_gallery: int, *, dimensions: int = 768, device: str = "cpu") -> list[dict[str, Any]]:
    """The row of re-ranked distances, all of them taken and let go."""
    return list(rows_of(["reranking"], {"num_query": num_query, "num_gallery": num_gallery, "dimensions": dimensions, "device": device}))


def rows_of(ways: Sequence[str], settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of `measure`, each from a fresh process, so that the peak of one is not that of another."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items() if name not in ("ways", "inside")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])}
    first = None
    for way in ways:
        command = [sys.executable, str(Path(__file__).resolve()), "--inside", *flags, "--ways", way]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if run.returncode:
            yield {"way": way, "failed": (run.stderr.strip().splitlines() or [f"exit {run.returncode}"])[-1]}
            continue
        row = json.loads(run.stdout.splitlines()[-1])
        if "labels" in row:
            first = first or row["labels"]
            row["same_labels"] = row["labels"] == first
        yield row


def measure(way: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Runs one way in this process."""
    started = time.perf_counter()
    run = WAYS[way](settings)
    prepared = time.perf_counter()
    found = run()
    seconds = time.perf_counter() - prepared
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"way": way, "seconds": round(seconds, 3), "peak_gib": round(peak, 3), "preparing_seconds": round(prepared - started, 3), **found}


def sparse(settings: Mapping[str, Any]) -> Callable[[], dict[str, Any]]:
    from personmae.evaluation.clustering import cluster
    from personmae.evaluation.reciprocal import jaccard_distances

    features = on_device(draw_features(settings["num"], settings["dimensions"]), settings["device"])

    def run() -> dict[str, Any]:
        graph = jaccard_distances(features, cut=EPS, k1=K1, k2=K2)
        labels = cluster(graph, eps=EPS, min_samples=MIN_SAMPLES).labels
        return {"num": len(labels), "pairs_per_image": round(graph.nnz / len(labels), 1), **described(labels)}

    return warmed(run, features)


def dense(settings: Mapping[str, Any]) -> Callable[[], dict[str, Any]]:
    from benchmarks._jaccard_peers import dense_labels

    features = draw_features(settings["num"], settings["dimensions"])
    return lambda: {"num": len(features), **described(dense_labels(features, K1, K2, EPS, MIN_SAMPLES))}


def reranking(settings: Mapping[str, Any]) -> Callable[[], dict[str, Any]]:
    from personmae.evaluation.reranking import reranked_distances

    num_query, num_gallery = settings["num_query"], settings["num_gallery"]
    features = on_device(draw_features(num_query + num_gallery, settings["dimensions"]), settings["device"])
    query, gallery = features[:num_query], features[num_query:]

    def run() -> dict[str, Any]:
        mean = sum(float(tile.mean()) * len(tile) for _, tile in reranked_distances(query, gallery)) / num_query
        return {"num_query": num_query, "num_gallery": num_gallery, "mean_distance": round(mean, 6)}

    return warmed(run, features)


WAYS: dict[str, Callable[[Mapping[str, Any]], Callable[[], dict[str, Any]]]] = {"sparse": sparse, "dense": dense, "reranking": reranking}


def warmed(run: Callable[[], dict[str, Any]], features: Any) -> Callable[[], dict[str, Any]]:
    """On CUDA after one run that does not count, which loads what it needs."""
    if getattr(features, "is_cuda", False):
        run()
    return run


def on_device(features: npt.NDArray[np.float32], device: str) -> Any:
    import torch

    return features if device == "cpu" else torch.from_numpy(features).to(device)


def described(labels: npt.NDArray[np.int64]) -> dict[str, Any]:
    digest = hashlib.sha256(np.ascontiguousarray(labels, np.int64).tobytes()).hexdigest()
    return {"clusters": int(labels.max()) + 1, "outliers": int((labels < 0).sum()), "labels": digest[:16]}


def draw_features(num: int, dimensions: int = 768, seed: int = 0) -> npt.NDArray[np.float32]:
    """Unit features [N, D]: identity, camera and noise in a latent space, mapped by one random matrix. Images stand in random order."""
    generator = np.random.default_rng(seed)
    person = generator.integers(0, max(1, num // IMAGES_PER_PERSON), num)
    camera = generator.integers(0, NUM_CAMERAS, num)
    people = generator.normal(size=(person.max() + 1, LATENT)).astype(np.float32)
    cameras = 0.6 * generator.normal(size=(NUM_CAMERAS, LATENT)).astype(np.float32)
    mapping = generator.normal(size=(LATENT, dimensions)).astype(np.float32) / LATENT**0.5
    features = np.empty((num, dimensions), np.float32)
    for start in range(0, num, 8192):
        part = slice(start, start + 8192)
        latent = people[person[part]] + cameras[camera[part]] + 0.6 * generator.normal(size=(len(person[part]), LATENT)).astype(np.float32)
        features[part] = latent @ mapping + 0.3 * generator.normal(size=(len(latent), dimensions)).astype(np.float32)
        features[part] /= np.linalg.norm(features[part], axis=1, keepdims=True)
    return features


if __name__ == "__main__":
    main()
