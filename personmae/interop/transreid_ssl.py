"""Our backbone inside TransReID-SSL (damo-cv/TransReID-SSL, transreid_pytorch), and its forks PASS, PersonViT and CION. One line of its
model/make_model.py is changed:

    from personmae.interop.transreid_ssl import vit_base_patch16_224_TransReID, vit_small_patch16_224_TransReID

Its convolutional stem (MODEL.STEM_CONV True, the ICS models) is another network, and is refused.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from personmae.interop.drop_in import refuse
from personmae.interop.transreid import Size, TransreidVit

GEM_POWER = 3.0
GEM_FLOOR = 1e-6


class TransreidSslVit(TransreidVit):
    """The module that TransReID-SSL calls `base`; its width is read from `in_planes`."""

    def __init__(self, encoder: str, *, gem_pool: bool = False, stem_conv: bool = False, **settings: object) -> None:
        """gem_pool: add the generalised mean of the patches to the class token. The rest: see `TransreidVit`."""
        refuse("TransReID-SSL", stem_conv=stem_conv)
        super().__init__(encoder, **settings)  # type: ignore[arg-type]
        self.gem_pool = gem_pool

    def forward(self, x: Tensor, cam_label: Tensor | None = None, view_label: Tensor | None = None) -> Tensor:
        """As `TransreidVit.forward`, with what gem_pool adds."""
        if self.local_feature or not self.gem_pool:
            return super().forward(x, cam_label, view_label)
        tokens = self.normed_tokens(x, self.embedding(cam_label, view_label))
        pooled = tokens[:, 1:].clamp(min=GEM_FLOOR).pow(GEM_POWER).mean(1).pow(1 / GEM_POWER)
        return tokens[:, 0] + pooled

    def load_param(self, model_path: str | Path, hw_ratio: int = 1) -> None:
        """See `load_weights`. hw_ratio: not needed, the grid of the file's positions is found."""
        self.load_weights(model_path)


def vit_base_patch16_224_TransReID(img_size: Size = (256, 128), stride_size: Size = 16, **settings: object) -> TransreidSslVit:  # noqa: N802
    """ViT-B/16: 768 channels, 12 blocks. settings: see `TransreidSslVit`."""
    return TransreidSslVit("vit-base", img_size=img_size, stride_size=stride_size, **settings)  # type: ignore[arg-type]


def vit_small_patch16_224_TransReID(img_size: Size = (256, 128), stride_size: Size = 16, **settings: object) -> TransreidSslVit:  # noqa: N802
    """ViT-S/16: 384 channels, 12 blocks. settings: see `TransreidSslVit`."""
    return TransreidSslVit("vit-small", img_size=img_size, stride_size=stride_size, **settings)  # type: ignore[arg-type]
