"""Fewer bits per weight: which layers, at how many bits, and which are left alone, and why.

One rule decides (`plan`). The decoder's layers take the bits asked for; embedding, head and projector take at least 8, since
every token passes them; the tower stays as it is.
"""

import mlx.core as mx
import mlx.nn as nn

from .config import QuantConfig
from .errors import CheckpointError, OptionError, listed, shown

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
CAREFUL_BITS = 8
CAREFUL = ("text.embed_tokens", "text.lm_head", "projector.")

Plan = dict[str, QuantConfig]


def check_bits(bits: int | None) -> None:
    """Raise OptionError unless MLX has a quantisation of so many bits; None stands for none."""
    if bits is not None and bits not in BITS:
        raise OptionError(f"bits is {shown(bits)}, expected one of {listed(BITS)}.")


def plan(model: nn.Module, bits: int, group_size: int = 64) -> tuple[Plan, dict[str, str]]:
    """(layers to quantise by path, layers left alone by path with the reason), for affine quantising."""
    check_bits(bits)
    if group_size not in GROUP_SIZES:
        raise OptionError(f"group_size is {shown(group_size)}, expected one of {listed(GROUP_SIZES)}.")
    chosen: Plan = {}
    left: dict[str, str] = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, (nn.Linear, nn.Embedding)):
            continue
        width = layer.weight.shape[-1]
        if path.startswith("vision."):
            left[path] = "the image encoder is kept exact"
        elif width % group_size:
            left[path] = f"its width {width} is not a multiple of the group size {group_size}"
        else:
            chosen[path] = QuantConfig(max(bits, CAREFUL_BITS) if path.startswith(CAREFUL) else bits, group_size)
    return chosen, left


def apply(model: nn.Module, chosen: Plan) -> None:
    """Replace the chosen layers by quantised ones, in place; their weights are quantised if they hold any."""

    def settings(path: str, _: nn.Module) -> bool | dict[str, int | str]:
        if path not in chosen:
            return False
        layer = chosen[path]
        return {"bits": layer.bits, "group_size": layer.group_size, "mode": layer.mode}

    try:
        nn.quantize(model, class_predicate=settings)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"MLX cannot quantise as config.json says ({str(error)[:200]}); convert the model again.") from error


def quantized(name: str, weight: mx.array, settings: QuantConfig) -> list[tuple[str, mx.array]]:
    """A weight "PATH.weight" (O, I) as its quantised layer's tensors: packed weight, scales, and biases if the mode has them."""
    parts = mx.quantize(weight, group_size=settings.group_size, bits=settings.bits, mode=settings.mode)
    path = name.removesuffix("weight")
    return [(path + part, tensor) for part, tensor in zip(("weight", "scales", "biases"), parts, strict=False)]
