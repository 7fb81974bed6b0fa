"""How much rounding each layer changes the answers, and how a budget of bytes is spent on all layers.

Each layer is rounded alone to PROBE_BITS bits, and the KL divergence of the answers' logits is measured. For other bits
it is taken to grow in proportion to the squared error of the weights, which needs no pass through the network.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx

from ..config import QuantConfig
from ..quantize.recipes import BITS, GROUP_SIZES, Plan, bits_per_weight
from ..quantize.rounding import rounded

PROBE_BITS = 4  # bits


@dataclass(frozen=True)
class Choice:
    """One way to store a layer: its setting, its bytes, and the divergence expected of it in nats per answer token."""

    settings: QuantConfig
    bytes: float
    kl: float


def rounding_error(weight: mx.array, settings: QuantConfig, stored: mx.Dtype) -> float:
    """Sum of squared errors of a rounded weight (O, I)."""
    return float(mx.square(rounded(weight, settings, stored) - weight.astype(mx.float32)).sum().item())  # type: ignore[arg-type]


def settings_for(width: int) -> Iterator[QuantConfig]:
    """Every affine setting that a layer of `width` inputs can have."""
    for bits in BITS:
        for group in GROUP_SIZES:
            if width % group == 0:
                yield QuantConfig(bits, group)


def choices(weight: mx.array, probe: QuantConfig, kl: float, stored: mx.Dtype) -> list[Choice]:
    """The ways to store a layer that are worth their bytes, smallest first.

    `kl` is the divergence measured at `probe`, `stored` the dtype of the scales.
    """
    base = rounding_error(weight, probe, stored)
    every = []
    for settings in settings_for(weight.shape[1]):
        error = rounding_error(weight, settings, stored)
        expected = max(kl, 0.0) * (error / base if base > 0 else 1.0)
        every.append(Choice(settings, weight.size * bits_per_weight(settings) / 8, expected))
    return hull(every)


def hull(every: list[Choice]) -> list[Choice]:
    """The lower left convex hull of the choices over bytes and divergence."""
    best: list[Choice] = []
    for choice in sorted(every, key=lambda c: (c.bytes, c.kl)):
        if best and choice.kl >= best[-1].kl:
            continue
        while len(best) > 1 and _gain(best[-2], choice) >= _gain(best[-2], best[-1]):
            best.pop()
        best.append(choice)
    return best


def _gain(small: Choice, large: Choice) -> float:
    return (small.kl - large.kl) / (large.bytes - small.bytes)


def spend(layers: dict[str, list[Choice]], budget: float) -> Plan:
    """A setting for every layer, together at most `budget` bytes; they go where they reduce the divergence most."""
    place = dict.fromkeys(layers, 0)
    left = budget - sum(every[0].bytes for every in layers.values())
    while True:
        steps = [
            (_gain(every[at], every[at + 1]), path)
            for path, every in layers.items()
            if (at := place[path]) + 1 < len(every) and every[at + 1].bytes - every[at].bytes <= left
        ]
        if not steps:
            return {path: every[place[path]].settings for path, every in layers.items()}
        _, path = max(steps)
        at = place[path]
        left -= layers[path][at + 1].bytes - layers[path][at].bytes
        place[path] = at + 1
