"""The recipe `mixed`: a model's own answers about pictures -> scales folded into it, and bits for each layer.

Three passes, one step of the network at a time; each result is written to a file, so that an interrupted run continues:
scales are searched and folded in (awq.py), layers are rounded one by one (sensitivity.py), the budget is spent. In
memory are the model, the examples at one step, one layer more and the logits of a few tokens. The same examples always
give the same plan.
"""

import hashlib
import json
import os
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from ..config import QuantConfig
from ..decoding.engine import Engine
from ..errors import CheckpointError, OptionError, OutputError
from ..files import safetensors
from ..quantize.layers import layer_at, put_layer
from ..quantize.recipes import Plan, Recipe, bits_per_weight, plan
from ..quantize.rounding import rounded, scale_type
from . import awq, sensitivity
from .chain import Chain, Scores
from .examples import Examples
from .quality import divergence

Report = Callable[[], None]  # called after every step


@dataclass
class SearchState:
    """What a calibration has found so far, in a file beside the result; with `path` None, in memory only."""

    path: Path | None
    fingerprint: str
    scales: dict[str, mx.array] = field(default_factory=dict)  # per layer
    kl: dict[str, float] = field(default_factory=dict)  # per layer, rounded alone

    @classmethod
    def open(cls, path: Path | None, fingerprint: str) -> "SearchState":
        """Read the state of an interrupted calibration with this fingerprint; else start an empty one."""
        found = cls(path, fingerprint)
        if path is None or not path.exists():
            return found
        try:
            safetensors.read_header(path)
            loaded = cast(
                tuple[dict[str, mx.array], dict[str, str]],
                mx.load(str(path), format="safetensors", return_metadata=True),
            )
        except (CheckpointError, RuntimeError, ValueError):
            return found
        arrays, about = loaded
        if about.get("fingerprint") != fingerprint:
            return found
        mx.eval(arrays)
        found.scales = arrays
        found.kl = json.loads(about["kl"])
        return found

    def save(self) -> None:
        """Write the state atomically; raises OutputError."""
        if self.path is None:
            return
        partial = self.path.with_name(f".{self.path.name}.safetensors")
        try:
            mx.save_safetensors(str(partial), self.scales, {"fingerprint": self.fingerprint, "kl": json.dumps(self.kl)})
            os.replace(partial, self.path)  # noqa: PTH105
        except (OSError, RuntimeError) as error:
            partial.unlink(missing_ok=True)
            raise OutputError(
                f"{self.path.parent} cannot take the state of the calibration; make room there.",
                path=self.path.parent,
            ) from error

    def remove(self) -> None:
        """Remove the file."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def steps(engine: Engine, examples: Examples, recipe: Recipe) -> int:
    """The number of times that `calibrate` will call its `report`."""
    chosen, _ = plan(engine.model, recipe)
    return len(Chain(engine.model, examples, chosen).steps) + len(chosen)


def calibrate(
    engine: Engine, examples: Examples, recipe: Recipe, found: SearchState, report: Report = lambda: None
) -> Plan:
    """Fold scales into the model, in place, and choose the bits of every layer within the recipe's budget.

    `found` is what an interrupted run has found already. Raises OptionError for a budget that is too small.
    """
    model, stored = engine.model, scale_type(engine.config.dtype)
    chosen, _ = plan(model, recipe)
    budget = budget_bytes(model, chosen, recipe)
    chain = Chain(model, examples, chosen)
    exact = chain.scores()
    _fold(chain, chosen, found, getattr(mx, engine.config.dtype), stored, report)
    _probe(chain, chosen, found, exact, stored, report)
    layers = {
        path: sensitivity.choices(layer_at(model, path).weight, probe(chosen, path), found.kl[path], stored)
        for path in chosen
    }
    return sensitivity.spend(layers, budget)


def fingerprint(engine: Engine, examples: Examples, recipe: Recipe) -> str:
    """A digest of what a calibration depends on: the model's weights, the examples and the recipe."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr((engine.config, recipe)).encode() + examples.fingerprint().encode())
    for name, array in engine.model.flat_parameters().items():
        digest.update(f"{name} {mx.abs(array).astype(mx.float32).sum().item()!r}".encode())
    return digest.hexdigest()


def probe(chosen: Plan, path: str) -> QuantConfig:
    """The setting that a layer is rounded to when it is measured alone."""
    return QuantConfig(sensitivity.PROBE_BITS, chosen[path].group_size)


def budget_bytes(model: nn.Module, chosen: Plan, recipe: Recipe) -> float:
    """The bytes that all chosen layers may take; raises OptionError where even the fewest bits take more."""
    weights = {path: layer_at(model, path).weight for path in chosen}
    size = sum(weight.size for weight in weights.values())
    least = (
        sum(w.size * min(map(bits_per_weight, sensitivity.settings_for(w.shape[1]))) for w in weights.values()) / size
    )
    if recipe.target_bits is None or recipe.target_bits < least:
        raise OptionError(
            f"`target_bits` is {recipe.target_bits}, and the least these layers take is {least:.2f}; raise it."
        )
    return float(size * recipe.target_bits / 8)


def _fold(chain: Chain, chosen: Plan, found: SearchState, dtype: mx.Dtype, stored: mx.Dtype, report: Report) -> None:
    """Record the inputs of every layer that can be scaled, search its scales and fold them in."""
    model, state = chain.model, chain.start()
    for step in chain.steps:
        folds = []
        if step.among(chosen):
            (path,) = step.paths
            folds = [fold for fold in awq.folds(path, layer_at(model, path)) if fold.layer in chosen]
        missing = [fold for fold in folds if fold.layer not in found.scales]
        layers = {fold.layer: layer_at(model, fold.layer) for fold in missing}
        for place, layer in layers.items():
            put_layer(model, place, awq.Recorder(layer))
        try:
            state = step.run(state)
            inputs = {place: awq.gathered(layer_at(model, place)) for place in layers}
        finally:
            for place, layer in layers.items():
                put_layer(model, place, layer)
        for fold in missing:
            weight, settings = layers[fold.layer].weight, probe(chosen, fold.layer)
            found.scales[fold.layer] = awq.search(weight, inputs[fold.layer], fold, settings, stored)
        if missing:
            found.save()
        for fold in folds:
            awq.apply_fold(model, fold, found.scales[fold.layer], dtype)
        report()


def _probe(chain: Chain, chosen: Plan, found: SearchState, exact: Scores, stored: mx.Dtype, report: Report) -> None:
    """Round every layer alone and note how far the answers diverge from the `exact` scores."""
    state = chain.start()
    for number, step in enumerate(chain.steps):
        for path in step.among(chosen):
            if path not in found.kl:
                whole = layer_at(chain.model, path)
                layer = copy(whole)
                layer.weight = rounded(whole.weight, probe(chosen, path), stored).astype(whole.weight.dtype)
                put_layer(chain.model, path, layer)
                try:
                    found.kl[path] = divergence(exact, chain.run(state, number))
                finally:
                    put_layer(chain.model, path, whole)
                found.save()
            report()
        state = step.run(state)
