"""Our backbone inside torchreid (KaiyangZhou/deep-person-reid). Before `build_model`, in scripts/main.py or your own:

    from personmae.interop.torchreid import register; register()

    torchreid.models.build_model("personmae_vit_small", num_classes, loss="triplet", pretrained=False)

Weights come by torchreid's own `load_pretrained_weights(model, FILE)` from an export, or by `model.load_weights(FILE)` from any file of ours.
"""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Literal

from torch import Tensor, nn

from personmae.configs import UserError
from personmae.interop.drop_in import IMAGENET, DropInVit
from personmae.interop.transreid import Size

MODELS = {"personmae_vit_tiny": "vit-tiny", "personmae_vit_small": "vit-small", "personmae_vit_base": "vit-base", "personmae_vit_large": "vit-large"}
# Where the package of models lies in a checkout and where in what pip installs.
PLACES = ("torchreid.models", "torchreid.reid.models")


class TorchreidVit(DropInVit):
    """A model of torchreid."""

    def __init__(
        self,
        num_classes: int,
        loss: Literal["softmax", "triplet"] = "softmax",
        pretrained: bool = False,
        use_gpu: bool = True,
        *,
        encoder: str = "vit-small",
        image_size: Size = (256, 128),
        stride: Size = 16,
        drop_path_rate: float = 0.1,
    ) -> None:
        """pretrained: there are no weights to be downloaded, so only False. use_gpu: not needed. The rest: see `DropInVit`. Raises ValueError for
        pretrained weights and for an unknown loss."""
        if pretrained:
            raise UserError("there are no weights to download: build with pretrained=False, then model.load_weights(FILE)")
        if loss not in ("softmax", "triplet"):
            raise UserError(f"loss is {loss!r}; torchreid has softmax and triplet")
        super().__init__(encoder, pixels=IMAGENET, image_size=image_size, stride=stride, drop_path_rate=drop_path_rate)
        self.loss, self.feature_dim = loss, self.embed_dim
        self.classifier = nn.Linear(self.embed_dim, num_classes)

    def forward(self, x: Tensor, return_featuremaps: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """[B, 3, H, W] -> in training logits [B, num_classes], with loss triplet (logits, feature [B, D]); in evaluation the feature. With
        return_featuremaps the patches as a map [B, D, rows, columns]."""
        if return_featuremaps:
            return self.as_map(self.normed_tokens(x))
        feature = self.class_token(x)
        if not self.training:
            return feature
        logits = self.classifier(feature)
        return logits if self.loss == "softmax" else (logits, feature)


def register(image_size: Size = (256, 128), stride: Size = 16) -> list[str]:
    """Enter our models into torchreid's factory, for images of this size and stride in pixels; returns their names. torchreid must be importable.

    Raises ValueError where no factory is found in it."""
    importlib.import_module("torchreid")
    factories = [getattr(sys.modules[place], "__model_factory", None) for place in PLACES if place in sys.modules]
    found = [factory for factory in factories if isinstance(factory, dict)]
    if not found:
        raise UserError("torchreid has no factory of models (torchreid.models.__model_factory); hand the model to its engine: TorchreidVit(...)")
    for factory in found:
        for name, encoder in MODELS.items():
            factory[name] = functools.partial(TorchreidVit, encoder=encoder, image_size=image_size, stride=stride)
    return list(MODELS)
