"""Does accuracy hold when pre-training is fast? The fast path beside the plain one, on the same seeds, by losses and by scores.

python benchmarks/fidelity.py                    on a CPU: bf16, and the fast loader, each beside plain fp32
python benchmarks/fidelity.py --device cuda      on a GPU: all that is fast there (bf16, fused operators, compiled blocks, CUDA graph)

Ways: plain (fp32, PyTorch's own operators, nothing compiled; images by Pillow's decoder and antialiased resize on the CPU), fast-loader (the same
with our loader), bf16 (with our loader and bf16), fast (all that the device has by default). Each pre-trains for so many steps on the same crops in
the same order, and its features are then scored as they are. A way holds when the mean loss of every window of 50 steps is within 1 % of the plain
one's of the same seed and within the spread of the plain one's seeds, and the median mAP lies within the range of the plain one's. Runs are
resumable parts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

# A program's own folder is on the path, the root is not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._measure import RESULTS, write_result
from benchmarks._parts import Part, Parts, logged, zero_shot_command, zero_shot_rows
from personmae.configs import user_errors_exit
from personmae.data.mannequins import MannequinsConfig, draw_mannequins

PLAIN_FLAGS = ("--precision", "fp32", "--operators", "reference", "--compile", "no", "--cuda-graph", "no", "--attention", "sdpa")
WAYS = {
    "plain": (*PLAIN_FLAGS, "--data.loader.kind", "threads"),
    "fast-loader": PLAIN_FLAGS,
    "bf16": (*PLAIN_FLAGS[2:], "--precision", "bf16"),
    "fast": (),
}
WAYS_OF = {"cpu": ("plain", "fast-loader", "bf16"), "cuda": ("plain", "fast")}
WINDOW = 50
MOST_DIFFERENCE = 0.01


def main() -> int:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/fidelity"), help="where data, runs and results go")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    parser.add_argument("--preset", default="vit-nano")
    parser.add_argument("--size", type=int, nargs=2, default=[128, 64], metavar=("HEIGHT", "WIDTH"), help="of the images that are drawn")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--num-unlabelled", type=int, default=6000)
    parser.add_argument("--num-test-ids", type=int, default=100)
    parser.add_argument("--output", type=Path, help="JSON; by default benchmarks/results/fidelity-DEVICE.json")
    options = parser.parse_args()
    if options.device == "cuda" and not cuda:
        print("not measured: needs a GPU (torch.cuda.is_available() is False); --device cpu compares what a CPU has", file=sys.stderr)
        return 2
    output = options.output or RESULTS / f"fidelity-{options.device}.json"
    with user_errors_exit():
        data = draw(options)
    ways = WAYS_OF[options.device]
    training = [train_part(options, way, seed, data) for seed in options.seeds for way in ways]
    scoring = [score_part(options, way, seed, data) for seed in options.seeds for way in ways]
    parts = Parts(options.folder, options.jobs)
    parts.run(training)
    parts.run(scoring)
    losses, scores = parts.rows(training), parts.rows(scoring)
    complete = parts.say_what_is_not_there([*training, *scoring])
    verdicts = [judge(way, losses, scores) for way in ways[1:]] if complete else []
    for verdict in verdicts:
        print(in_words(verdict))
    if options.device == "cpu":
        print("fused operators, compiled blocks and the CUDA graph: not measured: needs a GPU (--device cuda)")
    write_result(output, "fidelity", vars(options), [*verdicts, *losses, *scores])
    print(f"written to {output}")
    return 0 if complete else 1


def draw(options: argparse.Namespace) -> Path:
    """The crops and the labelled set."""
    height, width = options.size
    config = MannequinsConfig(
        size_px=(height, width),
        num_train_ids=10,
        num_test_ids=options.num_test_ids,
        num_unlabelled=options.num_unlabelled,
        num_occluded_train_ids=0,
        num_occluded_test_ids=0,
    )
    return draw_mannequins(options.folder / "rivermouth", config).root


def train_part(options: argparse.Namespace, way: str, seed: int, data: Path) -> Part:
    """The pre-training of one way with one seed."""
    run_dir = options.folder / f"{way}-seed{seed}"
    by_pillow = way == "plain" and options.device == "cpu"
    program = (str(Path(__file__).parent / "_pil_loader.py"),) if by_pillow else ("-m", "personmae")
    length = ("--schedule.steps", str(options.steps), "--log-every", "1", "--batch-size", str(options.batch_size))
    where = ("--data.source", str(data / "unlabelled"), "--run-dir", str(run_dir), "--seed", str(seed), "--device", options.device)
    few = ("--data.loader.num-threads", "2")
    command = (*program, "pretrain", options.preset, *where, *length, *few, *WAYS[way])
    return Part(f"pretrain-{way}-seed{seed}", {"way": way, "seed": seed}, command, partial(window_means, run_dir))


def score_part(options: argparse.Namespace, way: str, seed: int, data: Path) -> Part:
    """The zero-shot scores of what it has left, in fp32 for all ways."""
    own = options.folder / f"scores-{way}-seed{seed}"
    command = zero_shot_command(options.folder / f"{way}-seed{seed}", data, own, "--precision", "fp32")
    return Part(own.name, {"way": way, "seed": seed}, command, partial(zero_shot_rows, own))


def window_means(run_dir: Path) -> list[dict[str, Any]]:
    """The mean loss of each window, and the images per second that the run's log names in the middle."""
    losses = logged(run_dir, "loss")
    windows = [statistics.fmean(losses[first : first + WINDOW]) for first in range(0, len(losses), WINDOW)]
    return [{"window_losses": windows, "images_per_second": statistics.median(logged(run_dir, "images_per_second"))}]


def judge(way: str, losses: list[dict[str, Any]], scores: list[dict[str, Any]]) -> dict[str, Any]:
    """How a way differs from the plain one.

    largest_difference: of a window's mean loss of the same seed, as a fraction. largest_share_of_spread: the same difference over the range of the
    plain way's seeds in that window (None with one seed). mAP: of each seed, and those of the plain way. holds: see the module; with one seed,
    which has no spread, by the losses alone.
    """
    ours, plain = ({row["seed"]: row["window_losses"] for row in losses if row["way"] == name} for name in (way, "plain"))
    ranges = [max(window) - min(window) for window in zip(*plain.values(), strict=True)]
    pairs = [(a, b, width) for seed, windows in ours.items() for a, b, width in zip(windows, plain[seed], ranges, strict=True)]
    difference = max(abs(a - b) / b for a, b, _ in pairs)
    share = max(abs(a - b) / max(width, 1e-12) for a, b, width in pairs) if len(plain) > 1 else None
    ours_map, plain_map = (
        [row["mAP"] for row in scores if row["way"] == name and row["model"] == "mean, whitened"] for name in (way, "plain")
    )
    within = min(plain_map) <= statistics.median(ours_map) <= max(plain_map)
    return {
        "judged": way,
        "largest_difference": difference,
        "largest_share_of_spread": share,
        "mAP": ours_map,
        "plain_mAP": plain_map,
        "holds": difference <= MOST_DIFFERENCE and (share is None or (share <= 1 and within)),
    }


def in_words(verdict: dict[str, Any]) -> str:
    """A verdict as a line."""
    share = verdict["largest_share_of_spread"]
    spread = ", one seed: no spread to judge by" if share is None else f", {share:.0%} of the spread of seeds"
    ours, plain = (", ".join(f"{100 * value:.2f}" for value in verdict[key]) for key in ("mAP", "plain_mAP"))
    return (
        f"{verdict['judged']}: {'holds' if verdict['holds'] else 'DIFFERS'}; loss of a window at most {verdict['largest_difference']:.3%} from plain"
        f"{spread}; zero-shot mAP {ours} %, plain {plain} %"
    )


if __name__ == "__main__":
    with user_errors_exit():
        raise SystemExit(main())
