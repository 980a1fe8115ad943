"""Our backbone inside TransReID (damo-cv/TransReID). One line of its model/make_model.py is changed:

    from personmae.interop.transreid import vit_base_patch16_224_TransReID, vit_small_patch16_224_TransReID, deit_small_patch16_224_TransReID

SIE, JPM, strides, `PRETRAIN_CHOICE: 'imagenet'` and its training scripts work as before. Pixels are normalised by mean and std 0.5, as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from personmae.configs import UserError
from personmae.interop.drop_in import HALF, DropInVit, refuse
from personmae.models.attention import AttentionKind
from personmae.models.vit import Residual

Size = int | Sequence[int]


class TransreidVit(DropInVit):
    """The module that TransReID calls `base`."""

    def __init__(
        self,
        encoder: str,
        *,
        img_size: Size = (256, 128),
        stride_size: Size = 16,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        camera: int = 0,
        view: int = 0,
        local_feature: bool = False,
        sie_xishu: float = 1.5,
        attention: AttentionKind = "auto",
        **more: bool | None,
    ) -> None:
        """encoder: as vit-base. local_feature: give the tokens before the last block (JPM). more: what else the code base passes, if it is off. The
        rest: see `DropInVit`, under TransReID's names. Raises ValueError for dropout inside the blocks, which ours lack."""
        refuse("TransReID", drop_rate=drop_rate, attn_drop_rate=attn_drop_rate, **more)
        super().__init__(
            encoder,
            pixels=HALF,
            image_size=img_size,
            stride=stride_size,
            num_cameras=camera,
            num_views=view,
            sie_weight=sie_xishu,
            drop_path_rate=drop_path_rate,
            attention=attention,
        )
        self.local_feature = local_feature

    def forward(self, x: Tensor, cam_label: Tensor | None = None, view_label: Tensor | None = None) -> Tensor:
        """[B, 3, H, W] -> class token after the final norm [B, D]; with local_feature the tokens [B, 1 + L, D] before the last block, without the
        norm. cam_label, view_label: int64 [B], needed where the backbone has embeddings of them."""
        added = self.embedding(cam_label, view_label)
        if self.local_feature:
            return self.blocks.run(Residual(self.stream(x, added)), stop=len(self.blocks) - 1).add()
        return self.class_token(x, added)

    def load_param(self, model_path: str | Path) -> None:
        """TransReID's call for `PRETRAIN_CHOICE: 'imagenet'`; see `load_weights`."""
        self.load_weights(model_path)


# The names and signatures are TransReID's.
def vit_base_patch16_224_TransReID(img_size: Size = (256, 128), stride_size: Size = 16, **settings: object) -> TransreidVit:  # noqa: N802
    """ViT-B/16: 768 channels, 12 blocks. settings: see `TransreidVit`."""
    return TransreidVit("vit-base", img_size=img_size, stride_size=stride_size, **settings)  # type: ignore[arg-type]


def deit_small_patch16_224_TransReID(img_size: Size = (256, 128), stride_size: Size = 16, **settings: object) -> TransreidVit:  # noqa: N802
    """ViT-S/16: 384 channels, 12 blocks. settings: see `TransreidVit`. Its make_model has no JPM of 384 channels."""
    if settings.get("local_feature"):
        raise UserError("TransReID's JPM has BNNecks of 768 channels, whatever the backbone; set MODEL.JPM False for ViT-S, or use TransReID-SSL")
    return TransreidVit("vit-small", img_size=img_size, stride_size=stride_size, **settings)  # type: ignore[arg-type]


def vit_small_patch16_224_TransReID(img_size: Size = (256, 128), stride_size: Size = 16, **settings: object) -> TransreidVit:  # noqa: N802
    """Under this name TransReID builds an old ViT of 768 channels, 8 blocks and no biases on qkv. Raises ValueError."""
    raise UserError(
        "TransReID's vit_small is an old ViT of 768 channels and 8 blocks, which is not had here; set MODEL.TRANSFORMER_TYPE "
        "deit_small_patch16_224_TransReID for ViT-S/16, of 384 channels"
    )
