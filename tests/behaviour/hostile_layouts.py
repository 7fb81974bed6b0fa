"""What is done to folders of the other layouts to make them hostile, and what their refusal names, by layout."""

import json
import os
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from .changes import Change, settings, text, weights
from .hostile_folders import SAYS_OTHERWISE

PARTS = ("weight", "scales", "biases")


def each(table: str | None, **values: list[Any]) -> dict[str, tuple[Change, str]]:
    """One case per value of a setting, in a table of config.json or at its top."""
    return {
        f"{key} {value!r}"[:60]: (settings(**({table: {key: value}} if table else {key: value})), key)
        for key, every in values.items()
        for value in every
    }


def only(quantization: Any) -> Change:
    """What config.json says of the quantisation, under both of its names."""
    return lambda folder: [
        (folder / "config.json").write_text(
            json.dumps(
                json.loads((folder / "config.json").read_text())
                | dict.fromkeys(("quantization", "quantization_config"), quantization)
            )
        )
    ]


def put(name: str, new: Callable[[mx.array], mx.array] | None) -> Change:
    """A tensor changed, or taken out."""
    return weights(lambda t: t.pop(name) if new is None else t.update({name: new(t[name])}))


SHAPES: dict[str, Callable[[mx.array], mx.array]] = {
    "turned": lambda a: a.T,
    "flat": lambda a: a.reshape(-1),
    "of another type": lambda a: mx.zeros(a.shape, mx.uint16),
    "a scalar": lambda a: mx.array(1, a.dtype),
    "of no rows": lambda a: a[:0],
    "a row short": lambda a: a[:-1],
}
QUANTIZATIONS: list[Any] = [
    4, [], "4bit", {}, {"bits": 4}, {"group_size": 32}, {"bits": 0, "group_size": 32}, {"bits": 4, "group_size": 0},
    {"bits": -4, "group_size": 32}, {"bits": 4.0, "group_size": 32}, {"bits": True, "group_size": 32},
    {"bits": 1 << 70, "group_size": 32}, {"bits": 4, "group_size": 1 << 40}, {"bits": 4, "group_size": 32, "mode": "x"},
    {"bits": 4, "group_size": 32, "mode": {}}, {"bits": [4], "group_size": [32]},
]  # fmt: skip
UP = "language_model.model.layers.1.mlp.up_proj."
LINEAR = "multi_modal_projector.linear_0.weight"
KERNEL = "vision_tower.vision_model.conv_exp.reparam_conv.weight"
TIMM = "model.vision_tower.timm_model."
SIZES: dict[str, list[Any]] = {
    "hidden_size": [None, 0, -64, 65, 128, 1 << 24, "64", True],
    "num_hidden_layers": [None, 0, 3, 10**9],
    "num_attention_heads": [None, 0, 3, 1 << 30],
    "num_key_value_heads": [None, 0, 3],
    "intermediate_size": [None, 0, 127, 1 << 24],
    "vocab_size": [None, 0, 1, 1 << 24],
    "rms_norm_eps": [None, -1, "small", 1e300],
}
LIES: dict[str, dict[str, tuple[Change, str]]] = {
    "transformers": each("text_config", **SIZES)
    | each(
        "text_config",
        model_type=["llama", 7],
        hidden_act=["gelu"],
        use_sliding_window=[True],
        layer_types=["x", [1], {"a": 1}],
    )
    | each(
        "text_config",
        rope_parameters=[[1], {"rope_type": "yarn"}, {"rope_theta": "big"}, {}, "x"],
        eos_token_id=[5, -1, "end"],
    )
    | each("vision_config", architecture=[None, "vit_base_patch16_224", 7, ["fastvit_mci3"]])
    | each(
        "vision_config",
        model_args=[[1], "x", {"layers": [1]}, {"layers": "11111"}, {"embed_dims": [64] * 5}, {"se_ratio": 1}],
    )
    | each(None, text_config=[None, [], "x", 7], vision_config=["x", 7], projector_hidden_act=["relu"])
    | each(None, image_seq_length=[5, -4, "four", 1 << 70, 4.0, True], vision_feature_layer=[-2, [-1]])
    | each(None, tie_word_embeddings=["yes", 1, False], multimodal_projector_bias=[False])
    | {
        "a broken processor": (text("preprocessor_config.json", "{"), "preprocessor_config.json"),
        "a processor of a list": (text("processor_config.json", '{"image_processor": [1]}'), "image_processor"),
        "a picture of 2 ** 40": (text("preprocessor_config.json", json.dumps({"size": 1 << 40})), "image_size"),
        "a picture of text": (text("preprocessor_config.json", '{"size": "big"}'), "image_size"),
        "a picture of a list": (text("preprocessor_config.json", '{"size": [[1]]}'), "image"),
        "a picture of two sizes": (text("preprocessor_config.json", '{"size": 64, "crop_size": 128}'), "sides"),
        "another mean": (text("preprocessor_config.json", '{"image_mean": "x"}'), "image_mean"),
        "a pipe for a processor": (lambda f: os.mkfifo(f / "preprocessor_config.json"), "pipe"),
        "another tower's names": (weights(lambda t: t.update({TIMM + "stages.5.x": mx.zeros(1)})), "unknown"),
        "a stage too many": (
            weights(lambda t: t.update({TIMM + "stages.4.blocks.9.norm.bias": mx.zeros(1)})),
            "more than",
        ),
        "half in training form": (
            weights(lambda t: t.update({TIMM + "stem.0.conv_kxk.0.conv.weight": mx.zeros(1)})),
            "unknown name",
        ),
    },
    "mlx-vlm": each(None, **SIZES)
    | each(None, mm_vision_tower=[None, "clip", 7], model_type=["fast_vlm", "qwen2"], vision_config=[{"depths": [1]}])
    | {
        "kernels in PyTorch's order": (
            weights(lambda t: t.update({n: a.transpose(0, 3, 1, 2) for n, a in t.items() if a.ndim == 4})),
            "shape",
        ),
        "a kernel without axes": (put(KERNEL, lambda a: a.reshape(-1)), "shape"),
        "no tower": (weights(lambda t: [t.pop(n) for n in list(t) if n.startswith("vision_tower")]), "missing"),
    },
    "mlx-vlm quantised": {
        **{f"quantization {value!r}"[:60]: (only(value), "quantization") for value in QUANTIZATIONS},
        **{
            f"{bits} bits in groups of {group}": (only({"bits": bits, "group_size": group}), "do not fit")
            for bits, group in ((8, 32), (2, 32), (4, 64), (4, 128), (3, 32))
        },
        "no quantization": (settings(quantization=None, quantization_config=None), "quantization"),
        "another mode": (only({"bits": 4, "group_size": 32, "mode": "mxfp4"}), "do not fit"),
        "an exception of text": (only({"bits": 4, "group_size": 32, "mm_projector.0": "8"}), "mm_projector.0"),
        "an exception of nothing": (only({"bits": 4, "group_size": 32, "mm_projector.0": None}), "mm_projector.0"),
        **{f"{part} {what}": (put(UP + part, new), "up_proj") for part in PARTS for what, new in SHAPES.items()},
        **{f"no {part}": (put(UP + part, None), "up_proj") for part in PARTS},
    },
    "apple-mlx": each(None, **SIZES)
    | {
        "half a projector": (put("multi_modal_projector.linear_2.weight", None), "missing"),
        "a projector turned": (put(LINEAR, lambda a: a.T), "linear_0"),
        "half a tower": (
            weights(lambda t: t.update({"vision_tower.vision_model.head.proj": mx.zeros(1)})),
            "unknown name",
        ),
    },
}


# Settings that are possible in themselves: the message names what does not go with them.
OTHERWISE = SAYS_OTHERWISE | {
    "model_args": "",
    "vocab_size": "",
    "tie_word_embeddings": "",
    "rope_parameters": "",
    "model_type": "",
}
