"""What a number format costs: scores and images/s of one encoder in fp32, bf16, ONNX and ONNX with int8 weights.

    python benchmarks/deployment.py --checkpoint runs/tuned --data market1501=/data/market

Each kind extracts the features of the same set and is scored by the one evaluator; the differences of mAP are to fp32. images/s are those of the
network alone, on this machine, in batches of --batch-size.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# A program's own folder is on the path, the root is not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._measure import RESULTS, spread, time_calls, write_result
from personmae.evaluation.features import describe_batch
from personmae.evaluation.protocol import evaluate
from personmae.interop.initial_weights import FittedState, load_state
from personmae.interop.onnx_files import open_onnx, write_onnx
from personmae.interop.pixel_features import PixelFeatures, example_images
from personmae.tasks.retrieval import open_sets

FEATURE = "class"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run folder, an encoder, or a fine-tuned model: its encoder")
    parser.add_argument("--data", required=True, help="a set, as for personmae evaluate")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--num", type=int, default=5, help="timed batches")
    parser.add_argument("--output", type=Path, default=RESULTS / "deployment.json")
    options = parser.parse_args()
    rows = compare(options)
    for row in rows:
        change = f"{100 * row['mAP_change']:+.2f}"
        print(f"{row['kind']:10} mAP {100 * row['mAP']:.2f} % ({change}), rank-1 {100 * row['rank1']:.2f} %, {row['images_per_second']} images/s")
    # The data's and the run's places are the machine's business.
    settings = {**vars(options), "checkpoint": options.checkpoint.name, "data": options.data.partition("=")[0].rsplit("/")[-1]}
    write_result(options.output, "deployment", settings, rows)
    print(f"written to {options.output}")


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each kind; fp32 first."""
    tuned = options.checkpoint / "reid.safetensors"
    state = load_state(tuned if tuned.is_file() else options.checkpoint)
    ((_, reid_set),) = open_sets((options.data,), 0)
    rows: list[dict[str, Any]] = []
    for kind, describe in describers(state).items():
        found = evaluate(describe, reid_set, size=state.config.image_size, precision="fp32")
        scores = found.scores[FEATURE]
        call = functools.partial(describe, torch.from_numpy(example_images(state, options.batch_size)))
        speeds = [options.batch_size / time_calls(call, num=1, num_warm_up=1).median for _ in range(options.num)]
        rows.append({"kind": kind, "mAP": scores.mAP, "rank1": scores.rank(1), "images_per_second": spread(speeds)})
        rows[-1]["mAP_change"] = rows[-1]["mAP"] - rows[0]["mAP"]
    return rows


def describers(state: FittedState) -> dict[str, Callable[[Tensor], Mapping[str, Tensor]]]:
    """Each kind as a function from uint8 images [B, H, W, 3] to features [B, D]."""
    model = PixelFeatures(state).eval()

    def plain(images: Tensor) -> dict[str, Tensor]:
        with torch.inference_mode():
            return {FEATURE: model(images)}

    def bf16(images: Tensor) -> dict[str, Tensor]:
        return {name: feature.float() for name, feature in describe_batch(plain, images, torch.bfloat16, "none").items()}

    found: dict[str, Callable[[Tensor], Mapping[str, Tensor]]] = {"fp32": plain, "bf16": bf16}
    for kind, int8 in (("onnx", False), ("onnx int8", True)):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "encoder.onnx"
            write_onnx(path, state, {}, int8)
            run = open_onnx(path)
        found[kind] = lambda images, run=run: {FEATURE: torch.from_numpy(np.asarray(run(images.numpy())))}  # type: ignore[misc]
    return found


if __name__ == "__main__":
    main()
