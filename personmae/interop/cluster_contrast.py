"""Our backbone inside Cluster Contrast, its original (alibaba/cluster-contrast-reid) and its ViT fork in TransReID-SSL. One line is added to
clustercontrast/models/__init__.py, and in the original both names to the dict `__factory` below it:

    from personmae.interop.cluster_contrast import vit_small, vit_base

Pixels are normalised by ImageNet's mean and std, as there.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from personmae.configs import UserError
from personmae.interop.drop_in import IMAGENET, DropInVit, refuse
from personmae.interop.transreid import Size
from personmae.models.attention import AttentionKind


class ClusterContrastVit(DropInVit):
    """The model of Cluster Contrast: features of length 1, after a BNNeck."""

    def __init__(
        self,
        encoder: str,
        *,
        img_size: Size = (256, 128),
        stride_size: Size = 16,
        drop_path_rate: float = 0.1,
        pretrained_path: str = "",
        hw_ratio: int = 1,
        conv_stem: bool = False,
        num_features: int = 0,
        norm: bool = True,
        dropout: float = 0.0,
        num_classes: int = 0,
        pooling_type: str = "gem",
        attention: AttentionKind = "auto",
    ) -> None:
        """pretrained_path: a file of weights, see `DropInVit.load_weights`; empty for none. hw_ratio: not needed, the grid of the file's positions is
        found. pooling_type: not used, the class token is the feature. num_features, norm, dropout, num_classes: as the original passes them for its
        ResNets; only what Cluster Contrast itself asks for is had. Raises ValueError for anything else, and for the convolutional stem."""
        refuse("Cluster Contrast", conv_stem=conv_stem, dropout=dropout, num_classes=num_classes)
        super().__init__(
            encoder, pixels=IMAGENET, image_size=img_size, stride=stride_size, drop_path_rate=drop_path_rate, attention=attention
        )
        if num_features not in (0, self.embed_dim) or not norm:
            raise UserError(f"Cluster Contrast: features of {self.embed_dim} channels and length 1 are had; set num_features 0 and norm True")
        self.num_features = self.embed_dim
        self.bottleneck = nn.BatchNorm1d(self.embed_dim)
        self.bottleneck.bias.requires_grad_(False)
        if pretrained_path:
            self.load_weights(pretrained_path)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> features [B, num_features] of length 1, in training and evaluation alike."""
        return F.normalize(self.bottleneck(self.class_token(x)))


def vit_small(img_size: Size = (256, 128), **settings: object) -> ClusterContrastVit:
    """ViT-S/16. settings: see `ClusterContrastVit`."""
    return ClusterContrastVit("vit-small", img_size=img_size, **settings)  # type: ignore[arg-type]


def vit_base(img_size: Size = (256, 128), **settings: object) -> ClusterContrastVit:
    """ViT-B/16. settings: see `ClusterContrastVit`."""
    return ClusterContrastVit("vit-base", img_size=img_size, **settings)  # type: ignore[arg-type]
