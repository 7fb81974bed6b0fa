"""Which layers are quantised, at how many bits, and which are left alone, and why.

One rule decides (`plan`), from the shapes alone; `mixed` starts from it and spends its bytes by what calibration finds.
"""

from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn

from ..backend.ops import Backend
from ..config import ModelConfig, QuantConfig, is_whole
from ..errors import OptionError, listed, shown

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
DEFAULT_GROUP = 64
MODES: dict[str, QuantConfig] = {  # MLX's kinds of scale; all but affine come in one width and one group size
    "affine": QuantConfig(4, DEFAULT_GROUP, "affine"),
    "mxfp4": QuantConfig(4, 32, "mxfp4"),
    "mxfp8": QuantConfig(8, 32, "mxfp8"),
    "nvfp4": QuantConfig(4, 16, "nvfp4"),
}
CAREFUL = ("text.embed_tokens", "text.lm_head", "projector.")  # every token passes them
TOWER = "vision."
BILLION = 1_000_000_000
SMALL = 100_000_000  # parameters of a decoder that there is nothing to gain from quantising

Plan = dict[str, QuantConfig]


@dataclass(frozen=True)
class Recipe:
    """Bits of the decoder's layers, at least `careful` for embedding, head and projector; of the tower's, or None.

    With `target_bits`, calibration spends that many bits per weight, scales counted, over all of these layers.
    """

    name: str
    bits: int = 4
    careful: int = 8
    tower: int | None = None
    mode: str = "affine"
    group_size: int | None = None
    target_bits: float | None = None


RECIPES = {
    "4bit": Recipe("4bit", 4),
    "8bit": Recipe("8bit", 8),
    "small": Recipe("small", 4, tower=8),
    "mixed": Recipe("mixed", 4, target_bits=4.5),
    "plain": Recipe("plain", 4, careful=4),  # what mlx-lm and mlx-vlm do by default, to compare with
}


def check_bits(bits: int | None) -> None:
    """Raise OptionError unless MLX has a quantisation of so many bits; None stands for none."""
    if bits is not None and not (is_whole(bits) and bits in BITS):
        raise OptionError(f"`bits` is {shown(bits)}, expected 2, 3, 4, 5, 6 or 8.")


def usual_bits(config: ModelConfig, backend: Backend) -> int:
    """Bits to load a decoder with for a conversation where none are asked for; 0 for as stored."""
    if backend == "cpu" or config.quantization or config.text.parameters < SMALL:
        return 0
    return 8 if config.text.parameters < BILLION else 4


def choose_if_asked(
    name: str | None, *, bits: int | None, mode: str | None, group_size: int | None, pictures: object = None
) -> "Recipe | None":
    """The recipe that a conversion's options ask for, None where they ask for none.

    Raises OptionError where they contradict each other, and for options of quantising alone.
    """
    if name is None and bits is None and mode is None:
        if group_size is not None or pictures is not None:
            raise OptionError(
                "`group_size` and `pictures` belong to quantising; give `recipe`, `bits` or `mode` as well."
            )
        return None
    return choose(name, bits=bits, mode=mode, group_size=group_size)


def choose(
    name: str | None = None,
    *,
    bits: int | None = None,
    mode: str | None = None,
    group_size: int | None = None,
    target_bits: float | None = None,
    tower: bool = False,
) -> Recipe:
    """The recipe that options ask for, `4bit` where they ask for nothing; raises OptionError for a contradiction."""
    check_bits(bits)
    if name is not None and name not in RECIPES:
        raise OptionError(f"`recipe` is {shown(name)}, expected one of {listed(RECIPES)}.")
    if name is not None and bits is not None:
        raise OptionError("`recipe` and `bits` were given together; choose one.")
    if mode is not None and mode not in MODES:
        raise OptionError(f"`mode` is {shown(mode)}, expected one of {listed(MODES)}.")
    fixed = MODES[mode] if mode not in (None, "affine") else None
    if fixed is not None:
        if bits not in (None, fixed.bits) or group_size not in (None, fixed.group_size):
            raise OptionError(
                f"{mode} has {fixed.bits} bits in groups of {fixed.group_size}; leave `bits` and `group_size` out."
            )
        if name is not None:
            raise OptionError(f"`recipe` {name!r} and `mode` {mode!r} were given together; choose one.")
    elif group_size is not None and group_size not in GROUP_SIZES:
        raise OptionError(f"`group_size` is {shown(group_size)}, expected one of {listed(GROUP_SIZES)}.")
    bits, group_size = bits and int(bits), group_size and int(group_size)  # Python's own: NumPy's wrap around
    recipe = RECIPES[name or "4bit"]
    if bits is not None:
        recipe = replace(RECIPES["4bit"], name=f"{bits}bit", bits=bits)
    if fixed is not None:
        recipe = Recipe(fixed.mode, fixed.bits, mode=fixed.mode, group_size=fixed.group_size)
    elif group_size is not None:
        recipe = replace(recipe, group_size=group_size)
    if tower:
        recipe = replace(recipe, tower=recipe.tower or (recipe.bits if recipe.target_bits else 8))
    if target_bits is not None:
        if recipe.target_bits is None:
            raise OptionError(
                "`target_bits` was given, but only the recipe 'mixed' spends a budget; choose it, or leave it out."
            )
        if not 2.25 <= target_bits <= 8.5:
            raise OptionError(
                f"`target_bits` is {shown(target_bits)}, expected 2.25 to 8.5 bits per weight, scales counted."
            )
        recipe = replace(recipe, target_bits=float(target_bits))
    return recipe


def plan(model: nn.Module, recipe: Recipe) -> tuple[Plan, dict[str, str]]:
    """(layers to quantise by path, layers left alone by path with the reason).

    A width that is no multiple of the group size takes the next smaller group. Raises OptionError where not a single
    layer can take the group size asked for.
    """
    chosen: Plan = {}
    left: dict[str, str] = {}
    widths: set[int] = set()
    for path, layer in model.named_modules():
        weight = layer.get("weight")
        if weight is None or weight.ndim < 2:  # a norm, or a module of modules
            continue
        if not isinstance(layer, (nn.Linear, nn.Embedding)):
            left[path] = "a convolution, which MLX does not quantise"
        elif path.startswith(TOWER) and recipe.tower is None:
            left[path] = "the image encoder is kept exact"
        else:
            settings = _settings(path, weight, recipe)
            widths.add(weight.shape[-1])
            if settings is None:
                left[path] = f"its width {weight.shape[-1]} is no multiple of {GROUP_SIZES[0]}, the smallest group"
            else:
                chosen[path] = settings
    asked = recipe.group_size
    if widths and not any(asked is None or settings.group_size == asked for settings in chosen.values()):
        raise OptionError(
            f"No layer's width is a multiple of the group size {asked or GROUP_SIZES[0]} "
            f"(widths {listed(sorted(widths))}); choose a smaller one."
        )
    return chosen, left


def _settings(path: str, weight: mx.array, recipe: Recipe) -> QuantConfig | None:
    """Bits, group and mode of one layer; None where no group size divides its width."""
    width, bits, fixed = weight.shape[-1], recipe.bits, MODES[recipe.mode]
    if path.startswith(CAREFUL):
        bits = max(bits, recipe.careful)
    elif path.startswith(TOWER):
        bits = max(bits, recipe.tower or 0)
    elif fixed.mode != "affine" and width % fixed.group_size == 0:
        return fixed
    asked = recipe.group_size if recipe.mode == "affine" else None
    sizes = [size for size in GROUP_SIZES if size <= (asked or DEFAULT_GROUP) and width % size == 0]
    return QuantConfig(bits, max(sizes)) if sizes else None


def bits_per_weight(settings: QuantConfig) -> float:
    """Bits that one weight takes, its share of the group's scale (and offset) counted."""
    overhead = {"affine": 32, "mxfp4": 8, "mxfp8": 8, "nvfp4": 8}[settings.mode]
    return settings.bits + overhead / settings.group_size
