"""The image encoder as one compiled graph for pictures of every size, made from the arrays of its layers.

Enters: a network's tower (`network.vision`), whose blocks are known by the names of their parts. Leaves: features.
"""

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from . import graphs
from .compiler import Program, library, tensor_of
from .cores import in_background
from .gradients import with_gradient_of
from .memory import give_back_memory
from .views import Place, place_of

if TYPE_CHECKING:
    from concurrent.futures import Future

HEAD_DIM = 32  # of the tower's attention
PATCH = 64  # pixels along the side of a token


def features(tower: nn.Module, pixels: mx.array) -> mx.array:
    """Features (B, N, C) of pixels (B, H, W, 3), evaluated; with the gradient of the tower's own operations."""
    parameters: Any = tree_flatten(tower.parameters())
    names = [name for name, _ in parameters]

    def general(pixels: mx.array, *arrays: mx.array) -> mx.array:
        own = tower.parameters()
        tower.update(tree_unflatten(list(zip(names, arrays, strict=True))))
        try:
            found: mx.array = tower(pixels)
            return found
        finally:
            tower.update(own)

    def compiled(pixels: mx.array, *arrays: mx.array) -> mx.array:
        program: Program | None = tower.compiled.program(tower, dict(zip(names, arrays, strict=True)))
        if program is None:
            return general(pixels, *arrays)
        return program([pixels.astype(mx.float32)]).astype(pixels.dtype)

    found: mx.array = with_gradient_of(general)(compiled)(pixels, *(array for _, array in parameters))
    return found


def prepare(tower: nn.Module) -> None:
    """Have a tower compiled from now on, beginning in the background."""
    tower.compiled = CompiledTower()
    tower.compiled.begin(tower, dict(tree_flatten(tower.parameters())))


def takes(tower: nn.Module, pixels: mx.array) -> bool:
    """Whether a tower is one that is compiled, and pixels (B, H, W, 3) come to more than one token.

    A softmax whose first row has one element is compiled as if all had: such a picture must not be the first.
    """
    return isinstance(getattr(tower, "compiled", None), CompiledTower) and max(pixels.shape[1:3]) > PATCH


class CompiledTower:
    """A tower's program, made again where a layer or an array is another than it was made from."""

    def __init__(self) -> None:
        self._made_from: tuple[list[object], list[Place]] | None = None
        self._coming: Future[Program | None] | None = None  # what has been begun in the background
        self._program: Program | None = None
        self._lock = threading.Lock()

    def begin(self, tower: nn.Module, arrays: dict[str, mx.array]) -> None:
        """Begin to make the program of a tower with these arrays by path, in the background."""
        self._made_from = _parts(tower, arrays)
        self._coming = in_background(lambda: _program(tower, arrays))

    def program(self, tower: nn.Module, arrays: dict[str, mx.array]) -> Program | None:
        """The program of a tower with these arrays; None where it has layers that no graph is known of."""
        made_from = _parts(tower, arrays)
        with self._lock:
            coming, self._coming = self._coming, None
            if coming is not None:
                self._program = coming.result()
            if made_from != self._made_from:  # made anew in this thread: MLX follows gradients in it alone
                self._program, self._made_from = _program(tower, arrays), made_from
            return self._program


def _parts(tower: nn.Module, arrays: dict[str, mx.array]) -> tuple[list[object], list[Place]]:
    """The layers of a tower, and the places of its arrays."""
    layers: list[object] = [(path, type(layer), getattr(layer, "scale", None)) for path, layer in tower.named_modules()]
    return layers, [place_of(array) for array in arrays.values()]


class _UnknownLayer(Exception):
    """A layer that is none of the tower's, nor one with a low-rank update, nor quantised."""


def _program(tower: nn.Module, arrays: dict[str, mx.array]) -> Program | None:
    ov = library()
    pixels = ov.opset13.parameter([-1, -1, -1, 3], ov.Type.f32)
    try:
        graph = _Graph(ov.opset13, tower, arrays)
        y = graph.tower(pixels)
    except _UnknownLayer:
        return None
    dtype = arrays["patch_embed.conv.weight"].dtype
    program = Program(ov.Model([y], [pixels], "tower"), dtype, graph.constants)
    give_back_memory()
    return program


class _Graph:
    """The tower's blocks, in forward order; x (B, C, H, W). Each is found by its path, its arrays by theirs."""

    def __init__(self, op: Any, tower: nn.Module, arrays: dict[str, mx.array]):
        self._op, self._arrays = op, arrays
        self.constants: list[Any] = []
        self._modules: dict[str, nn.Module] = dict(tower.named_modules())

    def tower(self, pixels: Any) -> Any:
        """Features (B, N, C) of pixels (B, H, W, 3)."""
        op = self._op
        x = op.transpose(pixels, op.constant([0, 3, 1, 2]))
        stem = self._array("patch_embed.conv.weight").transpose(0, 3, 1, 2)
        x = op.convolution(x, self._constant(stem), [2, 2], [1, 1], [1, 1], [1, 1])
        x = self._gelu(op.add(x, self._bias("patch_embed.conv")))
        x = self._gelu(self.depthwise("patch_embed.depthwise", x))
        x = self._gelu(self.linear("patch_embed.linear", x))
        stage = 0
        while f"stages.{stage}" in self._modules:
            x = self.stage(f"stages.{stage}", x)
            stage += 1
        x = self.conv_exp("conv_exp", x)
        return self._rows(x)

    def stage(self, path: str, x: Any) -> Any:
        """Downsampling and positions where the stage has them, then its blocks."""
        if f"{path}.downsample" in self._modules:
            x = self._gelu(self.groups(f"{path}.downsample.groups", x))
            x = self._gelu(self.linear(f"{path}.downsample.linear", x))
        if f"{path}.position" in self._modules:
            x = self.depthwise(f"{path}.position", x)
        block = 0
        while f"{path}.blocks.{block}" in self._modules:
            x = self.block(f"{path}.blocks.{block}", x)
            block += 1
        return x

    def block(self, path: str, x: Any) -> Any:
        """Tokens mixed by a convolution or by attention, then the convolutional MLP."""
        op = self._op
        if f"{path}.norm" in self._modules:
            x = op.add(x, self.attention(path, x))
        else:
            x = self.depthwise(f"{path}.token_mixer", x)
        y = self.depthwise(f"{path}.convffn.conv", x)
        y = self._gelu(self.linear(f"{path}.convffn.fc1", y))
        return op.add(x, self.linear(f"{path}.convffn.fc2", y))

    def attention(self, path: str, x: Any) -> Any:
        """The norm and the self-attention of a block."""
        op = self._op
        norm = self._modules[f"{path}.norm"]
        rows = self._rows(x)
        y = op.mvn(rows, op.constant([2]), True, float(norm.eps), "inside_sqrt")
        y = op.add(op.multiply(y, self._array_node(f"{path}.norm.weight")), self._array_node(f"{path}.norm.bias"))
        qkv = graphs.product(op, y, *self._matrix(f"{path}.token_mixer.qkv"))
        heads = op.reshape(qkv, op.constant([0, 0, 3, -1, HEAD_DIM]), True)
        q, k, v = (
            op.squeeze(part, op.constant([0]))
            for part in op.split(op.transpose(heads, op.constant([2, 0, 3, 1, 4])), 0, 3).outputs()
        )
        y = op.transpose(graphs.attention(op, q, k, v, None, HEAD_DIM**-0.5), op.constant([0, 2, 1, 3]))
        y = op.reshape(y, op.constant([0, 0, -1]), True)
        y = graphs.product(op, y, *self._matrix(f"{path}.token_mixer.proj"))
        y = op.transpose(y, op.constant([0, 2, 1]))
        return op.reshape(y, op.shape_of(x), False)

    def conv_exp(self, path: str, x: Any) -> Any:
        """The last convolution with its squeeze-and-excite gate."""
        op = self._op
        x = self.groups(f"{path}.groups", x)
        gate = op.reduce_mean(x, op.constant([2, 3]), True)
        gate = op.sigmoid(self.linear(f"{path}.expand", op.relu(self.linear(f"{path}.reduce", gate))))
        return self._gelu(op.multiply(x, gate))

    def groups(self, path: str, x: Any) -> Any:
        """A grouped convolution as its filters, one depthwise convolution each."""
        filters = 0
        while f"{path}.filters.{filters}" in self._modules:
            filters += 1
        parts = [self.depthwise(f"{path}.filters.{number}", x) for number in range(filters)]
        return self._op.concat(parts, 1)

    def depthwise(self, path: str, x: Any) -> Any:
        """One centred k x k filter per channel."""
        op, stride = self._op, self._modules[path].stride
        weight = self._array(f"{path}.weight")  # (C, k, k, 1)
        channels, kernel = weight.shape[:2]
        reach = kernel // 2
        filters = self._constant(weight.reshape(channels, 1, 1, kernel, kernel))
        y = op.group_convolution(x, filters, [stride] * 2, [reach] * 2, [reach] * 2, [1, 1])
        return op.add(y, self._bias(path)) if f"{path}.bias" in self._arrays else y

    def linear(self, path: str, x: Any) -> Any:
        """A linear layer at every pixel."""
        op = self._op
        weight, bias = self._parts(path)
        y = op.convolution(x, self._constant(weight[:, :, None, None]), [1, 1], [0, 0], [0, 0], [1, 1])
        return y if bias is None else op.add(y, self._constant(bias.reshape(1, -1, 1, 1)))

    def _gelu(self, x: Any) -> Any:
        return self._op.gelu(x, "erf")

    def _rows(self, x: Any) -> Any:
        """(B, C, H, W) -> (B, H * W, C)."""
        op = self._op
        rows = op.reshape(x, op.constant([0, 0, -1]), True)
        return op.transpose(rows, op.constant([0, 2, 1]))

    def _array(self, path: str) -> mx.array:
        if path not in self._arrays:
            raise _UnknownLayer(path)
        return self._arrays[path]

    def _constant(self, array: mx.array) -> Any:
        mx.eval(array)
        self.constants.append(tensor_of(array))
        node = self._op.constant(self.constants[-1], shared_memory=True)
        return node if array.dtype == mx.float32 else self._op.convert(node, "f32")

    def _array_node(self, path: str) -> Any:
        return self._constant(self._array(path))

    def _bias(self, path: str) -> Any:
        return self._constant(self._array(f"{path}.bias").reshape(1, -1, 1, 1))

    def _matrix(self, path: str) -> Sequence[Any]:
        weight, bias = self._parts(path)
        return [self._constant(weight)] if bias is None else [self._constant(weight), self._constant(bias)]

    def _parts(self, path: str) -> tuple[mx.array, mx.array | None]:
        """The matrix (O, I) that a layer multiplies with, and its bias (O,) or None."""
        layer = self._modules.get(path)
        if getattr(type(layer), "is_plain", False) is True:
            return self._array(f"{path}.weight"), self._arrays.get(f"{path}.bias")
        if layer is not None and f"{path}.lora_a" in self._arrays:
            return self._updated(path, layer)
        if layer is None or f"{path}.scales" not in self._arrays:
            raise _UnknownLayer(path)
        weight, scales = self._array(f"{path}.weight"), self._array(f"{path}.scales")
        offsets = self._arrays.get(f"{path}.biases")
        weight = mx.dequantize(weight, scales, offsets, layer.group_size, layer.bits, layer.mode)
        return weight.astype(mx.float32), self._arrays.get(f"{path}.bias")

    def _updated(self, path: str, layer: nn.Module) -> tuple[mx.array, mx.array | None]:
        """The matrix and bias of a layer with a low-rank update, whose rows have lengths of their own or not."""
        weight, bias = self._parts(f"{path}.layer")
        a, b = (self._array(f"{path}.{name}").astype(mx.float32) for name in ("lora_a", "lora_b"))
        weight = weight.astype(mx.float32) + layer.scale * (b @ a)
        lengths = self._arrays.get(f"{path}.magnitude")
        if lengths is not None:
            weight = weight * (lengths / mx.linalg.norm(weight, axis=1))[:, None]
        return weight, bias
