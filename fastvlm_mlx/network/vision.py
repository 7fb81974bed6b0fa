"""FastViTHD, the image encoder, in inference form: pixels (B, H, W, 3) -> features (B, N, 2 * widths[-1]).

Source: FastVLM (arXiv:2412.13303) on FastViT (arXiv:2303.14189); apple/ml-fastvlm, mobileclip/mci.py at 592b4ad.

Every branch, batch norm and layer scale is folded into its neighbours by `fastvlm_mlx.convert`, 1x1 convolutions are
Linear layers, and a convolution with r outputs per channel is r depthwise ones. Activations are channels-last
throughout. B batch, H W grid, C channels, N = ceil(H/64) * ceil(W/64) image tokens.
"""

import mlx.core as mx
import mlx.nn as nn

from ..backend.linear import Linear
from ..backend.ops import attention, depthwise, feed_forward, gelu
from ..config import ATTENTION_STAGES, HEAD_DIM, VisionConfig

SE_RATIO = 16  # channels per channel of the squeeze-and-excite bottleneck


class Depthwise(nn.Module):
    """One k x k filter per channel, centred, with or without bias; stride 2 takes the ceiling of odd sizes."""

    def __init__(self, channels: int, kernel: int, *, stride: int = 1, bias: bool = True):
        super().__init__()
        self.stride = stride
        self.weight = mx.zeros((channels, kernel, kernel, 1))
        if bias:
            self.bias = mx.zeros((channels,))

    def __call__(self, x: mx.array) -> mx.array:
        y = depthwise(x, self.weight, self.stride)
        return y + self.bias if "bias" in self else y


class DepthwiseGroups(nn.Module):
    """A grouped convolution with `outputs` filters per channel: C channels -> outputs * C, filter by filter."""

    def __init__(self, channels: int, outputs: int, kernel: int, *, stride: int):
        super().__init__()
        self.filters = [Depthwise(channels, kernel, stride=stride) for _ in range(outputs)]

    def __call__(self, x: mx.array) -> mx.array:
        return mx.concatenate([conv(x) for conv in self.filters], axis=-1)


class PatchEmbed(nn.Module):
    """The stem: 3x3 stride 2, 3x3 depthwise stride 2, 1x1; pixels (B, H, W, 3) -> (B, H/4, W/4, C)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, kernel_size=3, stride=2, padding=1)
        self.depthwise = Depthwise(channels, 3, stride=2)
        self.linear = Linear(channels, channels)

    def __call__(self, x: mx.array) -> mx.array:
        x = gelu(self.conv(x))
        x = gelu(self.depthwise(x))
        return gelu(self.linear(x))


class Downsample(nn.Module):
    """7x7 stride 2 with r outputs per channel, then 1x1: (B, H, W, C) -> (B, H/2, W/2, r * C)."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.groups = DepthwiseGroups(channels, out_channels // channels, 7, stride=2)
        self.linear = Linear(out_channels, out_channels)

    def __call__(self, x: mx.array) -> mx.array:
        x = gelu(self.groups(x))
        return gelu(self.linear(x))


class ConvFFN(nn.Module):
    """7x7 depthwise, then the two layers of an MLP at every pixel; (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, channels: int, ratio: int):
        super().__init__()
        self.conv = Depthwise(channels, 7, bias=False)
        self.fc1 = Linear(channels, ratio * channels)
        self.fc2 = Linear(ratio * channels, channels)

    def __call__(self, x: mx.array) -> mx.array:
        return feed_forward(self.conv(x), self.fc1, self.fc2)


class RepMixerBlock(nn.Module):
    """A block of stages 0-2: tokens are mixed by a 3x3 depthwise convolution."""

    def __init__(self, channels: int, ratio: int):
        super().__init__()
        self.token_mixer = Depthwise(channels, 3)
        self.convffn = ConvFFN(channels, ratio)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.token_mixer(x)
        return x + self.convffn(x)


class MHSA(nn.Module):
    """Multi-headed self-attention over all pixels of a picture; (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, channels: int):
        super().__init__()
        self.qkv = Linear(channels, 3 * channels, bias=False)
        self.proj = Linear(channels, channels)

    def __call__(self, x: mx.array) -> mx.array:
        B, H, W, _ = x.shape
        qkv = self.qkv(x).reshape(B, H * W, -1, HEAD_DIM).transpose(0, 2, 1, 3)
        y = attention(qkv)
        return self.proj(y.transpose(0, 2, 1, 3).reshape(x.shape))


class AttentionBlock(nn.Module):
    """A block of stages 3-4: tokens are mixed by attention; (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, channels: int, ratio: int, eps: float):
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=eps)
        self.token_mixer = MHSA(channels)
        self.convffn = ConvFFN(channels, ratio)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.token_mixer(self.norm(x))
        return x + self.convffn(x)


class Stage(nn.Module):
    """Downsampling (but for stage 0), positions as a 7x7 convolution (stages 3-4: RepCPE), then `depth` blocks."""

    def __init__(self, config: VisionConfig, index: int):
        super().__init__()
        channels, ratio = config.widths[index], config.mlp_ratio
        if index > 0:
            self.downsample = Downsample(config.widths[index - 1], channels)
        if index in ATTENTION_STAGES:
            self.position = Depthwise(channels, 7)
        self.blocks: list[nn.Module] = [
            AttentionBlock(channels, ratio, config.layer_norm_eps)
            if index in ATTENTION_STAGES
            else RepMixerBlock(channels, ratio)
            for _ in range(config.depths[index])
        ]

    def __call__(self, x: mx.array) -> mx.array:
        if "downsample" in self:
            x = self.downsample(x)
        if "position" in self:
            x = self.position(x)
        for block in self.blocks:
            x = block(x)
        return x


class ConvExp(nn.Module):
    """3x3 with two outputs per channel, squeeze-and-excite, GELU: (B, H, W, C) -> (B, H, W, 2C)."""

    def __init__(self, channels: int):
        super().__init__()
        doubled = 2 * channels
        self.groups = DepthwiseGroups(channels, 2, 3, stride=1)
        self.reduce = Linear(doubled, doubled // SE_RATIO)
        self.expand = Linear(doubled // SE_RATIO, doubled)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.groups(x)
        gate = mx.mean(x, axis=(1, 2))
        gate = mx.sigmoid(self.expand(mx.maximum(self.reduce(gate), 0)))
        return gelu(x * gate[:, None, None])


class FastViTHD(nn.Module):
    """The tower: pixels (B, H, W, 3), RGB, 0-1 -> features (B, N, 2 * widths[-1]), row by row of the grid."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.patch_embed = PatchEmbed(config.widths[0])
        self.stages = [Stage(config, index) for index in range(len(config.depths))]
        self.conv_exp = ConvExp(config.widths[-1])

    def __call__(self, pixels: mx.array) -> mx.array:
        x = self.patch_embed(pixels)
        for stage in self.stages:
            x = stage(x)
        x = self.conv_exp(x)
        return x.reshape(x.shape[0], -1, x.shape[-1])
