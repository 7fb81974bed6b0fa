"""A whole model as three ONNX graphs, in a folder that transformers.js loads as `llava_qwen2`.

onnx/vision_encoder.onnx  onnx/embed_tokens.onnx  onnx/decoder_model_merged.onnx  config.json  generation_config.json
preprocessor_config.json  processor_config.json  tokenizer.json  tokenizer_config.json  chat_template.jinja  README.md
LICENSE  report.json  report.md

Files of graphs end in _fp16 and _quantized where they hold float16 and 8 bits, as transformers.js looks for them.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import mlx.core as mx
import numpy as np

from ..config import STRIDE, ModelConfig
from ..convert import export as transformers
from ..convert.card import licence_text, onnx_card
from ..convert.pipeline import check_place
from ..convert.unfold import unfold
from ..decoding.engine import Engine
from ..errors import CheckpointError, OptionError, listed, shown
from ..hub.licence import announce
from ..inputs.prompt import Turn
from ..network.model import LEVELS, FastVLM
from ..storage.fill import check_finite
from ..storage.open import OpenModel
from ..storage.place import check_target, new_folder
from . import estimate, onnxruntime
from .encoder import Weights, changes_nothing
from .onnx_decoder import decoder_graph, embedding_graph
from .onnx_encoder import encoder_graph
from .onnx_graph import BEYOND_PROTOBUF, Array, Graph
from .pictures import first_drawing
from .report import EXPORT, NAME, Report, Section
from .targets import Progress

OnnxPrecision = Literal["float32", "float16", "int8"]
SUFFIXES = {"float32": "", "float16": "_fp16", "int8": "_quantized"}
BITS = {"float32": 32, "float16": 16, "int8": 8}
QUESTION = "Describe the image."
HOW = "by onnxruntime on the CPU"


@dataclass(frozen=True)
class _Expected:
    """What MLX computes in float32: image embeddings (1, N, D) of pixels, and logits (1, V) after a question about
    them."""

    pixels: Array
    ids: tuple[list[int], list[int]]  # before the picture and behind it
    embeddings: Array
    logits: Array


def check_precision(precision: str) -> None:
    """Raise OptionError unless it is one that is written."""
    if precision not in SUFFIXES:
        raise OptionError(f"`precision` is {shown(precision)}, expected one of {listed(get_args(OnnxPrecision))}.")


def write(
    opened: OpenModel,
    folder: Path,
    out: Path,
    *,
    precision: OnnxPrecision = "float32",
    force: bool = False,
    progress: Progress = lambda label, share: None,
) -> Report:
    """Write a model opened from `folder` as a folder of ONNX graphs; returns the report that lies in it.

    `precision` is what matrices are stored in: "float32", "float16" (which they are multiplied in), or "int8", by
    onnxruntime's quantizer; whatever goes in and comes out is float32. Quantised layers are dequantised first. Raises
    OptionError, CheckpointError and OutputError; nothing is left half-written.
    """
    check_precision(precision)
    check_place(folder, out)
    resolved = opened.resolve()
    if resolved.image.size % STRIDE:
        raise CheckpointError(
            f"{opened.name}: its pictures of {resolved.image.size} pixels are no whole number of tokens of {STRIDE}; "
            "choose another model."
        )
    tokenizer, image = transformers.with_image_token(opened)
    rows = transformers.rows_with(image, resolved.text.vocab_size)
    config = replace(resolved, text=replace(resolved.text, vocab_size=rows), quantization={})
    nbytes = sum(parameter.size for parameter in FastVLM(config).flat_parameters().values()) * BITS[precision] // 8
    check_target(out, nbytes, force, own=EXPORT)
    onnxruntime.check_installed()
    announce(config.source.license)

    progress("Reading weights", 0.0)
    expected = _expected(opened, config)
    texts = _settings(config, image) | transformers.tokenizer_files(tokenizer, config)
    texts |= {"README.md": onnx_card(config, precision), "LICENSE": licence_text(folder, config)}
    with new_folder(out, nbytes, force, own=EXPORT) as partial:
        for file, text in texts.items():
            (partial / file).write_text(text, encoding="utf-8")
        (partial / "onnx").mkdir()
        files = _write_graphs(opened, config, partial / "onnx", precision, progress)
        progress("Comparing", 0.8)
        found = _compared(files, expected)
        sizes = {path.name: path.stat().st_size for path in sorted((partial / "onnx").iterdir())}
        report = _report(config, out, precision, image, sizes, found)
        report.write(partial / NAME)
    progress("Comparing", 1.0)
    return report


def _expected(opened: OpenModel, config: ModelConfig) -> _Expected:
    engine = Engine(opened)
    engine.load_weights(dtype="float32")
    pixels = first_drawing(config.image)
    pieces = engine.render([Turn(QUESTION, 1)])
    before, _, after = pieces
    assert isinstance(before, list) and isinstance(after, list)
    embeddings = engine.model.encode(mx.array(pixels)[None])
    whole = engine.model.embed(pieces, {0: embeddings[0]})
    logits = engine.model.prefill(whole, engine.model.text.make_cache())
    return _Expected(pixels, (before, after), np.array(embeddings), np.array(logits))


def _weights(opened: OpenModel, config: ModelConfig) -> Iterator[tuple[str, Weights]]:
    """Every tensor under its published name, float32, the vocabulary's matrices with rows for every token."""
    for name, array in unfold(transformers.read_tensors(opened), opened.resolve()):
        if name in ("text.embed_tokens.weight", "text.lm_head.weight"):
            array = transformers.with_rows(array, config.text.vocab_size)
        if changes_nothing(name):
            continue
        exact = array.astype(mx.float32)
        check_finite(opened.name, [(name, exact, array)])
        yield name, np.array(exact)


def _write_graphs(
    opened: OpenModel, config: ModelConfig, folder: Path, precision: OnnxPrecision, progress: Progress
) -> dict[str, Path]:
    """The three graphs; returns their files by name."""
    half = precision == "float16"
    text: dict[str, Weights] = {}
    vision: dict[str, Weights] = {}
    for name, array in _weights(opened, config):
        (text if name.startswith("text.") else vision)[name] = array
    files = {}
    for place, name in enumerate(("vision_encoder", "embed_tokens", "decoder_model_merged")):
        progress("Writing", 0.3 + 0.15 * place)
        if name == "vision_encoder":
            graph = encoder_graph(vision.items(), config, half=half)
            vision.clear()
        else:
            graph = (embedding_graph if name == "embed_tokens" else decoder_graph)(text, config, half=half)
        files[name] = _save(graph, folder, precision)
    return files


def _save(graph: Graph, folder: Path, precision: OnnxPrecision) -> Path:
    """Write a graph, beside it its weights where they are too many for one file; returns its path."""
    import onnx

    path = folder / f"{graph.name}{SUFFIXES[precision]}.onnx"
    first = folder / f"{graph.name}.float32.onnx" if precision == "int8" else path
    external = graph.nbytes > BEYOND_PROTOBUF
    data = f"{first.name}_data"
    onnx.save_model(graph.model(), str(first), save_as_external_data=external, location=data if external else None)
    if precision == "int8":
        onnxruntime.quantize(first, path, external=graph.nbytes // 4 > BEYOND_PROTOBUF)
        first.unlink()
        (folder / data).unlink(missing_ok=True)
    return path


def _compared(files: dict[str, Path], expected: _Expected) -> dict[str, estimate.Comparison]:
    """The graphs against MLX: the encoder's embeddings, and the logits after a question about the picture."""
    pixels = np.ascontiguousarray(LEVELS[expected.pixels].transpose(2, 0, 1)[None])
    embeddings = onnxruntime.run(files["vision_encoder"], {"pixel_values": pixels})["image_features"]
    before, after = (
        onnxruntime.run(files["embed_tokens"], {"input_ids": np.array([ids], np.int64)})["inputs_embeds"]
        for ids in expected.ids
    )
    inputs = np.concatenate([before, embeddings, after], axis=1)
    decoder = files["decoder_model_merged"]
    logits = onnxruntime.run(decoder, decoder_inputs(decoder, inputs))["logits"][:, -1:, : expected.logits.shape[1]]
    return {
        "embeddings": estimate.between(mx.array(embeddings), mx.array(expected.embeddings), HOW),
        "logits": estimate.between(mx.array(logits), mx.array(expected.logits[:, None]), HOW),
    }


def decoder_inputs(path: Path, embeddings: Array) -> dict[str, Array]:
    """What a decoder's graph takes for embeddings (B, L, D) with nothing in the cache."""
    import onnx

    rows, length, _ = embeddings.shape
    inputs: dict[str, Array] = {
        "inputs_embeds": embeddings,
        "attention_mask": np.ones((rows, length), np.int64),
        "position_ids": np.arange(length, dtype=np.int64)[None].repeat(rows, axis=0),
    }
    for declared in onnx.load(str(path), load_external_data=False).graph.input:
        if declared.name.startswith("past_key_values."):
            _, heads, _, width = declared.type.tensor_type.shape.dim
            inputs[declared.name] = np.zeros((rows, heads.dim_value, 0, width.dim_value), np.float32)
    return inputs


def _settings(config: ModelConfig, image: int) -> dict[str, str]:
    """Settings by the name of their file, as transformers.js reads them."""
    text = config.text
    model = {
        "model_type": "llava_qwen2",
        "architectures": ["LlavaQwen2ForCausalLM"],
        "license": config.source.license,
        "image_token_index": image,
        "mm_hidden_size": config.vision.out_width,
        "hidden_size": text.hidden_size,
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "head_dim": text.head_dim,
        "intermediate_size": text.intermediate_size,
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.max_position_embeddings,
        "tie_word_embeddings": text.tie_word_embeddings,
        "eos_token_id": list(config.eos_token_ids),
    }
    tables: dict[str, Any] = {
        "config.json": model,
        "generation_config.json": transformers.generation_settings(config),
    }
    tables |= transformers.processor_settings(config)
    return transformers.texts_of(tables)


def _report(
    config: ModelConfig,
    out: Path,
    precision: OnnxPrecision,
    image: int,
    sizes: dict[str, int],
    found: dict[str, estimate.Comparison],
) -> Report:
    facts = {
        "bytes": sum(sizes.values()),
        "files": sizes,
        "precision": precision,
        "licence": config.source.license,
        "image_token": image,
        "comparison": {name: asdict(each) for name, each in found.items()},
    }
    graphs = Section(
        "The graphs", f"Matrices in {precision}.", [(name, f"{size / 1e6:,.1f} MB") for name, size in sizes.items()]
    )
    rows = [
        (name, f"{each.difference:.1e} of the largest value, cosine {each.cosine:.6f}") for name, each in found.items()
    ]
    return Report(
        "onnx",
        config.source.name,
        out.name,
        facts,
        [graphs, Section("Against MLX in float32", f"Computed {HOW}.", rows)],
    )
