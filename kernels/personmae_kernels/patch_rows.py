"""Normalised patches of the wanted tokens as rows, straight from the uint8 image: the input of the patch embedding as one matrix product.

    row = (image[patch] / 255 - mean) / std            P = C * patch_px**2 values in the order (c, y, x)

One program takes ROWS rows. Bytes a row: P of the image, the row once. The bytes of an image are gathered one by one (memory order is (y, x, c)),
each cache line from L1 but once; patches that are not wanted are not read. There is no backward pass: images are bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from personmae_kernels import reference
from personmae_kernels.checks import HALVES_TOO, INDICES, axis_sizes, check_dtype
from personmae_kernels.launching import ceil_div, form_for, launch, next_power_of_2
from personmae_kernels.operators import operator


@triton.jit
def pixel_addresses(image, patch, values, Hg, Wg, C: tl.constexpr, PATCH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where values [P], numbered in the order (c, y, x), of patch number patch [ROWS] of image [ROWS] lie in images [B, H, W, C]: int64 [ROWS, P]."""
    corner = ((image * Hg + patch // Wg).to(tl.int64) * (PATCH * Wg) + patch % Wg) * (PATCH * C)
    c, y, x = values // (PATCH * PATCH), values // PATCH % PATCH, values % PATCH
    return corner[:, None] + (y * (Wg * PATCH * C) + x * C + c)[None, :]


@triton.jit
def patch_rows_kernel(  # type: ignore[no-untyped-def]
    images_ptr,  # uint8 [B, H, W, C], contiguous
    visible_ptr,  # int32 or int64 [T], or None: all patches in their order
    scale_ptr,  # [P] float32, 1 / (255 std)
    shift_ptr,  # [P] float32, -mean / std
    out_ptr,  # [T, P] float32, bfloat16 or float16, out
    T,
    V,
    Hg,
    Wg,
    P: tl.constexpr,
    C: tl.constexpr,
    PATCH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    rows = first + tl.arange(0, ROWS)
    values = tl.arange(0, BLOCK_P)
    in_rows, in_values = rows < T, values < P
    patch = rows % V if visible_ptr is None else tl.load(visible_ptr + rows, mask=in_rows, other=0)
    known = (patch >= 0) & (patch < Hg * Wg)

    address = pixel_addresses(rows // V, tl.where(known, patch, 0).to(tl.int32), values, Hg, Wg, C, PATCH)
    pixels = tl.load(images_ptr + address, mask=(in_rows & known)[:, None] & in_values[None, :], other=0).to(tl.float32)
    scale = tl.load(scale_ptr + values, mask=in_values, other=0.0)
    shift = tl.load(shift_ptr + values, mask=in_values, other=0.0)
    normalised = tl.where(known[:, None], pixels * scale[None, :] + shift[None, :], float("nan"))

    place = first.to(tl.int64) * P + tl.arange(0, ROWS)[:, None] * P + values[None, :]
    tl.store(out_ptr + place, normalised.to(out_ptr.dtype.element_ty), mask=in_rows[:, None] & in_values[None, :])


@operator("personmae_triton::patch_rows")
def _patch_rows(images: Tensor, visible: Tensor | None, patch_px: int, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    B, H, W, C = images.shape
    V = (H // patch_px) * (W // patch_px) if visible is None else visible.shape[1]
    P = C * patch_px**2
    scale, shift = reference.channel_scale_and_shift(tuple(mean), tuple(std), patch_px, images.device)
    out = torch.empty(B, V, P, device=images.device, dtype=dtype)
    block = next_power_of_2(P)
    rows = max(1, 4096 // block)
    launch(
        patch_rows_kernel,
        (ceil_div(B * V, rows),),
        images.contiguous(),
        None if visible is None else visible.contiguous(),
        scale,
        shift,
        out,
        B * V,
        V,
        H // patch_px,
        W // patch_px,
        P=P,
        C=C,
        PATCH=patch_px,
        ROWS=rows,
        BLOCK_P=block,
    )
    return out


@_patch_rows.register_fake
def _(images: Tensor, visible: Tensor | None, patch_px: int, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    B, H, W, C = images.shape
    V = (H // patch_px) * (W // patch_px) if visible is None else visible.shape[1]
    return images.new_empty((B, V, C * patch_px**2), dtype=dtype)


def patch_rows(
    images: Tensor, visible: Tensor | None, patch_px: int, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Normalised patches of the wanted tokens as rows, ready for one matrix product with the patch embedding (Dosovitskiy et al., ViT, 2021).

    images: uint8 [B, H, W, C]. visible: int32 or int64 [B, V] patch numbers, row-major on the grid, or None for all L patches. mean, std: of each
    channel, on the scale [0, 1]. dtype: of the result, float32, bfloat16 or float16. Returns [B, V, C * patch_px**2] = (image / 255 - mean) / std,
    in element order (c, y, x), which is that of `nn.Conv2d.weight.view(D, -1)`; without gradient.

    Patch numbers lie in 0 .. L - 1. They are not looked at beforehand, as that would make the host wait: the kernel never reads outside the images,
    and a row of any other number is NaN. The reference on a CPU raises IndexError for it. Raises TypeError or ValueError,
    naming the argument, for other shapes, dtypes or devices.
    """
    reference.check_patches(images, patch_px, mean, std)
    if visible is not None:
        axis_sizes(images=(images, "B H W C"), visible=(visible, "B V"))
        check_dtype(INDICES, visible=visible)
    if dtype not in HALVES_TOO:
        raise TypeError(f"dtype: float32, bfloat16 or float16 is needed, got {str(dtype).removeprefix('torch.')}")
    if form_for(images) == "reference":
        return reference.patch_rows(images, visible, patch_px, mean, std, dtype)
    return _patch_rows(images, visible, patch_px, mean, std, dtype)
