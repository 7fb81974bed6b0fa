"""A small random checkpoint in Apple's layout, written without PyTorch: what tests of files and commands start from."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from fastvlm_mlx.config import ModelConfig, QuantConfig, TextConfig, VisionConfig
from fastvlm_mlx.convert import published
from fastvlm_mlx.convert.key_map import APPLE_TOWER

Arrays = dict[str, mx.array]

VISION = VisionConfig(depths=(1, 1, 1, 1, 1), widths=(16, 32, 32, 64, 64))
TEXT: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 128,
    "max_position_embeddings": 1024,
}  # fmt: skip


def apple_name(name: str) -> str:
    """The published form's name as Apple's checkpoint has it."""
    for ours, apples in (
        ("vision.", APPLE_TOWER),
        ("projector.linear_1.", "model.mm_projector.0."),
        ("projector.linear_2.", "model.mm_projector.2."),
        ("text.lm_head.", "lm_head."),
        ("text.", "model."),
    ):
        if name.startswith(ours):
            return apples + name.removeprefix(ours)
    raise AssertionError(name)


def random_weights(
    vocab: int, *, tied: bool = True, seed: int = 0, dtype: mx.Dtype = mx.bfloat16, text: dict[str, Any] = TEXT
) -> Arrays:
    """Every tensor of a small checkpoint by Apple's names, the pooled head, counters and a tied head among them."""
    rng = np.random.default_rng(seed)
    config = ModelConfig(text=TextConfig(vocab_size=vocab, tie_word_embeddings=tied, **text), vision=VISION)
    weights: Arrays = {}
    for name, shape in published.shapes(config).items():
        noise = rng.standard_normal(shape).astype(np.float32)
        if name.endswith("running_var"):
            noise = 0.5 + rng.random(shape).astype(np.float32)
            weights[apple_name(name).replace("running_var", "num_batches_tracked")] = mx.array(1, dtype=mx.int64)
        elif len(shape) == 1:
            noise = (1 if name.endswith("weight") else 0) + 0.1 * noise
        elif "layer_scale" not in name:
            noise /= np.prod(shape[1:]) ** 0.5
        weights[apple_name(name)] = mx.array(noise).astype(dtype)
    weights[APPLE_TOWER + "head.proj"] = mx.zeros((VISION.out_width, 8), dtype=dtype)
    if tied:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    return weights


def write(folder: Path, tokenizer: Path, weights: Arrays | None = None, *, tied: bool = True, **settings: Any) -> Path:
    """A folder of config.json, the tokenizer's files and model.safetensors (random unless given)."""
    folder.mkdir(parents=True, exist_ok=True)
    added = json.loads((tokenizer / "added_tokens.json").read_text())
    vocab = max(added.values()) + 1
    vocab += -vocab % 64
    for file in tokenizer.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = {
        "model_type": "llava_qwen2", "mm_vision_tower": "mobileclip_l_128", "mm_projector_type": "mlp2x_gelu",
        "image_aspect_ratio": "pad", "hidden_act": "silu", "eos_token_id": added["<|im_end|>"], "vocab_size": vocab,
        "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": tied, "torch_dtype": "bfloat16",
        "vision_config": {"depths": list(VISION.depths), "widths": list(VISION.widths)}, **TEXT, **settings,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    text = {name: settings.get(name, size) for name, size in TEXT.items()}
    save(folder / "model.safetensors", random_weights(vocab, tied=tied, text=text) if weights is None else weights)
    return folder


def save(path: Path, weights: Arrays) -> None:
    mx.save_safetensors(str(path), weights, metadata={"format": "pt"})


def read(folder: Path) -> Arrays:
    """The weights of a folder written by `write`, all in memory."""
    weights = load(folder / "model.safetensors")
    mx.eval(weights)
    return weights


def load(path: Path) -> Arrays:
    """The arrays of a safetensors file, read when they are used."""
    arrays = mx.load(str(path))
    assert isinstance(arrays, dict)
    return arrays


def shard(folder: Path, count: int) -> None:
    """Split model.safetensors into shards with an index."""
    weights = read(folder)
    names = sorted(weights)
    weight_map: dict[str, str] = {}
    for i in range(count):
        file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        part = names[len(names) * i // count : len(names) * (i + 1) // count]
        save(folder / file, {name: weights[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def quant(how: dict[str, Any] | None) -> QuantConfig:
    """How a layer is quantised, from a table in a config.json."""
    assert how is not None
    return QuantConfig(**how)
