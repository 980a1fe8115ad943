"""The operators of PersonMAE: each one function with a plain PyTorch reference that is its specification."""

from personmae_kernels.patch_loss import patch_loss
from personmae_kernels.reference import (
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
    "CellLosses",
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
