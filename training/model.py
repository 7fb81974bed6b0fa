"""The trainable FastVLM: FastViTHD in its multi-branch training form, a two-layer projector, a Qwen2 decoder.

Pixels (B, 3, S, S), RGB, 0-1, enter; logits over the answers' tokens leave. The tower is timm's ``FastVit`` with the
options of ``fastvit_mci3``; the decoder is transformers' ``Qwen2ForCausalLM``. ``Auxiliary`` holds the heads that help
the tower to learn and are dropped at export.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

os.environ.setdefault("TIMM_FUSED_ATTN", "0")  # read by timm at import

try:
    import torchvision  # noqa: F401
except (
    RuntimeError
):  # PyPI's torchvision beside a CPU build of torch: it asks for two operators that its library has not brought
    _OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _OPERATORS.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from timm.layers.norm import LayerNorm2d
from timm.models.fastvit import FastVit, RepConditionalPosEnc
from transformers import Qwen2Config, Qwen2ForCausalLM

IMAGE_STRIDE = 64  # pixels of the picture per cell of the tower's output, along each axis
MIDDLE_STRIDE = 32  # the same for the output of stage 3
FINE_STRIDE = 16  # and of stage 2
LAYER_SCALE = 0.5  # timm starts at 1e-5, far too small for a training of hours


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of one model. Widths are whole multiples of the one before."""

    image_size: int = 192
    depths: tuple[int, ...] = (1, 1, 2, 2, 2)
    widths: tuple[int, ...] = (32, 64, 128, 256, 256)
    vocab_size: int = 576
    hidden_size: int = 192
    layers: int = 4
    heads: int = 3
    kv_heads: int = 1
    intermediate_size: int = 448
    max_positions: int = 2048

    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        """The sizes that a training state carries."""
        sizes: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(text).items()}
        return cls(**sizes)

    @property
    def vision_width(self) -> int:
        """Channels of one image token as the tower emits it."""
        return 2 * self.widths[-1]

    @property
    def image_tokens(self) -> int:
        """Image tokens of one picture, N."""
        return (self.image_size // IMAGE_STRIDE) ** 2


class Float32Backward(torch.autograd.Function):
    """A depthwise convolution computed in bfloat16 whose gradients are computed in float32.

    Torch's CPU build has no fast kernels for the gradients of strided depthwise convolutions in bfloat16.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
        """Convolve (B, C, H, W) with one filter (C, 1, k, k) per channel."""
        ctx.save_for_backward(x, weight)
        ctx.geometry = stride, padding
        return torch.conv2d(x.bfloat16(), weight.bfloat16(), None, stride, padding, 1, weight.shape[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """The gradients of input and weight."""
        x, weight = ctx.saved_tensors
        stride, padding = ctx.geometry
        of_x, of_weight, _ = torch.ops.aten.convolution_backward(
            gradient.float(), x.float(), weight.float(), None, stride, padding, (1, 1), False, (0, 0), weight.shape[0],
            (True, True, False),
        )  # fmt: skip
        return of_x.to(x.dtype), of_weight, None, None


class Depthwise(nn.Conv2d):
    """A grouped convolution with one or more outputs per group, computed as a depthwise one on repeated channels.

    Parameters and result are those of ``nn.Conv2d``; several times faster backwards on a CPU.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C, H, W) to (B, rC, H', W')."""
        ratio = self.out_channels // self.in_channels
        if ratio > 1:
            last = x.permute(0, 2, 3, 1).unsqueeze(-1)
            x = last.expand(*last.shape[:-1], ratio).flatten(-2).permute(0, 3, 1, 2)
        if not torch.is_autocast_enabled("cpu"):
            return nn.functional.conv2d(x, self.weight, self.bias, self.stride, self.padding, 1, self.out_channels)
        with torch.autocast("cpu", enabled=False):
            y: Tensor = Float32Backward.apply(x, self.weight, self.stride, self.padding)
        return y if self.bias is None else y + self.bias.to(y.dtype)[:, None, None]


def build_tower(config: ModelConfig) -> FastVit:
    """FastViTHD in training form, without the pooled head."""
    position = partial(RepConditionalPosEnc, spatial_shape=(7, 7))
    options: dict[str, Any] = {
        "layers": config.depths,
        "embed_dims": config.widths,
        "token_mixers": ("repmixer", "repmixer", "repmixer", "attention", "attention"),
        "mlp_ratios": (4, 4, 4, 4, 4),
        "downsamples": (False, True, True, True, True),
        "se_downsamples": (False,) * 5,
        "pos_embs": (None, None, None, position, position),
        "lkc_use_act": True,
        "stem_use_scale_branch": False,
        "norm_layer": partial(LayerNorm2d, eps=1e-5),
        "layer_scale_init_value": LAYER_SCALE,
        "cls_ratio": 2.0,
        "num_classes": 0,
        "inference_mode": False,
    }
    return FastVit(**options)


def build_decoder(config: ModelConfig) -> Qwen2ForCausalLM:
    """A Qwen2 decoder with tied embeddings."""
    options: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "attn_implementation": "eager",  # the fused one is slower backwards on a CPU
        "use_cache": False,
    }
    return Qwen2ForCausalLM(Qwen2Config(**options))


class FastVLM(nn.Module):
    """Tower, projector and decoder."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tower = build_tower(config)
        self.projector = nn.Sequential(
            nn.Linear(config.vision_width, config.hidden_size),
            nn.GELU(),
            nn.Linear(config.hidden_size, config.hidden_size),
        )
        self.decoder = build_decoder(config)
        for module in list(self.tower.modules()):
            if isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels:
                module.__class__ = Depthwise
        for module in self.tower.modules():  # timm's 0.02 is for widths of 96 and more and many more steps
            if isinstance(module, nn.Conv2d) and module.groups == 1:
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")

    def channels_last(self) -> FastVLM:
        """This model with its tower's kernels in the order in which convolutions are fastest on a CPU."""
        tower: Any = self.tower
        tower.to(memory_format=torch.channels_last)
        return self

    def see(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The tower's cells.

        :param pixels: (B, 3, S, S), RGB, 0-1.
        :return: the cells of stage 2 (B, (S/16)^2, C2), of stage 3 (B, (S/32)^2, C3) and the image tokens
            (B, N, C), all row-major.
        """
        x = self.tower.stem(pixels)
        outputs = []
        for stage in self.tower.stages:
            x = stage(x)
            outputs.append(x)
        fine, middle, last = (y.flatten(2).transpose(1, 2) for y in (outputs[2], outputs[3], self.tower.final_conv(x)))
        return fine, middle, last

    def embed(self, cells: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """The decoder's input: text before the image, image tokens, text after it, (B, L, D)."""
        table = self.decoder.get_input_embeddings()
        return torch.cat([table(before), self.projector(cells), table(after)], dim=1)

    def hidden(self, embeddings: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Final hidden states (B, L, D) under an additive mask (B, 1, L, L)."""
        output: Any = self.decoder.model(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, use_cache=False
        )
        states: Tensor = output.last_hidden_state
        return states


@dataclass(frozen=True)
class AuxiliarySizes:
    """How many things each auxiliary head tells apart."""

    shapes: int = 6
    colours: int = 8
    characters: int = 63  # 62 characters and "none"
    columns: int = 8  # slots along the width of a cell in which a character's centre may lie
    middle_columns: int = 4
    fine_columns: int = 2
    positions: int = 6  # characters of the longest text
    max_count: int = 4


class Auxiliary(nn.Module):
    """Heads on the tower's cells, used in training only."""

    def __init__(self, config: ModelConfig, sizes: AuxiliarySizes) -> None:
        super().__init__()
        self.sizes = sizes
        width, middle, fine = config.vision_width, config.widths[3], config.widths[2]
        self.objects = nn.Linear(width, sizes.shapes + sizes.colours + sizes.shapes * sizes.colours)
        nn.init.constant_(self.objects.bias, -4.0)  # nearly all of its targets are 0
        self.places = nn.Linear(width, sizes.shapes * 2)
        self.columns = nn.Linear(width, sizes.columns * sizes.characters)
        self.count = nn.Linear(width, sizes.max_count + 1 + sizes.shapes * (sizes.max_count + 1))
        self.string = nn.Linear(width, sizes.positions * sizes.characters)
        self.middle_objects = nn.Linear(middle, sizes.shapes + 1 + sizes.colours + 1)
        self.middle_columns = nn.Linear(middle, sizes.middle_columns * sizes.characters)
        self.fine_objects = nn.Linear(fine, sizes.shapes + 1 + sizes.colours + 1)
        self.fine_columns = nn.Linear(fine, sizes.fine_columns * sizes.characters)

    def forward(self, fine: Tensor, middle: Tensor, cells: Tensor) -> dict[str, Tensor]:
        """Logits of every head, per cell or per picture, from what ``FastVLM.see`` returns."""
        pooled = cells.mean(1)
        return {
            "objects": self.objects(cells),
            "places": self.places(cells).unflatten(-1, (self.sizes.shapes, 2)),
            "columns": self.columns(cells).unflatten(-1, (self.sizes.columns, -1)),
            "count": self.count(pooled).unflatten(-1, (-1, self.sizes.max_count + 1)),
            "string": self.string(pooled).unflatten(-1, (self.sizes.positions, -1)),
            "middle_objects": self.middle_objects(middle),
            "middle_columns": self.middle_columns(middle).unflatten(-1, (self.sizes.middle_columns, -1)),
            "fine_objects": self.fine_objects(fine),
            "fine_columns": self.fine_columns(fine).unflatten(-1, (self.sizes.fine_columns, -1)),
        }
