"""OpenVINO, which compiles large parts of a network for a CPU: loaded when a model is worth it, and then for good.

Enters: graphs, arrays of MLX, whose memory it reads without a copy. Leaves: arrays of MLX.
"""

import importlib
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from .views import memory_of

if TYPE_CHECKING:
    from types import ModuleType

    import openvino

TELEMETRY = "openvino_telemetry"  # reports to its makers that it was imported

_lock = threading.Lock()
openvino_module: "ModuleType | None" = None  # once it has been loaded
why_missing: str | None = None  # once it was found that it cannot be


def load() -> bool:
    """Import the library, unless it is there already; whether it is. Nothing is sent anywhere by it."""
    global openvino_module, why_missing
    with _lock:
        if openvino_module is None and why_missing is None:
            try:
                openvino_module = _import()
            except (ImportError, OSError) as error:  # not installed, or built for another system
                why_missing = str(error)
    return openvino_module is not None


def loaded() -> bool:
    """Whether the library has been loaded."""
    return openvino_module is not None


def library() -> Any:
    """The library; RuntimeError before `load`."""
    if openvino_module is None:
        raise RuntimeError("OpenVINO has not been loaded")
    return openvino_module


def _import() -> "ModuleType":
    """The library, imported without its telemetry, which stands in the way of no other program that has imported it."""
    absent = TELEMETRY not in sys.modules
    if absent:
        sys.modules[TELEMETRY] = None  # type: ignore[assignment]  # Python's way of saying that it must not be imported
    try:
        return importlib.import_module("openvino")
    finally:
        if absent:
            del sys.modules[TELEMETRY]


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 by instructions of its own."""
    return "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _core() -> "openvino.Core":
    global _made
    with _lock:
        if _made is None:
            _made = library().Core()
        return _made


_made: "openvino.Core | None" = None


class Program:
    """A compiled graph with one output, to be run from any thread."""

    def __init__(self, graph: "openvino.Model", dtype: mx.Dtype, constants: Sequence["openvino.Tensor"] = ()):
        """Compile a graph that computes in `dtype`, float32 or bfloat16.

        `constants` are the tensors whose memory it reads: the library holds none of them itself.
        """
        self._constants = constants
        settings = {
            "INFERENCE_PRECISION_HINT": "bf16" if dtype == mx.bfloat16 else "f32",  # else it decides by the processor
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # activations are never rounded to integers
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,  # MLX's threads, and other programs, want the same cores
        }
        self._compiled = _core().compile_model(graph, "CPU", settings)

    def __call__(self, arrays: Sequence[mx.array]) -> mx.array:
        """The output, evaluated; nothing of the arrays is kept."""
        request = self._compiled.create_infer_request()  # as cheap as clearing one that is used again
        mx.eval(*arrays)
        tensors = [tensor_of(array) for array in arrays]  # which hold the memory while it is read: the request does not
        for number, tensor in enumerate(tensors):
            request.set_input_tensor(number, tensor)
        request.infer(share_outputs=True)
        return array_of(request.get_output_tensor())


def tensor_of(array: mx.array) -> "openvino.Tensor":
    """The library's view of an evaluated array's memory; of a copy where its rows do not lie in order."""
    ov = library()
    if array.dtype == mx.bfloat16:  # which NumPy does not have
        return ov.Tensor(np.ascontiguousarray(memory_of(array.view(mx.uint16))), list(array.shape), ov.Type.bf16)
    return ov.Tensor(np.ascontiguousarray(array), shared_memory=True)


def array_of(tensor: "openvino.Tensor") -> mx.array:
    """A copy of a tensor as an array."""
    if tensor.element_type == library().Type.bf16:
        return mx.array(tensor.data.view(np.uint16)).view(mx.bfloat16)
    return mx.array(tensor.data)
