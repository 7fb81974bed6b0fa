"""The graph Metal gets, looked through on any machine: which kernels it takes, where it copies, how many there are.

    python -m benchmarks.metal_graph                      # ours, checked: a tower forward, a prefill, a decode step
                                                          # (as stored, and at chat's 8 bits), a step of a batch
    PYTHON -m benchmarks.metal_graph --mlx-vlm            # mlx-vlm's, counted alike (PYTHON has mlx-vlm installed)

MLX records a function's primitives with their shapes (`mx.export_function`). Three things are added, all read in MLX's
source at COMMIT, of which every rule below names the file and function: operations that are one kernel on Metal but are
spelled out on a CPU (`mx.fast`) are kept whole where Metal's rule takes them; strides are followed through every view,
so that a copy made for a kernel's sake shows; and each convolution is sent down `dispatch_conv_2D_gpu`. Nothing is
computed and nothing is timed. Where 0.32.4's wheel for macOS differs from that source, the rule is the wheel's (WHEEL),
read in its machine code.

Not seen: what does not depend on a traced input, and what the number of positions or the chip decides: attention in two
passes (from 1024 or 4096 positions on), products split along their inner axis (a second kernel adds the parts).
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from math import prod
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn

COMMIT = (
    "ml-explore/mlx 846d17622"  # 0.32.2 in development, 2026-08-22; the newest source there is for mlx 0.32.4's wheels
)
# dispatch_conv_2D_gpu: depthwise from 8 channels on, grouped gemm with 8 per group
WHEEL = "mlx-metal 0.32.4, macosx_14_0_arm64"
RULES = {
    "convolution": "mlx/backend/metal/conv.cpp, dispatch_conv_2D_gpu and conv_2D_gpu",
    "attention": "mlx/backend/metal/scaled_dot_product_attention.cpp, has_fused_kernel, use_fallback and eval_gpu",
    "norm": "mlx/backend/metal/normalization.cpp, LayerNorm::eval_gpu and RMSNorm::eval_gpu",
    "rope": "mlx/backend/metal/rope.cpp, RoPE::eval_gpu",
    "matmul": "mlx/backend/metal/matmul.cpp, check_transpose",
    "quantised": "mlx/backend/metal/quantized.cpp, ensure_row_contiguous_matrix",
    "reshape": "mlx/backend/common/utils.cpp, prepare_reshape",
    "views": "mlx/backend/gpu/primitives.cpp (Broadcast, ExpandDims, Slice, Split, Squeeze, Transpose: no kernel)",
    "pad": "mlx/backend/gpu/slicing.cpp, pad_gpu: one kernel fills, one copies",
}

# mlx-vlm's own graph at 1024 pixels, 0.5B, counted by `--mlx-vlm`: change the figures together with the version.
MLX_VLM_VERSION = "0.7.10"
MLX_VLM_KERNELS = {"tower and projector": 866, "decode step": 414}
MAX_SHARE = {"tower and projector": 0.5, "decode step": 0.77}  # of mlx-vlm's kernels that ours may take

Shape = tuple[int, ...]

VIEWS = {
    "Broadcast",
    "BroadcastAxes",
    "ExpandDims",
    "Squeeze",
    "Slice",
    "Split",
    "Transpose",
    "StopGradient",
    "Depends",
    "AsStrided",
}
RESHAPES = {"Reshape", "Flatten", "Unflatten"}
CUT = "closing the gaps of a cut"
WHOLE = "Depends"  # the primitive that stands for an operation Metal takes whole; no model uses it itself


@dataclass(frozen=True)
class Layout:
    """How an array lies in memory: its shape and, per axis, the distance in elements from one index to the next."""

    shape: Shape
    strides: Shape

    @property
    def row_contiguous(self) -> bool:
        """Whether it is dense and in order; axes of one element do not count (`check_contiguity`)."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True

    @property
    def dense(self) -> bool:
        """Whether it is dense in some order of its axes."""
        axes = sorted((stride, size) for size, stride in zip(self.shape, self.strides, strict=True) if size != 1)
        expected = 1
        for stride, size in axes:
            if stride != expected:
                return False
            expected *= size
        return True

    @property
    def scalar(self) -> bool:
        """Whether one stored element stands for all."""
        return all(size == 1 or stride == 0 for size, stride in zip(self.shape, self.strides, strict=True))


def in_order(shape: Shape) -> Layout:
    """The layout of a fresh array."""
    return Layout(shape, tuple(prod(shape[axis + 1 :]) for axis in range(len(shape))))


@dataclass(frozen=True)
class Step:
    """One primitive: what MLX calls it, its settings, its inputs and outputs by name, and the kernels it starts on
    Metal."""

    name: str
    arguments: list[Any]
    inputs: list[str]
    outputs: list[str]
    kernel: str = ""
    copies: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Graph:
    """Primitives in order, with the layout of every array by name."""

    steps: list[Step]
    layouts: dict[str, Layout]

    @property
    def kernels(self) -> Counter[str]:
        """How often each kernel is started, copies included; views start none."""
        started = Counter(step.kernel for step in self.steps if step.kernel)
        started.update(Counter("copy" for step in self.steps for _ in step.copies))
        started["fill"] += started["Pad"]
        started["Concatenate"] = sum(len(step.inputs) for step in self.steps if step.kernel == "Concatenate")
        return +started

    @property
    def copies(self) -> list[str]:
        """Every copy made because an array does not lie as a kernel wants it."""
        return [copy for step in self.steps for copy in step.copies]

    @property
    def layout_copies(self) -> list[str]:
        """Those of arrays that hold just what is wanted, in another order; the rest close the gaps that a cut has
        left."""
        return [copy for copy in self.copies if CUT not in copy]

    @property
    def gathers_by_number(self) -> int:
        """Gathers whose index is one number: `x[0]` of an array copies what a slice would only look at."""
        return sum(step.name == "Gather" and prod(self.layouts[step.inputs[1]].shape) == 1 for step in self.steps)

    def convolutions(self) -> list[tuple[str, Layout, Layout]]:
        """Kernel, input and weight of every convolution."""
        found = [step for step in self.steps if step.name == "Convolution"]
        return [(step.kernel, self.layouts[step.inputs[0]], self.layouts[step.inputs[1]]) for step in found]


# ---- recording
# -------------------------------------------------------------------------------------------------------------


class Recorder:
    """Stands in for operations that Metal takes whole while a function is recorded, and remembers what they were."""

    def __init__(self) -> None:
        self.whole: list[tuple[str, dict[str, Any]]] = []

    def mark(self, name: str, output: tuple[Shape, mx.Dtype], inputs: list[mx.array], **settings: Any) -> mx.array:
        """An array of the output's shape that depends on the inputs through one primitive."""
        self.whole.append((name, settings))
        number = mx.array(len(self.whole) - 1, dtype=mx.int32)
        stand_in = constant(output[0], output[1])
        mx.eval(number)
        depending: mx.array = mx.depends([stand_in], [number, *inputs])[0]
        return depending

    def swiglu(self, gate: mx.array, up: mx.array) -> mx.array:
        """silu(gate) * up, compiled by both packages: one kernel."""
        return self.mark("swiglu", (up.shape, up.dtype), [gate, up])

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Put the stand-ins in place; a model that binds functions when it is built has to be built inside."""
        attention = mx.fast.scaled_dot_product_attention

        def layer_norm(x: mx.array, weight: mx.array | None, bias: mx.array | None, eps: float, **_: Any) -> mx.array:
            return self.mark(
                "LayerNorm", (x.shape, x.dtype), [x, *(part for part in (weight, bias) if part is not None)]
            )

        def rms_norm(x: mx.array, weight: mx.array | None, eps: float, **_: Any) -> mx.array:
            return self.mark("RMSNorm", (x.shape, x.dtype), [x, *([weight] if weight is not None else [])])

        def rope(x: mx.array, dims: int, *, offset: int | mx.array = 0, **_: Any) -> mx.array:
            offsets = [offset] if isinstance(offset, mx.array) else []
            return self.mark("RoPE", (x.shape, x.dtype), [x, *offsets], dims=dims)

        def scaled_dot_product_attention(q: mx.array, k: mx.array, v: mx.array, **options: Any) -> mx.array:
            if not attention_is_fused(q.shape, k.shape, v.shape, options.get("mask")):
                return attention(q, k, v, **options)
            mask = options.get("mask")
            masks = [mx.broadcast_to(mask, (*q.shape[:3], k.shape[2]))] if isinstance(mask, mx.array) else []
            return self.mark("Attention", ((*q.shape[:3], v.shape[3]), q.dtype), [q, k, v, *masks])

        def dequantize(
            w: mx.array, scales: mx.array, biases: mx.array | None, group_size: int, bits: int, *_: Any
        ) -> mx.array:
            shape = (*w.shape[:-1], w.shape[-1] * 32 // bits)
            return self.mark(
                "Dequantize", (shape, scales.dtype), [w, scales, *([biases] if biases is not None else [])]
            )

        def compiled(name: str) -> Callable[..., mx.array]:
            return lambda *inputs: self.mark(name, (inputs[0].shape, inputs[0].dtype), list(inputs))

        fast: dict[str, Any] = {"layer_norm": layer_norm, "rms_norm": rms_norm, "rope": rope}
        whole: dict[str, Any] = {
            "gelu": compiled("gelu"),
            "silu": compiled("silu"),
        }  # MLX compiles these: one kernel each
        with (
            patch.multiple(mx.fast, scaled_dot_product_attention=scaled_dot_product_attention, **fast),
            patch.object(mx, "dequantize", dequantize),
            patch.multiple(nn, **whole),
            patch.multiple(nn.layers.activations, **whole),
        ):
            yield


def constant(shape: Shape, dtype: mx.Dtype) -> mx.array:
    """An array that takes no memory whatever its shape."""
    array = mx.broadcast_to(mx.array(0, dtype=dtype), shape)
    mx.eval(array)
    return array


def weightless(model: nn.Module, dtype: mx.Dtype) -> nn.Module:
    """The model with every weight replaced by a constant of the same shape: a graph needs no more."""
    from mlx.utils import tree_map

    packed = (mx.uint32, mx.uint8)
    model.update(tree_map(lambda p: constant(p.shape, p.dtype if p.dtype in packed else dtype), model.parameters()))
    return model


def record(recorder: Recorder, function: Callable[..., mx.array], *examples: mx.array) -> Graph:
    """The primitives of a function on arrays like the examples, each with its kernel on Metal and the copies it asks
    for."""
    entries: list[dict[str, Any]] = []
    mx.export_function(entries.append, function, *examples)
    layouts: dict[str, Layout] = {}
    numbers: dict[str, int] = {}
    steps: list[Step] = []
    for entry in entries:
        if entry["type"] == "inputs":
            layouts |= {name: in_order(tuple(shape)) for name, shape, _ in entry["inputs"]}
        elif entry["type"] == "constants":
            for name, array in entry["constants"]:
                # Weights lie as they were loaded. A kept transposed view is written down as in order too: only products
                # take one,
                # and they take either order (RULES["matmul"]).
                layouts[name] = in_order(tuple(array.shape))
                if array.ndim == 0 and array.dtype == mx.int32:
                    numbers[name] = int(array.item())
        elif entry["type"] == "primitive":
            inputs, outputs = ([name for name, _, _ in entry[side]] for side in ("inputs", "outputs"))
            step = Step(entry["name"], list(entry["arguments"]), inputs, outputs)
            if step.name == WHOLE:
                name, settings = recorder.whole[numbers[inputs[1]]]
                step = replace(step, name=name, arguments=[settings], inputs=inputs[2:])
            shapes = [tuple(shape) for _, shape, _ in entry["outputs"]]
            steps.append(_place(step, shapes, layouts))
    return Graph(steps, layouts)


# ---- Metal's rules
# ---------------------------------------------------------------------------------------------------------


def attention_is_fused(q: Shape, k: Shape, v: Shape, mask: Any) -> bool:
    """`has_fused_kernel`, and not one of the shapes for which `use_fallback` finds the unfused path faster."""
    (_, heads, length, width), (_, kv_heads, seen, _), v_width = q, k, v[3]
    if length > 8:
        fits = mask is None or not isinstance(mask, str) or length <= seen
        return width == v_width and width in (64, 72, 80, 96, 128) and fits
    return width == v_width and width in (64, 96, 128, 256) and length <= seen and length * (heads // kv_heads) <= 32


def convolution_kernel(x: Shape, weight: Shape, arguments: list[Any], weight_strides: Shape | None = None) -> str:
    """Which of Metal's kernels a 2-D convolution takes: x (B, H, W, C), weight (O, kH, kW, C / groups), by default in
    order."""
    stride, low, high, kernel_dilation, input_dilation, groups, flip = arguments
    (B, H, W, C), (O, kH, kW, _) = x, weight  # noqa: E741
    plain_input, plain_kernel = set(input_dilation) == {1}, set(kernel_dilation) == {1}
    C_per_group, O_per_group = C // groups, O // groups
    if groups > 1:
        if not plain_input:
            return "explicit gemm, grouped"
        small = max(kH, kW) <= 7 and max(stride) <= 2 and plain_kernel
        rows_follow = (weight_strides or in_order(weight).strides)[1] == kW
        if C_per_group == 1 and O_per_group == 1 and small and rows_follow and C % 8 == 0 and C == O:
            return "depthwise"
        specialised = C_per_group <= 4 or C_per_group == 8 or C_per_group % 16 == 0
        narrow = specialised and (O_per_group <= 16 or O_per_group % 16 == 0)
        return "implicit gemm, grouped" if narrow else "explicit gemm, grouped"
    out = B * ((H + low[0] + high[0] - kH) // stride[0] + 1) * ((W + low[1] + high[1] - kW) // stride[1] + 1)
    unit = set(stride) == {1}
    winograd = C % 32 == 0 and O % 32 == 0 and B * H * W >= 4096 and C + O >= 256
    if not flip and unit and plain_kernel and plain_input and (kH, kW) == (3, 3) and winograd:
        return "winograd"
    aligned = O <= 16 or O % 16 == 0
    if plain_input and (C <= 4 or C % 16 == 0) and aligned:
        return "implicit gemm"
    if plain_input and unit and out >= 256 and aligned and kH * kW >= 9:
        return "implicit gemm, channels padded"
    return "implicit gemm, general" if (C % 16 == 0 and O % 16 == 0) or out >= 256 else "explicit gemm"


def reshape_strides(source: Layout, shape: Shape) -> Shape | None:
    """Strides of a reshaped view, or None where the data has to be copied (`prepare_reshape`)."""
    if source.row_contiguous:
        return in_order(shape).strides
    merged: list[list[int]] = []
    for size, stride in zip(source.shape, source.strides, strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == stride * size:
            merged[-1] = [merged[-1][0] * size, stride]
        else:
            merged.append([size, stride])
    strides, axis = [], 0
    for size in shape:
        if axis < len(merged) and merged[axis][0] % size == 0:
            merged[axis][0] //= size
            strides.append(merged[axis][0] * merged[axis][1])
            axis += merged[axis][0] <= 1
        elif size == 1:
            strides.append(strides[-1] if strides else 1)
        else:
            return None
    return tuple(strides)


def _place(step: Step, shapes: list[Shape], layouts: dict[str, Layout]) -> Step:
    """Work out where the outputs lie, and the step's kernel and copies; adds the outputs to `layouts`."""
    inputs = [layouts[name] for name in step.inputs]
    fresh = [in_order(shape) for shape in shapes]
    copies: list[str] = []
    kernel = step.name

    def wanted(condition: Callable[[Layout], bool], which: list[Layout], why: str) -> None:
        copies.extend(
            f"{step.name} copies {array.shape} with strides {array.strides}: {why}"
            for array in which
            if not condition(array)
        )

    if step.name in VIEWS:
        kernel, fresh = "", _view(step, inputs, fresh)
    elif step.name in RESHAPES:
        strides = reshape_strides(inputs[0], shapes[0])
        kernel = ""
        if strides is None:
            why = "" if inputs[0].dense else f", {CUT}"
            copies.append(f"{step.name} copies {inputs[0].shape} with strides {inputs[0].strides} to {shapes[0]}{why}")
        else:
            fresh = [Layout(shapes[0], strides)]
    elif step.name == "Convolution":
        weight = inputs[1] if inputs[1].row_contiguous else in_order(inputs[1].shape)
        kernel = f"convolution: {convolution_kernel(inputs[0].shape, weight.shape, step.arguments, weight.strides)}"
        wanted(lambda array: array.row_contiguous, inputs[:2], "a convolution takes rows in order")
    elif step.name in ("Matmul", "AddMM"):
        left, right = inputs[:2]
        for matrix, vector in ((left, left.shape[-2] == 1), (right, right.shape[-1] == 1)):
            why = "a vector's other stride is not its width" if vector else "neither matrix axis is dense"
            wanted(partial(product_takes, vector=vector), [matrix], why)
    elif step.name == "QuantizedMatmul":
        wanted(_whole_rows, inputs, "a quantised product takes rows that follow each other")
    elif step.name in ("LayerNorm", "RMSNorm"):
        wanted(lambda array: array.dense and array.strides[-1] == 1, inputs[:1], "a norm takes dense rows")
    elif step.name == "RoPE":
        wanted(_turns_in_place, inputs[:1], "neither in order nor heads and positions merely swapped")
    elif step.name == "Attention":
        fresh = [_attend(inputs, shapes[0], wanted)]
    elif len(inputs) and step.name not in ("Gather", "Concatenate", "Pad", "SliceUpdate", "Reduce", "Arange", "Full"):
        fresh = [_elementwise(inputs, shape) for shape in shapes]
    layouts.update(zip(step.outputs, fresh, strict=True))
    return replace(step, kernel=kernel, copies=copies)


def _view(step: Step, inputs: list[Layout], fresh: list[Layout]) -> list[Layout]:
    """Outputs of a primitive that only looks at its input differently."""
    source, shape = inputs[0], fresh[0].shape
    if step.name == "Transpose":
        return [Layout(shape, tuple(source.strides[axis] for axis in step.arguments[0]))]
    if step.name in ("Broadcast", "BroadcastAxes"):
        lead = len(shape) - len(source.shape)
        kept = zip(source.shape, source.strides, shape[lead:], strict=True)
        return [Layout(shape, (0,) * lead + tuple(0 if old != new else stride for old, stride, new in kept))]
    if step.name == "Slice":
        steps = step.arguments[2]
        return [Layout(shape, tuple(stride * by for stride, by in zip(source.strides, steps, strict=True)))]
    if step.name == "Split":
        return [Layout(part.shape, source.strides) for part in fresh]
    if step.name == "ExpandDims":
        strides = list(source.strides)
        for axis in sorted(step.arguments[0]):
            after = shape[axis + 1] * strides[axis] if axis < len(strides) else 1
            strides.insert(axis, after)
        return [Layout(shape, tuple(strides))]
    if step.name == "Squeeze":
        gone = {axis % len(source.shape) for axis in step.arguments[0]}
        return [Layout(shape, tuple(stride for axis, stride in enumerate(source.strides) if axis not in gone))]
    return fresh


def product_takes(matrix: Layout, vector: bool) -> bool:
    """Whether a product takes a matrix as it lies (`check_transpose`), in either order; a `vector` is one row or one
    column."""
    (rows, columns), (down, across) = matrix.shape[-2:], matrix.strides[-2:]
    return (across == 1 and (not vector or down == columns)) or (down == 1 and (not vector or across == rows))


def _whole_rows(x: Layout) -> bool:
    return len(x.shape) < 2 or x.strides[-2:] == (x.shape[-1], 1)


def _turns_in_place(x: Layout) -> bool:
    if x.row_contiguous or len(x.shape) < 4 or (len(x.shape) == 4 and x.shape[0] == 1):
        return True
    (_, heads, length, width), strides = x.shape, x.strides
    return strides[0] == heads * length * width and strides[1:3] == (width, heads * width)


def _attend(inputs: list[Layout], shape: Shape, wanted: Callable[..., None]) -> Layout:
    """Where attention's output lies; a long query leaves it (B, L, heads, head_dim) in memory, whatever its shape
    says."""
    _, heads, length, width = shape
    if length > 8:
        wanted(lambda array: array.strides[-1] == 1, inputs[:3], "head_dim has to be dense")
        return Layout(shape, (length * heads * width, width, heads * width, 1))

    def query_fits(q: Layout) -> bool:
        if q.row_contiguous:
            return True
        axis = 1 if q.shape[0] == 1 else 0
        swapped = q.strides[2] == q.shape[3] * q.shape[axis] and q.strides[axis] == q.shape[3]
        return 1 in q.shape[:2] and q.strides[3] == 1 and swapped

    wanted(query_fits, inputs[:1], "a short query has to be in order")
    batched = lambda array: 1 in array.shape[:2] or array.strides[0] == array.strides[1] * array.shape[1]  # noqa: E731
    wanted(lambda array: array.strides[-1] == 1 and batched(array), inputs[1:3], "head_dim has to be dense")
    takes_mask = lambda array: array.row_contiguous or 1 in inputs[0].shape[:2] or batched(array)  # noqa: E731
    wanted(takes_mask, inputs[3:], "the mask has to be in order")
    return in_order(shape)


def _elementwise(inputs: list[Layout], shape: Shape) -> Layout:
    """The output lies as the inputs do where those agree and are dense, in order otherwise."""
    whole = [array for array in inputs if array.shape == shape and not array.scalar]
    if (
        whole
        and all(array.dense and array.strides == whole[0].strides for array in whole)
        and len(whole) == sum(not a.scalar for a in inputs)
    ):
        return whole[0]
    return in_order(shape)


# ---- the models
# ------------------------------------------------------------------------------------------------------------

SEEN = 300  # positions in the cache before the decode step that is recorded
BATCH_POSITIONS = (300, 260, 281, 300)  # positions of the rows of a batch
CHAT_BITS = 8  # what chat quantises the decoder to on a GPU (`quantize.recipes.usual_bits`)


def our_graphs(size: str = "0.5b", resolution: int = 1024, layers: int | None = None) -> dict[str, Graph]:
    """Ours on Metal in bfloat16: image to embeddings, prefill of those and a few words, one more token (also quantised
    as in chat), and one more for each row of a batch."""
    from fastvlm_mlx.backend import ops as backend
    from fastvlm_mlx.diagnostics import random_model
    from fastvlm_mlx.network.kv_cache import ragged
    from fastvlm_mlx.network.model import FastVLM
    from fastvlm_mlx.quantize import layers as packed_layers
    from fastvlm_mlx.quantize import recipes

    recorder = Recorder()

    def model_of(bits: int | None) -> Any:
        model = FastVLM(random_model.config(size, layers))
        if bits is not None:
            packed_layers.apply(
                model, recipes.plan(model, recipes.choose(bits=bits, group_size=recipes.DEFAULT_GROUP))[0]
            )
        weightless(model, mx.bfloat16)
        return model

    def seen(attention: Any, length: int) -> mx.array:
        return constant((1, attention.kv_heads, length, attention.head_dim), mx.bfloat16)

    def caches_of(model: Any, length: int) -> list[Any]:
        caches = model.text.make_cache()
        for layer, block in zip(caches, model.text.layers, strict=True):
            layer.update(seen(block.self_attn, length), seen(block.self_attn, length))
            mx.eval(layer.state)
        return list(caches)

    def one_token(model: Any) -> Graph:
        cache = caches_of(model, SEEN)
        return record(recorder, lambda token: _likeliest(model.step(token, cache)), constant((1,), mx.uint32))

    def batch_step(model: Any, lengths: tuple[int, ...]) -> Graph:
        caches = ragged([caches_of(model, length) for length in lengths])
        mx.eval(caches[0].offset)
        tokens = constant((len(lengths),), mx.uint32)
        return record(recorder, lambda token: _likeliest(model.step(token, caches)), tokens)

    with backend.forms_of("metal"), recorder.installed(), patch.object(backend, "_fused_swiglu", recorder.swiglu):
        model = model_of(None)
        pixels = constant((1, resolution, resolution, 3), mx.uint8)
        tokens = (resolution // 64) ** 2
        prompt = constant((1, tokens + 25, model.text.norm.weight.shape[0]), mx.bfloat16)
        return {
            "tower and projector": record(recorder, model.encode, pixels),
            "prefill": record(
                recorder, lambda embeddings: _likeliest(model.prefill(embeddings, model.text.make_cache())), prompt
            ),
            "decode step": one_token(model),
            f"decode step, {CHAT_BITS} bits": one_token(model_of(CHAT_BITS)),
            "batch step": batch_step(model, BATCH_POSITIONS),
        }


def mlx_vlm_graphs(size: str = "0.5b", resolution: int = 1024) -> dict[str, Graph]:
    """The graphs of mlx-vlm, by the names of `our_graphs`; its step is its own greedy one, log-softmax included.

    mlx-vlm has to be importable.
    """
    from mlx_vlm.models import cache as caches
    from mlx_vlm.models import fastvlm, mlp

    if size != "0.5b":
        raise SystemExit("mlx-vlm is counted at its default size, 0.5b.")
    text = fastvlm.TextConfig(model_type="qwen2")
    config = fastvlm.ModelConfig(text_config=text, vision_config=fastvlm.VisionConfig())
    recorder = Recorder()
    with recorder.installed(), patch.object(mlp, "swiglu", recorder.swiglu):
        model: Any = weightless(fastvlm.Model(config), mx.bfloat16)
        model.eval()
        cache = caches.make_prompt_cache(model.language_model)
        width = text.hidden_size // text.num_attention_heads
        seen = constant((1, text.num_key_value_heads, SEEN, width), mx.bfloat16)
        for layer in cache:
            mx.eval(layer.update_and_fetch(seen, seen))

        def encode(pixels: mx.array) -> mx.array:
            _, features, _ = model.vision_tower(pixels.astype(mx.bfloat16).transpose(0, 2, 3, 1))
            embeddings: mx.array = model.mm_projector(features.reshape(1, -1, features.shape[-1]))
            return embeddings

        def step(token: mx.array) -> mx.array:
            logits = model.language_model(token[:, None], cache=cache).logits[:, -1, :]
            return mx.argmax(logits - mx.logsumexp(logits, axis=-1, keepdims=True), axis=-1)

        return {
            "tower and projector": record(recorder, encode, constant((1, 3, resolution, resolution), mx.float32)),
            "decode step": record(recorder, step, constant((1,), mx.uint32)),
        }


def _likeliest(logits: mx.array) -> mx.array:
    return mx.argmax(logits, axis=-1)


# ---- what is asked of it
# ---------------------------------------------------------------------------------------------------


def faults(graphs: dict[str, Graph], size: str = "0.5b", resolution: int = 1024) -> list[str]:
    """Everything in our graphs that Metal would take slowly; empty where all is as it should be."""
    found = []
    for name, graph in graphs.items():
        for kernel, x, weight in graph.convolutions():
            where = f"{name}: convolution of {x.shape} with {weight.shape}"
            if weight.shape[1:3] == (1, 1):
                found.append(f"{where} is a matrix product")
            if weight.shape[3] == 1 and not kernel.endswith(": depthwise"):
                found.append(f"{where} takes {kernel}, not the depthwise kernel ({RULES['convolution']})")
        names = Counter(step.name for step in graph.steps)
        if names["Softmax"]:
            found.append(f"{name}: {names['Softmax']} attentions are not fused ({RULES['attention']})")
        if names["Rsqrt"] or names["Sqrt"]:
            found.append(f"{name}: norms are spelled out instead of fused ({RULES['norm']})")
        if names["Pad"] > names["Attention"]:
            found.append(
                f"{name}: {names['Pad']} paddings for {names['Attention']} attentions; pad q, k and v as one "
                f"({RULES['pad']})"
            )
        if len(graph.copies) - len(graph.layout_copies) > names["Pad"]:
            found.append(f"{name}: more cuts are copied than attentions are padded")
        rows = (
            3 if names["Dequantize"] else 1
        )  # of one token: its row of the embedding, or of its packed form and scales
        wanted = rows if name.startswith("decode step") else 0
        if graph.gathers_by_number > wanted:
            found.append(
                f"{name}: {graph.gathers_by_number - wanted} arrays are indexed by a number, which gathers; slice or "
                "split"
            )
        found += [
            f"{name}: {copy}" for copy in graph.layout_copies if not (name.startswith("batch step") and apart(copy))
        ]
        if names["GreaterEqual"]:
            found.append(f"{name}: {names['GreaterEqual']} masks are made, and nothing is padded")
        if name in MLX_VLM_KERNELS and resolution == 1024 and size == "0.5b":
            kernels, theirs = sum(graph.kernels.values()), MLX_VLM_KERNELS[name]
            if kernels > MAX_SHARE[name] * theirs:
                found.append(
                    f"{name}: {kernels} kernels, more than {MAX_SHARE[name]:.0%} of mlx-vlm {MLX_VLM_VERSION}'s "
                    f"{theirs}"
                )
    return found


def apart(copy: str) -> bool:
    """Whether a copy is the one that every layer makes of the queries and keys of a batch, to be turned: one row's
    heads lie together, those of the next come after its values."""
    return copy.startswith("RoPE copies")


def report(graphs: dict[str, Graph]) -> str:
    """Primitives, kernels and copies of each graph, for people."""
    lines = []
    for name, graph in graphs.items():
        lines.append(
            f"{name}: {len(graph.steps)} primitives, {sum(graph.kernels.values())} kernels, {len(graph.copies)} copies"
        )
        lines += [f"  {count:>5}  {kernel}" for kernel, count in graph.kernels.most_common()]
        lines += [f"  {count:>5} x {copy}" for copy, count in Counter(graph.copies).most_common()]
    return "\n".join(lines)


def main() -> int:
    """Print the graphs; exit 1 where one of ours has a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mlx-vlm", action="store_true", help="count mlx-vlm's graph instead of ours")
    parser.add_argument("--size", default="0.5b", help="0.5b, 1.5b, 7b or small")
    parser.add_argument("--resolution", type=int, default=1024, help="pixels")
    options = parser.parse_args()
    print(f"rules read in {COMMIT}; mlx {version('mlx')}\n")
    if options.mlx_vlm:
        print(report(mlx_vlm_graphs(options.size, options.resolution)))
        return 0
    graphs = our_graphs(options.size, options.resolution)
    print(report(graphs))
    if (options.size, options.resolution) == ("0.5b", 1024):
        for name, theirs in MLX_VLM_KERNELS.items():
            ours = sum(graphs[name].kernels.values())
            print(f"{name}: {ours} kernels, {ours / theirs:.1%} of mlx-vlm {MLX_VLM_VERSION}'s {theirs}")
    problems = faults(graphs, options.size, options.resolution)
    print("\n".join(["", *(f"FAULT {problem}" for problem in problems)]) if problems else "\nno faults")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
