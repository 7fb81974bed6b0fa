"""Estimates, from a model's shapes, of what every recipe would make of it: bytes in a folder and in memory."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..backend.ops import Backend
from ..config import ModelConfig, check_resolution
from ..decoding.engine import Engine
from ..diagnostics import random_model
from ..errors import HubError, OptionError
from ..hub.names import hub_model
from ..network import memory
from ..network.model import FastVLM
from ..quantize.recipes import RECIPES, Recipe, plan

# Apple's repositories and archives, and the repositories of MLX's community that hold the same weights.
PUBLISHED = re.compile(
    r"apple/FastVLM-(0\.5B|1\.5B|7B)|mlx-community/FastVLM-(0\.5B|1\.5B|7B)-bf16|llava-fastvithd_(0\.5b|1\.5b|7b)_stage[23](?:\.zip)?",
    re.IGNORECASE,
)
GPU: Backend = (
    "metal"  # estimates are for a GPU: a CPU computes in float32 and keeps dequantised copies (backend/ready.py)
)


@dataclass(frozen=True)
class Estimate:
    """Sizes in bytes by one recipe: the weights in a folder (`stored`), and what is in a GPU's memory while it answers.

    `cache` holds `context` positions; `total` is the sum of weights, cache and activations.
    """

    recipe: str
    stored: int
    weights: int
    cache: int
    activations: int
    total: int
    context: int


def of(model: str, *, tokenizer: str | None = None, resolution: int | None = None) -> list[Estimate]:
    """Estimates for a model as it is and by each recipe.

    `model` is a model on this machine, a published size ("0.5b", see `random_model`), or the name of a published model,
    of which nothing is downloaded. Raises HubError where it is none of these, and OptionError where it is quantised
    already.
    """
    if model in random_model.SIZES and not os.path.isdir(model):  # noqa: PTH112
        config = _of_size(model, resolution)
    else:
        try:
            config = Engine.open(model, tokenizer=tokenizer, resolution=resolution, cached_only=True).config
        except HubError as error:
            size = published_size(model)
            if size is None:
                sizes = ", ".join(size for size in random_model.SIZES if size != "small")  # made up for tests
                raise HubError(f"{str(error).rstrip('.')}. Published sizes are {sizes}.") from error
            config = _of_size(size, resolution)
    if config.quantization:
        raise OptionError(f"{model} is quantised already; name the model it was made from.")
    return [_estimate(config, config.dtype), *(_estimate(config, name, recipe) for name, recipe in RECIPES.items())]


def _of_size(size: str, resolution: int | None) -> ModelConfig:
    check_resolution(resolution)
    config = random_model.config(size)
    return config if resolution is None else replace(config, image=replace(config.image, size=resolution))


def published_size(model: str) -> str | None:
    """The size of a published model, by its name, its address or the size itself ("7b"); None for others."""
    if model.lower() in random_model.SIZES:
        return model.lower()
    named = hub_model(model)
    found = PUBLISHED.fullmatch(model if named is None else named.name)
    return next(filter(None, found.groups())).lower() if found else None


def _estimate(config: ModelConfig, name: str, recipe: Recipe | None = None) -> Estimate:
    """The estimate of one recipe; `mixed` is counted at its target, which is what four bits in groups of 64 take."""
    if recipe is not None:
        same = recipe if recipe.target_bits is None else replace(recipe, target_bits=None, careful=recipe.bits)
        config = replace(config, quantization=plan(FastVLM(config), same)[0])
    held = memory.estimate(config, backend=GPU)
    stored, weights = sum(memory.weight_bytes(config).values()), sum(held.weights.values())
    return Estimate(name, stored, weights, held.cache, held.activations, held.total, held.context)


COLUMNS = ("recipe", "folder", "of it", "weights", "cache", "activations", "in use")


def table(estimates: Sequence[Estimate]) -> str:
    """The estimates as aligned text, one line per recipe."""
    whole = estimates[0].stored
    rows: list[tuple[str, ...]] = [COLUMNS]
    for each in estimates:
        sizes = (each.weights, each.cache, each.activations, each.total)
        rows.append((each.recipe, _gb(each.stored), f"{100 * each.stored / whole:.0f} %", *map(_gb, sizes)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join(
        [
            *lines,
            f"One picture and {estimates[0].context} positions, on a GPU; weights are exact, activations estimated.",
        ]
    )


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.3f} GB"
