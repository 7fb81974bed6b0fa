"""The steps of converting a checkpoint: read, map, fold, cast, save; or fold straight into a model in memory."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import mlx.core as mx

from fastvlm_mlx.config import Dtype, Fit, ModelConfig, check_dtype
from fastvlm_mlx.errors import CheckpointError, OptionError, OutputError, about_its_path, listed, warn
from fastvlm_mlx.hub.licence import announce
from fastvlm_mlx.inputs.tokenizer import END_OF_TEXT, Tokenizer
from fastvlm_mlx.network.model import FastVLM
from fastvlm_mlx.quantize import layers
from fastvlm_mlx.storage.adapter import Adapter
from fastvlm_mlx.storage.fill import check_finite
from fastvlm_mlx.storage.open import OpenModel, check_tokenizer, is_ours, open_ours
from fastvlm_mlx.storage.save import save

from . import packed, published
from .card import licence_text, model_card
from .config_map import check_fit
from .fold import fold
from .fuse import fuse
from .source import Source, open_source, open_tower
from .tokenizer import read_tokenizer

HEAD, EMBEDDING = "text.lm_head", "text.embed_tokens"
DEQUANTISED = (
    "quantised layers whose columns are reordered here, or that are stacked with others quantised otherwise, "
    "are dequantised"
)
Progress = Callable[[int, int], None]  # tensors done, tensors in all


@about_its_path
def open_foreign(
    folder: Path,
    name: str,
    tokenizer: Path | None = None,
    *,
    layout: str | None = None,
    vision_from: Path | None = None,
    fit: Fit | None = None,
) -> OpenModel:
    """Open a checkpoint of another layout as a model of ours, mapped and folded in memory; nothing is written.

    Arguments are those of `convert`. Names, shapes and settings are all checked before any weights are read: raises
    CheckpointError, TokenizerError and OptionError. A FastVLMWarning names quantised layers that have to be
    dequantised.
    """
    check_fit(fit)
    source = open_source(folder, layout)
    tower = open_tower(vision_from, source)
    sources = [source] if tower is None else [source, tower]
    loaded_tokenizer = read_tokenizer(tokenizer or folder)
    config = source.config(name, fit)
    if tower is not None:
        config = replace(config, vision=tower.config(name, fit).vision)
    check_tokenizer(loaded_tokenizer, config)
    _check_shapes(config, sources)
    kept = packed.keep({layer: q for each in sources for layer, q in each.quantization.items()})
    if kept.unpacked:
        theirs = [
            each.name_of(f"{layer}.weight") for each in sources for layer in each.quantization if layer in kept.unpacked
        ]
        warn(f"{name}: {DEQUANTISED}: {listed(theirs)}.")
    config = replace(
        config,
        dtype=_stored_dtype(sources),
        eos_token_ids=_stop_tokens(config, loaded_tokenizer),
        quantization=kept.layers,
    )

    @cache
    def resolve() -> ModelConfig:
        return _resolve_head(config, source)

    def weights() -> Iterator[tuple[str, mx.array]]:
        resolved = resolve()
        tensors = {target: array for each in sources for target, array in each.tensors().items()}
        if resolved.text.tie_word_embeddings:
            for part in packed.PARTS:
                tensors.pop(f"{HEAD}.{part}", None)
        packed.unpack(tensors, kept.unpacked)
        yield from fold(tensors, resolved)

    return OpenModel(name, config, loaded_tokenizer, weights, resolve, folder=folder)


@about_its_path
def convert(
    folder: Path,
    out: Path,
    *,
    name: str | None = None,
    dtype: Dtype | None = None,
    tokenizer: Path | None = None,
    layout: str | None = None,
    vision_from: Path | None = None,
    fit: Fit | None = None,
    force: bool = False,
    say: Callable[[str], None] | None = None,
    progress: Progress | None = None,
    adapter: Adapter | None = None,
) -> ModelConfig:
    """Write `folder` as a folder of ours at `out`, and return its config.

    `name` is what the model is called in it, by default the folder's name. `dtype` is the dtype to store, by default
    the checkpoint's own; quantised layers stay quantised. `layout` is one of `key_map.LAYOUTS`, by default the one
    recognised. `vision_from` is a checkpoint to take the image encoder from where `folder` has none. `fit` is how
    pictures become square, "pad" or "crop", by default as the checkpoint says. `say` is told the layout when writing
    begins, `progress` is called with (tensors written, tensors in all).

    Raises OptionError, CheckpointError for a folder that cannot be used, and OutputError where `out` exists (without
    `force`) or cannot be written; nothing is left half-written.
    """
    check_dtype(dtype)
    if is_ours(folder) and adapter is None:
        raise CheckpointError(
            f"{folder} is converted already; use it as it is, or convert it with `to='transformers'`."
        )
    check_place(folder, out)
    name = name or folder.resolve().name
    if is_ours(folder):
        if layout or vision_from or fit:
            raise OptionError(f"{folder} is converted already; leave `layout`, `vision_from` and `fit` out.")
        opened = open_ours(folder, name, tokenizer and tokenizer / "tokenizer.json")
    else:
        opened = open_foreign(folder, name, tokenizer, layout=layout, vision_from=vision_from, fit=fit)
    opened = opened if adapter is None else fuse(opened, adapter)
    config = opened.resolve()
    config = replace(config, dtype=dtype or config.dtype)
    announce(config.source.license)
    stored_dtype: mx.Dtype = getattr(mx, config.dtype)
    model = FastVLM(config)
    layers.apply(model, config.quantization)
    parameters = model.flat_parameters()
    nbytes = model.nbytes_in(stored_dtype)
    total = len(parameters)

    def cast() -> Iterator[tuple[str, mx.array]]:
        if say:
            say(config.source.layout)
        for done, (name, array) in enumerate(opened.weights(), start=1):
            stored = array.astype(stored_dtype) if mx.issubdtype(array.dtype, mx.floating) else array
            if parameters.pop(name).shape != stored.shape:
                raise AssertionError(f"folding made {name} {stored.shape}")
            check_finite(str(folder), [(name, stored, array)])
            if progress:
                progress(done, total)
            yield name, stored
        if parameters:
            raise AssertionError(f"folding left out {listed(parameters)}")

    texts = {
        "tokenizer.json": opened.tokenizer.to_json(),
        "README.md": model_card(config, adapter=None if adapter is None else Path(adapter.origin).name),
        "LICENSE": licence_text(folder, config),
    }
    save(out, config, cast(), texts, nbytes=nbytes, force=force)
    return config


def check_place(folder: Path, out: Path) -> None:
    """Raise OutputError where writing `out` would overwrite the checkpoint."""
    if "\0" not in str(out) and folder.resolve().is_relative_to(Path(os.path.realpath(out))):
        raise OutputError(
            f"{out} is the checkpoint itself or holds it, so it is not written to; give another `out`.", path=out
        )


def _stored_dtype(sources: list[Source]) -> Dtype:
    """The dtype that most of the weights are stored in; config.json may say another."""
    named: dict[str, Dtype] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    sizes = dict.fromkeys(named, 0)
    for source in sources:
        for target in source.plan.renames.values():
            tensor = source.checkpoint.tensors[target.source]
            if tensor.dtype in sizes:
                sizes[tensor.dtype] += tensor.nbytes
    return named[max(sizes, key=lambda dtype: sizes[dtype])]


def _stop_tokens(config: ModelConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids at which an answer ends: the config's, the end of a turn, and <|endoftext|>."""
    end_of_text = tokenizer.find(END_OF_TEXT)
    found = {*config.eos_token_ids, tokenizer.special("<|im_end|>")}
    return tuple(sorted(found | ({end_of_text} if end_of_text is not None else set())))


def _resolve_head(config: ModelConfig, source: Source) -> ModelConfig:
    """The config with embedding and head tied only where the stored head, if there is one, equals the embedding."""
    heads = [part for part in packed.PARTS if f"{HEAD}.{part}" in source.plan.renames]
    if not config.text.tie_word_embeddings or not heads:
        return config
    tensors = source.tensors()
    pairs = [(tensors[f"{HEAD}.{part}"], tensors.get(f"{EMBEDDING}.{part}")) for part in heads]
    if all(two is not None and mx.array_equal(one, two).item() for one, two in pairs):
        return replace(config, quantization={layer: q for layer, q in config.quantization.items() if layer != HEAD})
    return replace(config, text=replace(config.text, tie_word_embeddings=False))


def _check_shapes(config: ModelConfig, sources: list[Source]) -> None:
    """Check names and shapes of the published form, from the headers alone; raises CheckpointError."""
    found: published.Shapes = {}
    holders: dict[str, Source] = {}
    for source in sources:
        shapes = source.shapes()
        found |= shapes
        holders |= dict.fromkeys(shapes, source)
    if (
        config.text.tie_word_embeddings and f"{HEAD}.weight" in found
    ):  # it is stored although tied; whether it is equal is checked on loading
        config = replace(config, text=replace(config.text, tie_word_embeddings=False))

    def name_of(target: str) -> str:
        missing_from = sources[-1] if target.startswith("vision.") else sources[0]
        return holders.get(target, missing_from).name_of(target)

    published.check(found, config, name_of)
