"""A model -> the folder that transformers' FastVlmForConditionalGeneration and LlavaProcessor load.

config.json  generation_config.json  model.safetensors (or shards)  processor_config.json  preprocessor_config.json
tokenizer.json  tokenizer_config.json  chat_template.jinja  README.md  LICENSE
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from tokenizers import AddedToken
from tokenizers import Tokenizer as BPETokenizer

from fastvlm_mlx.config import MODEL_TYPE, STRIDE, Dtype, Fit, ModelConfig, VisionConfig, check_dtype
from fastvlm_mlx.errors import CheckpointError, OptionError, about_its_path, listed, warn
from fastvlm_mlx.hub.licence import announce
from fastvlm_mlx.inputs.prompt import SYSTEM
from fastvlm_mlx.inputs.tokenizer import END_OF_TEXT
from fastvlm_mlx.network.model import FastVLM
from fastvlm_mlx.quantize import layers
from fastvlm_mlx.storage.adapter import Adapter
from fastvlm_mlx.storage.fill import check_finite
from fastvlm_mlx.storage.open import OpenModel, is_ours, open_ours
from fastvlm_mlx.storage.place import new_folder
from fastvlm_mlx.storage.save import save_weights

from .card import licence_text, transformers_card
from .config_map import ARCHITECTURE, check_fit
from .fuse import fuse
from .key_map import source_name
from .pipeline import Progress, check_place, open_foreign
from .unfold import unfold

IMAGE = "<image>"
VOCAB_MULTIPLE = 64  # the vocabulary's matrices are padded to a multiple of this many rows, as transformers does
NORM = ".convffn.conv.bn.weight"

# What prompt.py renders: pictures on lines of their own before the text of their turn.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\\nSYSTEM<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\\n' }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
).replace("SYSTEM", SYSTEM)


@about_its_path
def to_transformers(
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
    """Write `folder`, of any layout, as a folder that transformers loads; returns our config of what was written.

    Folded layers stay folded, beside batch norms and layer scales that change nothing: features and logits are the
    same. Quantised layers are dequantised. `<image>` is added to the vocabulary where it is missing. Arguments and
    errors are those of `convert`.
    """
    check_dtype(dtype)
    check_fit(fit)
    check_place(folder, out)
    name = name or folder.resolve().name
    if is_ours(folder):
        if layout or vision_from:
            raise OptionError(f"{folder} is converted already; leave `layout` and `vision_from` out to convert it.")
        opened = open_ours(folder, name, tokenizer and tokenizer / "tokenizer.json")
    else:
        opened = open_foreign(folder, name, tokenizer, layout=layout, vision_from=vision_from)
    opened = opened if adapter is None else fuse(opened, adapter)
    resolved = opened.resolve()
    if resolved.image.size % STRIDE:
        raise CheckpointError(
            f"{name}: its pictures of {resolved.image.size} pixels are no whole number of tokens of {STRIDE}, which "
            "transformers' processor cannot count; choose another model."
        )
    exported, image = with_image_token(opened)
    vocab = rows_with(image, resolved.text.vocab_size)
    config = replace(
        resolved,
        dtype=dtype or resolved.dtype,
        text=replace(resolved.text, vocab_size=vocab),
        image=replace(resolved.image, fit=fit or resolved.image.fit),
        quantization={},
    )
    stored_dtype: mx.Dtype = getattr(mx, config.dtype)

    tensors = read_tensors(opened)
    warn_of_quantised(name, resolved)

    def weights() -> Iterator[tuple[str, mx.array]]:
        total = len(tensors)
        for target, array in unfold(tensors, resolved):
            if target in ("text.embed_tokens.weight", "text.lm_head.weight"):
                array = with_rows(array, vocab)
            stored = array.astype(stored_dtype)
            theirs = source_name(target, "transformers")
            check_finite(str(folder), [(theirs, stored, array)])
            if progress:
                progress(total - len(tensors), total)
            yield theirs, stored
            if target.endswith(NORM):
                yield theirs.removesuffix("weight") + "num_batches_tracked", mx.array(0, dtype=mx.int64)

    announce(config.source.license)
    texts = _settings(config, image) | tokenizer_files(exported, config)
    texts |= {
        "README.md": transformers_card(config, len(resolved.quantization)),
        "LICENSE": licence_text(folder, config),
    }
    nbytes = stored_dtype.size * sum(parameter.size for parameter in FastVLM(config).flat_parameters().values())
    with new_folder(out, nbytes, force) as partial:
        if say:
            say(MODEL_TYPE if is_ours(folder) else opened.config.source.layout)
        for file, text in texts.items():
            (partial / file).write_text(text, encoding="utf-8")
        save_weights(partial, weights(), "pt")
    return config


def warn_of_quantised(name: str, config: ModelConfig) -> None:
    """A FastVLMWarning where a model that is written dequantised comes with quantised layers."""
    if config.quantization:
        warn(
            f"{name} has {len(config.quantization)} quantised layers: what is written of them is what quantising left, "
            "not the weights from before."
        )


def read_tensors(opened: OpenModel) -> dict[str, mx.array]:
    """Our tensors by name; raises CheckpointError unless names, shapes and dtypes are what the config calls for."""
    config, tensors = opened.resolve(), dict(opened.weights())
    model = FastVLM(config)
    layers.apply(model, config.quantization)
    parameters = model.flat_parameters()
    wrong = parameters.keys() ^ tensors.keys() or {
        path
        for path, parameter in parameters.items()
        if tensors[path].shape != parameter.shape
        or mx.issubdtype(tensors[path].dtype, mx.floating) != mx.issubdtype(parameter.dtype, mx.floating)
    }
    if wrong:
        raise CheckpointError(
            f"{opened.name}: {listed(sorted(wrong))} are not what its config.json calls for; convert it again."
        )
    return tensors


def own_tokenizer(opened: OpenModel) -> BPETokenizer:
    """The model's tokenizer as the library has it."""
    tokenizer = BPETokenizer.from_str(opened.tokenizer.to_json())
    tokenizer.encode_special_tokens = False
    return tokenizer


def with_image_token(opened: OpenModel) -> tuple[BPETokenizer, int]:
    """The tokenizer with `<image>` in it, and that token's id."""
    tokenizer = own_tokenizer(opened)
    if tokenizer.token_to_id(IMAGE) is None:
        tokenizer.add_special_tokens([AddedToken(IMAGE, special=True, normalized=False)])
    image = tokenizer.token_to_id(IMAGE)
    if image is None or not tokenizer.get_added_tokens_decoder().get(image, AddedToken("")).special:
        raise CheckpointError(
            f"{opened.name}: {IMAGE!r} is an ordinary word of its vocabulary; name another `tokenizer`."
        )
    return tokenizer, int(image)


def rows_with(image: int, vocabulary: int) -> int:
    """Rows of the vocabulary's matrices so that the token `image` has one: as many as there are, or as few more as can
    be."""
    return vocabulary if image < vocabulary else image + 1 + -(image + 1) % VOCAB_MULTIPLE


def with_rows(array: mx.array, rows: int) -> mx.array:
    """A matrix (V, D) with rows added, each the mean of the others, so that their logits are never the largest."""
    if array.shape[0] >= rows:
        return array
    mean = array.astype(mx.float32).mean(axis=0, keepdims=True)
    return mx.concatenate([array, mx.repeat(mean, rows - array.shape[0], axis=0).astype(array.dtype)])


def _settings(config: ModelConfig, image: int) -> dict[str, str]:
    """The settings files, by name."""
    text, vision = config.text, config.vision
    model_args: dict[str, Any] = {"inference_mode": True}
    if vision != VisionConfig():
        model_args |= {"layers": list(vision.depths), "embed_dims": list(vision.widths)}
    timm = {
        "model_type": "timm_wrapper",
        "architecture": ARCHITECTURE,
        "do_pooling": True,
        "global_pool": "avg",
        "hidden_size": vision.out_width,
        "initializer_range": 0.02,
        "model_args": model_args,
    }
    model = {
        "model_type": "fast_vlm",
        "architectures": ["FastVlmForConditionalGeneration"],
        "dtype": config.dtype,
        "torch_dtype": config.dtype,  # earlier releases read it here
        "license": config.source.license,
        "image_token_index": image,
        "image_seq_length": config.image.tokens,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "tie_word_embeddings": text.tie_word_embeddings,
        "text_config": qwen2_settings(config),
        "vision_config": timm,
    }
    tables = {
        "config.json": model,
        "generation_config.json": generation_settings(config),
        **processor_settings(config),
    }
    return texts_of(tables)


def texts_of(tables: Mapping[str, Any]) -> dict[str, str]:
    """Settings as they stand in their files, by the name of their file."""
    return {name: json.dumps(table, indent=2) + "\n" for name, table in tables.items()}


def generation_settings(config: ModelConfig) -> dict[str, Any]:
    """How transformers and its relatives decode by themselves: greedily, up to a stop token."""
    return {"eos_token_id": list(config.eos_token_ids), "do_sample": False}


def qwen2_settings(config: ModelConfig) -> dict[str, Any]:
    """The decoder's settings as transformers has them for Qwen2."""
    text = config.text
    return {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": text.hidden_size,
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "intermediate_size": text.intermediate_size,
        "vocab_size": text.vocab_size,
        "hidden_act": "silu",
        "rms_norm_eps": text.rms_norm_eps,
        "rope_theta": text.rope_theta,  # releases before 5 read it here
        "rope_parameters": {"rope_type": "default", "rope_theta": text.rope_theta},
        "max_position_embeddings": text.max_position_embeddings,
        "tie_word_embeddings": text.tie_word_embeddings,
        "use_sliding_window": False,
        "eos_token_id": list(config.eos_token_ids),
    }


def processor_settings(config: ModelConfig) -> dict[str, Any]:
    """Settings of LlavaProcessor and of its pictures, by the name of their file."""
    size = config.image.size
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE,
        "patch_size": STRIDE,
        "num_additional_image_tokens": 0,
        "vision_feature_select_strategy": "full",
    }
    pictures = {
        "processor_class": "LlavaProcessor",
        "image_processor_type": "LlavaImageProcessor",
        "do_pad": config.image.fit == "pad",
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.0, 0.0, 0.0],
        "image_std": [1.0, 1.0, 1.0],
        "do_convert_rgb": True,
    }
    return {"processor_config.json": processor, "preprocessor_config.json": pictures}


def tokenizer_files(tokenizer: BPETokenizer, config: ModelConfig) -> dict[str, str]:
    """The tokenizer and its settings as transformers reads them, by the name of their file."""
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": END_OF_TEXT if tokenizer.token_to_id(END_OF_TEXT) is not None else "<|im_end|>",
        "unk_token": None,
        "model_max_length": config.text.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "processor_class": "LlavaProcessor",
        "chat_template": CHAT_TEMPLATE,
        "added_tokens_decoder": {
            str(i): {"content": token.content, "special": token.special, "normalized": token.normalized,
                     "lstrip": token.lstrip, "rstrip": token.rstrip, "single_word": token.single_word}
            for i, token in sorted(tokenizer.get_added_tokens_decoder().items())
        },
    }  # fmt: skip
    return {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False) + "\n",
        "chat_template.jinja": CHAT_TEMPLATE,
    }
