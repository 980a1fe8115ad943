"""Our backbone inside SOLIDER-REID (tinyvision/SOLIDER-REID), in place of its Swin Transformers. In model/make_model.py the factory gets an entry:

    from personmae.interop.solider import personmae_vit_small; __factory_T_type["personmae_vit_small"] = personmae_vit_small

Its semantic weight steers SOLIDER's own pre-training, which a plain ViT has not had: it is not used. Tried on a stand-in of its contract only.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from personmae.configs import UserError
from personmae.interop.drop_in import HALF, DropInVit, refuse
from personmae.interop.transreid import Size


class SoliderVit(DropInVit):
    """A backbone of SOLIDER-REID: `num_features` is a list, the weights come by `init_weights`."""

    def __init__(
        self,
        encoder: str,
        *,
        img_size: Size = (256, 128),
        drop_path_rate: float = 0.1,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        pretrained: str | Path | None = None,
        convert_weights: bool = False,
        semantic_weight: float = 1.0,
        stride: Size = 16,
    ) -> None:
        """pretrained: a file, taken by `init_weights`. convert_weights, semantic_weight: of its Swin Transformers, not used. The rest: see
        `DropInVit`. Raises ValueError for dropout inside the blocks."""
        refuse("SOLIDER-REID", drop_rate=drop_rate, attn_drop_rate=attn_drop_rate)
        super().__init__(encoder, pixels=HALF, image_size=img_size, stride=stride, drop_path_rate=drop_path_rate)
        self.num_features = [self.embed_dim]
        self.pretrained = pretrained

    def init_weights(self, pretrained: str | Path | None = None) -> None:
        """Take a file; without one that of the constructor. Raises ValueError where there is neither."""
        chosen = pretrained or self.pretrained
        if not chosen:
            raise UserError("init_weights needs a file: set MODEL.PRETRAIN_PATH")
        self.load_weights(chosen)

    def forward(self, x: Tensor, semantic_weight: float | None = None) -> tuple[Tensor, list[Tensor]]:
        """[B, 3, H, W] -> class token [B, D] and [map of the patches [B, D, rows, columns]], after the final norm."""
        tokens = self.normed_tokens(x)
        return tokens[:, 0], [self.as_map(tokens)]


def personmae_vit_small(**settings: object) -> SoliderVit:
    """ViT-S/16. settings: see `SoliderVit`."""
    return SoliderVit("vit-small", **settings)  # type: ignore[arg-type]


def personmae_vit_base(**settings: object) -> SoliderVit:
    """ViT-B/16. settings: see `SoliderVit`."""
    return SoliderVit("vit-base", **settings)  # type: ignore[arg-type]
