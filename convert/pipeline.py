"""The way of a foreign checkpoint: read -> map -> fold -> cast -> save, or straight into a model's memory."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import mlx.core as mx

from fastvlm_mlx.config import Dtype, ModelConfig, check_dtype
from fastvlm_mlx.errors import CheckpointError, OutputError, listed, shown
from fastvlm_mlx.licence import announce
from fastvlm_mlx.model import FastVLM
from fastvlm_mlx.storage import OpenModel, check_finite, check_words, is_ours, save
from fastvlm_mlx.tokenizer import END_OF_TEXT, Tokenizer

from . import published
from .card import licence_text, model_card
from .config_map import from_llava
from .fold import fold
from .key_map import Plan, match, recognise, source_name
from .read import Checkpoint, read_checkpoint
from .tokenizer import read_tokenizer

HEAD, EMBEDDING = "text.lm_head.weight", "text.embed_tokens.weight"
Progress = Callable[[int, int], None]  # tensors done, tensors in all


def open_foreign(folder: Path, name: str, tokenizer: Path | None = None) -> OpenModel:
    """Open a checkpoint of another layout as a model of ours: mapped and folded in memory, nothing written.

    Everything that can be wrong with names, shapes and settings is found here, before any weights are read.
    """
    checkpoint = read_checkpoint(folder)
    if checkpoint.config.get("model_type") != "llava_qwen2":
        raise CheckpointError(
            f"{folder}: model_type is {shown(checkpoint.config.get('model_type'))}, expected 'llava_qwen2' (Apple's FastVLM) "
            "or a folder written by 'fastvlm-mlx convert'."
        )
    layout = recognise(checkpoint.tensors)
    words = read_tokenizer(tokenizer or folder)
    config = from_llava(checkpoint.config, name=name, layout=layout)
    check_words(words, config)
    config = replace(_with_stored_dtype(config, checkpoint), eos_token_ids=_stop_tokens(config, words))
    plan = match(checkpoint.tensors, layout)
    _check_shapes(config, plan, checkpoint, layout)

    @cache
    def settle() -> ModelConfig:
        return _settle_head(config, plan, checkpoint)

    def weights() -> Iterator[tuple[str, mx.array]]:
        settled = settle()
        yield from fold(_published(plan, checkpoint), settled)

    return OpenModel(name, config, words, weights, settle)


def convert(
    folder: Path,
    out: Path,
    *,
    name: str | None = None,
    dtype: Dtype | None = None,
    tokenizer: Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> ModelConfig:
    """Write `folder` as a folder of ours at `out` and return its config.

    `name` is what the model is called from now on, by default as its folder. `dtype` is the type to store, by default the
    checkpoint's own. `progress` is called after every tensor. Raises
    CheckpointError for a folder that cannot be used and OutputError where `out` exists (without `force`) or cannot be
    written; nothing is left half-written.
    """
    check_dtype(dtype)
    if is_ours(folder):
        raise CheckpointError(f"{folder} is converted already; expected a checkpoint as published.")
    if "\0" not in str(out) and folder.resolve().is_relative_to(Path(os.path.realpath(out))):
        raise OutputError(f"{out} is the checkpoint itself or holds it, so it is not written to; give another --out.")
    opened = open_foreign(folder, name or folder.resolve().name, tokenizer)
    config = opened.settle()
    config = replace(config, dtype=dtype or config.dtype)
    announce(config.source.license)
    places = FastVLM(config, "cpu").places()
    nbytes = sum(place.size for place in places.values()) * getattr(mx, config.dtype).size
    total = len(places)

    def cast() -> Iterator[tuple[str, mx.array]]:
        for done, (name, array) in enumerate(opened.weights(), start=1):
            stored = array.astype(getattr(mx, config.dtype))
            if places.pop(name).shape != stored.shape:
                raise AssertionError(f"folding made {name} {stored.shape}")
            check_finite(str(folder), [(name, stored, array)])
            if progress:
                progress(done, total)
            yield name, stored
        if places:
            raise AssertionError(f"folding left out {listed(places)}")

    texts = {"tokenizer.json": opened.tokenizer.to_json(), "README.md": model_card(config), "LICENSE": licence_text(folder, config)}
    save(out, config, cast(), texts, nbytes=nbytes, force=force)
    return config


def _with_stored_dtype(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """The type most of the weights are stored in, whatever config.json says of it."""
    named: dict[str, Dtype] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    sizes = dict.fromkeys(named, 0)
    for tensor in checkpoint.tensors.values():
        if tensor.dtype in sizes:
            sizes[tensor.dtype] += tensor.nbytes
    return replace(config, dtype=named[max(sizes, key=lambda kind: sizes[kind])])


def _stop_tokens(config: ModelConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The config's end of sequence and <|endoftext|>; the end of a turn where the config names none."""
    found = set(config.eos_token_ids) or {tokenizer.special("<|im_end|>")}
    end_of_text = tokenizer.find(END_OF_TEXT)
    return tuple(sorted(found | ({end_of_text} if end_of_text is not None else set())))


def _settle_head(config: ModelConfig, plan: Plan, checkpoint: Checkpoint) -> ModelConfig:
    """Drop a stored head that equals the embedding it is said to be tied to; keep it, untied, where they differ."""
    if not config.text.tie_word_embeddings or HEAD not in plan.renames:
        return config
    arrays = checkpoint.load()
    if mx.array_equal(arrays[plan.renames[HEAD]], arrays[plan.renames[EMBEDDING]]).item():
        plan.drops[plan.renames.pop(HEAD)] = "equal to the embedding it is tied to"
        return config
    return replace(config, text=replace(config.text, tie_word_embeddings=False))


def _check_shapes(config: ModelConfig, plan: Plan, checkpoint: Checkpoint, layout: str) -> None:
    """Names and shapes of the published form, worked out from the headers alone."""
    found = {target: checkpoint.tensors[source].shape for target, source in plan.renames.items()}
    for row, source, target, parts in plan.merges:
        zeros = {part: mx.zeros(checkpoint.tensors[name].shape) for part, name in parts.items()}
        try:
            merged = row.merge(zeros)  # unevaluated: only shapes are worked out
        except (ValueError, IndexError, KeyError) as error:
            raise CheckpointError(f"the tensors under {source!r} do not fit each other ({error}).") from error
        found |= {f"{target}.{part}": tuple(array.shape) for part, array in merged.items()}
    if config.text.tie_word_embeddings and HEAD in found:  # stored all the same: equal or not is settled on loading
        config = replace(config, text=replace(config.text, tie_word_embeddings=False))
    published.check(found, config, lambda name: source_name(name, layout))


def _published(plan: Plan, checkpoint: Checkpoint) -> dict[str, mx.array]:
    """The published form's tensors, unevaluated, holding on to nothing that was dropped."""
    arrays = checkpoint.load()
    tensors = {target: arrays.pop(source) for target, source in plan.renames.items()}
    for row, _, target, parts in plan.merges:
        merged = row.merge({part: arrays.pop(name) for part, name in parts.items()})
        tensors |= {f"{target}.{part}": array for part, array in merged.items()}
    return tensors
