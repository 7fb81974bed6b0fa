"""What `memory` says against what MLX held: weights and cache to the byte, the peak within a stated tolerance."""

import gc
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from fastvlm_mlx.backend import ops as backend
from fastvlm_mlx.backend.cpu import compiler
from fastvlm_mlx.config import QuantConfig
from fastvlm_mlx.decoding.answer import finish
from fastvlm_mlx.decoding.engine import Engine
from fastvlm_mlx.decoding.generate import stream
from fastvlm_mlx.decoding.request import Options
from fastvlm_mlx.diagnostics import random_model
from fastvlm_mlx.network import memory
from fastvlm_mlx.network.model import FastVLM
from fastvlm_mlx.quantize import layers, recipes

# The estimate of everything, against MLX's own peak. Both ends were seen: MLX runs ahead by a few operations, more or
# less.
LEAST, MOST = 0.9, 1.25


@pytest.fixture(scope="module")
def tiny() -> Engine:
    engine = Engine.open("tiny")
    engine.load_weights(dtype="float32")
    return engine


@pytest.mark.parametrize("size", ["0.5b", "1.5b", "7b"])
def test_published_sizes(size: str) -> None:
    """Counts from the published tables: 122.71 M in the tower without its pooled head, and Qwen2's by its formula."""
    config = random_model.config(size)
    counts, text = memory.parameters(config), config.text
    folded = {"tower": 122.71e6}  # batch norms and layer scales are folded away, a thousandth of it
    assert counts["tower"] == pytest.approx(folded["tower"], rel=2e-3)
    assert counts["projector"] == (3072 + 1 + text.hidden_size + 1) * text.hidden_size
    assert counts["embeddings"] == text.vocab_size * text.hidden_size * (1 if text.tie_word_embeddings else 2)
    D, inner, kv = text.hidden_size, text.intermediate_size, text.num_key_value_heads * text.head_dim
    layer = 2 * D * D + 2 * D * kv + 3 * D * inner + (D + 2 * kv) + 2 * D
    assert counts["decoder"] == text.num_hidden_layers * layer + D
    assert memory.estimate(config).cache == 2 * text.num_hidden_layers * kv * 1280 * 2


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_weights_to_the_byte(bits: int | None) -> None:
    config = random_model.config("small")
    model = FastVLM(config)
    model.set_dtype(mx.bfloat16)
    if bits:
        chosen, _ = recipes.plan(model, recipes.choose(bits=bits))
        layers.apply(model, chosen)
        config = replace(config, quantization=chosen)
    nbytes = sum(array.nbytes for array in model.flat_parameters().values())
    assert sum(memory.weight_bytes(config).values()) == nbytes


@pytest.mark.parametrize(
    ("mode", "group_size", "bits"), [("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4), ("affine", 32, 3)]
)
def test_modes_to_the_byte(mode: str, group_size: int, bits: int) -> None:
    config = random_model.config("small", layers=1)
    plan = {"text.layers.0.mlp.down_proj": QuantConfig(bits, group_size, mode)}
    model = FastVLM(config)
    model.set_dtype(mx.bfloat16)
    layers.apply(model, plan)
    nbytes = sum(array.nbytes for array in model.flat_parameters().values())
    assert sum(memory.weight_bytes(replace(config, quantization=plan)).values()) == nbytes


@pytest.mark.slow
@pytest.mark.skipif(backend.current() != "cpu", reason="the estimate was measured on the CPU backend")
@pytest.mark.parametrize(("size", "words"), [(64, 5), (128, 5), (192, 5), (256, 5), (192, 700), (192, 1900)])
def test_the_peak_of_tiny(tiny: Engine, size: int, words: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "openvino_module", None)  # which other tests in this process may have loaded
    tiny = tiny.at(size)
    gc.collect()
    mx.clear_cache()
    held = sum(array.nbytes for array in tiny.model.flat_parameters().values())
    others = mx.get_active_memory() - held  # what other tests keep in this process
    picture = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    stats = finish(stream(tiny, tiny.prepare(picture, "a " * words + "?"), Options(2))).stats
    context = stats.prompt_tokens + stats.completion_tokens
    estimate = memory.estimate(tiny.config, backend="cpu", context=context)
    assert sum(estimate.weights.values()) == held
    assert estimate.context == context
    peak = stats.peak_memory_bytes - others
    assert LEAST <= estimate.total / peak <= MOST, (estimate, peak)


def test_fewer_bits_and_smaller_pictures_take_less() -> None:
    config = random_model.config("7b")
    model = FastVLM(config)
    whole = memory.estimate(config)
    fewer = memory.estimate(replace(config, quantization=recipes.plan(model, recipes.choose(bits=4))[0]))
    small = memory.estimate(replace(config, image=replace(config.image, size=512)))
    assert fewer.total < 0.45 * whole.total and fewer.activations == whole.activations
    assert small.activations < whole.activations and small.context < whole.context
    assert memory.estimate(config, images=0).activations < whole.activations
    assert memory.estimate(config, context=10**9).context == config.text.max_position_embeddings
