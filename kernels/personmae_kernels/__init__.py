"""The operators of PersonMAE: each one function with a plain PyTorch reference that is its specification."""

from personmae_kernels.add_layer_norm import add_layer_norm
from personmae_kernels.patch_loss import patch_loss
from personmae_kernels.reference import (
    AddedNorm,
    CellLosses,
    assemble_tokens,
    cell_coordinates,
    feature_loss,
    gather_visible,
    join_tokens,
    patch_rows,
    patch_targets,
    region_codes,
    region_queries,
)

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
]
