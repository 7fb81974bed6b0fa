"""AdamW with a rate for each part, warmed up and falling as a cosine: `mlx.optimizers` put together.

PyTorch's AdamW is the reference: bias-corrected, eps 1e-8, weight decay apart from the gradient and of matrices alone.
"""

from collections.abc import Callable, Mapping

import mlx.core as mx
import mlx.optimizers as optimizers

from .options import TuneOptions
from .parts import group_of

Filter = Callable[[str, mx.array], bool]


def schedule(peak: float, warmup: float, steps: int) -> Callable[[mx.array], mx.array]:
    """The learning rate by step: up to `peak` over the share `warmup` of all steps, then down to 0 as a cosine."""
    rising = round(warmup * steps)
    falling: Callable[[mx.array], mx.array] = optimizers.cosine_decay(peak, max(1, steps - rising))
    if not rising:
        return falling
    rise = optimizers.linear_schedule(peak / (rising + 1), peak, rising)
    joined: Callable[[mx.array], mx.array] = optimizers.join_schedules([rise, falling], [rising])
    return joined


def optimizer_for(options: TuneOptions, learned: Mapping[str, mx.array], steps: int) -> optimizers.MultiOptimizer:
    """An optimizer for the parameters that learn, by name, over so many steps; its state is that of none taken yet."""
    rates = {"decoder": options.lr, "projector": options.projector_lr, "tower": options.tower_lr}
    kinds = dict.fromkeys((group_of(name), array.ndim > 1) for name, array in learned.items())
    parts, filters = [], []
    for group, decays in kinds:
        rate = rates[group]
        assert rate is not None  # resolved
        decay = options.weight_decay if decays else 0.0
        parts.append(optimizers.AdamW(schedule(rate, options.warmup, steps), weight_decay=decay, bias_correction=True))
        filters.append(_filter(group, decays))
    return optimizers.MultiOptimizer(parts, filters[:-1])


def _filter(group: str, decays: bool) -> Filter:
    return lambda name, array: group_of(name) == group and (array.ndim > 1) == decays
