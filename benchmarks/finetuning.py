"""What pre-training is worth after training on a task: the task from a checkpoint and from nothing, over seeds.

python benchmarks/finetuning.py --init runs/vit-nano --data demo/mannequins --tasks holistic
python benchmarks/finetuning.py --init runs/vit-nano --data city-a --occluded city-a/occluded --source city-b [-- FLAGS]

Both starts have the same recipe and number of steps. usl and uda begin from the checkpoint alone: from nothing there are no clusters to begin
with, and their start is what they are compared with. A run that is already in the folder is taken as it is.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

# A program's own folder is on the path, the root is not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._measure import RESULTS, spread, write_result
from personmae.configs import UserError, user_errors_exit

TASKS = ("holistic", "occluded", "usl", "uda")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", required=True, help="the pre-trained weights")
    parser.add_argument("--encoder", default="vit-nano", help="that is begun from nothing")
    parser.add_argument("--data", required=True, help="the labelled set")
    parser.add_argument("--occluded", help="of the task occluded; by default DATA/occluded")
    parser.add_argument("--source", help="of the task uda")
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["holistic", "occluded"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/finetuning"), help="where the runs go")
    parser.add_argument("--output", type=Path, default=RESULTS / "finetuning.json")
    parser.add_argument("flags", nargs="*", help="flags of the tasks, after --")
    options = parser.parse_args()
    if "uda" in options.tasks and options.source is None:
        parser.error("the task uda needs --source")
    rows: list[dict[str, Any]] = []
    with user_errors_exit():
        for task in options.tasks:
            starts = {"pre-trained": options.init} | ({"from nothing": f"random:{options.encoder}"} if task in TASKS[:2] else {})
            for start, init in starts.items():
                own = [row for seed in options.seeds for row in run_task(task, start, init, seed, options)]
                rows += own
                for model in dict.fromkeys(row["model"] for row in own):
                    found = {key: spread([100 * row[key] for row in own if row["model"] == model]) for key in ("mAP", "rank1")}
                    print(f"{task:9} {start:13} {model:16} mAP {found['mAP']} %, rank-1 {found['rank1']} %", flush=True)
    # Where things lie on this machine is nobody's business.
    places = {name: Path(value).name for name in ("init", "data", "occluded", "source") if (value := getattr(options, name)) is not None}
    write_result(options.output, "finetuning", {**vars(options), **places}, rows)
    print(f"written to {options.output}")


def run_task(task: str, start: str, init: str, seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one run: the start, the last epoch and the best one, with the seconds that this call took."""
    module = importlib.import_module(f"personmae.tasks.{task}")
    run_dir = options.folder / f"{task}-{start.replace(' ', '-')}-seed{seed}"
    data = (options.occluded or f"{options.data}/occluded") if task == "occluded" else options.data
    where = ["--data", data, "--init", init, "--run-dir", str(run_dir), "--seed", str(seed)]
    where += ["--source", options.source] if task == "uda" else []
    started = time.perf_counter()
    config = module.from_command_line([options.preset, *where, *options.flags])
    module.main(config)
    seconds = round(time.perf_counter() - started)
    path = run_dir / "evaluation.json"
    if not path.exists():
        raise UserError(f"{run_dir} was stopped; the same command continues")
    (evaluation,) = json.loads(path.read_text())["evaluations"]
    kept = ("model", "mAP", "rank1", "mINP", "num_queries", "num_gallery")
    rows = [{name: row.get(name) for name in kept} for row in evaluation["rows"]]
    # Of the best epoch the number stands in the name.
    return [{"task": task, "start": start, "seed": seed, "seconds": seconds, **row, "model": row["model"].split(" (")[0]} for row in rows]


if __name__ == "__main__":
    main()
