"""timm's VisionTransformer with our blocks: its interface, options and parameter names, our attention and fused additions inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from personmae.configs import UserError
from personmae.interop.drop_in import refuse
from personmae.interop.plain_blocks import PlainBlock
from personmae.interop.positions import SourcePositions, fit_positions
from personmae.models.vit import Residual


class TimmBlock(PlainBlock):
    """A block with the constructor of timm's."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        depth: int = 0,
        device: Any = None,
        dtype: Any = None,
        norm_layer: Callable[..., nn.Module] | None = None,
        act_layer: Callable[..., nn.Module] | None = None,
        mlp_layer: Any = None,
        attn_layer: Any = None,
        **more: Any,
    ) -> None:
        """drop_path: the rate of this block. depth, norm_layer, act_layer, mlp_layer, attn_layer: as `PersonmaeVit` has checked. more: what else timm
        passes, if it is off. Raises ValueError for what our blocks do not have."""
        refuse("timm", proj_drop_rate=proj_drop, attn_drop_rate=attn_drop, **more)
        if not qkv_bias or not proj_bias:
            raise UserError("timm: our blocks have biases; leave qkv_bias and proj_bias at True")
        super().__init__(dim, num_heads, mlp_ratio, drop_path)
        self.to(device=device, dtype=dtype)

    def forward(self, x: Any, attn_mask: Tensor | None = None, is_causal: bool = False) -> Any:
        """As `PlainBlock`. Raises ValueError for a mask, which our attention does not take."""
        if attn_mask is not None or is_causal:
            raise ValueError("our attention takes no mask; use timm's own vit_* of the same size, which has the same weights")
        return super().forward(x)


class PersonmaeVit(VisionTransformer):
    """timm's VisionTransformer on our blocks. `load_state_dict` also takes the weights of an encoder alone, and positions of another grid."""

    def __init__(self, *, norm_layer: Any = None, act_layer: Any = None, block_fn: Any = None, **settings: Any) -> None:
        """settings: those of timm's VisionTransformer. Raises ValueError for other norms, activations or blocks."""
        refuse("timm", norm_layer=norm_layer, act_layer=act_layer, block_fn=block_fn)
        super().__init__(block_fn=TimmBlock, **settings)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Normalised pixels [B, 3, H, W] -> tokens after the final norm [B, 1 + L, D], class token first. Raises ValueError for a mask."""
        if self.grad_checkpointing or attn_mask is not None or is_causal:
            return super().forward_features(x, attn_mask, is_causal)
        residual = Residual(self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x)))))
        for block in self.blocks:
            residual = block(residual)
        return self.norm(residual.add())

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's. Positions of another grid are brought to this one: sines and cosines computed anew, learned ones resized; see `fit_positions`.
        Where the head alone is missing, it stays as it was drawn, and that is told. Raises ValueError where the grid of the positions is unknown."""
        state = dict(state_dict)
        positions = state.get("pos_embed")
        wanted: Any = self.patch_embed.grid_size
        if isinstance(positions, Tensor) and positions.ndim == 3 and self.pos_embed is not None and positions.shape[1] != self.pos_embed.shape[1]:
            fitted = fit_positions(SourcePositions(positions[0].float(), (self.num_prefix_tokens,)), wanted, resize="bicubic")
            state["pos_embed"] = fitted.pos_embed.to(positions.dtype)
            print(f"personmae: pos_embed: {fitted.how}")
        head = {f"head.{name}": tensor for name, tensor in self.head.state_dict().items()}
        if strict and head and not head.keys() & state.keys():
            state |= head
            print(f"personmae: the file has no head; the new one, for {self.num_classes} classes, stays as it was drawn")
        return super().load_state_dict(state, strict=strict, assign=assign)


def build(variant: str, pretrained: bool, settings: Mapping[str, Any]) -> nn.Module:
    """The model of a registered name, as timm's builder makes it: with features_only, pretrained_cfg_overlay and the rest of its options."""
    from timm.models import build_model_with_cfg
    from timm.models.vision_transformer import checkpoint_filter_fn

    options = dict(settings)
    out_indices = options.pop("out_indices", 3)
    return build_model_with_cfg(
        PersonmaeVit,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **options,
    )
