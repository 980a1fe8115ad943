"""Seconds and memory of ranking a gallery, ours beside evaluators that sort: python benchmarks/ranking_speed.py [--size market msmt17 20000]

Then of pseudo-labels (Jaccard distance and DBSCAN), ours beside the dense code that is usual, and of our re-ranking. Distances included, from drawn
features of 768 dimensions, clustered by person. Each case runs in a process of its own, so that its peak memory is its own, and in turns, so that a
busy machine slows all alike. No ranking is timed unless ours equals the sorting evaluator on some queries of the size. A case that needs more memory
than there is is skipped, with the estimate.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

# A program's own folder is on the path, the root is not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import _ranking_cases
from benchmarks._jaccard_cases import jaccard_rows, reranking_rows
from benchmarks._measure import RESULTS, spread, write_result
from benchmarks._ranking_cases import Case, Size, size_of
from personmae.configs import UserError
from personmae.evaluation.memory import GIB, require_memory

CASES = {case.name: case for case in _ranking_cases.cases()}
# A part's own check, made once for each size before anything is timed.
CHECKS = [_ranking_cases.check]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", default=["market", "msmt17"], help="market, msmt17, or a number of gallery images")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE", help=f"of: {'; '.join(CASES)}")
    parser.add_argument("--spread", type=float, default=2.6, help="noise of an image beside its person's centre: 2.6 gives some 60 %% mAP on market")
    parser.add_argument("--num-turns", type=int, default=3)
    parser.add_argument("--cluster", nargs="*", type=int, default=[12_936], metavar="N", help="images to cluster; 32621 is MSMT17's training set")
    parser.add_argument("--cluster-ways", nargs="+", choices=["sparse", "dense"], default=["sparse", "dense"], help="dense takes 12 GiB for 32621")
    parser.add_argument("--rerank", nargs="*", default=["market"], metavar="SIZE", help="sizes as above that are re-ranked")
    parser.add_argument("--output", type=Path, default=RESULTS / "ranking_speed.json")
    parser.add_argument("--only", choices=list(CASES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        sizes, reranked = ([size_of(words) for words in chosen] for chosen in (options.size, options.rerank))
    except ValueError as error:
        parser.error(str(error))
    if options.only:
        print(json.dumps(run_here(CASES[options.only], sizes[0], options.spread)))
        return
    results = []
    for size in sizes:
        for check in CHECKS:
            check(size, options.spread)
        results += compare(size, [CASES[name] for name in options.cases], options)
    for num in options.cluster:
        results += shown(f"{num} images", f"cluster {num}", jaccard_rows(num, ways=options.cluster_ways))
    for size in reranked:
        results += shown(size.name, "rerank", reranking_rows(size.num_queries, size.num_gallery))
    settings = {key: value for key, value in vars(options).items() if key != "only"}
    write_result(options.output, "ranking_speed", {**settings, "threads": torch.get_num_threads()}, results)
    print(f"written to {options.output}")


def compare(size: Size, cases: list[Case], options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each case of a size."""
    reasons = {case.name: why_not(case, size) for case in cases}
    found: dict[str, list[dict[str, Any]]] = {case.name: [] for case in cases if not reasons[case.name]}
    for _ in range(options.num_turns):
        for name, runs in found.items():
            runs.append(run_apart(name, size, options.spread))
    rows = []
    for case in cases:
        row: dict[str, Any] = {"case": case.name, "size": size.name, **{key: value for key, value in size._asdict().items() if key != "name"}}
        if reasons[case.name]:
            row["skipped"] = reasons[case.name]
            print(f"{size.name:8s} {case.name}: skipped: {reasons[case.name]}")
        else:
            runs = found[case.name]
            measured = {key: spread([run[key] for run in runs]) for key in ("seconds", "peak_gib")}
            row |= {**runs[0], **measured}
            print(f"{size.name:8s} {case.name}: {measured['seconds']} s, peak {measured['peak_gib']} GiB")
        rows.append(row)
    return rows


def shown(name: str, work: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of `_jaccard_cases`, printed; one run each, for they take long."""
    for row in rows:
        if "failed" in row:
            print(f"{name:8s} {work}, {row['way']}: failed: {row['failed']}", flush=True)
        else:
            labels = f", {row['clusters']} clusters, labels {'the same' if row['same_labels'] else 'OTHERS'}" if "labels" in row else ""
            print(f"{name:8s} {work}, {row['way']}: {row['seconds']:.1f} s, peak {row['peak_gib']:.2f} GiB{labels}", flush=True)
    return [{"case": work, "size": name, **row} for row in rows]


def why_not(case: Case, size: Size) -> str:
    """Why a case cannot run here; nothing if it can."""
    if case.missing():
        return case.missing()
    try:
        require_memory(case.bytes_needed(size), "it")
    except UserError as error:
        return str(error)
    return ""


def run_apart(name: str, size: Size, noise: float) -> dict[str, Any]:
    """What a case found in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--only", name, "--size", size.name, "--spread", str(noise)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} at size {size.name} failed:\n{done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def run_here(case: Case, size: Size, noise: float) -> dict[str, Any]:
    """What a case found, and the peak of this process's memory."""
    found = case.run(size, noise)
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    peak_kib = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return {**found, "peak_gib": peak_kib * 1024 / GIB}


if __name__ == "__main__":
    main()
