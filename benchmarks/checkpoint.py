"""One checkpoint, three folders: Apple's layout for mlx-vlm, timm's names for transformers, ours; all of one type.

Enters: a folder in Apple's layout, or the name of a size to fill with random weights. Leaves: `ours/`, `mlx-vlm/` and
`transformers/` with the same numbers, each as its reader wants them. Needs no PyTorch.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np

from fastvlm_mlx.config import Dtype, ModelConfig, VisionConfig
from fastvlm_mlx.convert import convert, published
from fastvlm_mlx.convert.key_map import APPLE_TOWER
from fastvlm_mlx.convert.tokenizer import WORDS
from fastvlm_mlx.diagnostics import random_model

TOKENIZER = (
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
)
TEMPLATE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\n{prompt}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
CHAT_TEMPLATE = (  # the one of Qwen2's published tokenizers
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IMAGE_TOKEN = -1  # counted from the end of the vocabulary: no word's id in a published or a random checkpoint
PUBLISHED = (
    ("vision.", APPLE_TOWER),
    ("projector.linear_1.", "model.mm_projector.0."),
    ("projector.linear_2.", "model.mm_projector.2."),
)

# What Apple's tower names are in timm's fastvit_mci3.
NETWORK = {
    **{i: f"stages.{stage}.blocks" for stage, i in enumerate((0, 2, 4, 7, 10))},
    **{i: f"stages.{stage}.downsample" for stage, i in enumerate((1, 3, 5, 8), start=1)},
    **{i: f"stages.{stage}.pos_emb" for stage, i in enumerate((6, 9), start=3)},
}
TIMM = (
    ("patch_embed.", "stem."),
    ("conv_exp.", "final_conv."),
    ("se.reduce", "se.fc1"),
    ("se.expand", "se.fc2"),
    (".convffn.", ".mlp."),
    ("proj.0.lkb_reparam", "proj.0.reparam_conv"),
)


def write_random(folder: Path, size: str, layers: int | None = None) -> Path:
    """A checkpoint of random weights in Apple's layout, with a tokenizer that knows the words of the prompt and no
    others."""
    config = random_model.config(size, layers)
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(random_model.NOISE).astype(np.float32)
    weights = {
        _apple_name(name): mx.array(_values(name, shape, noise)) for name, shape in published.shapes(config).items()
    }
    weights[APPLE_TOWER + "head.proj"] = mx.zeros((config.vision.out_width, 768))
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    end = _write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(_apple_config(config, end), indent=2))
    return folder


def make_talkative(folder: Path) -> Path:
    """Give a random checkpoint a chat template, and every token id but the last a text, so that answers can be seen."""
    config = json.loads((folder / "config.json").read_text())
    vocabulary = json.loads((folder / "vocab.json").read_text())
    added = json.loads((folder / "added_tokens.json").read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    first = config["vocab_size"] + IMAGE_TOKEN - len(added)  # special tokens follow all others
    vocabulary |= {f"\u0120{token}": token for token in range(len(vocabulary), first)}
    moved = {name: first + place for place, name in enumerate(added)}
    described = {str(moved[each["content"]]): each for each in settings["added_tokens_decoder"].values()}
    config["eos_token_id"] = moved["<|im_end|>"]
    settings |= {"added_tokens_decoder": described, "chat_template": CHAT_TEMPLATE}
    for name, content in {
        "config.json": config,
        "vocab.json": vocabulary,
        "added_tokens.json": moved,
        "tokenizer_config.json": settings,
    }.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False))
    return folder


def prepare(
    name: str, source: Callable[[], Path], out: Path, resolution: int, dtype: Dtype = "float32"
) -> dict[str, Path]:
    """Folders of the same weights for each of the three, by name, from the checkpoint that `source` finds or writes.

    Those that an earlier run made of a checkpoint of this `name` with the same settings are kept.
    """
    folders = {who: out / who for who in ("ours", "mlx-vlm", "transformers")}
    settings = {"checkpoint": name, "resolution": resolution, "dtype": dtype}
    done = out / "prepared.json"
    if done.exists() and json.loads(done.read_text()) == settings:
        return folders
    checkpoint = source()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    config = json.loads((checkpoint / "config.json").read_text()) | {"mm_vision_tower": f"mobileclip_l_{resolution}"}
    config["torch_dtype"] = dtype
    weights = dict(_cast(checkpoint, getattr(mx, dtype)))
    if config["tie_word_embeddings"]:
        weights.pop("lm_head.weight", None)
    _write(folders["mlx-vlm"], checkpoint, config, weights, resolution)
    convert(folders["mlx-vlm"], folders["ours"])
    theirs = {transformers_name(name): array for name, array in weights.items() if not name.endswith("head.proj")}
    _write(folders["transformers"], checkpoint, _transformers_config(config, resolution, dtype), theirs, resolution)
    done.write_text(json.dumps(settings))
    return folders


def _write(folder: Path, checkpoint: Path, config: dict[str, object], weights: dict[str, mx.array], size: int) -> None:
    folder.mkdir()
    for name in TOKENIZER:
        if (checkpoint / name).exists():
            shutil.copy(checkpoint / name, folder / name)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    picture = {
        "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
        "image_mean": [0.0, 0.0, 0.0], "image_std": [1.0, 1.0, 1.0], "resample": 3, "do_resize": True,
        "do_center_crop": True,
        "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "rescale_factor": 1 / 255,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(picture, indent=2))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})


def _cast(checkpoint: Path, dtype: mx.Dtype) -> Iterator[tuple[str, mx.array]]:
    for file in sorted(checkpoint.glob("*.safetensors")):
        arrays = mx.load(str(file))
        assert isinstance(arrays, dict)
        for name, array in arrays.items():
            yield name, array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array


def _apple_name(name: str) -> str:
    for ours, apples in (*PUBLISHED, ("text.lm_head.", "lm_head."), ("text.", "model.")):
        if name.startswith(ours):
            return apples + name.removeprefix(ours)
    raise KeyError(name)


def transformers_name(name: str) -> str:
    """The name that transformers' FastVLM has for a tensor of Apple's checkpoints."""
    if name.startswith(APPLE_TOWER):
        name = name.removeprefix(APPLE_TOWER)
        if found := re.match(r"network\.(\d+)\.", name):
            name = f"{NETWORK[int(found[1])]}.{name[found.end() :]}"
        for apples, theirs in TIMM:
            name = name.replace(apples, theirs)
        return "model.vision_tower.timm_model." + re.sub(r"(layer_scale(_\d)?)$", r"\1.gamma", name)
    for number, theirs in (("0", "linear_1"), ("2", "linear_2")):
        name = name.replace(f"model.mm_projector.{number}.", f"model.multi_modal_projector.{theirs}.")
    if name.startswith("model.") and "multi_modal_projector" not in name:
        name = "model.language_model." + name.removeprefix("model.")
    return name


def _transformers_config(apple: dict[str, object], resolution: int, dtype: str) -> dict[str, object]:
    kept = (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
        "vocab_size",
        "rms_norm_eps", "rope_theta", "max_position_embeddings", "tie_word_embeddings", "hidden_act",
    )  # fmt: skip
    vision = {
        "model_type": "timm_wrapper", "architecture": "fastvit_mci3", "do_pooling": True, "global_pool": "avg",
        "hidden_size": 3072,
        "initializer_range": 0.02, "model_args": {"inference_mode": True},
    }  # fmt: skip
    text = {"model_type": "qwen2", "torch_dtype": dtype, **{name: apple[name] for name in kept}}
    return {
        "architectures": ["FastVlmForConditionalGeneration"], "model_type": "fast_vlm", "torch_dtype": dtype,
        "vision_config": vision, "text_config": text, "tie_word_embeddings": apple["tie_word_embeddings"],
        "image_token_index": int(str(apple["vocab_size"])) + IMAGE_TOKEN, "image_seq_length": (resolution // 64) ** 2,
        "projector_hidden_act": "gelu", "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
        "multimodal_projector_bias": True,
    }  # fmt: skip


def _apple_config(config: ModelConfig, end: int) -> dict[str, object]:
    text, vision = config.text, config.vision
    other = {} if vision == VisionConfig() else {"vision_config": {"depths": vision.depths, "widths": vision.widths}}
    return {
        **other,
        "architectures": ["LlavaQwen2ForCausalLM"], "model_type": "llava_qwen2", "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": f"mobileclip_l_{config.image.size}", "mm_hidden_size": config.vision.out_width,
        "image_aspect_ratio": "pad", "hidden_act": "silu", "eos_token_id": end, "torch_dtype": "float32",
        "hidden_size": text.hidden_size, "num_hidden_layers": text.num_hidden_layers, "vocab_size": text.vocab_size,
        "num_attention_heads": text.num_attention_heads, "num_key_value_heads": text.num_key_value_heads,
        "intermediate_size": text.intermediate_size, "tie_word_embeddings": text.tie_word_embeddings,
        "rope_theta": text.rope_theta, "rms_norm_eps": text.rms_norm_eps,
        "max_position_embeddings": text.max_position_embeddings, "tokenizer_model_max_length": 8192,
        "tokenizer_padding_side": "right", "use_sliding_window": False,
    }  # fmt: skip


def _values(name: str, shape: tuple[int, ...], noise: np.ndarray) -> np.ndarray:
    """Norms, batch-norm statistics and layer scales away from their initial values; activations keep their size."""
    values = np.resize(noise, shape)
    if name.endswith("running_var"):
        return 0.5 + np.abs(values)
    if "layer_scale" in name:
        return 0.3 + 0.1 * values
    if name.endswith(("bn.weight", "norm.weight", "layernorm.weight")):
        return 1 + 0.1 * values
    if len(shape) == 1 or "embed_tokens" in name or "lm_head" in name:
        return 0.05 * values
    return values / np.float32(np.prod(shape[1:]) ** 0.5)


def _write_tokenizer(folder: Path) -> int:
    """vocab.json, merges.txt and the rest, of Qwen2's kind, trained on the prompt's own words; the id of <|im_end|>."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    cut = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    words = [TEMPLATE.format(prompt="Describe the image. What is on the table?")] * 2
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(words, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False))
    model = json.loads(bpe.to_str())["model"]
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    added = {name: len(model["vocab"]) + i for i, name in enumerate(names)}
    described = {str(i): {"content": name, "special": True, "normalized": False} for name, i in added.items()}
    settings = {
        "tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": described, "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "unk_token": None,
    }  # fmt: skip
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (folder / "added_tokens.json").write_text(json.dumps(added))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return added["<|im_end|>"]
