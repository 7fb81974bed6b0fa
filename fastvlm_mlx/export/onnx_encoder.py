"""Tower and projector as an ONNX graph: pixels (B, 3, H, W) -> image embeddings (B, N, D), any batch, height and width.

Filters see channels first, matrices see them last, so that runtimes quantise them as the products they are.
"""

from collections.abc import Iterable

from ..config import ATTENTION_STAGES, HEAD_DIM, ModelConfig
from ..convert.published import network_indices
from .encoder import Weights
from .onnx_graph import Graph

LAST = [0, 2, 3, 1]  # channels last
FIRST = [0, 3, 1, 2]


def encoder_graph(weights: Iterable[tuple[str, Weights]], config: ModelConfig, *, half: bool) -> Graph:
    """The encoder of these sizes, from tensors under their published names."""
    writer = _Writer(dict(weights), config, half)
    writer.encoder()
    return writer.graph


class _Writer:
    def __init__(self, weights: dict[str, Weights], config: ModelConfig, half: bool):
        self.weights, self.config, self.vision = weights, config, config.vision
        self.graph = Graph("vision_encoder", half=half)

    def encoder(self) -> None:
        g = self.graph
        x = g.input("pixel_values", "FLOAT", ["batch_size", 3, "height", "width"])
        for index, stride in enumerate((2, 2)):
            x = self.gelu(self.filters(x, f"vision.patch_embed.{index}.reparam_conv", stride))
        x = self.first(self.gelu(self.linear(self.last(x), "vision.patch_embed.2.reparam_conv")))
        for stage in range(len(self.vision.depths)):
            x = self.stage(x, stage)
        x = self.conv_exp(x)
        x = g("Reshape", self.last(x), g.constant(0, -1, self.vision.out_width))
        x = self.gelu(self.linear(x, "projector.linear_1"))
        x = self.linear(x, "projector.linear_2")
        g.output(x, "image_features", ["batch_size", "num_image_tokens", self.config.text.hidden_size])

    def stage(self, x: str, stage: int) -> str:
        downsample, position, blocks = network_indices(len(self.vision.depths))[stage]
        if downsample >= 0:
            home = f"vision.network.{downsample}.proj"
            x = self.gelu(self.filters(x, f"{home}.0.lkb_reparam", 2))
            x = self.first(self.gelu(self.linear(self.last(x), f"{home}.1.reparam_conv")))
        if position >= 0:
            x = self.filters(x, f"vision.network.{position}.reparam_conv")
        for block in range(self.vision.depths[stage]):
            home = f"vision.network.{blocks}.{block}"
            if stage in ATTENTION_STAGES:
                x = self.graph("Add", x, self.attention(x, home))
            else:
                x = self.filters(x, f"{home}.token_mixer.reparam_conv")
            y = self.last(self.filters(x, f"{home}.convffn.conv.conv"))
            y = self.linear(self.gelu(self.linear(y, f"{home}.convffn.fc1")), f"{home}.convffn.fc2")
            x = self.graph("Add", x, self.first(y))
        return x

    def attention(self, x: str, home: str) -> str:
        g = self.graph
        x = self.last(x)
        norm = [g.weight(f"{home}.norm.{part}", self.weights.pop(f"{home}.norm.{part}")) for part in ("weight", "bias")]
        y = g("LayerNormalization", x, *norm, axis=-1, epsilon=self.vision.layer_norm_eps)
        qkv = self.weights.pop(f"{home}.token_mixer.qkv.weight")
        width = len(qkv) // 3
        y = g("Reshape", g.linear(y, f"{home}.qkv", qkv), g.constant(0, -1, 3 * width // HEAD_DIM, HEAD_DIM))
        q, k, v = g.several("Split", 3, g("Transpose", y, perm=[0, 2, 1, 3]), axis=1, num_outputs=3)
        q = g("Mul", q, g.number(HEAD_DIM**-0.5))
        y = g("MatMul", g("Softmax", g("MatMul", q, g("Transpose", k, perm=[0, 1, 3, 2])), axis=-1), v)
        y = g("Reshape", g("Transpose", y, perm=[0, 2, 1, 3]), g.constant(0, -1, width))
        return self.first(g("Reshape", self.linear(y, f"{home}.token_mixer.proj"), g("Shape", x)))

    def conv_exp(self, x: str) -> str:
        g, home = self.graph, "vision.conv_exp"
        x = self.filters(x, f"{home}.reparam_conv")
        gate = self.last(g("ReduceMean", x, g.constant(2, 3), keepdims=1))
        gate = g("Relu", self.linear(gate, f"{home}.se.reduce"))
        gate = g("Sigmoid", self.linear(gate, f"{home}.se.expand"))
        return self.gelu(g("Mul", x, self.first(gate)))

    def filters(self, x: str, name: str, stride: int = 1) -> str:
        """A centred convolution of few inputs per output."""
        weight = self.weights.pop(f"{name}.weight")
        inputs = [x, self.graph.weight(f"{name}.weight", weight)]
        if f"{name}.bias" in self.weights:
            inputs.append(self.graph.weight(f"{name}.bias", self.weights.pop(f"{name}.bias")))
        reach = weight.shape[-1] // 2
        groups = 1 if name.endswith("patch_embed.0.reparam_conv") else len(weight) // self.widening(name)
        return self.graph("Conv", *inputs, pads=[reach] * 4, strides=[stride, stride], group=groups)

    def widening(self, name: str) -> int:
        """Outputs per channel of a filter."""
        if name == "vision.conv_exp.reparam_conv":
            return 2
        for stage, (downsample, _, _) in enumerate(network_indices(len(self.vision.depths))):
            if name.startswith(f"vision.network.{downsample}.proj"):
                return self.vision.widths[stage] // self.vision.widths[stage - 1]
        return 1

    def linear(self, x: str, name: str) -> str:
        """A matrix, or a 1x1 convolution, of channels that come last."""
        weight = self.weights.pop(f"{name}.weight")
        return self.graph.linear(x, name, weight.reshape(len(weight), -1), self.weights.pop(f"{name}.bias"))

    def gelu(self, x: str) -> str:
        return self.graph("Gelu", x)

    def last(self, x: str) -> str:
        return self.graph("Transpose", x, perm=LAST)

    def first(self, x: str) -> str:
        return self.graph("Transpose", x, perm=FIRST)
