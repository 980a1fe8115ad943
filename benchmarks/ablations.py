"""What each choice of the method is worth: one is changed at a time, over seeds, at equal steps and at equal time, on the built-in data.

python benchmarks/ablations.py [--folder runs/ablations] [--jobs 2]           all of it: between three and four hours on two cores
python benchmarks/ablations.py --variants full "A1 target A" --seeds 0        a part of it; a part that is done is not done again

Each variant pre-trains vit-nano on the unlabelled crops of a city, and its features are scored as they are, on whole people and on occluded ones. At
equal time: a variant whose step is shorter than the full method's is also trained for as many steps more (fewer, where it is longer); where the two
differ by less than 5 %, its run at equal steps stands for both. The names A1 to A9 are those of docs/evidence.md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

# A program's own folder is on the path, the root is not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._measure import RESULTS, spread, write_result
from benchmarks._parts import Part, Parts, logged, zero_shot_command, zero_shot_rows
from personmae.configs import user_errors_exit
from personmae.data.mannequins import MannequinsConfig, draw_mannequins

FULL = "full"
VARIANTS: dict[str, tuple[str, ...]] = {
    FULL: (),
    "A1 target A": ("--model.target-region", "A"),
    "A2 random mask": ("--model.masking.kind", "random"),
    "A3 masked only": ("--model.predict", "masked"),
    "A3 unseen only": ("--model.predict", "unseen"),
    "A4 pixels only": ("--model.losses", "pixels"),
    "A4 features only": ("--model.losses", "features"),
    "A5 ratio 0.25": ("--model.masking.ratio", "0.25"),
    "A5 ratio 0.75": ("--model.masking.ratio", "0.75"),
    "A8 own codes": ("--model.pixel-decoder.codes", "own", "--model.feature-decoder.codes", "own"),
    "A9 no ramp": ("--schedule.feature-ramp-ratio", "0"),
}
SIZE = (128, 64)
SETS = {"whole": ".", "occluded": "occluded"}
SAME_TIME = 0.05


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/ablations"), help="where data, runs and results go")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1500, help="of a run at equal steps")
    parser.add_argument("--no-equal-time", action="store_true", help="only at equal steps")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, each with one thread")
    parser.add_argument("--num-test-ids", type=int, default=100)
    parser.add_argument("--num-unlabelled", type=int, default=6000)
    parser.add_argument("--output", type=Path, default=RESULTS / "ablations.json")
    options = parser.parse_args()
    if FULL not in options.variants:
        # All others are seen beside it.
        options.variants.insert(0, FULL)
    with user_errors_exit():
        data = draw(options)
    parts = Parts(options.folder, options.jobs)
    runs = [(variant, seed) for seed in options.seeds for variant in options.variants]
    training = [train_part(options, data, variant, seed, "steps", options.steps) for variant, seed in runs]
    parts.run(training)
    budgets = {} if options.no_equal_time else steps_in_equal_time(parts.rows(training), options.steps)
    longer = [train_part(options, data, variant, seed, "time", budgets[variant]) for variant, seed in runs if variant in budgets]
    parts.run(longer)
    training += longer
    trained = [part.about for part in training if part.name not in (*parts.failed, *parts.missing([part]))]
    scoring = [score_part(options, data, about, name) for about in trained for name in SETS]
    parts.run(scoring)
    rows = parts.rows(scoring)
    print(table(rows, options.variants, {variant: budgets.get(variant, options.steps) for variant in options.variants}))
    complete = parts.say_what_is_not_there([*training, *scoring])
    missing = parts.missing([*training, *scoring])
    write_result(options.output, "ablations", {**vars(options), "equal_time_steps": budgets, "missing": missing, "failed": parts.failed}, rows)
    print(f"written to {options.output}")
    return 0 if complete else 1


def draw(options: argparse.Namespace) -> Path:
    """The crops and the two labelled sets."""
    config = MannequinsConfig(
        size_px=SIZE,
        num_train_ids=10,
        num_test_ids=options.num_test_ids,
        num_unlabelled=options.num_unlabelled,
        num_occluded_train_ids=10,
        num_occluded_test_ids=options.num_test_ids,
    )
    return draw_mannequins(options.folder / "rivermouth", config).root


def train_part(options: argparse.Namespace, data: Path, variant: str, seed: int, equal: str, steps: int) -> Part:
    """The pre-training of a variant with one seed. equal: steps or time."""
    name = f"{variant.replace(' ', '-')}-equal-{equal}-seed{seed}"
    run_dir = options.folder / name
    where = ("--data.source", str(data / "unlabelled"), "--run-dir", str(run_dir), "--seed", str(seed), "--data.loader.num-threads", "1")
    command = ("-m", "personmae", "pretrain", "vit-nano", *where, "--schedule.steps", str(steps), *VARIANTS[variant])
    return Part(name, {"variant": variant, "seed": seed, "equal": equal, "steps": steps}, command, partial(step_rows, run_dir))


def step_rows(run_dir: Path) -> list[dict[str, Any]]:
    """What a run's log says of its speed."""
    return [{"images_per_second": statistics.median(logged(run_dir, "images_per_second"))}]


def score_part(options: argparse.Namespace, data: Path, about: dict[str, Any], name: str) -> Part:
    """The zero-shot scores of a trained variant on one of the sets."""
    run = f"{about['variant'].replace(' ', '-')}-equal-{about['equal']}-seed{about['seed']}"
    own = options.folder / f"scores-{name}-{run}"
    return Part(own.name, {**about, "set": name}, zero_shot_command(options.folder / run, data / SETS[name], own), partial(zero_shot_rows, own))


def steps_in_equal_time(rows: list[dict[str, Any]], steps: int) -> dict[str, int]:
    """Variant -> the steps it makes in the time that the full method takes for `steps`, of those whose speed differs by more than SAME_TIME. By the
    median speed over seeds; nothing if the full method's is not known."""
    speeds: dict[str, list[float]] = {}
    for row in rows:
        speeds.setdefault(row["variant"], []).append(row["images_per_second"])
    if FULL not in speeds:
        return {}
    full = statistics.median(speeds[FULL])
    ratios = {variant: statistics.median(values) / full for variant, values in speeds.items()}
    return {variant: round(steps * ratio) for variant, ratio in ratios.items() if abs(ratio - 1) > SAME_TIME}


def table(rows: list[dict[str, Any]], variants: list[str], equal_time_steps: dict[str, int]) -> str:
    """What was found, as Markdown: mAP of the mean token, whitened; median, least and most over seeds."""
    heads = [f"{name}: mAP, %" for name in SETS]
    titles = ["variant", *heads, "steps in equal time", *heads]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for variant in variants:
        cells = []
        for equal in ("steps", "time"):
            for name in SETS:
                ran_alone = any((row["variant"], row["equal"]) == (variant, equal) for row in rows)
                found = [row for row in rows if (row["variant"], row["equal"], row["set"]) == (variant, equal if ran_alone else "steps", name)]
                scores = [100 * row["mAP"] for row in found if row["model"] == "mean, whitened"]
                cells.append(f"{spread(scores).median:.1f} ({min(scores):.1f} to {max(scores):.1f})" if scores else "missing")
        lines.append(f"| {' | '.join([variant, *cells[: len(SETS)], str(equal_time_steps[variant]), *cells[len(SETS) :]])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    with user_errors_exit():
        raise SystemExit(main())
