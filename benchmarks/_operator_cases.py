"""The operators in the sizes of training: their inputs, and what each call must move and compute at the least.

Sizes are those of the presets: ViT-S and ViT-B (widths 384 and 768, heads of 64) with decoders of 256 and 512 (heads of 32), regions of 256x128
pixels in 128 patches of 16x16, 63 of them visible. Bytes count every input read once and every output written once, no temporary; a loss writes its
gradient in the forward pass, so its backward pass counts nothing. A multiply-add is two FLOPs; those of element-wise formulas are counted roughly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

GRID, PATCH_PX, NUM_VISIBLE = (16, 8), 16, 63
L = GRID[0] * GRID[1]
P = 3 * PATCH_PX**2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ENCODERS, DECODERS = (384, 768), (256, 512)
SWEEP_TOKENS, SWEEP_WIDTHS = (32, 33, 64, 65, 128, 129), (256, 384, 512, 768)
SWEEP_VISIBLE = (31, 32, 63, 64)


class Work(NamedTuple):
    """What one call must do."""

    num_bytes: int
    num_flops: int

    def __add__(self, other: Work) -> Work:  # type: ignore[override]
        return Work(self.num_bytes + other.num_bytes, self.num_flops + other.num_flops)


Works = tuple[Work, Work | None]  # forward, and backward where there is one


@dataclass(frozen=True, kw_only=True)
class Maker:
    """Makes the inputs of a case. random=False leaves floating tensors as memory gives them: to compile, not to run."""

    B: int
    dtype: torch.dtype
    device: torch.device = torch.device("cpu")
    random: bool = True

    def floats(self, *shape: int, dtype: torch.dtype | None = None, gradient: bool = False) -> Tensor:
        make = torch.randn if self.random else torch.empty
        return make(*shape, dtype=dtype or self.dtype, device=self.device).requires_grad_(gradient)

    def wide(self, *shape: int, gradient: bool = False) -> Tensor:
        return self.floats(*shape, dtype=torch.float32, gradient=gradient)

    def images(self) -> Tensor:
        sides = GRID[0] * PATCH_PX, GRID[1] * PATCH_PX
        return torch.randint(0, 256, (self.B, *sides, 3), dtype=torch.uint8, device=self.device)

    def visible(self, V: int) -> Tensor:
        return torch.rand(self.B, L, device=self.device).argsort(1)[:, :V].sort(1).values.int()

    def boxes(self) -> Tensor:
        corners = torch.randint(0, 40, (self.B, 2, 2), device=self.device)
        return torch.cat([corners, corners + torch.randint(64, 128, (self.B, 2, 2), device=self.device)], dim=2).int()


@dataclass(frozen=True, kw_only=True)
class Case:
    """An operator in one size."""

    name: str
    make: Callable[[Maker], dict[str, Any]]  # the arguments of the operator; those that require gradients get them
    work: Callable[[int, int], Works]  # of (batch size, bytes of an element)
    can_compile: bool = True  # by torch.compile, in bearable time
    autocast: bool = False  # runs under autocast to the maker's dtype, as in training: its parameters are float32


def patch_rows_work(B: int, e: int, V: int) -> Works:
    return Work(B * V * (P + P * e + (4 if V < L else 0)), 2 * B * V * P), None


def patch_rows_cases(sweep: bool) -> list[Case]:
    def make(V: int, maker: Maker) -> dict[str, Any]:
        visible = maker.visible(V) if V < L else None
        return {"images": maker.images(), "visible": visible, "patch_px": PATCH_PX, "mean": MEAN, "std": STD, "dtype": maker.dtype}

    return [Case(name=f"{V} of {L} patches", make=partial(make, V), work=partial(patch_rows_work, V=V)) for V in (NUM_VISIBLE, L)]


def gather_visible_work(B: int, e: int, V: int, D: int, positions: bool) -> Works:
    forward = Work(B * V * (2 * D * e + 4) + (4 * L * D if positions else 0), B * V * D if positions else 0)
    return forward, Work(B * (V * D * e + L * D * e + 4 * V), 0)


def gather_visible_cases(sweep: bool) -> list[Case]:
    def make(V: int, D: int, positions: bool, maker: Maker) -> dict[str, Any]:
        tokens = maker.floats(maker.B, L, D, gradient=True)
        return {"tokens": tokens, "visible": maker.visible(V), "positions": maker.wide(L, D) if positions else None}

    sizes = [(NUM_VISIBLE, D, positions) for D in ENCODERS for positions in (True, False)]
    if sweep:
        sizes = [(V, D, False) for V in SWEEP_VISIBLE for D in SWEEP_WIDTHS]
    return [
        Case(
            name=f"{V} of {L} tokens of {D}{', positions' if positions else ''}",
            make=partial(make, V, D, positions),
            work=partial(gather_visible_work, V=V, D=D, positions=positions),
        )
        for V, D, positions in sizes
    ]


def assemble_tokens_work(B: int, e: int, V: int, D: int) -> Works:
    moved = B * ((1 + V) * D * e + 4 * V + (1 + L) * D * e)
    return Work(moved + 4 * (L * D + D), B * L * D), Work(moved + 4 * D, B * (L - V) * D)


def assemble_tokens_cases(sweep: bool) -> list[Case]:
    def make(V: int, D: int, maker: Maker) -> dict[str, Any]:
        tokens = maker.floats(maker.B, 1 + V, D, gradient=True)
        return {"tokens": tokens, "visible": maker.visible(V), "mask_token": maker.wide(D, gradient=True), "positions": maker.wide(L, D)}

    sizes = [(V, D) for V in SWEEP_VISIBLE for D in SWEEP_WIDTHS] if sweep else [(NUM_VISIBLE, D) for D in DECODERS]
    return [Case(name=f"{V} to {L} tokens of {D}", make=partial(make, V, D), work=partial(assemble_tokens_work, V=V, D=D)) for V, D in sizes]


def join_tokens_work(B: int, e: int, V: int, D: int) -> Works:
    moved = B * 2 * (1 + V + L) * D * e
    return Work(moved + 4 * (B * V + L * D), B * V * D), Work(moved, 0)


def join_tokens_cases(sweep: bool) -> list[Case]:
    def make(V: int, D: int, maker: Maker) -> dict[str, Any]:
        tokens, queries = (maker.floats(maker.B, N, D, gradient=True) for N in (1 + V, L))
        return {"tokens": tokens, "visible": maker.visible(V), "positions": maker.wide(L, D), "queries": queries}

    sizes = [(V, D) for V in SWEEP_VISIBLE for D in SWEEP_WIDTHS] if sweep else [(NUM_VISIBLE, D) for D in DECODERS]
    return [Case(name=f"{1 + V} + {L} tokens of {D}", make=partial(make, V, D), work=partial(join_tokens_work, V=V, D=D)) for V, D in sizes]


def region_queries_work(B: int, e: int, D: int) -> Works:
    """Backward computes no gradient to the codes, so it has as many products as forward; its sums are over rows, columns and both."""
    work = Work(B * (32 + 2 + L * D * e) + 4 * (2 * D * D + 2 * D), 2 * B * ((GRID[0] + GRID[1]) * (D // 2) * D + D * D) + 2 * B * L * D)
    return work, work


def region_queries_cases(sweep: bool) -> list[Case]:
    def make(D: int, maker: Maker) -> dict[str, Any]:
        flips = torch.rand(maker.B, 2, device=maker.device) < 0.5
        parameters = {"mask_token": maker.wide(D, gradient=True), "weight": maker.wide(D, 2 * D, gradient=True), "bias": maker.wide(D, gradient=True)}
        return {"boxes": maker.boxes(), "flips": flips, "grid": GRID, **parameters}

    widths = SWEEP_WIDTHS if sweep else DECODERS
    return [Case(name=f"{L} of {D}", make=partial(make, D), work=partial(region_queries_work, D=D), autocast=True) for D in widths]


def patch_loss_work(B: int, e: int) -> Works:
    return Work(B * L * (P + 2 * P * e + 8), B * L * P * 10), Work(0, 0)


def patch_loss_cases(sweep: bool) -> list[Case]:
    def make(per_channel: bool, maker: Maker) -> dict[str, Any]:
        values = {"predicted": maker.floats(maker.B, L, P, gradient=True), "images": maker.images(), "weights": maker.wide(maker.B, L)}
        return {**values, "patch_px": PATCH_PX, "mean": MEAN, "std": STD, "per_channel": per_channel}

    return [
        Case(name=f"{L} patches of {P}{', per channel' if per_channel else ''}", make=partial(make, per_channel), work=patch_loss_work)
        for per_channel in (False, True)
    ]


def feature_loss_work(B: int, e: int, D: int) -> Works:
    return Work(B * L * (3 * D * e + 8), B * L * D * 16), Work(0, 0)


def feature_loss_cases(sweep: bool) -> list[Case]:
    def make(D: int, kind: str, normalised: bool, maker: Maker) -> dict[str, Any]:
        values = {"predicted": maker.floats(maker.B, L, D, gradient=True), "target": maker.floats(maker.B, L, D), "weights": maker.wide(maker.B, L)}
        return {**values, "kind": kind, "normalise_predicted": normalised}

    sizes = [(D, "mse", True) for D in (SWEEP_WIDTHS if sweep else ENCODERS)]
    if not sweep:
        sizes += [(768, "mse", False)] + [(D, kind, True) for kind in ("smooth-l1", "cosine") for D in ENCODERS]
    return [
        Case(
            name=f"{L} tokens of {D}, {kind}{'' if normalised else ', raw prediction'}",
            make=partial(make, D, kind, normalised),
            work=partial(feature_loss_work, D=D),
        )
        for D, kind, normalised in sizes
    ]


def add_layer_norm_work(B: int, e: int, N: int, D: int, scaled: bool, wide_stream: bool = False) -> Works:
    """Backward writes the branch's gradient apart from the stream's where they differ: by a scale, whose gradient reads the branch too, or in dtype.
    wide_stream: the stream is float32, whatever the branch is."""
    branch, stream, statistics = B * N * D * e, B * N * D * (4 if wide_stream else e), 8 * B * N
    apart = scaled or stream != branch
    forward = Work(2 * stream + 2 * branch + statistics + 4 * D * (3 if scaled else 2), B * N * D * (10 if scaled else 8))
    moved = 3 * stream + branch + (branch if apart else 0) + (branch if scaled else 0)
    return forward, Work(moved + statistics + 4 * D * (6 if scaled else 3), B * N * D * (18 if scaled else 13))


def add_layer_norm_cases(sweep: bool) -> list[Case]:
    def make(N: int, D: int, scaled: bool, stream: torch.dtype | None, maker: Maker) -> dict[str, Any]:
        values = {"stream": maker.floats(maker.B, N, D, dtype=stream, gradient=True), "branch": maker.floats(maker.B, N, D, gradient=True)}
        values |= {name: maker.wide(D, gradient=True) for name in ("weight", "bias")}
        return values | ({"branch_scale": maker.wide(D, gradient=True), "row_scale": maker.wide(maker.B)} if scaled else {})

    training = [(64, 384), (64, 768), (129, 384), (129, 768), (128, 256), (128, 512)]
    widest = [(N, D) for N in SWEEP_TOKENS for D in SWEEP_WIDTHS] if sweep else training
    sizes: list[tuple[int, int, bool, torch.dtype | None]] = [(N, D, False, None) for N, D in widest]
    if not sweep:
        # A float32 stream is what autocast makes of the residual connections.
        sizes += [(64, D, True, None) for D in ENCODERS] + [(64, D, False, torch.float32) for D in ENCODERS]
    return [
        Case(
            name=f"{N} tokens of {D}{', scaled' if scaled else ''}{', float32 stream' if stream else ''}",
            make=partial(make, N, D, scaled, stream),
            work=partial(add_layer_norm_work, N=N, D=D, scaled=scaled, wide_stream=stream is not None),
        )
        for N, D, scaled, stream in sizes
    ]


def short_attention_work(B: int, e: int, N: int, H: int, d: int) -> Works:
    token = B * N * H * d * e
    rows = 4 * B * H * N  # log-sum-exp
    return Work(4 * token + rows, 4 * B * H * N * N * d), Work(8 * token + rows, 10 * B * H * N * N * d)


def short_attention_cases(sweep: bool) -> list[Case]:
    def make(N: int, H: int, d: int, maker: Maker) -> dict[str, Any]:
        return {"qkv": maker.floats(maker.B, N, 3, H, d, gradient=True)}

    encoders = [(N, D // 64, 64) for N in (64, 129) for D in ENCODERS]
    decoders = [(N, D // 32, 32) for N in (128, 192) for D in DECODERS]
    sizes = [*encoders, *decoders, (128, 6, 64), (33, 6, 64), (129, 8, 32), (193, 6, 64), (211, 6, 64)]
    if sweep:
        sizes = [(N, D // d, d) for N in SWEEP_TOKENS for D, d in ((256, 32), (384, 64), (512, 32), (768, 64))]
    return [
        Case(name=f"{N} tokens, {H} heads of {d}", make=partial(make, N, H, d), work=partial(short_attention_work, N=N, H=H, d=d))
        for N, H, d in sizes
    ]


def short_cross_attention_work(B: int, e: int, N: int, M: int, H: int, d: int) -> Works:
    width, rows, products = B * H * d * e, 4 * B * H * N, B * H * N * M * d
    return Work((2 * N + 2 * M) * width + rows, 4 * products), Work((4 * N + 4 * M) * width + rows, 10 * products)


def short_cross_attention_cases(sweep: bool) -> list[Case]:
    def make(N: int, M: int, H: int, maker: Maker) -> dict[str, Any]:
        return {"q": maker.floats(maker.B, N, H, 32, gradient=True), "kv": maker.floats(maker.B, M, 2, H, 32, gradient=True)}

    sizes = [(L, M, D // 32) for M in (SWEEP_TOKENS if sweep else (NUM_VISIBLE + 1,)) for D in DECODERS]
    return [
        Case(name=f"{N} x {M} tokens, {H} heads of 32", make=partial(make, N, M, H), work=partial(short_cross_attention_work, N=N, M=M, H=H, d=32))
        for N, M, H in sizes
    ]


def parameter_shapes(D: int, depth: int) -> list[tuple[int, ...]]:
    """Those of the blocks of a ViT of width D."""
    block = [(3 * D, D), (3 * D,), (D, D), (D,), (4 * D, D), (4 * D,), (D, 4 * D), (D,), *[(D,)] * 4]
    return block * depth


def adamw_ema_work(B: int, e: int, D: int, depth: int, half: bool) -> Works:
    """Parameter, two moments and average are read and written in float32, the gradient is read, two bfloat16 copies are written."""
    num = sum(torch.Size(shape).numel() for shape in parameter_shapes(D, depth))
    return Work(num * (4 * 8 + (2 if half else 4) + 2 * 2), num * 20), None


def adamw_ema_cases(sweep: bool) -> list[Case]:
    def make(D: int, depth: int, half: bool, maker: Maker) -> dict[str, Any]:
        shapes = parameter_shapes(D, depth)
        wide = {name: [maker.wide(*shape) for shape in shapes] for name in ("parameters", "first_moments", "averages")}
        copies = {name: [maker.floats(*shape, dtype=torch.bfloat16) for shape in shapes] for name in ("copies", "average_copies")}
        return {
            **wide,
            "second_moments": [maker.wide(*shape).square_() for shape in shapes],
            "gradients": [maker.floats(*shape, dtype=torch.bfloat16 if half else torch.float32) for shape in shapes],
            "hyper": torch.tensor([1e-4, 0.9, 0.95, 1e-8, 0.1, 0.05, 1.0, 0.99], device=maker.device),
            "weight_decays": [0.05 if len(shape) > 1 else 0.0 for shape in shapes],
            **copies,
        }

    # torch.compile unrolls the loop over the tensors: a block takes it seconds, a network minutes.
    sizes = [(D, depth, False) for D in ENCODERS for depth in (1, 12)]
    return [
        Case(
            name=f"{depth} blocks of {D}{', bf16 gradients' if half else ''}",
            make=partial(make, D, depth, half),
            work=partial(adamw_ema_work, D=D, depth=depth, half=half),
            can_compile=depth == 1,
        )
        for D, depth, half in [*sizes, (384, 1, True)]
    ]


def block_masks_work(B: int, e: int) -> Works:
    return Work(B * (8 + L), 0), None


def block_masks_cases(sweep: bool) -> list[Case]:
    def make(maker: Maker) -> dict[str, Any]:
        seeds = torch.randint(-(2**63), 2**63 - 1, (maker.B,), dtype=torch.int64, device=maker.device)
        return {"seeds": seeds, "grid": GRID, "num_visible": NUM_VISIBLE}

    return [Case(name=f"{L} patches, {NUM_VISIBLE} visible", make=make, work=block_masks_work, can_compile=False)]


# The cases of each operator; True asks for the sweep over tokens and widths where it has them.
OPERATORS: dict[str, Callable[[bool], list[Case]]] = {
    "patch_rows": patch_rows_cases,
    "gather_visible": gather_visible_cases,
    "assemble_tokens": assemble_tokens_cases,
    "join_tokens": join_tokens_cases,
    "region_queries": region_queries_cases,
    "patch_loss": patch_loss_cases,
    "feature_loss": feature_loss_cases,
    "add_layer_norm": add_layer_norm_cases,
    "short_attention": short_attention_cases,
    "short_cross_attention": short_cross_attention_cases,
    "adamw_ema_": adamw_ema_cases,
    "block_masks": block_masks_cases,
}
# The file of an operator and its test, where it is not called as the operator is.
FILES = {"join_tokens": "assemble_tokens", "short_cross_attention": "short_attention", "adamw_ema_": "adamw_ema"}
