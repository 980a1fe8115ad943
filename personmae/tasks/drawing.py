"""Draw the built-in data set, and measure how hard it is.

personmae mannequins OUT
personmae mannequins OUT --check
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from personmae.configs import UserError
from personmae.data.mannequins import draw_mannequins
from personmae.data.reid import read_market_layout
from personmae.evaluation.colour_histogram import describe_colours
from personmae.evaluation.protocol import evaluate
from personmae.models.vit import VisionTransformer, initialise
from personmae.models.zoo import ENCODERS
from personmae.recipes.programs import DrawConfig

# As hard as the real thing: on 250 identities of Market-1501 colours alone reach 9.8 % mAP and a random network 1.7 %
# (3.2 % whitened).
COLOUR_MAP = (0.05, 0.20)
RANDOM_MAP = (0.0, 0.06)
NUM_WHITENING = 2000
COLOURS = "colour histogram"


def main(config: DrawConfig, say: Callable[[str], object] = print) -> None:
    """Draw into a folder, and check if asked to. Raises UserError if the set is easier or harder than it should be."""
    if config.check and min(config.mannequins.num_unlabelled, config.mannequins.num_test_ids) < 2:
        raise UserError("the check needs at least 2 unlabelled pictures and 2 test identities; draw more, or leave --check out")
    layout = draw_mannequins(config.folder, config.mannequins, num_workers=config.num_workers)
    say(f"{layout.root}: {read_market_layout(layout.root).describe()}")
    if config.check and (problems := check_difficulty(layout.root, layout.unlabelled, say)):
        raise UserError("; ".join(problems))


def check_difficulty(root: Path, unlabelled: Path, say: Callable[[str], object]) -> list[str]:
    """Print the scores of the yardsticks; returns what lies outside its range, a sentence each."""
    problems = []
    for row in measure_difficulty(root, unlabelled):
        low, high = COLOUR_MAP if row["model"] == COLOURS else RANDOM_MAP
        inside = low <= row["mAP"] <= high
        verdict = "as hard as it should be" if inside else "OUT OF RANGE"
        say(f"{row['model']:17} {row['feature']:16} mAP {row['mAP']:.2%}, rank-1 {row['rank1']:.2%}: {verdict} ({low:.0%} to {high:.0%})")
        if not inside:
            problems.append(f"{row['model']}, {row['feature']}: mAP {row['mAP']:.2%} lies outside {low:.0%} to {high:.0%}")
    return problems


def measure_difficulty(root: Path, unlabelled: Path) -> list[dict[str, Any]]:
    """Scores of the two yardsticks that know nothing: a colour histogram of six stripes, and the mean of the patch tokens of a randomly initialised
    ViT, raw and whitened on unlabelled pictures. Rows as in evaluation.json."""
    reid_set = read_market_layout(root)
    paths = sorted(unlabelled.iterdir())
    encoder = VisionTransformer(ENCODERS["vit-nano"])
    initialise(encoder, torch.Generator().manual_seed(0))
    size = encoder.config.image_size
    chosen = paths[:: max(1, len(paths) // NUM_WHITENING)]
    colours = evaluate(describe_colours, reid_set, size=size).scores
    random = evaluate(encoder.eval().describe, reid_set, size=size, unlabelled=chosen).scores
    rows = [scores.row(COLOURS, "six stripes") for scores in colours.values()]
    return rows + [random[feature].row("random ViT", feature) for feature in ("mean", "mean, whitened")]
