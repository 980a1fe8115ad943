"""Small made-up crops for tests of the training: a few coloured bands each, so that there is something to learn."""

from pathlib import Path

import numpy as np
from PIL import Image

# A network of the real parts at the size of a test, as flags of the pretrain program.
SMALL = [
    "vit-nano",
    *("--model.encoder.image-size", "32", "16", "--model.encoder.patch-px", "4", "--model.encoder.width", "32"),
    *("--model.encoder.depth", "2", "--model.encoder.num-heads", "2"),
    *("--model.pixel-decoder.width", "16", "--model.pixel-decoder.num-heads", "2"),
    *("--model.feature-decoder.width", "16", "--model.feature-decoder.num-heads", "2"),
    *("--batch-size", "8", "--log-every", "1", "--device", "cpu", "--precision", "fp32"),
]


def draw_crops(folder: Path, num_images: int = 24, seed: int = 0) -> Path:
    """JPEGs of 60 to 90 by 30 to 40 pixels in two sub-folders."""
    generator = np.random.default_rng(seed)
    for number in range(num_images):
        height, width = int(generator.integers(60, 91)), int(generator.integers(30, 41))
        bands = generator.integers(0, 256, (4, 3))
        image = bands[np.minimum(np.arange(height) * 4 // height, 3)][:, None].repeat(width, 1).astype(np.float64)
        image += generator.normal(0, 8, image.shape)
        path = folder / f"part{number % 2}" / f"crop_{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path, quality=92)
    return folder
