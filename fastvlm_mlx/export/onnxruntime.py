"""onnx and onnxruntime, imported when they are needed, and kept from printing."""

import contextlib
import importlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import OptionError
from .silence import silence

MISSING = "Writing ONNX takes the extra 'onnx': pip install 'fastvlm-mlx[onnx]'"
ERRORS_ONLY = 3  # of onnxruntime's levels

Array = np.ndarray[Any, Any]


def check_installed() -> None:
    """Raise OptionError, saying what to do, unless onnx and onnxruntime can be imported."""
    for name in ("onnx", "onnxruntime"):
        try:
            with quiet():
                importlib.import_module(name)
        except ImportError as error:
            reason = "is not installed" if error.name == name else f"cannot be imported: {error}"
            raise OptionError(f"{MISSING} ({name} {reason}).") from error


def run(path: Path, inputs: dict[str, Array]) -> dict[str, Array]:
    """The outputs by name of a model on the CPU."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = ERRORS_ONLY
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def quantize(path: Path, out: Path, *, external: bool) -> None:
    """Write a float32 model with its matrices in 8 bits, by onnxruntime's own quantizer."""
    with quiet():
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(
            str(path), str(out), weight_type=QuantType.QInt8, per_channel=True, reduce_range=True,
            op_types_to_quantize=["MatMul", "Gather"], use_external_data_format=external,
        )  # fmt: skip


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within the block, what is printed, logged and warned of goes nowhere."""
    logging.disable(logging.CRITICAL)
    try:
        with silence():
            yield
    finally:
        logging.disable(logging.NOTSET)
