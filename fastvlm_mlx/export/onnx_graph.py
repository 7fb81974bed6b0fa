"""A writer of ONNX graphs: nodes by operator, weights as they are stored, names given as it goes."""

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt

OPSET = 20  # the first with GELU
IR_VERSION = 9  # that runtimes of its time read
BEYOND_PROTOBUF = 1_900_000_000  # bytes: what is larger keeps its weights in a file beside it

Array = npt.NDArray[Any]


class Graph:
    """A graph being written. Values are named by strings; a call adds a node and returns the name of what it gives.

    Activations are float32. With `half`, the weights of products are stored as float16, and their products computed in
    it.
    """

    def __init__(self, name: str, *, half: bool):
        import onnx

        self.name, self.half = name, half
        self._onnx = onnx
        self._nodes: list[Any] = []
        self._weights: dict[str, Any] = {}
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._numbers = itertools.count()
        self.nbytes = 0

    def __call__(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Add a node with one output."""
        return self.several(operator, 1, *inputs, **attributes)[0]

    def several(self, operator: str, count: int, *inputs: str, **attributes: Any) -> list[str]:
        """Add a node with so many outputs."""
        outputs = [f"{operator}_{next(self._numbers)}" for _ in range(count)]
        self._nodes.append(self._onnx.helper.make_node(operator, list(inputs), outputs, **attributes))
        return outputs

    def weight(self, name: str, array: Array) -> str:
        """Store a tensor under a name."""
        self._weights[name] = self._onnx.numpy_helper.from_array(np.ascontiguousarray(array), name)
        self.nbytes += array.nbytes
        return name

    def constant(self, *values: float, dtype: Any = np.int64, scalar: bool = False) -> str:
        """Numbers as a one-dimensional tensor, or one as a scalar; the same numbers are stored once."""
        array = np.array(values[0] if scalar else values, dtype)
        name = f"{array.dtype}{list(array.shape)}_" + "_".join(map(str, values))
        return name if name in self._weights else self.weight(name, array)

    def number(self, value: float) -> str:
        """A float32."""
        return self.constant(value, dtype=np.float32, scalar=True)

    def linear(self, x: str, name: str, matrix: Array, bias: Array | None = None) -> str:
        """x (..., I) with a matrix (O, I), and a bias (O,)."""
        weight = self.weight(f"{name}.weight", matrix.T.astype(np.float16 if self.half else np.float32))
        y = self("MatMul", self.to(x, "FLOAT16") if self.half else x, weight)
        y = self.to(y, "FLOAT") if self.half else y
        return y if bias is None else self("Add", y, self.weight(f"{name}.bias", bias.astype(np.float32)))

    def to(self, x: str, dtype: str) -> str:
        """x as another type, by ONNX's name of it."""
        return self("Cast", x, to=getattr(self._onnx.TensorProto, dtype))

    def input(self, name: str, dtype: str, shape: list[int | str]) -> str:
        """Declare an input; axes that may have any length have names."""
        self._inputs.append(self._declared(name, dtype, shape))
        return name

    def output(self, value: str, name: str, shape: list[int | str]) -> None:
        """Give a value out, as float32, under a name."""
        self._nodes.append(self._onnx.helper.make_node("Identity", [value], [name]))
        self._outputs.append(self._declared(name, "FLOAT", shape))

    def _declared(self, name: str, dtype: str, shape: list[int | str]) -> Any:
        return self._onnx.helper.make_tensor_value_info(name, getattr(self._onnx.TensorProto, dtype), shape)

    def model(self) -> Any:
        """The whole as ONNX's protobuf."""
        helper = self._onnx.helper
        graph = helper.make_graph(
            self._nodes, self.name, self._inputs, self._outputs, initializer=list(self._weights.values())
        )
        opset = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION, producer_name="fastvlm-mlx")
