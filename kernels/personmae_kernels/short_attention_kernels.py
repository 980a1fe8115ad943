"""The kernels of short_attention: forward and backward, for self-attention and cross-attention alike.

Forward: a program has a tile of queries of one head, or all of them, and goes through the keys in tiles (Milakov & Gimelshein, 2018). Backward: a
program has all queries of a head, and dq in registers, and goes through the keys in tiles, whose dk and dv are then done. So nothing is accumulated
in memory. Where one tile has all keys the loop falls away, and delta comes from what is on chip.

The backward kernel loads and multiplies in the order in which 128 queries and keys just fit the registers of sm_80, and 256 float32 queries its
shared memory. Try another order with the ahead-of-time check first.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(start_ptr, rows, row_stride, length, HEAD: tl.constexpr, RAGGED: tl.constexpr):  # type: ignore[no-untyped-def]
    """[rows, HEAD] of a head; rows past the length are zeros."""
    place = start_ptr + rows[:, None] * row_stride + tl.arange(0, HEAD)[None, :]
    if RAGGED:
        return tl.load(place, mask=(rows < length)[:, None], other=0.0)
    return tl.load(place)


@triton.jit
def store_rows(start_ptr, rows, row_stride, length, values, HEAD: tl.constexpr, RAGGED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The inverse of load_rows, rounded to the format of the memory."""
    place = start_ptr + rows[:, None] * row_stride + tl.arange(0, HEAD)[None, :]
    values = values.to(start_ptr.dtype.element_ty)
    if RAGGED:
        tl.store(place, values, mask=(rows < length)[:, None])
    else:
        tl.store(place, values)


@triton.jit
def short_attention_forward_kernel(  # type: ignore[no-untyped-def]
    q_ptr,  # [B, N, H, HEAD]
    k_ptr,  # [B, M, H, HEAD]
    v_ptr,  # [B, M, H, HEAD], strides of k
    out_ptr,  # [B, N, H, HEAD], out
    lse_ptr,  # [B, H, N] float32, out
    q_image,  # strides of q: image, row, head
    q_row,
    q_head,
    kv_image,
    kv_row,
    kv_head,
    N,
    M,
    H: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    QUERY_TILES: tl.constexpr,
    KEY_TILES: tl.constexpr,
    RAGGED_N: tl.constexpr,
    RAGGED_M: tl.constexpr,
):
    program = tl.program_id(0) // QUERY_TILES
    image, head = (program // H).to(tl.int64), (program % H).to(tl.int64)
    rows = tl.program_id(0) % QUERY_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    k_ptr += image * kv_image + head * kv_head
    v_ptr += image * kv_image + head * kv_head
    q = load_rows(q_ptr + image * q_image + head * q_head, rows, q_row, N, HEAD, RAGGED_N)

    top = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    out = tl.zeros([BLOCK_N, HEAD], tl.float32)
    for tile in range(KEY_TILES):
        keys = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        k = load_rows(k_ptr, keys, kv_row, M, HEAD, RAGGED_M)
        v = load_rows(v_ptr, keys, kv_row, M, HEAD, RAGGED_M)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * (LOG2_E * HEAD**-0.5)
        if RAGGED_M:
            s = tl.where((keys < M)[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
        top = new_top

    store_rows(out_ptr + (image * N * H + head) * HEAD, rows, H * HEAD, N, out / total[:, None], HEAD, RAGGED_N)
    tl.store(lse_ptr + program.to(tl.int64) * N + rows, top + tl.log2(total), mask=rows < N)


@triton.jit
def short_attention_backward_kernel(  # type: ignore[no-untyped-def]
    gradient_ptr,  # [B, N, H, HEAD], contiguous
    q_ptr,  # [B, N, H, HEAD]
    k_ptr,  # [B, M, H, HEAD]
    v_ptr,  # [B, M, H, HEAD], strides of k
    out_ptr,  # [B, N, H, HEAD], contiguous
    lse_ptr,  # [B, H, N] float32
    dq_ptr,  # [B, N, H, HEAD], out: rows dq_row apart, heads and images without gaps
    dk_ptr,  # [B, M, H, HEAD], out: rows dkv_row apart
    dv_ptr,  # [B, M, H, HEAD], out, strides of dk
    q_image,  # strides of q: image, row, head
    q_row,
    q_head,
    kv_image,
    kv_row,
    kv_head,
    dq_row,
    dkv_row,
    N,
    M,
    H: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    KEY_TILES: tl.constexpr,
    RAGGED_N: tl.constexpr,
    RAGGED_M: tl.constexpr,
):
    program = tl.program_id(0)
    image, head = (program // H).to(tl.int64), (program % H).to(tl.int64)
    rows = tl.arange(0, BLOCK_N)
    k_ptr += image * kv_image + head * kv_head
    v_ptr += image * kv_image + head * kv_head
    dk_ptr += image * M * dkv_row + head * HEAD
    dv_ptr += image * M * dkv_row + head * HEAD
    place = (image * N * H + head) * HEAD
    q = load_rows(q_ptr + image * q_image + head * q_head, rows, q_row, N, HEAD, RAGGED_N)
    g = load_rows(gradient_ptr + place, rows, H * HEAD, N, HEAD, RAGGED_N)
    # Rows past the end: p is finite with 0 here, and their gradient is 0.
    lse = tl.load(lse_ptr + program.to(tl.int64) * N + rows, mask=rows < N, other=0.0)
    if KEY_TILES > 1:
        delta = tl.sum(g.to(tl.float32) * load_rows(out_ptr + place, rows, H * HEAD, N, HEAD, RAGGED_N).to(tl.float32), 1)

    dq = tl.zeros([BLOCK_N, HEAD], tl.float32)
    for tile in range(KEY_TILES):
        keys = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        v = load_rows(v_ptr, keys, kv_row, M, HEAD, RAGGED_M)
        k = load_rows(k_ptr, keys, kv_row, M, HEAD, RAGGED_M)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * (LOG2_E * HEAD**-0.5)
        if RAGGED_M:
            s = tl.where((keys < M)[None, :], s, float("-inf"))
        p = tl.exp2(s - lse[:, None])
        dp = tl.dot(g, tl.trans(v), input_precision="ieee")
        dv = tl.dot(tl.trans(p.to(g.dtype)), g, input_precision="ieee")
        store_rows(dv_ptr, keys, dkv_row, M, dv, HEAD, RAGGED_M)
        if KEY_TILES == 1:
            delta = tl.sum(p * dp, 1)
        ds = (p * (dp - delta[:, None])).to(q.dtype)
        dk = tl.dot(tl.trans(ds), q, input_precision="ieee") * HEAD**-0.5
        store_rows(dk_ptr, keys, dkv_row, M, dk, HEAD, RAGGED_M)
        dq = tl.dot(ds, k, dq, input_precision="ieee")
    store_rows(dq_ptr + image * N * dq_row + head * HEAD, rows, dq_row, N, dq * HEAD**-0.5, HEAD, RAGGED_N)
