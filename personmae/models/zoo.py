"""The encoder sizes by name: tiny to large as in timm, and a nano for a demo on a laptop."""

from __future__ import annotations

from personmae.models.vit import VitConfig

ENCODERS: dict[str, VitConfig] = {
    "vit-nano": VitConfig(image_size=(128, 64), width=128, depth=4, num_heads=4),
    "vit-tiny": VitConfig(width=192, num_heads=3),
    "vit-small": VitConfig(width=384, num_heads=6),
    "vit-base": VitConfig(width=768, num_heads=12),
    "vit-large": VitConfig(width=1024, depth=24, num_heads=16),
}
