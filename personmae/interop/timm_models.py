"""Registers our encoders with timm, on timm's import; what they are built of is imported when one is created.

    import timm, personmae

    timm.create_model("personmae_vit_base_patch16", img_size=(384, 128), num_classes=751, checkpoint_path="encoder.safetensors")
"""

from __future__ import annotations

from typing import Any

from timm.models import generate_default_cfgs, register_model

# What timm's data pipeline reads: people stand upright, and nothing is cropped off.
SHARED: dict[str, Any] = {
    "url": "",
    "num_classes": 0,
    "input_size": (3, 256, 128),
    "fixed_input_size": True,
    "pool_size": None,
    "crop_pct": 1.0,
    "interpolation": "bilinear",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "first_conv": "patch_embed.proj",
    "classifier": "head",
}
WIDTHS: dict[str, dict[str, Any]] = {
    "personmae_vit_nano_patch16": {"embed_dim": 128, "depth": 4, "num_heads": 4, "img_size": (128, 64)},
    "personmae_vit_tiny_patch16": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "personmae_vit_small_patch16": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "personmae_vit_base_patch16": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "personmae_vit_large_patch16": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}
default_cfgs = generate_default_cfgs(
    {name: {**SHARED, "input_size": (3, *sizes.get("img_size", (256, 128)))} for name, sizes in WIDTHS.items()}
)


def _create(name: str, pretrained: bool, settings: dict[str, Any]) -> Any:
    from personmae.interop.timm_vit import build

    return build(name, pretrained, {"patch_size": 16, "num_classes": 0, "img_size": (256, 128), **WIDTHS[name], **settings})


@register_model
def personmae_vit_nano_patch16(pretrained: bool = False, **settings: Any) -> Any:
    """The ViT of the demo: 128 channels, 4 blocks, images of 128 x 64 pixels."""
    return _create("personmae_vit_nano_patch16", pretrained, settings)


@register_model
def personmae_vit_tiny_patch16(pretrained: bool = False, **settings: Any) -> Any:
    """ViT-Ti/16 for images of 256 x 128 pixels."""
    return _create("personmae_vit_tiny_patch16", pretrained, settings)


@register_model
def personmae_vit_small_patch16(pretrained: bool = False, **settings: Any) -> Any:
    """ViT-S/16 for images of 256 x 128 pixels."""
    return _create("personmae_vit_small_patch16", pretrained, settings)


@register_model
def personmae_vit_base_patch16(pretrained: bool = False, **settings: Any) -> Any:
    """ViT-B/16 for images of 256 x 128 pixels."""
    return _create("personmae_vit_base_patch16", pretrained, settings)


@register_model
def personmae_vit_large_patch16(pretrained: bool = False, **settings: Any) -> Any:
    """ViT-L/16 for images of 256 x 128 pixels."""
    return _create("personmae_vit_large_patch16", pretrained, settings)
