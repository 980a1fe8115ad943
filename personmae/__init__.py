"""PersonMAE: fast masked pre-training of Vision Transformers on unlabelled person crops, for person re-identification.

    import personmae, timm

    extractor = personmae.FeatureExtractor("encoder.safetensors")     # see personmae/extraction.py
    model = timm.create_model("personmae_vit_small_patch16")          # see personmae/interop/timm_models.py
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_TIMM_MODELS = "personmae.interop.timm_models"


def __getattr__(name: str) -> Any:
    # Imported at its first use: `personmae --help` must not wait for torch.
    if name == "FeatureExtractor":
        return importlib.import_module("personmae.extraction").FeatureExtractor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _RegistersWithTimm(importlib.abc.MetaPathFinder):
    """Waits for the first import of timm, and registers our models right after it."""

    asking = False

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != "timm" or self.asking:
            return None
        self.asking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.asking = False
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                importlib.import_module(_TIMM_MODELS)

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


if "timm" in sys.modules:
    importlib.import_module(_TIMM_MODELS)
else:
    sys.meta_path.insert(0, _RegistersWithTimm())
