"""Does pre-training help, and does the method beat plain MAE? Each start through each task, over seeds, at equal steps.

python benchmarks/evidence.py [--folder runs/evidence] [--jobs 2]          all of it, on the built-in data
python benchmarks/evidence.py --tasks holistic --starts scratch personmae  a part of it; a part that is done is not done again

Starts: scratch (no pre-training), mae (plain MAE), personmae; pre-trained on the unlabelled crops of one city, with each seed. Tasks: zero-shot
(features as they are), holistic, occluded, usl, and uda, from a second city. Runs go side by side (--jobs), each writes FOLDER/results/NAME.json
when it ends, and the table is made of all that are there; what is missing, or has failed, is said. Each row names the commit it was measured with.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A program's own folder is on the path, the root is not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._measure import RESULTS, commit_at_first, spread, write_result
from personmae.configs import user_errors_exit
from personmae.data.mannequins import MannequinsConfig, draw_mannequins

STARTS = {"scratch": None, "mae": "mae-nano", "personmae": "vit-nano"}
TASKS = ("zero-shot", "holistic", "occluded", "usl", "uda")
SIZE = (128, 64)


@dataclass(frozen=True)
class Part:
    """One run: a command of ours, and where its scores then stand. start: of its model. task: "pretrain" has no scores."""

    task: str
    start: str
    seed: int
    run_dir: Path
    arguments: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.task}-{self.start}-seed{self.seed}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/evidence"), help="where data, runs and results go")
    parser.add_argument("--starts", nargs="+", choices=list(STARTS), default=list(STARTS))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, each with one thread")
    parser.add_argument("--pretrain-steps", type=int, help="by default those of the presets")
    parser.add_argument("--epochs", type=int, help="of the tasks; by default those of the presets")
    parser.add_argument("--num-train-ids", type=int, default=150)
    parser.add_argument("--num-test-ids", type=int, default=100)
    parser.add_argument("--num-unlabelled", type=int, default=6000)
    parser.add_argument("--output", type=Path, default=RESULTS / "evidence.json")
    options = parser.parse_args()
    with user_errors_exit():
        cities = draw_cities(options)
    (options.folder / "results").mkdir(parents=True, exist_ok=True)
    (options.folder / "logs").mkdir(exist_ok=True)
    first, then = parts_of(options, cities)
    failed: list[str] = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for stage in (first, then):
            went_well = list(pool.map(lambda part: run_part(part, options.folder), stage))
            failed += [part.name for part, well in zip(stage, went_well, strict=True) if not well]
    rows = [row for part in then for row in rows_of(part, options.folder)]
    missing = [part.name for part in then if part.name not in failed and not (options.folder / "results" / f"{part.name}.json").exists()]
    print(table(rows, options))
    for word, names in (("failed", failed), ("missing", missing)):
        if names:
            print(f"{word}: {', '.join(names)} (logs in {options.folder / 'logs'})")
    write_result(options.output, "evidence", {**vars(options), "missing": missing}, rows)
    print(f"written to {options.output}")
    return 1 if failed or missing else 0


def draw_cities(options: argparse.Namespace) -> tuple[Path, Path]:
    """The city that is pre-trained and tested on, and the one that uda comes from."""
    numbers = {"size_px": SIZE, "num_train_ids": options.num_train_ids, "num_test_ids": options.num_test_ids}
    occluded = {"num_occluded_train_ids": options.num_train_ids, "num_occluded_test_ids": options.num_test_ids}
    here = MannequinsConfig(**numbers, **occluded, num_unlabelled=options.num_unlabelled)
    draw_mannequins(options.folder / "rivermouth", here)
    away = MannequinsConfig(**numbers, city="highfield", num_occluded_train_ids=0, num_occluded_test_ids=0, num_unlabelled=0)
    if "uda" in options.tasks:
        draw_mannequins(options.folder / "highfield", away)
    return options.folder / "rivermouth", options.folder / "highfield"


def parts_of(options: argparse.Namespace, cities: tuple[Path, Path]) -> tuple[list[Part], list[Part]]:
    """The pre-training runs, and all that begin with what those leave."""
    here, away = cities
    first, then = [], []
    for seed in options.seeds:
        for start in options.starts:
            preset, run_dir = STARTS[start], options.folder / f"{start}-seed{seed}"
            if preset is not None:
                length = ("--schedule.steps", str(options.pretrain_steps)) if options.pretrain_steps else ()
                where = ("--data.source", str(here / "unlabelled"), "--run-dir", str(run_dir), "--seed", str(seed))
                first.append(Part("pretrain", start, seed, run_dir, ("pretrain", preset, *where, "--data.loader.num-threads", "1", *length)))
            init = str(run_dir) if preset is not None else "random:vit-nano"
            for task in options.tasks:
                own = options.folder / f"{task}-{start}-seed{seed}"
                if task == "zero-shot":
                    if preset is not None:
                        found = ("--checkpoint", init, "--data", str(here), "--output", str(own), "--num-threads", "1", "--no-cache", "--no-compare")
                        then.append(Part(task, start, seed, own, ("evaluate", *found)))
                    continue
                data = here / "occluded" if task == "occluded" else here
                flags = ["--data", str(data), "--init", init, "--run-dir", str(own), "--seed", str(seed), "--loader.num-threads", "1"]
                flags += ["--source", str(away)] if task == "uda" else []
                flags += ["--schedule.epochs", str(options.epochs)] if options.epochs else []
                if options.epochs and task in ("holistic", "occluded"):
                    flags += ["--schedule.warmup-epochs", str(min(3, options.epochs))]
                # From nothing there may be no clusters at first.
                flags += ["--if-too-few", "widen"] if task in ("usl", "uda") else []
                then.append(Part(task, start, seed, own, ("train", task, "nano", *flags)))
    return first, then


def run_part(part: Part, folder: Path) -> bool:
    """Runs a part that is not done, and writes down that it is; whether it went well."""
    result = folder / "results" / f"{part.name}.json"
    if result.exists():
        return True
    started = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / "logs" / f"{part.name}.txt").open("a") as log:
        command = [sys.executable, "-m", "personmae", *part.arguments]
        status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode
    seconds = round(time.perf_counter() - started)
    print(f"{part.name}: {'done' if status == 0 else f'failed ({status})'} in {seconds} s", flush=True)
    if status == 0:
        content = {"part": part.name, "seconds": seconds, "commit": commit_at_first(), "arguments": part.arguments, "rows": read_rows(part)}
        partial = result.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1))
        partial.replace(result)
    return status == 0


def read_rows(part: Part) -> list[dict[str, Any]]:
    """The scores that a run has left."""
    if part.task == "pretrain":
        return []
    if part.task == "zero-shot":
        (found,) = part.run_dir.rglob("scores.json")
        features = json.loads(found.read_text())["scores"]
        return [{"model": feature, **{name: scores[name] for name in ("mAP", "rank1")}} for feature, scores in features.items()]
    (evaluation,) = json.loads((part.run_dir / "evaluation.json").read_text())["evaluations"]
    return [{name: row[name] for name in ("model", "mAP", "rank1")} for row in evaluation["rows"]]


def rows_of(part: Part, folder: Path) -> list[dict[str, Any]]:
    """The rows of a part that is done."""
    path = folder / "results" / f"{part.name}.json"
    if not path.exists():
        return []
    content = json.loads(path.read_text())
    about = {"task": part.task, "start": part.start, "seed": part.seed, "seconds": content["seconds"], "commit": content["commit"]}
    # Of the best epoch the number stands in the name.
    return [{**about, **row, "model": row["model"].split(" (")[0]} for row in content["rows"]]


def table(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """What the runs found, as Markdown: median, least and most over seeds, of the last epoch; of zero-shot the mean token, whitened."""
    lines = ["| task | start | mAP, % | rank-1, % | seeds |", "|---|---|---|---|---|"]
    for task in options.tasks:
        for start in options.starts:
            chosen = [row for row in rows if (row["task"], row["start"]) == (task, start) and row["model"] in ("last epoch", "mean, whitened")]
            if chosen:
                cells = [str(spread([100 * row[key] for row in chosen])) for key in ("mAP", "rank1")]
                lines.append(f"| {task} | {start} | {cells[0]} | {cells[1]} | {len(chosen)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
