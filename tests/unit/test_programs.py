"""The programs that a large model has on a CPU, against MLX's operations: products, attention, the whole tower."""

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from fastvlm_mlx.backend import cpu, ops, ready
from fastvlm_mlx.backend.cpu import compiler
from fastvlm_mlx.backend.linear import Linear
from fastvlm_mlx.config import Dtype, QuantConfig
from fastvlm_mlx.decoding.engine import Engine
from fastvlm_mlx.diagnostics.random_model import open_random
from fastvlm_mlx.errors import FastVLMWarning
from fastvlm_mlx.network.model import LEVELS, FastVLM
from fastvlm_mlx.quantize import layers, rounding

from .. import programs
from ..programs import difference

TIGHT = 2e-6  # sums of float32 in another order
FEATURES = 1e-5  # through all layers of a tower
HALF = 2e-2  # of bfloat16, whose values have three digits


@pytest.fixture(autouse=True)
def _programs(monkeypatch: pytest.MonkeyPatch) -> None:
    programs.for_any_size(monkeypatch)


# ---- products and attention ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.float32, TIGHT), (mx.bfloat16, HALF)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 48), (1, 1, 48), (3, 48), (2, 20, 48)])
def test_a_product(shape: tuple[int, ...], bias: bool, dtype: mx.Dtype, tolerance: float) -> None:
    layer = Linear(48, 40, bias=bias)
    layer.update({name: mx.random.normal(array.shape).astype(dtype) for name, array in layer.parameters().items()})
    x = mx.random.normal(shape).astype(dtype)
    with ops.general_forms():
        expected = layer(x)
    y = layer(x)
    assert (y.shape, y.dtype) == (expected.shape, dtype)
    assert difference(y, expected) < tolerance


def test_rows_that_do_not_lie_in_order() -> None:
    x, weight = mx.random.normal((48, 7)).T, mx.random.normal((48, 40)).T
    assert difference(ops.linear(x, weight), x @ weight.T) < TIGHT


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_a_quantised_product(bits: int, group_size: int, dtype: mx.Dtype) -> None:
    """As stored, in every affine form; one row, a few, and many."""
    settings = QuantConfig(bits, group_size)
    parts = rounding.quantized("weight", mx.random.normal((48, 256)), settings, mx.bfloat16)
    layer = layers.QuantizedLinear(48, 256, settings, dtype, bias=True)
    layer.load_weights([(name, part if part.dtype == mx.uint32 else part.astype(dtype)) for name, part in parts], False)
    layer.bias = mx.random.normal((48,)).astype(dtype)
    matrix = rounding.dequantized([part for _, part in parts], settings)
    for shape in ((1, 256), (2, 1, 256), (1, 33, 256)):
        x = mx.random.normal(shape).astype(dtype)
        expected = x.astype(mx.float32) @ matrix.T + layer.bias
        assert difference(layer(x), expected) < (TIGHT if dtype == mx.float32 else HALF)
    assert layer.form is not None


@pytest.mark.parametrize("part", ["weight", "scales", "biases"])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_changed_quantised_matrix_counts(part: str, in_place: bool) -> None:
    settings = QuantConfig(4, 64)
    layer = layers.QuantizedLinear(48, 256, settings, bias=False)
    first, second = (
        [(name, a if a.dtype == mx.uint32 else a.astype(mx.float32)) for name, a in parts]
        for parts in (
            rounding.quantized("weight", mx.random.normal((48, 256)), settings, mx.bfloat16) for _ in range(2)
        )
    )
    layer.load_weights(first)
    x = mx.random.normal((3, 256))
    before = layer(x)
    if in_place:
        layer[part][:] = dict(second)[part]
    else:
        layer[part] = dict(second)[part]
    with ops.general_forms():
        expected = layer(x)
    assert difference(layer(x), expected) < TIGHT < difference(before, expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "L", "K"), [(4, 4, 9, 9), (6, 2, 5, 11), (3, 1, 2, 2), (2, 1, 1, 7)])
@pytest.mark.parametrize("order", ["heads first", "positions first"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.float32, TIGHT), (mx.bfloat16, HALF)])
def test_attention(
    heads: int, kv_heads: int, L: int, K: int, causal: bool, order: str, dtype: mx.Dtype, tolerance: float
) -> None:
    shapes = ((heads, L), (kv_heads, K), (kv_heads, K))
    if order == "heads first":
        q, k, v = (mx.random.normal((2, count, length, 8)) for count, length in shapes)
    else:
        q, k, v = (mx.random.normal((2, length, count, 8)).transpose(0, 2, 1, 3) for count, length in shapes)
    q, k, v = q.astype(dtype), k.astype(dtype), v.astype(dtype)
    ours = cpu.attention(q, k, v, 0.35, causal=causal)
    expected = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.35, mask="causal" if causal else None)
    assert (ours.shape, ours.dtype) == (expected.shape, dtype)
    assert mx.abs(ours - expected).max() < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.float32, TIGHT), (mx.bfloat16, HALF)])
@pytest.mark.parametrize("shape", [(14,), (1, 1, 14), (2, 5, 14)])
def test_swiglu(shape: tuple[int, ...], dtype: mx.Dtype, tolerance: float) -> None:
    x = mx.random.normal(shape).astype(dtype)
    with ops.general_forms():
        expected = ops.swiglu(x)
    assert ops.swiglu(x).dtype == dtype and difference(ops.swiglu(x), expected) < tolerance


def test_a_single_key_is_left_to_mlx() -> None:
    """A softmax of one element, compiled first, would be taken for that of any number."""
    q = mx.random.normal((1, 2, 9, 8))
    assert not cpu.takes_attention(q, q[:, :, :1]) and cpu.takes_attention(q, q)


def test_threads_have_requests_of_their_own() -> None:
    x = [mx.random.normal((5, 48)) for _ in range(16)]
    weight = mx.random.normal((40, 48))
    mx.eval(x, weight)
    alone = [np.array(ops.linear(each, weight)) for each in x]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda each: np.array(ops.linear(each, weight)), x))
    assert all(np.array_equal(one, other) for one, other in zip(alone, together, strict=True))


def test_nothing_is_held_once_a_product_is_there() -> None:
    weight = mx.random.normal((40, 48))
    ops.linear(mx.random.normal((5, 48)), weight)
    held = weakref.ref(weight)
    del weight
    gc.collect()
    assert held() is None


# ---- the tower -----------------------------------------------------------------------------------------------------


def model_of(dtype: Dtype = "float32", bits: int | None = None) -> FastVLM:
    engine = Engine(open_random("small"))
    engine.load_weights(dtype=dtype, bits=bits)
    programs.compile_tower(engine.model.vision)
    return engine.model


def pixels(*shape: int) -> mx.array:
    return mx.array(LEVELS[np.random.default_rng(0).integers(0, 256, (*shape, 3))])


def of_the_layers(model: FastVLM, x: mx.array) -> mx.array:
    with ops.general_forms():
        return model.vision(x)


@pytest.mark.slow
def test_every_size_and_batch_by_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = model_of(), []
    ops.features(model.vision, pixels(1, 128, 128))  # by which it is there
    program = compiler.Program.__init__
    monkeypatch.setattr(compiler.Program, "__init__", lambda *given: (made.append(given[1]), program(*given))[1])
    for shape in ((1, 64, 64), (1, 65, 64), (2, 64, 128), (1, 256, 192), (3, 192, 320), (1, 64, 64), (1, 500, 90)):
        x = pixels(*shape)
        assert difference(ops.features(model.vision, x), of_the_layers(model, x)) < FEATURES
    assert "tower" not in [graph.friendly_name for graph in made]


def test_threads_share_a_tower() -> None:
    """From its first picture on, while it is still being compiled."""
    model, x = model_of(), pixels(1, 128, 192)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: np.array(ops.features(model.vision, x)), range(8)))
    assert all(np.array_equal(each, found[0]) for each in found)
    assert difference(mx.array(found[0]), of_the_layers(model, x)) < FEATURES


@pytest.mark.slow
def test_bfloat16() -> None:
    model, exact = model_of("bfloat16"), model_of()
    x = pixels(1, 256, 256)
    found, expected = ops.features(model.vision, x.astype(mx.bfloat16)), of_the_layers(exact, x)
    assert found.dtype == mx.bfloat16
    a, b = np.array(found.astype(mx.float32)).ravel(), np.array(expected).ravel()
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.999


def scaled(model: FastVLM) -> None:
    layer = model.vision.stages[1].blocks[0].convffn.fc1
    layer.weight = 2 * layer.weight


def scaled_in_place(model: FastVLM) -> None:
    weight = model.vision.stages[4].position.weight
    weight[:] = 2 * weight


def updated(model: FastVLM) -> None:
    """With low-rank updates on two layers, one of whose rows have lengths of their own."""

    class LowRank(nn.Module):
        def __init__(self, layer: nn.Module, *, magnitude: bool):
            super().__init__()
            rows, width = layer["weight"].shape
            self.layer, self.scale = layer, 0.5
            self.lora_a, self.lora_b = mx.random.normal((4, width)), 0.1 * mx.random.normal((rows, 4))
            if magnitude:
                self.magnitude = mx.random.uniform(0.5, 1.5, (rows,))

        def __call__(self, x: mx.array) -> mx.array:
            weight = self.layer["weight"] + self.scale * self.lora_b @ self.lora_a
            if "magnitude" in self:
                weight = weight * (self.magnitude / mx.linalg.norm(weight, axis=1))[:, None]
            y: mx.array = x @ weight.T
            return y + self.layer["bias"] if "bias" in self.layer else y

    block = model.vision.stages[3].blocks[0]
    block.token_mixer.qkv = LowRank(block.token_mixer.qkv, magnitude=True)
    block.convffn.fc2 = LowRank(block.convffn.fc2, magnitude=False)


def quantised(model: FastVLM) -> None:
    path = "stages.2.blocks.0.convffn.fc1"
    layer = layers.layer_at(model.vision, path)
    settings = QuantConfig(8, 32)
    parts = rounding.quantized("weight", layer.weight, settings, mx.bfloat16)
    layers.apply(model.vision, {path: settings})
    tensors = [(name, part if part.dtype == mx.uint32 else part.astype(mx.float32)) for name, part in parts]
    layers.layer_at(model.vision, path).load_weights([*tensors, ("bias", layer.bias)])


def unknown(model: FastVLM) -> None:
    """A layer that no graph is known of: the tower is computed by its own operations."""

    class Doubled(Linear):
        def __call__(self, x: mx.array) -> mx.array:
            return 2 * super().__call__(x)

    plain = model.vision.patch_embed.linear
    layer = Doubled(*reversed(plain.weight.shape))
    layer.update(plain.parameters())
    model.vision.patch_embed.linear = layer


@pytest.mark.slow
@pytest.mark.parametrize("change", [scaled, scaled_in_place, updated, quantised, unknown])
def test_what_is_changed_counts(change: Callable[[FastVLM], None]) -> None:
    model, x = model_of(), pixels(1, 128, 192)
    before = ops.features(model.vision, x)
    change(model)
    expected = of_the_layers(model, x)
    assert difference(ops.features(model.vision, x), expected) < FEATURES < difference(before, expected)


def logits(model: FastVLM, embeddings: mx.array, tokens: list[int]) -> list[mx.array]:
    """Of a prompt (1, L, D), and after each of some tokens."""
    cache = model.text.make_cache()
    return [model.prefill(embeddings, cache), *(model.step(mx.array([token]), cache) for token in tokens)]


@pytest.mark.slow
def test_answers_are_those_of_mlx() -> None:
    """A whole prefill and steps after it, plain and quantised."""
    for bits in (None, 4, 8):
        model = model_of(bits=bits)
        embeddings, tokens = 0.1 * mx.random.normal((1, 20, 128)), [3, 500, 7]

        found = logits(model, embeddings, tokens)
        with ops.general_forms():
            expected = logits(model, embeddings, tokens)
        assert max(map(difference, found, expected)) < FEATURES


# ---- the library ---------------------------------------------------------------------------------------------------

EVERYTHING = """
import socket, sys
def refuse(*_, **__):
    raise AssertionError("something is sent")
socket.socket.connect = socket.socket.connect_ex = socket.socket.sendto = socket.getaddrinfo = refuse
socket.create_connection = refuse
import numpy as np
from fastvlm_mlx import VLM
from fastvlm_mlx.backend import cpu, ready
from fastvlm_mlx.decoding.engine import Engine
from fastvlm_mlx.diagnostics.random_model import open_random
ready.LARGE = 1
for bits, dtype in ((None, "float32"), (4, "float32"), (8, "bfloat16")):
    engine = Engine(open_random("small"))
    engine.load_weights(bits=bits, dtype=dtype)
    assert cpu.loaded() and cpu.takes_tower(engine.model.vision, np.zeros((1, 128, 128, 3)))
    VLM(engine).generate(np.zeros((90, 70, 3), np.uint8), "What is this?", max_tokens=3)
sent = [name for name in sys.modules if name.startswith("openvino_telemetry")]
assert not sent, sent
"""


@pytest.mark.slow
def test_nothing_is_sent_anywhere() -> None:
    """The library's telemetry is not imported, and with sockets that refuse everything every path runs."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", EVERYTHING], check=True, timeout=120)


def test_telemetry_of_others_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = object()
    monkeypatch.setitem(sys.modules, compiler.TELEMETRY, theirs)
    monkeypatch.setattr(compiler, "openvino_module", None)
    assert compiler.load() and sys.modules[compiler.TELEMETRY] is theirs
    monkeypatch.delitem(sys.modules, compiler.TELEMETRY)
    monkeypatch.setattr(compiler, "openvino_module", None)
    assert compiler.load() and compiler.TELEMETRY not in sys.modules


def test_without_the_library_it_is_said_once_and_answers_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = of_the_layers(model_of(), pixels(1, 128, 128))
    monkeypatch.setattr(compiler, "openvino_module", None)
    monkeypatch.setattr(compiler, "why_missing", "No module named 'openvino'")
    monkeypatch.setattr(ready, "LARGE", 1)
    engine = Engine(open_random("small"))
    with pytest.warns(FastVLMWarning, match="OpenVINO is not installed") as said:
        engine.load_weights(dtype="float32")
    assert len(said) == 1
    assert difference(ops.features(engine.model.vision, pixels(1, 128, 128)), expected) < FEATURES


def test_a_processor_without_bfloat16_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ready, "LARGE", 1)
    monkeypatch.setattr(cpu, "has_bfloat16", lambda: False)
    engine = Engine(open_random("small"))
    with pytest.warns(FastVLMWarning, match="no instructions for bfloat16"):
        engine.load_weights(dtype="bfloat16")
