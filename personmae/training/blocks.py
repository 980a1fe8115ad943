"""How the blocks of a model are run: compiled, or with their activations dropped and computed again.

Each block is compiled by itself: all blocks of a kind share one compilation, and what lies between them (operators, data) stays as it is.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from personmae.models.vit import Blocks

MOST_COMPILATIONS = 128
CompileKind = Literal["auto", "yes", "no"]


class CompileChoice(NamedTuple):
    """Whether blocks are compiled, and the words that say why."""

    compiled: bool
    reason: str

    def __str__(self) -> str:
        return f"{'compiled' if self.compiled else 'not compiled'} ({self.reason})"


def choose_compilation(kind: CompileKind, device: torch.device) -> CompileChoice:
    """auto: on CUDA, where the time that compiling takes comes back."""
    if kind == "auto":
        return CompileChoice(device.type == "cuda", f"on {device.type}")
    return CompileChoice(kind == "yes", "asked for")


def set_blocks(module: nn.Module, *, compiled: bool, checkpointing: bool, backend: str = "inductor") -> None:
    """How every block inside `module` runs from now on. Names and values of parameters stay as they are.

    compiled: by torch.compile, each block as one graph for the sizes that it meets. checkpointing: see `Blocks`. backend: of torch.compile.
    """
    if compiled:
        # Kinds of blocks share the code that is compiled, and so do the models that follow each other in one process (a sweep, a notebook); after 8
        # compilations of it torch.compile would end with an error.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_COMPILATIONS)
    for part in module.modules():
        if isinstance(part, Blocks):
            part.checkpointing = checkpointing
            for block in part if compiled else ():
                block.compile(fullgraph=True, dynamic=False, backend=backend)


def uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Inside, compiled blocks run as they are written: for evaluation, whose last batches have other sizes each time. Compiling for each would take
    longer than it gives, and after a few sizes torch.compile ends with an error."""
    if "torch._dynamo" not in sys.modules:
        # Nothing is compiled, and set_stance would import it all, which takes a second or two.
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")
