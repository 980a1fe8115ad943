"""Features of a folder of person crops, as an .npz: features float32 [N, D] of unit length, and names [N].

personmae extract CROPS features.npz --checkpoint runs/small
"""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np

from personmae.configs import UserError
from personmae.extraction import FeatureExtractor, FolderFeatures
from personmae.recipes.programs import ExtractConfig, ExtractionConfig
from personmae.whole_files import explained_write, whole_file

Say = Callable[[str], object]


def main(config: ExtractConfig, say: Say = print) -> FolderFeatures:
    """Extract, write, and say what was left out. Raises UserError for paths that do not hold what they should."""
    if config.output.suffix.lower() != ".npz":
        raise UserError(f"{config.output}: features are written as .npz; give such a name")
    with explained_write(config.output):
        config.output.parent.mkdir(parents=True, exist_ok=True)
    extractor = open_extractor(config)
    found = extractor.folder(config.source, say=say)
    about = {"checkpoint": str(config.checkpoint), "identity": extractor.identity, "image_size": list(extractor.image_size), "unit_length": True}
    with whole_file(config.output) as file:
        np.savez(file, features=found.features, names=np.array(found.names, np.str_), about=np.array(json.dumps(about)))
    say(f"{config.output}: features {list(found.features.shape)} of {config.source}")
    if found.rejected:
        name, reason = found.rejected[0]
        say(f"left out: {len(found.rejected)} files, as {name}: {reason}")
    return found


def open_extractor(config: ExtractionConfig) -> FeatureExtractor:
    """The extractor of these settings."""
    return FeatureExtractor(
        config.checkpoint,
        image_size=config.image_size,
        device=config.device,
        precision=config.precision,
        batch_size=config.batch_size,
        num_threads=config.num_threads,
        feature=config.feature,
        flip=config.flip,
    )
