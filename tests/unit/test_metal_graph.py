"""The graph that Metal gets, checked without Metal: the kernels it takes, its copies, and the waits of the host.

`benchmarks/metal_graph.py` has the rules, with the file and function of MLX's source that each was read in.
"""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from benchmarks import metal_graph
from benchmarks.metal_graph import Graph, Layout, in_order
from fastvlm_mlx.decoding.engine import Engine
from fastvlm_mlx.decoding.generate import stream
from fastvlm_mlx.decoding.request import Options
from fastvlm_mlx.diagnostics import random_model
from fastvlm_mlx.diagnostics.random_model import open_random
from fastvlm_mlx.quantize.recipes import usual_bits


@pytest.fixture(scope="module")
def graphs() -> dict[str, Graph]:
    return metal_graph.our_graphs("0.5b", 1024)


def test_metal_takes_every_operation_the_fast_way(graphs: dict[str, Graph]) -> None:
    assert metal_graph.faults(graphs) == []


@pytest.mark.parametrize(("size", "resolution"), [("1.5b", 512), ("7b", 768)])
def test_other_sizes_and_resolutions_do_too(size: str, resolution: int) -> None:
    assert metal_graph.faults(metal_graph.our_graphs(size, resolution, layers=2), size, resolution) == []


def test_every_norm_and_attention_is_one_kernel(graphs: dict[str, Graph]) -> None:
    tower, decode = graphs["tower and projector"].kernels, graphs["decode step"].kernels
    assert (tower["LayerNorm"], tower["Attention"]) == (6, 6)
    assert (decode["RMSNorm"], decode["RoPE"], decode["Attention"]) == (49, 24, 24)


@pytest.mark.parametrize(
    ("x", "weight", "stride", "groups", "kernel"),
    [
        ((1, 256, 256, 96), (96, 7, 7, 1), 1, 96, "depthwise"),
        ((1, 256, 256, 96), (192, 7, 7, 1), 2, 96, "implicit gemm, grouped"),  # two outputs per group
        ((1, 16, 16, 24), (24, 3, 3, 1), 1, 24, "depthwise"),  # channels a multiple of 8
        ((1, 16, 16, 20), (20, 3, 3, 1), 1, 20, "implicit gemm, grouped"),  # and none
        ((1, 16, 16, 24), (24, 9, 9, 1), 1, 24, "implicit gemm, grouped"),  # a filter too large
        ((1, 16, 16, 32), (32, 3, 3, 8), 1, 4, "implicit gemm, grouped"),  # 8 channels per group, as up to 4, or 16
        ((1, 16, 16, 24), (24, 3, 3, 6), 1, 4, "explicit gemm, grouped"),
        ((1, 1024, 1024, 3), (96, 3, 3, 3), 2, 1, "implicit gemm"),
        ((1, 64, 64, 384), (1536, 1, 1, 384), 1, 1, "implicit gemm"),
        ((1, 64, 64, 128), (128, 3, 3, 128), 1, 1, "winograd"),
    ],
)
def test_convolutions_are_sent_to_the_kernel_metal_would_choose(
    x: tuple[int, ...], weight: tuple[int, ...], stride: int, groups: int, kernel: str
) -> None:
    pad = weight[1] // 2
    arguments = [[stride] * 2, [pad] * 2, [pad] * 2, [1, 1], [1, 1], groups, False]
    assert metal_graph.convolution_kernel(x, weight, arguments) == kernel


def test_depthwise_asks_for_a_filter_whose_rows_follow_each_other() -> None:
    arguments = [[1, 1], [1, 1], [1, 1], [1, 1], [1, 1], 16, False]
    shapes = (1, 16, 16, 16), (16, 3, 3, 1)
    assert metal_graph.convolution_kernel(*shapes, arguments, (9, 3, 1, 1)) == "depthwise"
    assert (
        metal_graph.convolution_kernel(*shapes, arguments, (9, 1, 3, 1)) == "implicit gemm, grouped"
    )  # turned on its side


@pytest.mark.parametrize(
    ("shape", "strides", "vector", "taken"),
    [
        ((5, 8), (8, 1), False, True),
        ((5, 8), (1, 5), False, True),
        ((5, 8), (24, 1), False, True),  # a cut of wider rows
        ((5, 8), (24, 3), False, False),
        ((1, 8), (8, 1), True, True),
        ((1, 8), (2248, 1), True, False),  # the last of 281 rows
        ((8, 1), (1, 8), True, True),
        ((8, 1), (1, 99), True, False),
    ],
)
def test_a_product_takes_either_order_and_a_vector_only_whole(
    shape: tuple[int, int], strides: tuple[int, int], vector: bool, taken: bool
) -> None:
    assert metal_graph.product_takes(Layout(shape, strides), vector) == taken


def test_the_last_row_taken_by_its_number_is_seen_to_be_copied() -> None:
    recorder = metal_graph.Recorder()
    hidden, head = (metal_graph.constant(shape, mx.bfloat16) for shape in ((1, 281, 64), (64, 100)))
    copied = metal_graph.record(recorder, lambda x: x[:, -1] @ head, hidden).copies
    assert len(copied) == 1 and "(1, 64) with strides (17984, 1)" in copied[0]
    assert metal_graph.record(recorder, lambda x: (x[:, -1:] @ head)[:, 0], hidden).copies == []


def test_a_token_at_chats_eight_bits(graphs: dict[str, Graph]) -> None:
    """The products take a bias of their own kernel, and the embedding's row is looked up in three arrays and
    dequantised."""
    plain, packed = graphs["decode step"].kernels, graphs["decode step, 8 bits"].kernels
    assert usual_bits(random_model.config("0.5b"), "metal") == metal_graph.CHAT_BITS
    assert packed["QuantizedMatmul"] == plain["Matmul"] + plain["AddMM"] == 97
    assert packed["Dequantize"] == 1 and packed["Gather"] == 3 and packed["copy"] == 0
    assert packed.total() == plain.total() + plain["AddMM"] + 3


def test_a_step_of_a_batch(graphs: dict[str, Graph]) -> None:
    """Products as for one token; in every layer an attention and two writes for each row, the rows put together, and
    one copy.
    """
    one, four = (graphs[name].kernels for name in ("decode step", "batch step"))
    rows, layers = len(metal_graph.BATCH_POSITIONS), 24
    assert four["copy"] == layers and four["Attention"] == rows * layers and four["SliceUpdate"] == 2 * rows * layers
    assert four["Concatenate"] == rows * layers
    alike = ("Matmul", "AddMM", "RMSNorm", "RoPE", "Add", "swiglu", "Gather", "ArgReduce")
    assert all(four[kernel] == one[kernel] for kernel in alike)
    assert four.total() == sum(four[kernel] for kernel in (*alike, "copy", "Attention", "SliceUpdate", "Concatenate"))


def test_a_reshape_copies_just_where_numpy_has_to() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        shape = tuple(rng.choice([1, 2, 3, 4, 6], size=rng.integers(2, 5)))
        order = rng.permutation(len(shape))
        array = np.zeros(shape, np.int8).transpose(order)
        flat = rng.permutation([*array.shape])
        cut = rng.integers(1, len(flat) + 1)
        target = (*(int(size) for size in flat[:cut]), int(np.prod(flat[cut:])))
        expected = np.shares_memory(array.reshape(target), array)
        layout = Layout(tuple(int(n) for n in array.shape), tuple(int(n) for n in array.strides))
        strides = metal_graph.reshape_strides(layout, target)
        assert (strides is not None) == expected, (layout, target)


def test_layout_of_a_fresh_array() -> None:
    assert in_order((2, 3, 4)).strides == (12, 4, 1)
    assert in_order((2, 3, 4)).row_contiguous
    swapped = Layout((3, 2, 4), (4, 12, 1))
    assert swapped.dense
    assert not swapped.row_contiguous
    assert not Layout((2, 3), (4, 1)).dense


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the host asks of the device, in order: "queue" goes on at once, "wait" stands until it is done."""
    seen: list[str] = []

    def noting(name: str, original: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            seen.append(name)
            return original(*arguments, **options)

        return call

    monkeypatch.setattr(mx, "async_eval", noting("queue", mx.async_eval))
    for name in ("eval", "synchronize"):
        monkeypatch.setattr(mx, name, noting("wait", getattr(mx, name)))
    for name in ("item", "tolist", "__array__", "__int__", "__bool__"):
        if hasattr(mx.array, name):
            monkeypatch.setattr(mx.array, name, noting("wait", getattr(mx.array, name)))
    yield seen


@pytest.mark.slow
def test_the_host_waits_once_between_picture_and_first_token(
    events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the picture's features, so that their time is known, when the prefill is queued already; then for the token.

    The model is the one Metal would get, run by MLX's general CPU operations.
    """
    monkeypatch.setattr("fastvlm_mlx.backend.ops.current", lambda: "metal")
    engine = Engine(open_random("small")).at(448)
    engine.load_weights()
    request = engine.prepare(np.zeros((64, 64, 3), np.uint8), "What is this?")
    events.clear()
    list(stream(engine, request, Options(max_tokens=1)))
    waits = [number for number, event in enumerate(events) if event == "wait"]
    assert len(waits) == 2, events
    assert events[: waits[0]].count("queue") >= 2, "the tower and the prefill are queued before anybody waits"
