"""ONNX: the encoder for any runtime, in batches of any size, float32 or with int8 weights. The only file that imports onnx and onnxruntime.

Inputs and outputs: see pixel_features.py.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from personmae.configs import UserError
from personmae.interop.initial_weights import CARD, FittedState
from personmae.interop.pixel_features import PixelFeatures, example_images
from personmae.whole_files import write_whole

OPSET = 18


def write_onnx(path: Path, state: FittedState, card: Mapping[str, Any], int8: bool = False) -> None:
    """Write the encoder as one ONNX file, whole or not at all; the card is in its metadata.

    int8: the weights of matrix products in 8 bits with a scale for each channel, activations quantised as they come (onnxruntime's dynamic
    quantisation): a quarter of the size, for CPUs. Raises UserError where onnx is missing or the disk refuses."""
    _require("onnx", "onnxscript", *(["onnxruntime"] if int8 else []))
    import onnx

    with _quiet():
        program = torch.onnx.export(
            PixelFeatures(state).eval(),
            (torch.from_numpy(example_images(state, 2)),),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            verbose=False,
        )
        assert program is not None
        model = _with_int8_weights(program.model_proto) if int8 else program.model_proto
    onnx.helper.set_model_props(model, {CARD: json.dumps(dict(card))})
    onnx.checker.check_model(model)
    write_whole(path, model.SerializeToString(), parents=True)


def open_onnx(path: Path) -> Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]:
    """A function from images to features, by onnxruntime on the CPU. Raises UserError where onnxruntime is missing."""
    _require("onnxruntime")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: session.run(["features"], {"images": images})[0]


def _with_int8_weights(model: Any) -> Any:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory(prefix="personmae-") as folder:
        plain, quantised = Path(folder) / "plain.onnx", Path(folder) / "int8.onnx"
        onnx.save(model, plain)
        quantize_dynamic(plain, quantised, per_channel=True, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"])
        return onnx.load(quantised)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter and the quantiser say of their own internals."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _require(*packages: str) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"{' and '.join(missing)} is not installed: pip install -c constraints.txt -e '.[onnx]'")
