"""Decoder queries: the mask token plus the projected relative code of each cell of region B, the [B, L, 2 D] codes never written.

    code[b, r, c]    = [rows[b, r], columns[b, c], scale[b]]                 sine-cosine codes of y, x and the two ratios, see region_codes
    queries[b, r, c] = mask_token + weight code[b, r, c] + bias
                     = rows[b, r] Wr^T + columns[b, c] Wc^T + (scale[b] Ws^T + bias + mask_token)

The first kernel writes the few distinct codes straight from the boxes; three matrix products (cuBLAS) project them; the second kernel adds the
projections. Bytes an image: Hg + Wg + 2 codes of D / 2 written and read, as many projections of D, and the queries [L, D] written once; in the
backward pass the gradient [L, D] is read once.

Sines and cosines: tl.sin is libdevice's, whose reduction of large arguments spills to local memory, and the interpreter has no libdevice. Here the
angle is counted in quarter turns, q = value * (frequency * 2 / pi), so that the reduction q - round(q) is exact; what remains, in [-pi/4, pi/4], goes
to the polynomials of Cephes (sinf, cosf; within 1.2e-7). y and x come from an integer numerator and one division. So a code is within
1.2e-7 + 1.8e-7 |value * frequency| of the exact one: 2e-5 for a value of 100.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from personmae_kernels import reference
from personmae_kernels.checks import FLOATS, INDICES, axis_sizes, check_dtype
from personmae_kernels.launching import ceil_div, form_for, launch, next_power_of_2
from personmae_kernels.operators import operator

# Rows and columns of the grid together: all values of an image stand in one block.
MAX_CELLS = 2046


@triton.jit
def sine_and_cosine(quarters):  # type: ignore[no-untyped-def]
    """Of angles in quarter turns, float32, below 2**22 in size."""
    nearest = tl.floor(quarters + 0.5)
    angle = (quarters - nearest) * 1.5707963267948966
    square = angle * angle
    sine = angle + angle * square * (-1.6666654611e-1 + square * (8.3321608736e-3 - square * 1.9515295891e-4))
    cosine = 1.0 - 0.5 * square + square * square * (4.166664568298827e-2 + square * (-1.388731625493765e-3 + square * 2.443315711809948e-5))
    quadrant = nearest.to(tl.int32) & 3
    odd = (quadrant & 1) == 1
    first, second = tl.where(odd, cosine, sine), tl.where(odd, sine, cosine)
    return tl.where(quadrant >= 2, -first, first), tl.where((quadrant == 1) | (quadrant == 2), -second, second)


@triton.jit
def store_codes(out_ptr, first, number, sine, cosine, f, inside, NUM: tl.constexpr):  # type: ignore[no-untyped-def]
    """The codes of 2 NUM channels, first all sines, as vectors first + number of out."""
    place = out_ptr + first * (2 * NUM) + (number * (2 * NUM))[:, None] + f[None, :]
    tl.store(place, sine.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(place + NUM, cosine.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def region_codes_kernel(  # type: ignore[no-untyped-def]
    boxes_ptr,  # int32 or int64 [B, 2, 4]
    flips_ptr,  # bool [B, 2]
    frequencies_ptr,  # [NUM] float32, 2 / pi * 10000**(-f / NUM)
    rows_ptr,  # [B, R, 2 NUM], out
    columns_ptr,  # [B, C, 2 NUM], out
    scale_ptr,  # [B, 2, 2 NUM], out
    R: tl.constexpr,
    C: tl.constexpr,
    NUM: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    v = tl.arange(0, BLOCK_V)  # the values of an image: y of each row, x of each column, the two ratios
    box = boxes_ptr + b * 8
    ya, xa = tl.load(box).to(tl.int32), tl.load(box + 1).to(tl.int32)
    ha, wa = tl.load(box + 2).to(tl.int32) - ya, tl.load(box + 3).to(tl.int32) - xa
    yb, xb = tl.load(box + 4).to(tl.int32), tl.load(box + 5).to(tl.int32)
    hb, wb = tl.load(box + 6).to(tl.int32) - yb, tl.load(box + 7).to(tl.int32) - xb
    flip_a, flip_b = tl.load(flips_ptr + b * 2).to(tl.int32), tl.load(flips_ptr + b * 2 + 1).to(tl.int32)

    # In units of half a cell of A: twice the coordinate plus one, times A's size in pixels, is a whole number.
    is_row, is_column, is_ratio = v < R, (v >= R) & (v < R + C), v >= R + C
    along_y = 2 * R * (yb - ya) + (2 * v + 1) * hb
    step = 2 * (v - R) + 1
    along_x = 2 * C * (xb - xa) + tl.where(flip_b != 0, 2 * C - step, step) * wb
    along_x = tl.where(flip_a != 0, 2 * C * wa - along_x, along_x)
    is_height = v == R + C
    numerator = tl.where(is_row, along_y - ha, tl.where(is_column, along_x - wa, tl.where(is_height, hb, wb)))
    denominator = tl.where(is_row, 2 * ha, tl.where(is_column, 2 * wa, tl.where(is_height, ha, wa)))
    value = tl.div_rn(numerator.to(tl.float32), denominator.to(tl.float32))
    value = tl.where(is_ratio, 10.0 * tl.log(tl.where(is_ratio, value, 1.0)), value)

    in_channels = (f < NUM)[None, :]
    frequency = tl.load(frequencies_ptr + f, mask=f < NUM, other=0.0)
    sine, cosine = sine_and_cosine(value[:, None] * frequency[None, :])
    store_codes(rows_ptr, b * R, v, sine, cosine, f, is_row[:, None] & in_channels, NUM)
    store_codes(columns_ptr, b * C, v - R, sine, cosine, f, is_column[:, None] & in_channels, NUM)
    store_codes(scale_ptr, b * 2, v - (R + C), sine, cosine, f, (is_ratio & (v < R + C + 2))[:, None] & in_channels, NUM)


@triton.jit
def add_codes_kernel(  # type: ignore[no-untyped-def]
    rows_ptr,  # [B, R, D]
    columns_ptr,  # [B, C, D]
    scale_ptr,  # [B, D]
    mask_token_ptr,  # [D]
    out_ptr,  # [B, R, C, D], out
    R,
    C,
    D,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    c = tl.arange(0, BLOCK_C)
    in_channels = d < D
    inside = (c < C)[:, None] & in_channels[None, :]
    cells = c[:, None] * D + d[None, :]
    same = tl.load(scale_ptr + b * D + d, mask=in_channels, other=0.0).to(tl.float32)
    same += tl.load(mask_token_ptr + d, mask=in_channels, other=0.0).to(tl.float32)
    columns = tl.load(columns_ptr + b * C * D + cells, mask=inside, other=0.0).to(tl.float32) + same[None, :]
    for i in tl.static_range(ROWS):
        r = tl.program_id(2) * ROWS + i
        row = tl.load(rows_ptr + (b * R + r) * D + d, mask=in_channels & (r < R), other=0.0).to(tl.float32)
        out = (columns + row[None, :]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (b * R + r) * C * D + cells, out, mask=inside & (r < R))


@triton.jit
def add_codes_backward_kernel(  # type: ignore[no-untyped-def]
    gradient_ptr,  # [B, R, C, D], all but the first axis contiguous
    rows_ptr,  # [B, R, D], out
    columns_ptr,  # [B, C, D], out
    scale_ptr,  # [B, D] float32, out
    R,
    C,
    D,
    image_stride,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    c = tl.arange(0, BLOCK_C)
    in_channels = d < D
    inside = (c < C)[:, None] & in_channels[None, :]
    cells = c[:, None] * D + d[None, :]
    columns = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    for r in range(R):
        gradient = tl.load(gradient_ptr + b * image_stride + r * (C * D) + cells, mask=inside, other=0.0).to(tl.float32)
        tl.store(rows_ptr + (b * R + r) * D + d, tl.sum(gradient, 0).to(rows_ptr.dtype.element_ty), mask=in_channels)
        columns += gradient
    tl.store(columns_ptr + b * C * D + cells, columns.to(columns_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr + b * D + d, tl.sum(columns, 0), mask=in_channels)


@functools.lru_cache(maxsize=32)
def _frequencies(num: int, device: torch.device) -> Tensor:  # [num] float32, in quarter turns; kept on the device
    exponents = torch.arange(num, dtype=torch.float64) / num
    return (2.0 / math.pi * 10000.0**-exponents).float().to(device)


@operator("personmae_triton::region_codes")
def _region_codes(boxes: Tensor, flips: Tensor, num_rows: int, num_columns: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """reference.region_codes in `dtype`: rows [B, Hg, D / 2], columns [B, Wg, D / 2], scale [B, D]."""
    B, num = len(boxes), width // 4
    rows, columns, scale = _empty_codes(boxes, flips, num_rows, num_columns, width, dtype)
    block_v = next_power_of_2(num_rows + num_columns + 2)
    block_f = min(next_power_of_2(num), max(1, 2048 // block_v))
    launch(
        region_codes_kernel,
        (B, ceil_div(num, block_f)),
        boxes.contiguous(),
        flips.contiguous(),
        _frequencies(num, boxes.device),
        *(rows, columns, scale),
        R=num_rows,
        C=num_columns,
        NUM=num,
        BLOCK_V=block_v,
        BLOCK_F=block_f,
    )
    return rows, columns, scale


@_region_codes.register_fake
def _empty_codes(boxes: Tensor, flips: Tensor, num_rows: int, num_columns: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    B, half = len(boxes), width // 2
    rows, columns = boxes.new_empty(B, num_rows, half, dtype=dtype), boxes.new_empty(B, num_columns, half, dtype=dtype)
    return rows, columns, boxes.new_empty(B, width, dtype=dtype)


@operator("personmae_triton::add_codes")
def _add_codes(rows: Tensor, columns: Tensor, scale: Tensor, mask_token: Tensor) -> Tensor:
    """rows [B, Hg, D], columns [B, Wg, D], scale [B, D], mask_token [D] -> their sums [B, Hg * Wg, D], in the dtype of rows, added in float32."""
    (B, R, D), C = rows.shape, columns.shape[1]
    out = rows.new_empty(B, R * C, D)
    block_c = next_power_of_2(C)
    block_d = min(next_power_of_2(D), 256, 4096 // block_c)
    launch(
        add_codes_kernel,
        (B, ceil_div(D, block_d), ceil_div(R, 4)),
        *(tensor.contiguous() for tensor in (rows, columns, scale, mask_token)),
        out,
        R,
        C,
        D,
        ROWS=4,
        BLOCK_C=block_c,
        BLOCK_D=block_d,
    )
    return out


@_add_codes.register_fake
def _(rows: Tensor, columns: Tensor, scale: Tensor, mask_token: Tensor) -> Tensor:
    B, R, D = rows.shape
    return rows.new_empty(B, R * columns.shape[1], D)


@operator("personmae_triton::add_codes_backward")
def _add_codes_backward(gradient: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """gradient [B, Hg * Wg, D] -> its sums over columns [B, Hg, D], over rows [B, Wg, D] and over both [B, D], added in float32. The first two
    are in its dtype, the last stays float32: it is summed once more, over the images."""
    (B, _, D), C = gradient.shape, gradient.shape[1] // num_rows
    # The queries' part of a longer sequence is read where it lies.
    gradient = gradient if gradient.stride()[1:] == (D, 1) else gradient.contiguous()
    rows, columns, scale = _empty_sums(gradient, num_rows)
    block_c = next_power_of_2(C)
    block_d = min(next_power_of_2(D), 128, 4096 // block_c)
    launch(
        add_codes_backward_kernel,
        (B, ceil_div(D, block_d)),
        gradient,
        *(rows, columns, scale),
        num_rows,
        C,
        D,
        gradient.stride(0),
        num_warps=max(1, block_c * block_d // 1024),
        BLOCK_C=block_c,
        BLOCK_D=block_d,
    )
    return rows, columns, scale


@_add_codes_backward.register_fake
def _empty_sums(gradient: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    B, L, D = gradient.shape
    scale = gradient.new_empty(B, D, dtype=torch.float32)
    return gradient.new_empty(B, num_rows, D), gradient.new_empty(B, L // num_rows, D), scale


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    rows, _, _, mask_token = inputs
    ctx.num_rows, ctx.mask_dtype = rows.shape[1], mask_token.dtype


def _backward(ctx, gradient):  # type: ignore[no-untyped-def]
    rows, columns, scale = _add_codes_backward(gradient, ctx.num_rows)
    mask_token = scale.sum(0).to(ctx.mask_dtype) if ctx.needs_input_grad[3] else None
    return rows, columns, scale.to(gradient.dtype), mask_token


_add_codes.register_autograd(_backward, setup_context=_setup)


def region_queries(boxes: Tensor, flips: Tensor, grid: tuple[int, int], mask_token: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Decoder queries: the mask token plus the projected relative code of each cell of region B (Tao et al., Siamese Image Modeling, CVPR 2023,
    generalised to rectangular grids and to flips of either region).

    boxes: int32 or int64 [B, 2, 4], (y0, x0, y1, x1) of A and B in pixels of the unflipped image, below 2**31 / (2 * grid). flips: bool [B, 2], which
    region is mirrored. grid: (rows, columns), 2046 together at most. mask_token: float32 or bfloat16 [D], D a multiple of 4. weight [D, 2 D] and
    bias [D], float32 or bfloat16, both alike: over the concatenation (row, column, scale) of `region_codes`. Returns [B, L, D], row-major, in the
    dtype of the projections: that of autocast where it is on, else that of weight. The sums are taken in float32. Gradients to mask_token, weight and
    bias. Raises TypeError or ValueError, naming the argument, for other shapes, dtypes or devices.
    """
    sizes = axis_sizes(boxes=(boxes, "B 2 4"), flips=(flips, "B 2"), mask_token=(mask_token, "D"), weight=(weight, "D E"), bias=(bias, "D"))
    check_dtype(INDICES, boxes=boxes)
    check_dtype(torch.bool, flips=flips)
    check_dtype(FLOATS, mask_token=mask_token, weight=weight)
    check_dtype(weight.dtype, bias=bias)
    width = sizes["D"]
    if width % 4 or not width:
        raise ValueError(f"mask_token: a width that is a multiple of 4 is needed, got {width}")
    if sizes["E"] != 2 * width:
        raise ValueError(f"weight: [D, 2 D] = [{width}, {2 * width}] is needed, got shape {list(weight.shape)}")
    if len(grid) != 2 or min(grid) < 1 or sum(grid) > MAX_CELLS:
        raise ValueError(f"grid: (rows, columns), each at least 1 and together at most {MAX_CELLS}, is needed, got {tuple(grid)}")
    if form_for(weight) == "reference":
        return reference.region_queries(boxes, flips, grid, mask_token, weight, bias)
    device = weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    rows, columns, scale = _region_codes(boxes, flips, *grid, width, dtype)
    # One cast and one split: their backward pass is one concatenation and one cast.
    by_row, by_column, by_scale = weight.to(dtype).split([width // 2, width // 2, width], 1)
    return _add_codes(F.linear(rows, by_row), F.linear(columns, by_column), F.linear(scale, by_scale, bias.to(dtype)), mask_token)
