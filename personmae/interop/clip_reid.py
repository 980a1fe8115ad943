"""Our backbone as the image encoder of CLIP-ReID's baseline (Syliz517/CLIP-ReID). In model/make_model.py, after CLIP is built:

    from personmae.interop.clip_reid import ClipReidVit
    self.image_encoder = ClipReidVit("vit-base", weights=FILE, image_size=cfg.INPUT.SIZE_TRAIN, stride=cfg.MODEL.STRIDE_SIZE)

Its two-stage training needs features aligned with text, which these are not. Its heads are 768 and 512 wide, so only ViT-B fits unchanged. Tried on a
stand-in of its contract only.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from personmae.interop.drop_in import HALF, DropInVit
from personmae.interop.transreid import Size
from personmae.models.vit import Residual
from personmae_kernels.checks import wide

PROJECTED = 512  # channels of CLIP's common space for ViT-B/16


class ClipReidVit(DropInVit):
    """An image encoder of CLIP-ReID: three outputs."""

    def __init__(
        self,
        encoder: str = "vit-base",
        *,
        weights: str | Path | None = None,
        image_size: Size = (256, 128),
        stride: Size = 16,
        drop_path_rate: float = 0.0,
    ) -> None:
        """See `DropInVit`. The projection is new, and starts as CLIP's does: normal, with the deviation D ** -0.5."""
        super().__init__(encoder, pixels=HALF, image_size=image_size, stride=stride, drop_path_rate=drop_path_rate)
        self.proj = nn.Linear(self.embed_dim, PROJECTED, bias=False)
        nn.init.normal_(self.proj.weight, std=self.embed_dim**-0.5)
        if weights is not None:
            self.load_weights(weights)

    def forward(self, x: Tensor, cv_emb: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """[B, 3, H, W] -> tokens before the last block [B, 1 + L, D], tokens after the final norm, and these projected [B, 1 + L, 512].

        cv_emb: [B, D], added to the class token alone: of cameras and views, times their weight."""
        last = len(self.blocks) - 1
        before = self.blocks.run(Residual(self.stream(x, added_to_class=cv_emb)), stop=last).add()
        tokens = self.norm(wide(self.blocks.run(Residual(before), start=last).add()))
        return before, tokens, self.proj(tokens)
