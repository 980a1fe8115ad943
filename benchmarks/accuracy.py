"""Does pre-training help, and does the method beat plain MAE? Each start through each task, over seeds, on the built-in data.

python benchmarks/accuracy.py [--folder runs/accuracy] [--jobs 2]           all of it
python benchmarks/accuracy.py --tasks holistic --starts scratch personmae  a part of it; a part that is done is not done again
python benchmarks/accuracy.py --scale small --jobs 1                        ViT-S on images of 256 x 128 pixels, for a GPU
python benchmarks/accuracy.py --data market1501=/data/market --unlabelled /data/crops --tasks zero-shot holistic usl       on sets of your own

Starts: scratch (no pre-training), mae (plain MAE) and personmae, pre-trained for equally many steps on the unlabelled crops of one city with each
seed; and mae-equal-time, plain MAE for as many steps more as its step is shorter (--equal-time). Tasks: zero-shot (features as they are), holistic,
occluded, usl, and uda, from a second city. Runs go side by side (--jobs), each writes FOLDER/results/NAME.json when it ends, and the table and the
chart are made of all that are there; what is missing, or has failed, is said. Each row names the commit it was measured with.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

# A program's own folder is on the path, the root is not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._measure import RESULTS, spread, write_result
from benchmarks._parts import Part, Parts, no_rows, zero_shot_command, zero_shot_rows
from personmae.configs import user_errors_exit
from personmae.data.mannequins import MannequinsConfig, draw_mannequins


@dataclass(frozen=True)
class Scale:
    """A size of network, what it is pre-trained by, and the flags that its size asks for."""

    encoder: str
    mae: str  # presets of personmae pretrain
    personmae: str
    size: tuple[int, int]  # height, width of the drawn images in pixels
    pretrain: tuple[str, ...] = ()
    train: tuple[str, ...] = ()

    def preset(self, start: str) -> str | None:
        """What a start is pre-trained by; None from nothing."""
        return {"scratch": None, "personmae": self.personmae}.get(start, self.mae)


SCALES = {
    # One thread each: runs go side by side on a CPU.
    "nano": Scale(
        "vit-nano", "mae-nano", "vit-nano", (128, 64), ("--data.loader.num-threads", "1"), ("--loader.num-threads", "1")
    ),
    "small": Scale("vit-small", "mae-small", "vit-small", (256, 128), ("--batch-size", "256"), ("--model.image-size", "256", "128")),
}
STARTS = ("scratch", "mae", "mae-equal-time", "personmae")
DEFAULT_STARTS = ["scratch", "mae", "personmae"]
TASKS = ("zero-shot", "holistic", "occluded", "usl", "uda")
PRETRAIN_STEPS = 4000
# The row of each task that counts: features as they are are scored after whitening, and no epoch is chosen by its scores.
COUNTED = ("last epoch", "mean, whitened")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/accuracy"), help="where data, runs and results go")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=DEFAULT_STARTS)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--scale", choices=list(SCALES), default="nano")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, each with one thread")
    parser.add_argument("--pretrain-steps", type=int, default=PRETRAIN_STEPS)
    parser.add_argument("--equal-time", type=float, default=1.5, help="steps of plain MAE in the time of one of PersonMAE")
    parser.add_argument("--epochs", type=int, help="of the tasks; by default those of the presets")
    parser.add_argument("--data", help="a labelled set of your own instead of the drawn ones, as market1501=/data/market")
    parser.add_argument("--unlabelled", help="with --data: images to pre-train on, as personmae pretrain takes them")
    parser.add_argument("--occluded-data", help="with --data: the set of the task occluded, as occluded-duke=/data/occluded")
    parser.add_argument("--source", help="with --data: the set that uda comes from, as msmt17=/data/msmt17")
    parser.add_argument("--num-train-ids", type=int, default=150, help="people, and images, of the drawn sets, as the next two")
    parser.add_argument("--num-test-ids", type=int, default=100)
    parser.add_argument("--num-unlabelled", type=int, default=6000)
    parser.add_argument("--output", type=Path, default=RESULTS / "accuracy.json", help="JSON; the chart goes beside it as .png")
    options = parser.parse_args()
    if problem := missing_set(options):
        parser.error(problem)
    with user_errors_exit():
        sets = own_sets(options) if options.data else draw_cities(options)
    first, then = parts_of(options, sets)
    parts = Parts(options.folder, options.jobs)
    parts.run(first)
    parts.run(then)
    rows = parts.rows(then)
    print(table(rows, options.tasks, options.starts))
    complete = parts.say_what_is_not_there([*first, *then])
    # A set by its name: results tell no folders of a machine.
    names = {flag: Path(value).name for flag in ("data", "unlabelled", "occluded_data", "source") if (value := getattr(options, flag))}
    write_result(options.output, "accuracy", {**vars(options), **names, "missing": parts.missing(then), "failed": parts.failed}, rows)
    draw_chart(options.output.with_suffix(".png"), rows, options.tasks, options.starts)
    print(f"written to {options.output}")
    return 0 if complete else 1


@dataclass(frozen=True)
class Sets:
    """What is pre-trained on, what the tasks train and are scored on, and what uda comes from, as the programs' flags take them."""

    unlabelled: str
    labelled: str
    occluded: str
    source: str


def missing_set(options: argparse.Namespace) -> str | None:
    """Which set of the user's own is not given and needed."""
    needed = {"--occluded-data": (options.occluded_data, "occluded"), "--source": (options.source, "uda")}
    if options.data is None:
        given = [flag for flag, (value, _) in [*needed.items(), ("--unlabelled", (options.unlabelled, ""))] if value]
        return f"{given[0]} goes with --data, the labelled set of your own" if given else None
    if options.unlabelled is None and any(start != "scratch" for start in options.starts):
        return "--data needs --unlabelled, the images to pre-train on (the training part of the set, say), or --starts scratch alone"
    lacking = [f"--tasks {task} needs {flag}" for flag, (value, task) in needed.items() if task in options.tasks and value is None]
    return f"with --data, {lacking[0]}; or leave that task out" if lacking else None


def own_sets(options: argparse.Namespace) -> Sets:
    """The user's."""
    return Sets(options.unlabelled or "", options.data, options.occluded_data or "", options.source or "")


def draw_cities(options: argparse.Namespace) -> Sets:
    """The city that is pre-trained and tested on, and the one that uda comes from."""
    numbers = {"size_px": SCALES[options.scale].size, "num_train_ids": options.num_train_ids, "num_test_ids": options.num_test_ids}
    occluded = {"num_occluded_train_ids": options.num_train_ids, "num_occluded_test_ids": options.num_test_ids}
    here = MannequinsConfig(**numbers, **occluded, num_unlabelled=options.num_unlabelled)
    draw_mannequins(options.folder / "rivermouth", here)
    away = MannequinsConfig(**numbers, city="highfield", num_occluded_train_ids=0, num_occluded_test_ids=0, num_unlabelled=0)
    if "uda" in options.tasks:
        draw_mannequins(options.folder / "highfield", away)
    city = options.folder / "rivermouth"
    return Sets(str(city / "unlabelled"), str(city), str(city / "occluded"), str(options.folder / "highfield"))


def parts_of(options: argparse.Namespace, sets: Sets) -> tuple[list[Part], list[Part]]:
    """The pre-training runs, and all that begin with what those leave."""
    scale = SCALES[options.scale]
    first, then = [], []
    for seed in options.seeds:
        for start in options.starts:
            preset, run_dir = scale.preset(start), options.folder / f"{start}-seed{seed}"
            if preset is not None:
                steps = round(options.pretrain_steps * (options.equal_time if start == "mae-equal-time" else 1))
                where = ("--data.source", sets.unlabelled, "--run-dir", str(run_dir), "--seed", str(seed), *scale.pretrain)
                pretrain = ("-m", "personmae", "pretrain", preset, *where, "--schedule.steps", str(steps))
                first.append(Part(f"pretrain-{start}-seed{seed}", {}, pretrain, no_rows))
            init = str(run_dir) if preset is not None else f"random:{scale.encoder}"
            for task in options.tasks:
                own = options.folder / f"{task}-{start}-seed{seed}"
                about = {"task": task, "start": start, "seed": seed}
                if task != "zero-shot":
                    command = ("-m", "personmae", *train_command(options, task, seed, init, own, sets))
                    then.append(Part(own.name, about, command, partial(trained_rows, own)))
                elif preset is not None:
                    then.append(Part(own.name, about, zero_shot_command(run_dir, sets.labelled, own), partial(zero_shot_rows, own)))
    return first, then


def train_command(options: argparse.Namespace, task: str, seed: int, init: str, own: Path, sets: Sets) -> list[str]:
    """Arguments of `personmae` for one task."""
    data = sets.occluded if task == "occluded" else sets.labelled
    flags = ["--data", data, "--init", init, "--run-dir", str(own), "--seed", str(seed), *SCALES[options.scale].train]
    flags += ["--source", sets.source] if task == "uda" else []
    flags += ["--schedule.epochs", str(options.epochs)] if options.epochs else []
    if options.epochs and task in ("holistic", "occluded"):
        flags += ["--schedule.warmup-epochs", str(min(3, options.epochs))]
    # From nothing there may be no clusters at first.
    flags += ["--if-too-few", "widen"] if task in ("usl", "uda") else []
    return ["train", task, "nano", *flags]


def trained_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The scores that a task's run has left; of the best epoch the number stands in the name, and is left out."""
    (evaluation,) = json.loads((run_dir / "evaluation.json").read_text())["evaluations"]
    return [{"model": row["model"].split(" (")[0], "mAP": row["mAP"], "rank1": row["rank1"]} for row in evaluation["rows"]]


def counted(rows: list[dict[str, Any]], task: str, start: str, key: str = "mAP") -> list[float]:
    """The scores of a task from a start, in percent, one for each seed."""
    return [100 * row[key] for row in rows if (row["task"], row["start"]) == (task, start) and row["model"] in COUNTED]


def table(rows: list[dict[str, Any]], tasks: list[str], starts: list[str]) -> str:
    """What the runs found, as Markdown: median, least and most over seeds, of the last epoch; of zero-shot the mean token, whitened."""
    lines = ["| task | start | mAP, % | rank-1, % | seeds |", "|---|---|---|---|---|"]
    for task in tasks:
        for start in starts:
            if scores := counted(rows, task, start):
                lines.append(f"| {task} | {start} | {in_words(scores)} | {in_words(counted(rows, task, start, 'rank1'))} | {len(scores)} |")
    return "\n".join(lines)


def in_words(scores: list[float]) -> str:
    """Median, and from the least to the most."""
    return f"{spread(scores).median:.1f} ({min(scores):.1f} to {max(scores):.1f})"


def draw_chart(path: Path, rows: list[dict[str, Any]], tasks: list[str], starts: list[str]) -> None:
    """Writes a PNG: for each task a point for each seed and a line at the median, for each start. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.4 * len(tasks) + 0.6, 3.2), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for panel, task in zip(panels, tasks, strict=True):
        for place, start in enumerate(starts):
            if scores := counted(rows, task, start):
                colour = "#1f5fa8" if start == "personmae" else "#7a828c"
                panel.scatter([place] * len(scores), scores, color=colour, s=18)
                panel.plot([place - 0.3, place + 0.3], [spread(scores).median] * 2, color=colour)
        panel.set_title(f"{task}: mAP, %", fontsize=10, loc="left")
        panel.set_xticks(range(len(starts)), starts, rotation=30, ha="right", fontsize=9)
        panel.set_xlim(-0.6, len(starts) - 0.4)
        panel.set_ylim(bottom=0)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    with user_errors_exit():
        raise SystemExit(main())
