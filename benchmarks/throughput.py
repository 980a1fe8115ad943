"""Images per second of the training step, four ways in one run: python benchmarks/throughput.py [PRESET ...]

One step is masks, student, teacher, both decoders, backward, clipping, AdamW, the teacher's moving average. The ways are plain eager PyTorch in the
manner of the public MAE code, the same with SDPA, that under torch.compile, and ours as `personmae/pretrain.py` runs it: the same model, tokens and
weights, and a way is timed only when its loss is that of the others. Ways take turns, so that a busy machine slows all alike. Results go into a JSON
file, after each turn of each way, and a chart beside it. Exit status 1 if ours failed.

    --input jpegs    drawn people as JPEG files through the loader, with the time that the step waits for them; synthetic: noise on the device
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

# A program's own folder is on the path, the root is not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._measure import RESULTS, commit_at_first, write_result
from benchmarks._operator_timing import CANNOT_RUN, describe_problem
from benchmarks._throughput_chart import draw_chart
from benchmarks._throughput_flops import PLANNED, count_flops, describe_flops
from benchmarks._throughput_inputs import Source, jpeg_source, noise_batch, noise_source
from benchmarks._throughput_timing import Lengths, Timing, free_memory, measure_ceiling, time_in_turns
from benchmarks._throughput_ways import WAYS, Trainer, Way, begin, make_trainer
from personmae.data.loaders import LoaderConfig
from personmae.recipes.pretraining import PretrainConfig, pretrain_presets

# Presets that all ways are timed for; of the others ours alone.
COMPARED = ("vit-nano", "vit-small", "vit-base")
Rows = list[dict[str, Any]]


def main(arguments: Sequence[str] | None = None) -> int:
    presets = {name: config for name, (_, config) in pretrain_presets().items()}
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ["vit-small", "vit-base"] if cuda else ["vit-nano", "mae-nano", "vit-tiny"]
    parser.add_argument("presets", nargs="*", default=default, metavar="PRESET", help=f"of {', '.join(presets)}")
    parser.add_argument("--ways", nargs="+", choices=WAYS, help=f"all for {', '.join(COMPARED)}, ours for the other presets, if not given")
    parser.add_argument("--input", nargs="+", choices=["synthetic", "jpegs"], default=["synthetic"])
    parser.add_argument("--batch-size", type=int, default=1024 if cuda else 64)
    parser.add_argument("--num-steps", type=int, default=20 if cuda else 5, help="steps timed in each turn")
    parser.add_argument("--num-turns", type=int, default=3)
    parser.add_argument("--part-seconds", type=float, default=60 if cuda else 15, help="of a way with an input, its first step apart")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if cuda else "cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16" if cuda else "fp32")
    parser.add_argument("--num-threads", type=int, help="of PyTorch on a CPU; by default its own choice")
    parser.add_argument("--num-images", type=int, help="JPEGs that are drawn; two batches, at least 256, if not given")
    parser.add_argument("--output", type=Path, default=RESULTS / "throughput.json", help="JSON; the chart goes beside it as .png")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.presets if name not in presets]:
        parser.error(f"unknown preset {unknown[0]!r}; choose of {', '.join(presets)}")
    for name in ("batch_size", "num_steps", "num_turns", "num_threads"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if options.num_images is not None and options.num_images < options.batch_size:
        parser.error(f"--num-images is {options.num_images}; at least a batch ({options.batch_size}) is needed")
    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    return time_all({name: presets[name] for name in options.presets}, options)


def time_all(presets: dict[str, PretrainConfig], options: argparse.Namespace) -> int:
    """Times, prints and writes everything; 1 if ours failed, else 0."""
    ceiling = measure_ceiling(torch.device(options.device))
    print(f"ceiling: matrix product, {ceiling / 1e12:,.2f} TFLOP/s", flush=True)
    settings: dict[str, Any] = {**vars(options), "num_threads": torch.get_num_threads(), "ceiling_flops_per_second": ceiling, "gflop_per_image": {}}
    rows: Rows = []
    for name, preset in presets.items():
        config = dataclasses.replace(preset, batch_size=options.batch_size)
        flops = count_flops(config)
        print(describe_flops(name, flops), flush=True)
        counted = {part: value / 1e9 for part, value in {**flops._asdict(), "total": flops.total}.items()}
        settings["gflop_per_image"][name] = {**counted, "planned": PLANNED.get(name)}
        rows += time_preset(name, config, flops.total, options, ceiling, functools.partial(write, options, settings, list(rows)))
        write(options, settings, rows, [])
        chart(options, rows)
    print(f"written to {options.output}")
    return 1 if any("problem" in row for row in rows if row["way"] == "ours") else 0


def write(options: argparse.Namespace, settings: dict[str, Any], before: Rows, new: Rows) -> None:
    """The JSON file, with what there is so far."""
    write_result(options.output, "throughput", settings, [*before, *new])


def chart(options: argparse.Namespace, rows: Rows) -> None:
    """The chart beside the JSON file, if anything was timed."""
    if any("images_per_second" in row for row in rows):
        where = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        revision, _, changes = commit_at_first().partition(" ")
        title = f"Training step, batch {options.batch_size}, {options.precision}; {where}; torch {torch.__version__}; {revision[:12]} {changes}"
        try:
            draw_chart(options.output.with_suffix(".png"), title, rows)
        except ImportError as error:
            print(f"no chart: {error} (pip install matplotlib)")


def time_preset(name: str, config: PretrainConfig, flops: int, options: argparse.Namespace, ceiling: float, save: Callable[[Rows], None]) -> Rows:
    """The rows of one preset. save: takes those that there are, whenever there are new ones."""
    device = torch.device(options.device)
    ways: list[Way] = options.ways or list(WAYS if name in COMPARED else WAYS[-1:])
    trainers: dict[Way, Trainer] = {}
    problems: dict[Way, str] = {}
    beginning = begin(config, noise_batch(dataclasses.replace(config, batch_size=4)), device, options.precision)
    for way in ways:
        try:
            trainers[way] = make_trainer(way, config, beginning, device, options.precision)
            print(f"{name}, {way}: {trainers[way].description}", flush=True)
        except CANNOT_RUN as error:
            problems[way] = describe_problem(error)
    rows: Rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in options.input:
            source, untimed = open_source(kind, name, config, options, Path(folder))
            timings = {way: Timing(problem=problems.get(way)) for way in ways}
            about = {"preset": name, "input": kind, "batch_size": options.batch_size, "precision": options.precision}
            finish = functools.partial(finish_rows, about, timings, flops, ceiling, options)
            save_all = functools.partial(save_so_far, save, list(rows), finish)
            lengths = Lengths(options.num_turns, options.num_steps, *untimed, options.part_seconds)
            time_in_turns(trainers, timings, source, lengths, device, save_all)
            # What failed with one input has no turn with the next.
            problems |= {way: timing.problem for way, timing in timings.items() if timing.problem}
            rows += finish()
            show(finish())
    trainers.clear()
    torch._dynamo.reset()
    free_memory(device)
    return rows


def save_so_far(save: Callable[[Rows], None], before: Rows, finish: Callable[[], Rows]) -> None:
    """Hands on the rows of the inputs before, and those of the present one as they stand."""
    save([*before, *finish()])


def open_source(kind: str, name: str, config: PretrainConfig, options: argparse.Namespace, folder: Path) -> tuple[Source, tuple[int, int]]:
    """Where the batches come from, and how many steps are not timed at the start of the first and of the other turns."""
    device = torch.device(options.device)
    if kind == "synthetic":
        cuda = device.type == "cuda"
        return noise_source(config, 8 if cuda else 2, device), ((20, 2) if cuda else (2, 1))
    num_images = options.num_images or max(2 * options.batch_size, 256)
    source = jpeg_source(config, folder, num_images, device, lambda line: print(f"{name}: {line}", flush=True))
    # Until the loader has no more batches ready than it makes.
    untimed = LoaderConfig().prefetch + 4
    return source, (untimed, untimed)


def finish_rows(about: dict[str, Any], timings: dict[Way, Timing], flops: int, ceiling: float, options: argparse.Namespace) -> Rows:
    """A row for each way; in that of ours, how many times as fast as the others it is, and how much of their memory it takes."""
    rows = [{**about, "way": way, **timing.row(options.batch_size, flops, ceiling)} for way, timing in timings.items()]
    for row in rows:
        if missing := options.num_turns * options.num_steps - (row["step_ms"].num if "step_ms" in row else 0):
            row["steps_left_out"] = missing
    timed = {row["way"]: row for row in rows if "images_per_second" in row}
    ours = timed.pop("ours", None)
    if ours is not None:
        ours["times_as_fast"] = {way: ours["images_per_second"].median / row["images_per_second"].median for way, row in timed.items()}
        if ours["peak_bytes_per_image"]:
            ours["share_of_memory"] = {way: ours["peak_bytes_per_image"] / row["peak_bytes_per_image"] for way, row in timed.items()}
    return rows


def show(rows: Rows) -> None:
    """Prints a line for each row."""
    for row in rows:
        text = f"{row['preset']:10} {row['input']:9} {row['way']:8}"
        if "images_per_second" in row:
            text += f" {row['images_per_second']} images/s, {row['step_ms'].median:,.1f} ms, {row['share_of_matmul']:.1%} of the matrix ceiling"
            if row["peak_bytes_per_image"]:
                text += f", {row['peak_bytes_per_image'] / 2**20:,.1f} MiB an image"
            if row["input"] == "jpegs":
                text += f", waiting for data {row['data_wait_ratio'].median:.1%}"
            if missing := row.get("steps_left_out"):
                text += f"; {missing} steps left out (--part-seconds, or it failed)"
        print(text + (f" {row['problem']}" if "problem" in row else ""), flush=True)
        for way, ratio in row.get("times_as_fast", {}).items():
            memory = f", {row['share_of_memory'][way]:.2f} of its memory" if "share_of_memory" in row else ""
            print(f"{'':29} {ratio:.2f} times as fast as {way}{memory}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
