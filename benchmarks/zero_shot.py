"""Zero-shot scores of pre-training on the demo's data over seeds: python benchmarks/zero_shot.py [-- PRETRAIN FLAGS]

Draws the demo's data, pre-trains a preset for each seed, and evaluates each by the one protocol. A run that is already in the folder is taken as
it is.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

# A program's own folder is on the path, the root is not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._measure import RESULTS, spread, write_result
from personmae import demo, pretrain
from personmae.configs import UserError, user_errors_exit
from personmae.recipes.programs import DemoConfig, RetrievalConfig
from personmae.tasks import retrieval


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="vit-nano")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where the data and the runs go")
    parser.add_argument("--name", default="zero-shot", help="of the result file, and of the runs")
    parser.add_argument("flags", nargs="*", help="flags of the pretrain program, after --")
    options = parser.parse_args()
    with user_errors_exit():
        results = [row for seed in options.seeds for row in evaluate_seed(seed, options)]
    for feature in ("mean", "mean, whitened", "class", "class, whitened"):
        trained, fresh = (
            {row["seed"]: 100 * row["mAP"] for row in results if (row["model"], row["feature"]) == (model, feature)}
            for model in (retrieval.PRETRAINED, retrieval.RANDOM)
        )
        gains = [trained[seed] - fresh[seed] for seed in options.seeds]
        print(f"{feature:16} mAP {spread(list(trained.values()))} %, above random initialisation {spread(gains)}, least {min(gains):.2f}")
    write_result(RESULTS / f"{options.name}.json", "zero-shot", vars(options), results)
    print(f"written to {RESULTS / options.name}.json")


def evaluate_seed(seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one seed, with the seconds that this call spent on pre-training (few if the run was there already)."""
    data = demo.draw(DemoConfig(folder=options.folder))
    run_dir = options.folder / f"{options.name}-seed{seed}"
    where = ["--data.source", str(data.unlabelled), "--run-dir", str(run_dir), "--seed", str(seed)]
    started = time.perf_counter()
    config = pretrain.from_command_line([options.preset, *where, *options.flags])
    done = pretrain.main(config)
    if done < (config.schedule.steps or 0):
        raise UserError(f"stopped at step {done}; the same command continues")
    seconds = time.perf_counter() - started
    rows = retrieval.main(RetrievalConfig(checkpoint=(run_dir,), data=(str(data.root),)))
    return [{"seed": seed, "pretraining_seconds": round(seconds), **row} for row in rows]


if __name__ == "__main__":
    main()
