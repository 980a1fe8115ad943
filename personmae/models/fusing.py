"""When a block of the encoder is computed by Triton's kernels, and when by PyTorch's own operators.

A step that is captured in a CUDA graph costs the host nothing, and Triton's kernels are faster at any size. In an eager loop with small inputs the
host is what all waits for, and PyTorch's own operators are launched faster: with 64 images of ViT-B (6.3 million elements) on an H200, training ran
at 0.7 times the speed of timm's network by Triton's, with blocks compiled or not (benchmarks/results/backbones-h200.json, of commit 807b365).
"""

from __future__ import annotations

from torch import Tensor

# Elements of a stream [B, N, D] from which on Triton's kernels are taken outside of CUDA graphs. Reckoned, from when the products of a block take
# longer than its launches; not measured.
FUSED_FROM = 1 << 24


def worth_fusing(x: Tensor) -> bool:
    """Whether Triton's kernels serve a tensor better than PyTorch's own operators where nothing is captured. Off CUDA there is nothing to choose."""
    return not x.is_cuda or x.numel() >= FUSED_FROM
