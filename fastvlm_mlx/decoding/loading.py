"""A model's folder, of any accepted layout -> an open model -> a network with its weights in place."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import progress
from ..backend import ops, ready, residency
from ..backend.address_space import check_address_space
from ..backend.ops import Backend
from ..config import Dtype, ModelConfig, check_dtype
from ..errors import OptionError, about, warn
from ..hub import licence
from ..hub.names import Found
from ..network import memory
from ..network.model import FastVLM
from ..quantize import layers, recipes
from ..quantize.recipes import Plan
from ..storage.fill import fill
from ..storage.open import OpenModel, is_ours, open_ours


def open_model(found: Found, tokenizer: Path | None = None, *, name: str | None = None, **how: Any) -> OpenModel:
    """Read and check the small files of a model, called `name` (by default as it was asked for); no weights yet.

    `tokenizer` is a folder to take the tokenizer from instead. `how` are what `convert.open_foreign` takes to read a
    checkpoint of another layout: `layout`, `vision_from` and `fit`. Raises CheckpointError, TokenizerError and
    OptionError.
    """
    name = name or found.name
    if is_ours(found.folder) and all(value is None for value in how.values()):
        opened = open_ours(found.folder, name, tokenizer and tokenizer / "tokenizer.json")
    else:
        from ..convert import open_foreign  # which a folder of ours has no use for

        opened = open_foreign(found.folder, name, tokenizer, **how)
    return replace(opened, built_in=found.built_in)


def read_weights(
    opened: OpenModel,
    *,
    bits: int | None = None,
    group_size: int = recipes.DEFAULT_GROUP,
    plan: Plan | None = None,
    dtype: Dtype | None = None,
) -> tuple[FastVLM, ModelConfig]:
    """Read the weights into a network for the default device; returns it with the config that the weights fit.

    `bits` quantises the decoder on the way, in groups of `group_size`; a `plan` says each layer's bits. `dtype` is what
    to compute in, by default the stored type on a GPU and float32 on a CPU. Raises OptionError and CheckpointError.
    """
    backend = ops.current()
    check_dtype(dtype)
    licence.announce(opened.config.source.license)
    computed: Dtype = dtype or ("float32" if backend == "cpu" else opened.config.dtype)
    stored_dtype: mx.Dtype = getattr(mx, computed)
    config = opened.resolve()
    model = FastVLM(config)
    if bits is not None:
        plan, _ = recipes.plan(model, recipes.choose(bits=bits, group_size=group_size))
    if plan:
        if config.quantization:
            raise OptionError(f"{opened.name} is quantised already; load it without `bits`.")
        config = replace(config, quantization=plan)
    layers.apply(model, config.quantization)
    residency.bound_cache(backend)
    _warn_of_size(config, backend, computed)
    check_address_space(opened.name, model.nbytes_in(stored_dtype))
    with progress.bar("Loading", len(model.flat_parameters())) as track, about(opened.folder):
        fill(model, replace(opened, weights=lambda: track(opened.weights())), stored_dtype, plan or {})
    ready.make_ready(model, layers.packed_layers(model).values(), stored_dtype)
    return model, config


def _warn_of_size(config: ModelConfig, backend: Backend, dtype: Dtype) -> None:
    """Warn where a GPU's share of the memory is too small for the model and a conversation about one picture."""
    working_set = residency.working_set() if backend != "cpu" else None
    if working_set is None:
        return
    needed = memory.estimate(config, backend=backend, dtype=dtype).total
    if needed > working_set:
        advice = "" if config.quantization else "`bits=4` or "
        warn(
            f"The model takes about {needed / 1e9:.1f} GB with one picture, and the system recommends at most "
            f"{working_set / 1e9:.1f} GB for the GPU: expect it to be slow, or to end; use {advice}a smaller model."
        )


def tower_in(dtype: mx.Dtype, model: FastVLM, config: ModelConfig) -> FastVLM:
    """A network of this config with the tower and projector of `model` in another dtype; its decoder has no weights."""
    other = FastVLM(config)
    layers.apply(other, config.quantization)
    parts = [
        (path, parameter)
        for path, parameter in model.flat_parameters().items()
        if path.startswith(("vision.", "projector."))
    ]
    floating = (mx.float16, mx.bfloat16, mx.float32)
    other.load_weights([(path, p.astype(dtype) if p.dtype in floating else p) for path, p in parts], strict=False)
    other.text.norm.weight = other.text.norm.weight.astype(dtype)  # which says what to compute in
    return other
