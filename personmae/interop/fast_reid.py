"""Our backbone inside fast-reid (JDAI-CV/fast-reid). In its tools/train_net.py one line is added, and the configuration names it:

    from personmae.interop.fast_reid import register; register()

    MODEL.BACKBONE.NAME build_personmae_backbone   MODEL.BACKBONE.DEPTH small   MODEL.BACKBONE.FEAT_DIM 384   MODEL.BACKBONE.PRETRAIN_PATH FILE

With HEADS.POOL_LAYER Identity the heads get the class token; with any pooling the map of the patches.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from personmae.configs import UserError
from personmae.interop.drop_in import DropInVit, refuse
from personmae.interop.exports import Pixels
from personmae.interop.transreid import Size

NAME = "build_personmae_backbone"


class FastReidVit(DropInVit):
    """A backbone of fast-reid."""

    def __init__(self, encoder: str, *, pixels: Pixels, as_class: bool, image_size: Size, stride: Size, drop_path_rate: float) -> None:
        """as_class: give the class token, else the map of the patches. The rest: see `DropInVit`."""
        super().__init__(encoder, pixels=pixels, image_size=image_size, stride=stride, drop_path_rate=drop_path_rate)
        self.as_class = as_class

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W], normalised -> class token [B, D, 1, 1], or the patches [B, D, rows, columns], after the final norm."""
        if self.as_class:
            return self.class_token(images)[:, :, None, None]
        return self.as_map(self.normed_tokens(images))


def build_personmae_backbone(cfg: Any) -> FastReidVit:
    """The backbone of a fast-reid configuration. DEPTH: tiny, small, base or large. Mean and std are those of MODEL.PIXEL_MEAN and PIXEL_STD, to
    which the weights are folded. Raises ValueError for a FEAT_DIM that is not the width, and for dropout inside the blocks."""
    settings = cfg.MODEL.BACKBONE
    refuse("fast-reid", DROP_RATIO=settings.DROP_RATIO, ATT_DROP_RATE=settings.ATT_DROP_RATE)
    mean, std = (tuple(float(value) / 255 for value in values) for values in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD))
    backbone = FastReidVit(
        f"vit-{settings.DEPTH.removeprefix('vit-')}",
        pixels=(mean, std),  # type: ignore[arg-type]
        as_class=cfg.MODEL.HEADS.POOL_LAYER == "Identity",
        image_size=tuple(cfg.INPUT.SIZE_TRAIN),
        stride=tuple(settings.STRIDE_SIZE),
        drop_path_rate=settings.DROP_PATH_RATIO,
    )
    if backbone.embed_dim != settings.FEAT_DIM:
        raise UserError(f"MODEL.BACKBONE.FEAT_DIM is {settings.FEAT_DIM}, and this backbone is {backbone.embed_dim} wide; set it to that")
    if settings.PRETRAIN and settings.PRETRAIN_PATH:
        backbone.load_weights(settings.PRETRAIN_PATH)
    return backbone


def register() -> None:
    """Enter the builder into fast-reid's registry; a second call does nothing. fast-reid must be importable."""
    from fastreid.modeling.backbones.build import BACKBONE_REGISTRY

    # Its registry tells what it has only by an error.
    try:
        BACKBONE_REGISTRY.get(NAME)
    except KeyError:
        BACKBONE_REGISTRY.register(build_personmae_backbone)
