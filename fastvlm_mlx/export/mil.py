"""An encoder as a program of Core ML's intermediate language (MIL), written operation by operation: pixels -> features.

Enters: tensors under their published names. Leaves: a program in which every tensor is (1, channels, H, W), which the
Neural Engine computes best (Apple, "Deploying Transformers on the Apple Neural Engine"): linear layers are 1x1
convolutions, heads are slices of the channels, norms are means and products, and the one transposition stands at the
end.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from ..config import ATTENTION_STAGES, HEAD_DIM, ModelConfig
from ..convert.published import network_indices
from ..errors import CheckpointError
from .encoder import Weights
from .options import PackageOptions
from .ranges import Scales
from .stored import Integers, Palette, stored

INPUT, OUTPUT = "images", "image_features"  # as Apple's app knows them
SMALLEST_NORMAL = 2.0**-14  # of float16

Value = Any  # a variable of MIL's


def program(
    weights: Iterable[tuple[str, Weights]], config: ModelConfig, scales: Scales, options: PackageOptions, opset: Any
) -> Any:
    """The encoder of these sizes as a MIL program for one picture of `config.image.size` pixels.

    Pixels (1, 3, S, S) float32 are 0-1 as an "array", 0-255 as an "image"; features come out as (1, N, C) float32, with
    the projector as image embeddings (1, N, D). The scales are absorbed on the way. Raises CheckpointError for weights
    that float16 cannot hold.
    """
    from coremltools.converters.mil import Builder
    from coremltools.converters.mil.mil import types

    side = config.image.size

    def build(images: Value) -> Value:  # whose argument's name the program's input gets
        return _Writer(Builder, dict(weights), config, scales, options).encoder(images)

    pixels = Builder.TensorSpec((1, 3, side, side), types.fp32)
    return Builder.program(input_specs=[pixels], opset_version=opset)(build)


class _Writer:
    """Writes the operations of one encoder, taking each weight as it is needed."""

    def __init__(
        self, builder: Any, weights: dict[str, Weights], config: ModelConfig, scales: Scales, options: PackageOptions
    ):
        self.mb, self.weights, self.scales, self.options = builder, weights, scales, options
        self.config, self.vision = config, config.vision
        self.half = options.half
        self.type: Any = np.float16 if self.half else np.float32

    def encoder(self, images: Value) -> Value:
        """From pixels to what the package gives."""
        x = self.mb.cast(x=images, dtype="fp16", name="pixels") if self.half else images
        if self.options.input == "image":
            x = self.mb.mul(x=x, y=self.type(1 / 255), name="levels")
        x = self.patch_embed(x)
        for stage in range(len(self.vision.depths)):
            x = self.stage(x, stage)
        x = self.conv_exp(x)
        if self.options.with_projector:
            x = self.projector(x)
        _, channels, height, width = x.shape
        x = self.mb.reshape(x=x, shape=[1, channels, height * width], name="tokens")
        last = {} if self.half else {"name": OUTPUT}
        x = self.mb.transpose(x=x, perm=[0, 2, 1], **last)
        return self.mb.cast(x=x, dtype="fp32", name=OUTPUT) if self.half else x

    def patch_embed(self, x: Value) -> Value:
        """The stem."""
        home = "vision.patch_embed"
        x = self.gelu(self.conv(x, f"{home}.0.reparam_conv", stride=2))
        x = self.gelu(self.conv(x, f"{home}.1.reparam_conv", stride=2))
        return self.gelu(self.conv(x, f"{home}.2.reparam_conv"))

    def stage(self, x: Value, stage: int) -> Value:
        """Downsampling, positions and blocks, the residual stream divided by the stage's scale."""
        downsample, position, blocks = network_indices(len(self.vision.depths))[stage]
        scale, entry = self.scales.streams[stage], 1.0
        if downsample >= 0:
            home = f"vision.network.{downsample}.proj"
            x = self.gelu(self.conv(x, f"{home}.0.lkb_reparam", stride=2, reads=self.scales.streams[stage - 1]))
            x = self.gelu(self.conv(x, f"{home}.1.reparam_conv"))
        if position >= 0:
            x = self.conv(x, f"vision.network.{position}.reparam_conv", writes=scale)
            entry = scale
        for i in range(self.vision.depths[stage]):
            home = f"vision.network.{blocks}.{i}"
            if stage in ATTENTION_STAGES:
                norm = self.scales.norms.get(f"vision.stages.{stage}.blocks.{i}.norm", 1.0)
                x = self.mb.add(x=x, y=self.attention(x, home, scale, norm))
            else:
                x = self.conv(x, f"{home}.token_mixer.reparam_conv", reads=entry, writes=scale)
                entry = scale
            x = self.mb.add(x=x, y=self.conv_ffn(x, f"{home}.convffn", scale))
        return x

    def conv_ffn(self, x: Value, home: str, scale: float) -> Value:
        """7x7, then an MLP at every pixel."""
        y = self.conv(x, f"{home}.conv.conv", reads=scale)
        y = self.gelu(self.conv(y, f"{home}.fc1"))
        return self.conv(y, f"{home}.fc2", writes=scale)

    def attention(self, x: Value, home: str, scale: float, norm: float) -> Value:
        """Attention over all pixels: what it adds to the stream. The norm's weights are in the projections."""
        name = home.replace("vision.", "").replace(".", "_")
        weight, bias = self.weights.pop(f"{home}.token_mixer.qkv.weight"), self.weights.pop(f"{home}.norm.bias")
        whole = weight.astype(np.float64)
        biases = np.split(whole @ bias.astype(np.float64), 3)
        matrices = np.split(whole * self.weights.pop(f"{home}.norm.weight").astype(np.float64), 3)
        matrices[0], biases[0] = matrices[0] * HEAD_DIM**-0.5, biases[0] * HEAD_DIM**-0.5
        x = self.norm(x, scale, norm)
        _, channels, height, width = x.shape
        heads = [1, channels // HEAD_DIM, HEAD_DIM, height * width]
        q, k, v = (
            self.mb.reshape(
                x=self.convolved(
                    x, matrix[:, :, None, None].astype(np.float32), each.astype(np.float32), f"{name}_{part}"
                ),
                shape=heads,
            )
            for part, matrix, each in zip("qkv", matrices, biases, strict=True)
        )
        scores = self.mb.matmul(x=q, y=k, transpose_x=True, transpose_y=False)
        y = self.mb.matmul(x=v, y=self.mb.softmax(x=scores, axis=-1), transpose_x=False, transpose_y=True)
        y = self.mb.reshape(x=y, shape=[1, channels, height, width])
        proj = self.weights.pop(f"{home}.token_mixer.proj.weight")[:, :, None, None]
        return self.convolved(
            y, proj / scale, self.weights.pop(f"{home}.token_mixer.proj.bias") / scale, f"{name}_proj"
        )

    def norm(self, x: Value, scale: float, factor: float) -> Value:
        """A layer norm over channels without weights, of x times `factor`, so that its squares stay inside float16."""
        if factor * scale != 1:
            x = self.mb.mul(x=x, y=self.type(factor * scale))
        y = self.mb.sub(x=x, y=self.mb.reduce_mean(x=x, axes=[1], keep_dims=True))
        variance = self.mb.reduce_mean(x=self.mb.square(x=y), axes=[1], keep_dims=True)
        epsilon = self.vision.layer_norm_eps * factor**2
        if self.half:
            epsilon = max(epsilon, SMALLEST_NORMAL)
        return self.mb.mul(x=y, y=self.mb.rsqrt(x=variance, epsilon=self.type(epsilon)))

    def conv_exp(self, x: Value) -> Value:
        """The last convolution, with squeeze-and-excite."""
        home, mean = "vision.conv_exp", self.scales.mean
        x = self.conv(x, f"{home}.reparam_conv", reads=self.scales.streams[-1])
        gate = x if mean == 1 else self.mb.mul(x=x, y=self.type(mean))
        gate = self.mb.reduce_mean(x=gate, axes=[2, 3], keep_dims=True)
        gate = self.mb.relu(x=self.conv(gate, f"{home}.se.reduce", reads=1 / mean))
        gate = self.mb.sigmoid(x=self.conv(gate, f"{home}.se.expand"))
        return self.gelu(self.mb.mul(x=x, y=gate))

    def projector(self, x: Value) -> Value:
        """Features to image embeddings."""
        for name in ("linear_1", "linear_2"):
            weight = self.weights.pop(f"projector.{name}.weight")[:, :, None, None]
            x = self.convolved(x, weight, self.weights.pop(f"projector.{name}.bias"), f"projector_{name}")
            x = self.gelu(x) if name == "linear_1" else x
        return x

    def gelu(self, x: Value) -> Value:
        """GELU with erf."""
        return self.mb.gelu(x=x, mode="EXACT")

    def conv(self, x: Value, name: str, *, stride: int = 1, reads: float = 1.0, writes: float = 1.0) -> Value:
        """A convolution by its published name, whose input is stored divided by `reads`, and its output by `writes`."""
        bias = self.weights.pop(f"{name}.bias", None)
        weight = self.weights.pop(f"{name}.weight") * np.float32(reads / writes)
        title = name.removeprefix("vision.").replace(".", "_")
        return self.convolved(x, weight, None if bias is None else bias / np.float32(writes), title, stride)

    def convolved(self, x: Value, weight: Weights, bias: Weights | None, name: str, stride: int = 1) -> Value:
        """A centred convolution: weight (O, I / groups, k, k)."""
        reach, groups = weight.shape[-1] // 2, x.shape[1] // weight.shape[1]
        form: dict[str, Any] = {} if bias is None else {"bias": self.checked(bias.astype(self.type), f"{name}.bias")}
        return self.mb.conv(
            x=x, weight=self.const(weight, name), strides=[stride, stride], pad_type="custom", pad=[reach] * 4,
            groups=groups, name=name, **form,
        )  # fmt: skip

    def const(self, weight: Weights, name: str) -> Value:
        """A weight as the package stores it."""
        if not self.half:
            return weight.astype(np.float32)
        form = stored(weight, self.options.tower_bits)
        title, newest = f"{name}_weight", self.options.target == "iOS18"
        if isinstance(form, Integers):
            scale = self.checked(form.scale, name)
            if newest:
                scale = scale.reshape(-1, *[1] * (weight.ndim - 1))
                return self.mb.constexpr_blockwise_shift_scale(data=form.q, scale=scale, name=title)
            return self.mb.constexpr_affine_dequantize(
                quantized_data=form.q, zero_point=np.int8(0), scale=scale, axis=0, name=title
            )
        if isinstance(form, Palette):
            self.checked(form.table, name)
            if newest:
                table = form.table.reshape(*[1] * weight.ndim, -1, 1)
                return self.mb.constexpr_lut_to_dense(indices=self.packed(form), lut=table, name=title)
            shape = np.array(weight.shape, np.uint32)
            return self.mb.constexpr_lut_to_dense(indices=form.packed(), lut=form.table, shape=shape, name=title)
        return self.checked(form, name)

    def packed(self, form: Palette) -> Any:
        """Indices in coremltools' own types of few bits."""
        from coremltools.converters.mil.mil import types

        return form.indices.astype({4: types.np_uint4_dtype, 6: types.np_uint6_dtype}[form.bits])

    def checked(self, array: Any, name: str) -> Any:
        """An array as it is; raises CheckpointError where float16 could not hold it."""
        if not np.isfinite(array).all():
            raise CheckpointError(f"`precision='float16'` cannot hold the weights {name}; write `precision='float32'`.")
        return array
