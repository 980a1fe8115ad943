"""Triton's interpreter, mended: what triton 3.6 gets wrong there would be wrong in silence or fail with today's NumPy.

1. bfloat16 is kept as bit patterns, and tl.dot multiplies those: operands are widened to float32 first. Other arithmetic on bfloat16 is wrong too,
   so the kernels never do any: they load, widen, compute and round.
2. float32 is cut to bfloat16, not rounded: it is rounded to the nearest, ties to even, as a GPU does.
3. range() with a bound that is no constant needs __index__ of a tensor, which NumPy 2.4 and newer refuse for arrays of one element.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import numpy as np


def wanted() -> bool:
    """Whether TRITON_INTERPRET asks for the interpreter, in the words that Triton takes for yes."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def mend() -> None:
    """Mends the interpreter of this process, once."""
    import triton.language as tl
    import triton.runtime.interpreter as interpreter

    patch_lang_tensor = interpreter._patch_lang_tensor
    convert_float = interpreter._convert_float
    create_dot = interpreter.InterpreterBuilder.create_dot

    def patched_lang_tensor(tensor: Any, scope: Any) -> None:
        patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).item()))

    def converted(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) == (tl.bfloat16, tl.float32):
            return data.view(np.uint16).astype(np.uint32) << np.uint32(16)
        if (source, target) == (tl.float32, tl.bfloat16):
            bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
            rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            return np.where(np.isnan(data), np.uint32(0x7FC0), rounded).astype(np.uint16)
        return convert_float(data, source, target, rounding)

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle(converted(handle.data, tl.bfloat16, tl.float32, None).view(np.float32), tl.float32)

    def mended_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return create_dot(self, widened(a), widened(b), d, *rest)

    interpreter._convert_float = converted
    interpreter._patch_lang_tensor = patched_lang_tensor
    interpreter.InterpreterBuilder.create_dot = mended_dot
