"""The whole method in minutes on a laptop: draw the built-in data set, pre-train, evaluate, write a report.

personmae demo
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from personmae import pretrain
from personmae.configs import UserError
from personmae.data.mannequins import MannequinsConfig, MannequinsLayout, draw_mannequins
from personmae.recipes.pretraining import vit_nano
from personmae.recipes.programs import DemoConfig, RetrievalConfig
from personmae.tasks import retrieval


def main(config: DemoConfig) -> Path:
    """Draw, pre-train, evaluate; returns the path of the report."""
    start = time.perf_counter()
    data = draw(config)
    recipe = replace(vit_nano(), preset="vit-nano", seed=config.seed, run_dir=config.folder / f"run-seed{config.seed}")
    schedule = replace(recipe.schedule, steps=config.steps or recipe.schedule.steps)
    run = replace(recipe, data=replace(recipe.data, source=str(data.unlabelled)), schedule=schedule)
    done = pretrain.main(run)
    if done < (schedule.steps or 0):
        raise UserError(f"the demo was stopped at step {done}; the same command continues it")
    retrieval.main(RetrievalConfig(checkpoint=(run.run_dir,), data=(str(data.root),), page=True, attention=True))
    report = (run.run_dir / "report.html").resolve()
    print(f"\n{time.perf_counter() - start:.0f} s in all. Open the report: {report.as_uri()}")
    return report


def draw(config: DemoConfig) -> MannequinsLayout:
    """The demo's data set: unlabelled crops to pre-train on, and a labelled test set of other people."""
    return draw_mannequins(
        config.folder / "mannequins",
        MannequinsConfig(
            size_px=vit_nano().model.encoder.image_size,
            num_unlabelled=config.num_unlabelled,
            num_test_ids=config.num_test_ids,
            # Nothing is trained on labels here, and the occluded set has no part.
            num_train_ids=10,
            num_occluded_train_ids=0,
            num_occluded_test_ids=0,
        ),
    )
