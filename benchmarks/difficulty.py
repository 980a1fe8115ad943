"""How hard the built-in data set is, over seeds: python benchmarks/difficulty.py

What a colour histogram and a randomly initialised ViT find in its test part, by the one protocol: the yardsticks of `personmae mannequins --check`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

# A program's own folder is on the path, the root is not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._measure import RESULTS, write_result
from personmae.data.mannequins import MannequinsConfig, draw_mannequins
from personmae.tasks.drawing import measure_difficulty


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--size", type=int, nargs=2, default=[128, 64], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--num-test-ids", type=int, default=MannequinsConfig().num_test_ids)
    parser.add_argument("--num-unlabelled", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=RESULTS / "difficulty.json")
    options = parser.parse_args()
    height, width = options.size
    # The parts that are not looked at are left out: the others are the same without them.
    config = MannequinsConfig(
        size_px=(height, width),
        num_test_ids=options.num_test_ids,
        num_unlabelled=options.num_unlabelled,
        num_occluded_train_ids=0,
        num_occluded_test_ids=0,
    )
    results = []
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            layout = draw_mannequins(Path(folder) / "mannequins", replace(config, seed=seed))
            for row in measure_difficulty(layout.root, layout.unlabelled):
                results.append({"seed": seed, **row})
                print(f"seed {seed}: {row['model']}, {row['feature']}: mAP {row['mAP']:.2%}, rank-1 {row['rank1']:.2%}")
    write_result(options.output, "difficulty", vars(options), results)
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
