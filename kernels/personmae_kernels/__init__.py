"""The operators of PersonMAE: each one function with a plain PyTorch reference that is its specification."""

from personmae_kernels.add_layer_norm import add_layer_norm
from personmae_kernels.assemble_tokens import assemble_tokens, join_tokens
from personmae_kernels.feature_loss import feature_loss
from personmae_kernels.gather_visible import gather_visible
from personmae_kernels.patch_loss import patch_loss
from personmae_kernels.patch_rows import patch_rows
from personmae_kernels.reference import AddedNorm, CellLosses, cell_coordinates, patch_targets, region_codes
from personmae_kernels.region_queries import region_queries
from personmae_kernels.short_attention import short_attention, short_cross_attention

__all__ = [
    "AddedNorm",
    "CellLosses",
    "add_layer_norm",
    "assemble_tokens",
    "cell_coordinates",
    "feature_loss",
    "gather_visible",
    "join_tokens",
    "patch_loss",
    "patch_rows",
    "patch_targets",
    "region_codes",
    "region_queries",
    "short_attention",
    "short_cross_attention",
]
