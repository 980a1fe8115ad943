"""Our backbone inside OpenUnReID (open-mmlab/OpenUnReID). In openunreid/models/backbones/__init__.py the factory gets an entry:

    from personmae.interop.openunreid import personmae_vit_small; __factory["personmae_vit_small"] = personmae_vit_small

The neck, the pooling and the parts are OpenUnReID's own, over the map of the patches. Tried on a stand-in of its contract only.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from personmae.configs import UserError
from personmae.interop.drop_in import IMAGENET, DropInVit
from personmae.interop.transreid import Size


class OpenUnReidVit(DropInVit):
    """A backbone of OpenUnReID: `num_features`, and a map of features."""

    def __init__(
        self,
        encoder: str,
        pretrained: bool = False,
        *,
        weights: str | Path | None = None,
        image_size: Size = (256, 128),
        stride: Size = 16,
        drop_path_rate: float = 0.1,
    ) -> None:
        """pretrained: there is nothing to be downloaded; weights: a file instead. The rest: see `DropInVit`."""
        if pretrained and weights is None:
            raise UserError("there are no weights to download: give weights=FILE, or MODEL.source_pretrained")
        super().__init__(encoder, pixels=IMAGENET, image_size=image_size, stride=stride, drop_path_rate=drop_path_rate)
        self.num_features = self.embed_dim
        if weights is not None:
            self.load_weights(weights)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> the patches after the final norm as a map [B, num_features, rows, columns]."""
        return self.as_map(self.normed_tokens(x))


def personmae_vit_small(pretrained: bool = False, **settings: object) -> OpenUnReidVit:
    """ViT-S/16. settings: see `OpenUnReidVit`."""
    return OpenUnReidVit("vit-small", pretrained, **settings)  # type: ignore[arg-type]


def personmae_vit_base(pretrained: bool = False, **settings: object) -> OpenUnReidVit:
    """ViT-B/16. settings: see `OpenUnReidVit`."""
    return OpenUnReidVit("vit-base", pretrained, **settings)  # type: ignore[arg-type]
