"""What a model takes in memory, worked out from its config alone: weights, key-value cache, activations.

Enters: a `ModelConfig`, with the quantisation of each layer where there is one. Leaves: counts and bytes. No weights
are made.

Weights and cache are exact. On a CPU the compiled programs of a large model hold its tower and its quantised matrices
once more (`backend.cpu`), which is counted with them; a small model may keep float32 copies of quantised matrices, in
up to a quarter of the machine's memory (`backend.cpu.packed`), which are not. Activations are estimated: MLX queues
operations ahead of their execution, so everything that the stem, one block of the tower or one layer of the decoder
computes is taken to be in memory at the same time; the CPU's own operations (`cpu`) finish before the next begin. There
the sum comes out from 10 % below to 25 % above MLX's own peak (tests/unit/test_memory.py; the activations of 0.5B's
tower at 1024 pixels: 2 % below). What a GPU takes has not been measured.

This is for answering: converting while loading (a folder that is not ours) can take more for a moment.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..backend.cpu.convolution import TILE, WINDOWS
from ..backend.ops import Backend
from ..backend.ready import LARGE
from ..config import ATTENTION_STAGES, DTYPES, HEAD_DIM, Dtype, ModelConfig, QuantConfig, TextConfig, VisionConfig
from .kv_cache import buffered
from .model import PREFILL_CHUNK, FastVLM

PARTS = ("tower", "projector", "embeddings", "decoder")
SCALE_BYTES = 2  # of a scale in a folder
CONTEXT = 1024  # positions beside the pictures': a question and an answer of some length
BYTES: dict[Dtype, int] = dict(zip(DTYPES, (4, 2, 2), strict=True))
AHEAD = 1 << 24  # elements that MLX makes, at most, ahead of those that are still waited for
# Heads whose scores a GPU never writes out (mlx 0.32, scaled_dot_product_attention.cpp).
FUSED_HEAD_DIMS = (64, 80, 128)


@dataclass(frozen=True)
class Memory:
    """Bytes: weights by part (`PARTS`), key-value cache at `context` positions, and activations at their largest."""

    weights: dict[str, int]
    cache: int
    activations: int
    context: int

    @property
    def total(self) -> int:
        """All of it: what answering takes at its peak."""
        return sum(self.weights.values()) + self.cache + self.activations


def parameters(config: ModelConfig) -> dict[str, int]:
    """How many parameters each part has; the head counts as an embedding, and not at all where it is tied to it."""
    counts = dict.fromkeys(PARTS, 0)
    for name, shape in _shapes(config):
        counts[_part(name)] += math.prod(shape)
    return counts


def estimate(
    config: ModelConfig,
    *,
    backend: Backend = "metal",
    dtype: Dtype | None = None,
    context: int | None = None,
    images: int = 1,
) -> Memory:
    """What answering takes with `images` pictures and `context` positions in all.

    `context` is by default the pictures' positions and CONTEXT more. `dtype` is the type to compute in, by default as
    stored on a GPU and float32 on a CPU. Layers in `config.quantization` are counted as quantised, so
    `replace(config, quantization=plan)` answers for a recipe.
    """
    computed: Dtype = dtype or ("float32" if backend == "cpu" else config.dtype)
    limit = config.text.max_position_embeddings
    image_tokens = images * config.image.tokens
    context = min(limit, context or image_tokens + CONTEXT)
    weights = weight_bytes(config, computed)
    forms = backend
    if backend == "cpu" and sum(parameters(config).values()) >= LARGE:
        compiled = _compiled_bytes(config, computed)
        weights = {part: size + compiled[part] for part, size in weights.items()}
        forms = "cuda"  # programs write no more out than a GPU's kernels do
    tower = _tower(config.vision, config.image.size, forms) if images else 0
    decoder = _decoder(config.text, min(context, PREFILL_CHUNK), context, forms)
    return Memory(
        weights,
        _cache(config.text, context, computed),
        BYTES[computed] * max(tower, decoder),
        context,
    )


def with_decoder_bits(config: ModelConfig, bits: int) -> ModelConfig:
    """A model's config with its decoder's matrices in `bits` bits: the least that quantising while loading saves."""
    quantization = {
        name.removesuffix(".weight"): QuantConfig(bits, 64)
        for name, shape in _shapes(config)
        if name.startswith("text.layers.") and len(shape) == 2 and shape[-1] % 64 == 0
    }
    return replace(config, quantization=quantization)


def weight_bytes(config: ModelConfig, dtype: Dtype | None = None) -> dict[str, int]:
    """Bytes of the weights by part: in memory as `dtype`, or without it in a folder, whose scales have 16 bits."""
    sizes = dict.fromkeys(PARTS, 0)
    item = BYTES[dtype or config.dtype]
    scales = item if dtype else min(item, SCALE_BYTES)
    for name, shape in _shapes(config):
        settings = config.quantization.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        count = math.prod(shape)
        sizes[_part(name)] += count * item if settings is None else _quantized_bytes(count, settings, scales)
    return sizes


def _compiled_bytes(config: ModelConfig, dtype: Dtype) -> dict[str, int]:
    """Bytes that programs hold by part: the tower dequantised, and the affine matrices of the others as they are
    stored."""
    sizes = dict.fromkeys(PARTS, 0)
    for name, shape in _shapes(config):
        settings = config.quantization.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if _part(name) == "tower":
            sizes["tower"] += math.prod(shape) * BYTES[dtype]
        elif settings is not None and settings.mode == "affine":
            sizes[_part(name)] += _quantized_bytes(math.prod(shape), settings, BYTES["float32"])
    return sizes


def _quantized_bytes(count: int, settings: QuantConfig, item: int) -> int:
    """Packed weights and their scales: a byte each in the mx and nv modes, two of `item` bytes in affine."""
    scales = 2 * item if settings.mode == "affine" else 1
    return count * settings.bits // 8 + count // settings.group_size * scales


def _shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every parameter of the model before quantising; MLX makes no array before it is asked for its values."""
    for name, parameter in FastVLM(config).flat_parameters().items():
        yield name, parameter.shape


def _part(name: str) -> str:
    if name.startswith("vision."):
        return "tower"
    if name.startswith("projector."):
        return "projector"
    return "embeddings" if name.startswith(("text.embed_tokens.", "text.lm_head.")) else "decoder"


def _cache(config: TextConfig, context: int, dtype: Dtype) -> int:
    """Keys and values of every layer."""
    return (
        2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * buffered(context) * BYTES[dtype]
    )


def _tower(config: VisionConfig, size: int, backend: Backend) -> int:
    """Elements held at the tower's peak: the stem or the block that computes the most."""
    half, side, width = -(-size // 2), -(-size // 4), config.widths[0]
    stem = half * half * 27 if backend == "cpu" else 0  # the windows of a 3x3 convolution over three colours
    stem += 3 * size * size + 2 * half * half * width
    rest = 3 * side * side * width
    peak = stem + _depthwise(half, width, 3, 2, backend) + min(rest, AHEAD)
    for stage, width in enumerate(config.widths):
        if stage > 0:
            out = -(-side // 2)
            before = config.widths[stage - 1]
            down = side * side * before + width // before * _depthwise(side, before, 7, 2, backend)
            down += 4 * out * out * width
            side, peak = out, max(peak, down)
        x, inner = side * side * width, width * config.mlp_ratio
        mixer = _depthwise(side, width, 3, 1, backend)
        if stage in ATTENTION_STAGES:
            mixer = 8 * x + (width // HEAD_DIM * side**4 if backend == "cpu" else 0)  # the scores
        hidden = 2 * side * side * inner
        peak = max(peak, 4 * x + max(mixer, _depthwise(side, width, 7, 1, backend) + hidden))
    return peak


def _depthwise(side: int, channels: int, kernel: int, stride: int, backend: Backend) -> int:
    """Elements that a depthwise convolution makes: its result, on a CPU also the padded input and its windows."""
    out = -(-side // stride)
    result = channels * out * out
    if backend != "cpu":
        return result
    tile = min(TILE, out)
    tiles, span = -(-out // tile), (tile - 1) * stride + kernel
    padded = channels * (side + kernel) * ((tiles * tile - 1) * stride + kernel)
    return padded + min(channels * out * tiles * kernel * span, 3 * WINDOWS) + 2 * result


def _decoder(config: TextConfig, rows: int, context: int, backend: Backend) -> int:
    """Elements held while the last `rows` of `context` positions go through one layer, and the logits after it."""
    hidden, inner = config.hidden_size, config.intermediate_size
    scores = config.num_attention_heads * rows * context
    if backend == "cpu":  # which finishes one step before it begins the next
        scores += 3 * scores // 4  # and what there is of their softmax while they are
        return 3 * rows * (hidden + inner) + scores + config.vocab_size
    if config.head_dim in FUSED_HEAD_DIMS:
        scores = 0
    qkv = 3 * rows * (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    return 8 * rows * hidden + qkv + scores + 5 * rows * inner + config.vocab_size
