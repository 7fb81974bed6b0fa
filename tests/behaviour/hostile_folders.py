"""What is done to a folder to make it hostile, and what its refusal names: tables of (change, words of the message)."""

import json
import shutil
import struct
from typing import Any

import mlx.core as mx

from fastvlm_mlx.convert.key_map import APPLE_TOWER

from .changes import (
    Change,
    cut,
    first,
    header,
    index,
    link,
    pipe,
    poison,
    settings,
    sharded,
    text,
    then,
    weights,
    without,
)

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
NORM = "model.norm.weight"
DEEP = "[" * 100_000
TERABYTES = struct.pack("<Q", 1 << 42)

BOTH: dict[str, tuple[Change, str]] = {
    "no config": (without("config.json"), "config.json"),
    "empty config": (text("config.json", ""), "config.json"),
    "broken config": (text("config.json", '{"model_type": '), "not valid JSON"),
    "a config of bytes": (text("config.json", bytes(range(256))), "not valid JSON"),
    "a config in UTF-16": (text("config.json", '{"a": 1}'.encode("utf-16")), "not valid JSON"),
    "a list for a config": (text("config.json", "[]"), "config.json"),
    "a number for a config": (text("config.json", "7"), "config.json"),
    "a deep config": (text("config.json", DEEP), "nested"),
    "a huge number in the config": (text("config.json", '{"a": ' + "9" * 9000 + "}"), "config.json"),
    "NaN in the config": (text("config.json", '{"a": NaN}'), "NaN"),
    "a key twice in the config": (text("config.json", '{"a": 1, "a": 2}'), "twice"),
    "25 MB of config": (text("config.json", '{"a": "' + "x" * 25_000_000 + '"}'), "more than"),
    "another model": (text("config.json", '{"model_type": "llama"}'), "llama"),
    "no model type": (text("config.json", "{}"), "None"),
    "a long model type": (text("config.json", json.dumps({"model_type": "x" * 100_000})), "xxx"),
    "escapes for a model type": (text("config.json", json.dumps({"model_type": "\x1b[2J\n"})), r"\x1b"),
    "a pipe for a config": (pipe("config.json"), "pipe"),
    "/dev/zero for a config": (link("config.json", "/dev/zero"), "device"),
    "a dangling config": (link("config.json", "/nowhere/config.json"), "config.json"),
    "a folder for a config": (then(without("config.json"), lambda f: (f / "config.json").mkdir()), "folder"),
    "no weights": (without("model.safetensors"), "model.safetensors"),
    "empty weights": (text("model.safetensors", b""), "truncated"),
    "weights of 7 bytes": (text("model.safetensors", b"1234567"), "truncated"),
    "a header of terabytes": (text("model.safetensors", TERABYTES + b"{}"), "truncated"),
    "a header of 2 ** 64 - 1": (text("model.safetensors", b"\xff" * 8 + b"{}"), "truncated"),
    "a header of spaces": (text("model.safetensors", struct.pack("<Q", 1000) + b" " * 1000), "not valid JSON"),
    "a deep header": (text("model.safetensors", struct.pack("<Q", len(DEEP)) + DEEP.encode()), "nested"),
    "a header of noise": (text("model.safetensors", struct.pack("<Q", 1000) + bytes(range(250)) * 4), "not valid JSON"),
    "a list for a header": (text("model.safetensors", struct.pack("<Q", 2) + b"[]"), "table"),
    "an empty header": (text("model.safetensors", struct.pack("<Q", 2) + b"{}"), ""),
    "a pointer of Git LFS": (
        text("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "Git LFS",
    ),
    "a pipe for weights": (pipe("model.safetensors"), "pipe"),
    "/dev/zero for weights": (link("model.safetensors", "/dev/zero"), "device"),
    **{f"cut at {tenth * 10} %": (cut(tenth / 10), "model.safetensors") for tenth in range(1, 10)},
    "one byte short": (cut(0.9999999), "model.safetensors"),
    "bytes too many": (header(lambda table: None, grow=100), "model.safetensors"),
    "a tensor that overlaps": (
        header(
            lambda t: t[first(t)].update(
                data_offsets=[t[first(t)]["data_offsets"][0] + 1, t[first(t)]["data_offsets"][1] + 1]
            )
        ),
        "overlap",
    ),
    "a tensor of terabytes": (
        header(lambda t: t[first(t)].update(shape=[1 << 40], data_offsets=[0, 1 << 42])),
        "malformed",
    ),
    "a shape with a negative": (header(lambda t: t[first(t)].update(shape=[-1])), "malformed"),
    "a shape with a fraction": (header(lambda t: t[first(t)].update(shape=[1.5])), "malformed"),
    "a shape of text": (header(lambda t: t[first(t)].update(shape="big")), "malformed"),
    "a shape of 2 ** 31": (
        header(lambda t: t.update(x={"dtype": "F32", "shape": [0, 1 << 31], "data_offsets": [0, 0]})),
        "malformed",
    ),
    "a shape of 1000 dimensions": (
        header(lambda t: t.update(x={"dtype": "U8", "shape": [0] * 1000, "data_offsets": [0, 0]})),
        "malformed",
    ),
    "an unknown type": (header(lambda t: t[first(t)].update(dtype="F4_E2M1")), "malformed"),
    "a list for a type": (header(lambda t: t[first(t)].update(dtype=["F32"])), "malformed"),
    "no offsets": (header(lambda t: t[first(t)].pop("data_offsets")), "malformed"),
    "three offsets": (header(lambda t: t[first(t)].update(data_offsets=[0, 1, 2])), "malformed"),
    "offsets backwards": (
        header(lambda t: t[first(t)].update(data_offsets=t[first(t)]["data_offsets"][::-1])),
        "malformed",
    ),
    "an entry of text": (header(lambda t: t.update({first(t): "tensor"})), "malformed"),
    "a name twice": (
        header(lambda t: json.dumps(t).encode()[:-1] + b"," + json.dumps({n: t[n] for n in [first(t)]}).encode()[1:]),
        "twice",
    ),
    "many names twice": (header(lambda t: b"{" + b'"a":1,' * 200_000 + b'"a":1}'), "twice"),
    "a tensor more": (
        header(lambda t: t.update(surplus={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})),
        "surplus",
    ),
    "a tensor renamed": (header(lambda t: t.update({first(t) + ".old": t.pop(first(t))})), ".old"),
    "a tensor with escapes": (header(lambda t: t.update({"\x1b[2J": t.pop(first(t))})), r"\x1b"),
    "a shard missing": (then(sharded, without(SHARDS[1])), SHARDS[1]),
    "a shard cut short": (
        then(sharded, lambda f: (f / SHARDS[0]).write_bytes((f / SHARDS[0]).read_bytes()[:-5])),
        SHARDS[0],
    ),
    "a shard twice": (then(sharded, lambda f: shutil.copy(f / SHARDS[0], f / SHARDS[1])), "two files"),
    "shards and the whole": (then(lambda f: shutil.copy(f / "model.safetensors", f / "old.safetensors")), "two files"),
    "an index of nothing": (index(lambda t: t.clear()), "weight_map"),
    "an empty index": (index(lambda t: t["weight_map"].clear()), "weight_map"),
    "an index of numbers": (index(lambda t: t.update(weight_map={"a": 7})), "weight_map"),
    "an index of a list": (index(lambda t: t.update(weight_map=["a"])), "weight_map"),
    "a broken index": (then(sharded, text("model.safetensors.index.json", "{")), "index.json"),
    "a pipe for an index": (pipe("model.safetensors.index.json"), "pipe"),
    "an index that leaves the folder": (
        index(lambda t: t["weight_map"].update(a="../../etc/passwd")),
        "not to be trusted",
    ),
    "an index to a device": (index(lambda t: t["weight_map"].update(a="/dev/zero")), "not to be trusted"),
    "an index with a NUL": (index(lambda t: t["weight_map"].update(a="a\0.safetensors")), "not to be trusted"),
    "an index with a long name": (index(lambda t: t["weight_map"].update(a="x" * 5000 + ".safetensors")), "missing"),
    "an index to a pickle": (index(lambda t: t["weight_map"].update(a="pytorch_model.bin")), "not to be trusted"),
    "an index that promises more": (index(lambda t: t["weight_map"].update(promised=SHARDS[0])), "promised"),
    "an index that knows less": (index(lambda t: t["weight_map"].pop(next(iter(t["weight_map"])))), "unknown to"),
    "an index that mixes up": (
        index(lambda t: t.update(weight_map={n: SHARDS[f == SHARDS[0]] for n, f in t["weight_map"].items()})),
        "promises",
    ),
}

SETTINGS: dict[str, list[Any]] = {
    "hidden_size": [None, 0, -64, 65, 128, 1 << 24, 1 << 70, "64", 64.0, True, [64]],
    "num_hidden_layers": [None, 0, 1, 3, 1_000_000_000, "2"],
    "num_attention_heads": [None, 0, 3, 64, 1 << 30],
    "num_key_value_heads": [None, 0, 3, 2],
    "intermediate_size": [None, 0, 127, 1 << 24],
    "vocab_size": [None, 0, 1, 100, 1 << 24],
    "max_position_embeddings": [None, 0, -1, "many"],
    "rope_theta": [None, 0, -1, "big", 1e300, True],
    "rms_norm_eps": [None, 0, -1e-6, "small"],
    "tie_word_embeddings": [None, "yes", 1],
    "hidden_act": ["gelu", 7, ["silu"]],
    "mm_projector_type": ["linear", {"a": 1}],
    "mm_vision_tower": [None, "openai/clip-vit", "mobileclip_l_", "mobileclip_l_0", "mobileclip_l_99999999", 7],
    "rope_scaling": [{"type": "yarn", "factor": 4.0}],
    "use_sliding_window": [True],
    "eos_token_id": [-1, 1 << 40, "end", [[1]], {"a": 1}, 5],
    "vision_config": [
        [1],
        "small",
        {"depths": [1]},
        {"depths": "11111"},
        {"depths": [0] * 5},
        {"depths": [2] * 5},
        {"depths": [10**9] * 5},
        {"widths": [64] * 5},
        {"widths": [16, 33, 66, 96, 96]},
        {"widths": [1 << 24] * 5},
    ],
}

APPLES: dict[str, tuple[Change, str]] = {
    **{
        f"{key} {value!r}"[:60]: (settings(**{key: value}), key)
        for key, values in SETTINGS.items()
        for value in values
        if not (key == "tie_word_embeddings" and value == "no")
    },
    "only pickles": (then(without("model.safetensors"), text("pytorch_model.bin", b"\x80\x04.")), "pytorch_model.bin"),
    "NaN": (poison(NORM, float("nan")), "norm.weight"),
    "infinity": (poison("model.layers.0.mlp.down_proj.weight", float("inf")), "down_proj"),
    "minus infinity": (poison("model.embed_tokens.weight", float("-inf")), "embed_tokens"),
    "NaN in the tower": (poison(APPLE_TOWER + "patch_embed.0.reparam_conv.weight", float("nan")), "patch_embed"),
    "a negative variance": (poison(APPLE_TOWER + "network.0.0.convffn.conv.bn.running_var", -5.0), "convffn"),
    "a norm missing": (weights(lambda t: t.pop(NORM)), NORM),
    "half the tower missing": (weights(lambda t: [t.pop(n) for n in list(t) if "network.7" in n]), "missing"),
    "a tensor of another shape": (weights(lambda t: t.update({NORM: mx.zeros((65,))})), NORM),
    "a tensor turned": (
        weights(lambda t: t.update({"model.mm_projector.0.weight": t["model.mm_projector.0.weight"].T})),
        "mm_projector",
    ),
    "a scalar": (weights(lambda t: t.update({NORM: mx.array(1.0)})), NORM),
    "an unknown tensor": (weights(lambda t: t.update({"model.layers.0.lora_A": mx.zeros((1,))})), "lora_A"),
    "a layer too many": (
        weights(lambda t: t.update({"model.layers.7.input_layernorm.weight": mx.zeros((64,))})),
        "layers.7",
    ),
    "a layer of 200 digits": (
        weights(lambda t: t.update({f"model.layers.{'9' * 200}.input_layernorm.weight": mx.zeros((1,))})),
        "999",
    ),
    "both forms of the tower": (
        weights(lambda t: t.update({APPLE_TOWER + "patch_embed.0.rbr_conv.0.conv.weight": mx.zeros((1,))})),
        "unknown name",
    ),
    "no vocab": (without("vocab.json"), "vocab.json"),
    "no merges": (without("merges.txt"), "merges.txt"),
    "empty vocab": (text("vocab.json", ""), "vocab.json"),
    "a vocab of nothing": (text("vocab.json", "{}"), "merges"),
    "a vocab of a list": (text("vocab.json", "[]"), "vocab.json"),
    "a vocab of text": (text("vocab.json", '{"a": "b"}'), "vocab.json"),
    "a vocab of negatives": (text("vocab.json", '{"a": -1}'), "vocab.json"),
    "a vocab of huge ids": (text("vocab.json", json.dumps({"a": 1 << 40})), "vocab.json"),
    "a vocab with a token twice": (text("vocab.json", '{"a": 1, "a": 2}'), "twice"),
    "a pipe for a vocab": (pipe("vocab.json"), "pipe"),
    "/dev/zero for merges": (link("merges.txt", "/dev/zero"), "device"),
    "merges that are not UTF-8": (text("merges.txt", b"\xff\xfe\n"), "UTF-8"),
    "merges of nothing": (text("merges.txt", "#version: 0.2\n"), "no merges"),
    "merges of three": (text("merges.txt", "a b c\n"), "pair"),
    "merges of unknown tokens": (text("merges.txt", "notatoken another\n"), "fit together"),
    "added tokens of text": (text("added_tokens.json", '{"<|im_end|>": "x"}'), "added_tokens.json"),
    "added tokens elsewhere": (text("added_tokens.json", '{"<|im_end|>": 7}'), "im_end"),
    "a list of added tokens": (text("tokenizer_config.json", '{"added_tokens_decoder": [1]}'), "added_tokens_decoder"),
    "added tokens without names": (
        text("tokenizer_config.json", '{"added_tokens_decoder": {"1": {}}}'),
        "added_tokens_decoder",
    ),
    "added tokens without ids": (
        text("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "y"}}}'),
        "added_tokens_decoder",
    ),
    "added tokens that are numbers": (
        text("tokenizer_config.json", '{"added_tokens_decoder": {"1": 7}}'),
        "added_tokens_decoder",
    ),
    "no special tokens": (without("added_tokens.json", "tokenizer_config.json"), "im_start"),
    "a broken tokenizer.json": (text("tokenizer.json", "{}"), "tokenizer.json"),
    "GPT-2's kind of tokenizer.json": (
        text(
            "tokenizer.json", json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}})
        ),
        "im_start",
    ),
    "a deep tokenizer.json": (text("tokenizer.json", DEEP), "tokenizer.json"),
    "a pipe for tokenizer.json": (pipe("tokenizer.json"), "pipe"),
}

# Where the sizes are possible but not the weights', the message names the first tensor that does not fit.
SAYS_OTHERWISE = dict.fromkeys(
    ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size", "mm_vision_tower"),
    "config.json",
) | {"eos_token_id": "stop", "num_hidden_layers": "", "vision_config": ""}

OURS: dict[str, tuple[Change, str]] = {
    "a newer format": (settings(format_version=2), "format_version"),
    "no format": (settings(format_version=None), "format_version"),
    "an unknown entry": (settings(extra=1), "extra"),
    "an unknown size": (settings(text={"extra": 1}), "text.extra"),
    "no text": (settings(text=None), "text"),
    "text of text": (settings(text="x"), "text"),
    "an unknown dtype": (settings(dtype="float8"), "float8"),
    "an unknown fit": (settings(image={"fit": "stretch"}), "stretch"),
    "images of 100000": (settings(image={"size": 100_000}), "100000"),
    "infinite eps": (settings(text={"rms_norm_eps": 1e308}), "rms_norm_eps"),
    "a negative eps": (settings(vision={"layer_norm_eps": -1.0}), "layer_norm_eps"),
    "a billion layers": (settings(text={"num_hidden_layers": 10**9}), "num_hidden_layers"),
    "a billion blocks": (settings(vision={"depths": [10**9] * 5}), "depths"),
    "a layer more": (settings(text={"num_hidden_layers": 3}), "missing"),
    "a layer less": (settings(text={"num_hidden_layers": 1}), "layers.1"),
    "another width": (settings(text={"hidden_size": 128}), "shape"),
    "an MLP of 2 ** 24": (settings(text={"intermediate_size": 1 << 24}), "shape"),
    "a tower of 2 ** 24": (settings(vision={"widths": [1 << 24] * 5}), "shape"),
    "a vocabulary of 2 ** 24": (settings(text={"vocab_size": 1 << 24}), "shape"),
    "a vocabulary too small": (settings(text={"vocab_size": 300}), "outside the vocabulary"),
    "an ordinary stop token": (settings(eos_token_ids=[5]), "another model"),
    "a stop token outside": (settings(eos_token_ids=[10**6]), "outside the vocabulary"),
    "a quantisation of text": (settings(quantization="4bit"), "quantization"),
    "an unknown quantisation": (
        settings(quantization={"text.layers.0.mlp.down_proj": {"bits": 7, "group_size": 64}}),
        "config.json",
    ),
    "a quantisation that is not there": (
        settings(quantization={"text.layers.0.mlp.down_proj": {"bits": 4, "group_size": 64}}),
        "down_proj",
    ),
    "a quantisation of nothing": (settings(quantization={"text.layers.0.mlp.down_proj": {}}), "missing"),
    "no tokenizer": (without("tokenizer.json"), "tokenizer.json"),
    "an empty tokenizer": (text("tokenizer.json", ""), "tokenizer.json"),
    "a tokenizer of text": (text("tokenizer.json", '"x"'), "tokenizer.json"),
    "a pipe for a tokenizer": (pipe("tokenizer.json"), "pipe"),
    "NaN": (poison("text.norm.weight", float("nan")), "norm.weight"),
    "infinity": (poison("vision.conv_exp.reduce.weight", float("inf")), "conv_exp"),
    "a tensor missing": (weights(lambda t: t.pop("text.norm.weight")), "text.norm.weight"),
    "a tensor more": (weights(lambda t: t.update(extra=mx.zeros((3,)))), "extra"),
    "integers for weights": (
        weights(lambda t: t.update({"text.norm.weight": mx.ones((64,), mx.int32)})),
        "text.norm.weight",
    ),
    "a shape turned": (
        weights(lambda t: t.update({"projector.linear_1.weight": t["projector.linear_1.weight"].T})),
        "linear_1",
    ),
}
