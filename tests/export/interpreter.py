"""A saved Core ML package, decoded and computed again without Core ML: protobuf and weight file read here, operations
written out.

It shares no code with what writes packages, and knows nothing of the network: whatever the file says is what is
computed. Each result is rounded to the type the file declares for it. Format: coremltools' Model.proto and MIL.proto;
the weight file is MILBlob's (a header of 64 bytes, then for each blob a record of 64 bytes that says where its data
lie).
"""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from coremltools.proto import MIL_pb2, Model_pb2

Array = np.ndarray[Any, Any]

SENTINEL = 0xDEADBEEF
NAMES = {value: name for name, value in MIL_pb2.DataType.items()}
NUMPY = {"FLOAT32": np.float32, "FLOAT16": np.float16, "INT8": np.int8, "UINT8": np.uint8, "INT32": np.int32,
         "UINT32": np.uint32, "BOOL": np.bool_, "UINT16": np.uint16}  # fmt: skip
BLOB_TYPES = {1: "FLOAT16", 2: "FLOAT32", 3: "UINT8", 4: "INT8", 11: "UINT4", 13: "UINT6"}


class Package:
    """A package on disk: its specification and its weight file."""

    def __init__(self, folder: Path):
        manifest = json.loads((folder / "Manifest.json").read_text())
        entries = manifest["itemInfoEntries"]
        root = folder / "Data" / entries[manifest["rootModelIdentifier"]]["path"]
        self.spec = Model_pb2.Model()
        self.spec.ParseFromString(root.read_bytes())
        self.folder = root.parent
        (self.block,) = self.spec.mlProgram.functions["main"].block_specializations.values()
        self.blobs: dict[str, bytes] = {}

    @property
    def operations(self) -> list[Any]:
        return list(self.block.operations)

    def run(self, inputs: dict[str, Array], *, exact: bool = False) -> dict[str, Array]:
        """Outputs by name; with `exact`, results that the file declares as float16 stay in float32, weights are as
        stored."""
        values: dict[str, Any] = {name: torch.from_numpy(array) for name, array in inputs.items()}
        last = {name: place for place, operation in enumerate(self.operations) for name in _read(operation)}
        for place, operation in enumerate(self.operations):
            arguments = {name: self._argument(argument, values) for name, argument in operation.inputs.items()}
            if operation.type == "const" or operation.type.startswith("constexpr"):
                arguments |= {name: self._value(value) for name, value in operation.attributes.items()}
            (output,) = operation.outputs
            kind, shape = NAMES[output.type.tensorType.dataType], _shape(output.type.tensorType)
            result = OPERATIONS[operation.type](**arguments)
            assert tuple(getattr(result, "shape", ())) == shape, (output.name, operation.type, result.shape, shape)
            rounds = kind == "FLOAT16" and torch.is_tensor(result) and operation.type != "const"
            values[output.name] = result.half().float() if rounds and not exact else result
            for name in _read(operation):
                if last[name] == place:
                    values.pop(name, None)
        return {name: values[name].numpy() for name in self.block.outputs}

    def _argument(self, argument: Any, values: dict[str, Any]) -> Any:
        (binding,) = argument.arguments
        return values[binding.name] if binding.WhichOneof("binding") == "name" else self._value(binding.value)

    def _value(self, value: Any) -> Any:
        kind, shape = NAMES[value.type.tensorType.dataType], _shape(value.type.tensorType)
        if value.WhichOneof("value") == "blobFileValue":
            array = self._blob(value.blobFileValue.fileName, value.blobFileValue.offset, kind)
            return _tensor(array[: int(np.prod(shape))].reshape(shape))
        tensor = value.immediateValue.tensor
        field = tensor.WhichOneof("value")
        found = getattr(tensor, field).values
        if field == "strings":
            return found[0]
        array = np.frombuffer(found, NUMPY[kind]) if field == "bytes" else np.array(found, NUMPY[kind])
        return _tensor(array.reshape(shape))

    def _blob(self, name: str, offset: int, kind: str) -> Array:
        if name not in self.blobs:
            self.blobs[name] = (self.folder / name.removeprefix("@model_path/")).read_bytes()
        data = self.blobs[name]
        sentinel, number, size, start = struct.unpack_from("<IIQQ", data, offset)
        if sentinel != SENTINEL or BLOB_TYPES[number] != kind or start + size > len(data):
            raise ValueError(f"{name}: no {kind} of {size} bytes at {offset}")
        if kind in ("UINT4", "UINT6"):
            return _unpacked(np.frombuffer(data, np.uint8, size, start), int(kind[-1]))
        return np.frombuffer(data, NUMPY[kind], size // np.dtype(NUMPY[kind]).itemsize, start)


def _shape(kind: Any) -> tuple[int, ...]:
    return tuple(dimension.constant.size for dimension in kind.dimensions)


def _read(operation: Any) -> set[str]:
    return {binding.name for argument in operation.inputs.values() for binding in argument.arguments if binding.name}


def _tensor(array: Array) -> Any:
    """Numbers to compute with in float32; whole numbers and truth values as NumPy has them."""
    return torch.from_numpy(array.astype(np.float32)) if array.dtype.kind == "f" else array


def _whole(found: Any) -> list[int]:
    return [int(each) for each in np.asarray(found).reshape(-1)]


def conv(
    x: Any, weight: Any, strides: Any, pad_type: Any, pad: Any, dilations: Any, groups: Any, bias: Any = None
) -> Any:
    assert pad_type == "custom" and _whole(dilations) == [1, 1]
    top, bottom, left, right = _whole(pad)
    return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, stride=_whole(strides), groups=int(groups))


def gelu(x: Any, mode: str) -> Any:
    assert mode == "EXACT"
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def cast(x: Any, dtype: str) -> Any:
    assert dtype in ("fp16", "fp32")
    return x.float()  # rounded, if at all, as any result of its declared type


def matmul(x: Any, y: Any, transpose_x: Any, transpose_y: Any) -> Any:
    return (x.mT if bool(transpose_x) else x) @ (y.mT if bool(transpose_y) else y)


def affine(quantized_data: Array, zero_point: Array, scale: Any, axis: Any) -> Any:
    shape = [1] * quantized_data.ndim
    shape[int(axis)] = -1
    steps = quantized_data.astype(np.float32) - np.asarray(zero_point, np.float32).reshape(
        -1, *[1] * (quantized_data.ndim - 1)
    )
    return torch.from_numpy(steps) * scale.reshape(shape)


def blockwise(data: Array, scale: Any) -> Any:
    return torch.from_numpy(data.astype(np.float32)) * scale


def lookup(indices: Array, lut: Any, shape: Array | None = None) -> Any:
    if shape is not None:  # until iOS 17: packed bytes, one table
        sizes = _whole(shape)
        places = _unpacked(indices, int(lut.numel()).bit_length() - 1)[: int(np.prod(sizes))]
        return lut[torch.from_numpy(places)].reshape(sizes)
    assert lut.shape[-1] == 1 and set(lut.shape[1:-2]) == {1}
    rows = torch.from_numpy(indices.reshape(lut.shape[0], -1))
    return torch.take_along_dim(lut.reshape(lut.shape[0], -1), rows, dim=1).reshape(indices.shape)


def _unpacked(data: Array, bits: int) -> Array:
    """Whole numbers of few bits, one after the other from the lowest bit of the first byte on."""
    stream = np.unpackbits(data, bitorder="little")
    rows = stream[: len(stream) // bits * bits].reshape(-1, bits).astype(np.int64)
    return np.asarray((rows << np.arange(bits)).sum(axis=1))


OPERATIONS: dict[str, Any] = {
    "const": lambda name, val: val,
    "constexpr_affine_dequantize": lambda name, **arguments: affine(**arguments),
    "constexpr_blockwise_shift_scale": lambda name, **arguments: blockwise(**arguments),
    "constexpr_lut_to_dense": lambda name, **arguments: lookup(**arguments),
    "conv": conv,
    "gelu": gelu,
    "cast": cast,
    "matmul": matmul,
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "square": lambda x: x * x,
    "relu": torch.relu,
    "sigmoid": lambda x: torch.sigmoid(x),
    "rsqrt": lambda x, epsilon: 1 / torch.sqrt(x + epsilon),
    "softmax": lambda x, axis: torch.softmax(x, int(axis)),
    "reduce_mean": lambda x, axes, keep_dims: x.mean(_whole(axes), keepdim=bool(keep_dims)),
    "reshape": lambda x, shape: x.reshape(_whole(shape)),
    "transpose": lambda x, perm: x.permute(_whole(perm)),
}
