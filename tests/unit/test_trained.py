"""Checkpoints as training leaves them: read as the model they hold, or refused in a sentence that says what they
are."""

import json
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from fastvlm_mlx import load
from fastvlm_mlx.convert import convert
from fastvlm_mlx.convert.key_map import APPLE_TOWER
from fastvlm_mlx.errors import CheckpointError, TokenizerError

from .. import checkpoint, layouts
from ..checkpoint import Arrays

IMAGE = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
Change = Callable[[Path], Any]


@pytest.fixture
def apple(tmp_path: Path, tokenizer_files: Path) -> Path:
    return checkpoint.write(tmp_path / "apple", tokenizer_files)


def weights(change: Callable[[Arrays], Arrays | None]) -> Change:
    def run(folder: Path) -> None:
        tensors = checkpoint.read(folder)
        checkpoint.save(folder / "model.safetensors", change(tensors) or tensors)

    return run


def renamed(change: Callable[[str], str]) -> Change:
    return weights(lambda tensors: {change(name): array for name, array in tensors.items()})


def config(*gone: str, **settings: Any) -> Change:
    def run(folder: Path) -> None:
        theirs = json.loads((folder / "config.json").read_text()) | settings
        (folder / "config.json").write_text(
            json.dumps({key: value for key, value in theirs.items() if key not in gone})
        )

    return run


def text(name: str, change: Callable[[bytes], bytes]) -> Change:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def both(*changes: Change) -> Change:
    def run(folder: Path) -> None:
        for change in changes:
            change(folder)

    return run


def marked(data: bytes) -> bytes:
    return b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n")


def with_patch_token(folder: Path) -> None:
    """As Apple's trainer adds <im_patch>: the last token, and the embedding cut to the tokenizer's size."""
    added = json.loads((folder / "added_tokens.json").read_text())
    new = max(added.values()) + 1
    (folder / "added_tokens.json").write_text(json.dumps(added | {"<im_patch>": new}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"][str(new)] = {"content": "<im_patch>", "special": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config(mm_use_im_patch_token=True, vocab_size=new + 1)(folder)
    cut = {name: (lambda array: array[: new + 1]) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    weights(lambda t: {name: cut.get(name, lambda array: array)(array) for name, array in t.items()})(folder)


def processor(name: str = "preprocessor_config.json", **settings: Any) -> Change:
    usual = {
        "do_resize": True, "size": {"shortest_edge": 128}, "do_center_crop": True,
        "crop_size": {"height": 128, "width": 128},
        "image_mean": [0.0, 0.0, 0.0], "image_std": [1.0, 1.0, 1.0], "resample": 3, "rescale_factor": 1 / 255,
        "do_rescale": True,
    }  # fmt: skip
    return lambda folder: (folder / name).write_text(json.dumps(usual | settings))


ROPE = {"rope_theta": 1e6, "rope_type": "default"}
READ: dict[str, Change] = {
    "transformers 5": config(
        "rope_theta", "torch_dtype", rope_parameters=ROPE, layer_types=["full_attention"] * 2, dtype="bfloat16"
    ),
    "transformers 5, both": config(rope_parameters=ROPE, rope_scaling=None),
    "rope_scaling default": config(rope_scaling={"type": "default"}),
    "rope_scaling rope_type": config(
        "rope_theta", rope_scaling={"rope_type": "default", "rope_theta": 1e6, "factor": None}
    ),
    "a patch token": with_patch_token,
    "a path": config(mm_vision_tower="/data/runs/mobileclip_l_128"),
    "a path that ends in a slash": config(mm_vision_tower="./towers/mobileclip_l_128/"),
    "a path of Windows": config(mm_vision_tower="C:\\models\\MobileCLIP_L_128\\"),
    "a path to a file": config(mm_vision_tower="~/mobileclip_l_128.pt"),
    "a path of two": config(mm_vision_tower="/mobileclip_l_1024/mobileclip_l_128/open_clip_pytorch_model.bin"),
    "a folder of no size, and a processor": both(config(mm_vision_tower="/data/tower"), processor()),
    "module.": renamed(lambda name: f"module.{name}"),
    "_orig_mod.": renamed(lambda name: f"_orig_mod.{name}"),
    "module._orig_mod.": renamed(lambda name: f"module._orig_mod.{name}"),
    "_orig_mod.module.module.": renamed(lambda name: f"_orig_mod.module.module.{name}"),
    "layers wrapped": renamed(lambda name: name.replace("layers.0.", "layers.0._checkpoint_wrapped_module.")),
    "a tower compiled": renamed(
        lambda name: name.replace("vision_tower.vision_tower.", "vision_tower._orig_mod.vision_tower.")
    ),
    "PEFT's, merged": renamed(lambda name: f"base_model.model.{name}"),
    "a trainer's own": renamed(lambda name: f"model.{name}"),
    "a trainer's of another name": renamed(lambda name: f"student.module.{name}"),
    "a tower without its inner prefix": renamed(
        lambda name: name.replace(APPLE_TOWER, APPLE_TOWER.removesuffix("model."))
    ),
    "rotary buffers": weights(
        lambda t: t | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": mx.ones((16,)) for i in range(2)}
    ),
    "one rotary buffer": weights(lambda t: t | {"model.rotary_emb.inv_freq": mx.ones((16,))}),
    "a mark between rows of tiles": weights(lambda t: t | {"model.image_newline": mx.ones((64,))}),
    **{
        f"{name} from Windows": text(name, marked)
        for name in ("config.json", "vocab.json", "merges.txt", "added_tokens.json")
    },
    "a processor": processor(),
    "a processor's file": lambda folder: (folder / "processor_config.json").write_text(
        json.dumps({"image_processor": {"size": {"shortest_edge": 128}, "do_pad": None, "image_grid_pinpoints": None}})
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", READ)
def test_read_as_the_model_it_is(apple: Path, case: str) -> None:
    expected = load(apple).generate(IMAGE, "What is it?", max_tokens=8)
    READ[case](apple)
    vlm = load(apple)
    assert vlm.config.image.size == 128 and vlm.config.image.fit == "pad" and vlm.config.text.rope_theta == 1e6
    known = list(takewhile(lambda token: token < vlm.config.text.vocab_size, expected.token_ids))
    assert len(known) > 2  # the small model's random weights also choose tokens that fill the vocabulary up
    assert vlm.generate(IMAGE, "What is it?", max_tokens=8).token_ids[: len(known)] == known


def test_a_tokenizer_json_with_a_byte_order_mark(apple: Path, tmp_path: Path) -> None:
    convert(apple, tmp_path / "ours")
    expected = load(tmp_path / "ours").generate(None, "Hi", max_tokens=4).token_ids
    for name in ("tokenizer.json", "config.json"):
        text(name, marked)(tmp_path / "ours")
    assert load(tmp_path / "ours").generate(None, "Hi", max_tokens=4).token_ids == expected


def test_a_processor_says_how_pictures_become_square(apple: Path) -> None:
    config("image_aspect_ratio")(apple)
    assert load(apple).config.image.fit == "crop"
    processor(do_pad=True)(apple)
    assert load(apple).config.image.fit == "pad"


def adapter(folder: Path, name: str = "adapter_model.safetensors", **settings: Any) -> None:
    tensors = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": mx.zeros((8, 64))}
    checkpoint.save(folder / name, tensors)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | settings))


def alone(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    adapter(folder, base_model_name_or_path="apple/FastVLM-0.5B")


def unmerged(tensors: Arrays) -> Arrays:
    layers = {name.replace("q_proj.weight", "q_proj.base_layer.weight"): array for name, array in tensors.items()}
    lora = {"model.layers.0.self_attn.q_proj.lora_A.default.weight": mx.zeros((8, 64))}
    return {f"base_model.model.{name}": array for name, array in (layers | lora).items()}


def bitsandbytes(tensors: Arrays) -> Arrays:
    name = "model.layers.0.mlp.up_proj.weight"
    return tensors | {
        name: mx.zeros((4096, 1), dtype=mx.uint8),
        f"{name}.absmax": mx.zeros((64,)),
        f"{name}.quant_map": mx.zeros((16,)),
    }


def put(name: str, kind: mx.Dtype) -> Change:
    return weights(lambda tensors: tensors | {name: mx.zeros(tensors[name].shape, dtype=kind)})


DOWN = "model.layers.0.mlp.down_proj.weight"
KERNEL = APPLE_TOWER + "patch_embed.0.reparam_conv.weight"
REFUSED: dict[str, tuple[Change, str]] = {
    "anyres": (config(image_aspect_ratio="anyres"), "image_aspect_ratio is 'anyres'.*not supported yet; use a model"),
    "anyres to nine": (config(image_aspect_ratio="anyres_max_9"), "image_aspect_ratio"),
    "square": (config(image_aspect_ratio="square"), "image_aspect_ratio"),
    "unpad": (
        config(mm_patch_merge_type="spatial_unpad"),
        "mm_patch_merge_type is 'spatial_unpad'.*tiles.*use one with 'flat'",
    ),
    "start and end": (config(mm_use_im_start_end=True), "mm_use_im_start_end"),
    "a resampler": (config(mm_resampler_type="spatial_pool"), "mm_resampler_type"),
    "a tower of no size": (config(mm_vision_tower="/data/tower"), "mm_vision_tower is '/data/tower'"),
    "a tower of other pictures": (config(mm_vision_tower="mobileclip_l_128_v2"), "mm_vision_tower"),
    "yarn": (config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e6}), "rope_parameters.rope_type is 'yarn'"),
    "linear": (config(rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling.type is 'linear'"),
    "sections": (
        config(rope_scaling={"type": "default", "mrope_section": [16, 24, 24]}),
        "rope_scaling has 'mrope_section'",
    ),
    "half": (config(rope_parameters=ROPE | {"partial_rotary_factor": 0.5}), "partial_rotary_factor"),
    "sliding": (config(layer_types=["sliding_attention", "full_attention"]), "layer_types"),
    "a mean": (processor(image_mean=[0.48, 0.46, 0.41]), "image_mean"),
    "another size": (processor(size={"shortest_edge": 336}, crop_size=336), "336.*the two have to agree"),
    "bilinear": (processor(resample=2), "resample"),
    "tiles": (processor(image_grid_pinpoints=[[256, 256]]), "image_grid_pinpoints"),
    "pixels": (processor(min_pixels=3136), "min_pixels"),
    "neither": (both(config("image_aspect_ratio"), processor(do_center_crop=False)), "neither pads nor crops"),
    "a bad file": (lambda folder: (folder / "preprocessor_config.json").write_text("{"), "preprocessor_config.json"),
    "an adapter": (alone, "an adapter \\(LORA for 'apple/FastVLM-0.5B'\\), not a whole model; load the model"),
    "an adapter without settings": (
        both(alone, lambda folder: [(folder / name).unlink() for name in ("adapter_config.json", "config.json")]),
        "an adapter, not",
    ),
    "an adapter beside": (
        adapter,
        "an adapter \\(LORA\\) lies beside a model's weights.*move 'adapter_config.json', 'adapter_model",
    ),
    "MLX's adapter": (lambda folder: adapter(folder, "adapters.safetensors"), "beside"),
    "not merged": (weights(unmerged), "adapter that was not merged.*merge_and_unload"),
    "a projector": (
        lambda folder: ((folder / "model.safetensors").unlink(), (folder / "mm_projector.bin").touch()),
        "the projector of a model alone",
    ),
    "no tower": (
        weights(lambda t: {name: array for name, array in t.items() if "vision_tower" not in name}),
        "image encoder is missing.*vision_from",
    ),
    "bitsandbytes by its settings": (
        config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "quantised by 'bitsandbytes'.*dequantize",
    ),
    "bitsandbytes by its older settings": (
        config(quantization_config={"load_in_4bit": True}),
        "quantised by 'bitsandbytes'",
    ),
    "bitsandbytes by its tensors": (weights(bitsandbytes), "quantised by bitsandbytes"),
    "GPTQ": (config(quantization_config={"quant_method": "gptq", "bits": 4}), "quantised by 'gptq'.*bfloat16"),
    "int8": (put(DOWN, mx.int8), f"'{DOWN}' is stored as 'I8' without the scales.*bfloat16"),
    "bool": (put(DOWN, mx.bool_), "stored as 'BOOL' without the scales"),
    "uint32": (put(DOWN, mx.uint32), "stored as 'U32' without the scales"),
    "a kernel": (put(KERNEL, mx.int8), "without the scales"),
    "under two names": (weights(lambda t: t | {f"module.{DOWN}": t[DOWN]}), "two names"),
    "a resized embedding": (
        weights(lambda t: t | {"model.embed_tokens.weight": mx.zeros((1000, 64))}),
        "1000 rows, config.json says vocab_size.*write 1000",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_a_sentence(apple: Path, case: str) -> None:
    change, says = REFUSED[case]
    change(apple)
    with pytest.raises(CheckpointError, match=says):
        load(apple)


def test_square_with_a_fit(apple: Path, tmp_path: Path) -> None:
    config(image_aspect_ratio="square")(apple)
    assert convert(apple, tmp_path / "ours", fit="crop").image.fit == "crop"


def test_a_tower_from_elsewhere(apple: Path, tmp_path: Path) -> None:
    expected = convert(apple, tmp_path / "whole")
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in apple.iterdir():
        (bare / file.name).write_bytes(file.read_bytes())
    weights(lambda t: {name: array for name, array in t.items() if "vision_tower" not in name})(bare)
    assert convert(bare, tmp_path / "ours", name="apple", vision_from=apple) == expected
    ours, whole = (checkpoint.load(tmp_path / name / "model.safetensors") for name in ("ours", "whole"))
    assert ours.keys() == whole.keys() and all(mx.array_equal(ours[name], whole[name]) for name in ours)


@pytest.mark.parametrize("kind", ["F64", "F8_E4M3"])
def test_types_that_mlx_lacks(apple: Path, kind: str) -> None:
    path = apple / "model.safetensors"
    header = json.dumps(
        {"model.norm.weight": {"dtype": kind, "shape": [4], "data_offsets": [0, 32 if kind == "F64" else 4]}}
    ).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(32))
    with pytest.raises(CheckpointError, match=f"is stored as {kind}.*save the model in bfloat16"):
        load(apple)


def test_an_adapter_beside_a_folder_of_ours(apple: Path, tmp_path: Path) -> None:
    convert(apple, tmp_path / "ours")
    adapter(tmp_path / "ours")
    with pytest.raises(CheckpointError, match="lies beside"):
        load(tmp_path / "ours")


def test_other_whole_numbers_in_a_folder_of_ours(apple: Path, tmp_path: Path) -> None:
    convert(apple, tmp_path / "ours")
    weights(lambda t: t | {"text.norm.weight": mx.zeros(t["text.norm.weight"].shape, dtype=mx.int8)})(tmp_path / "ours")
    with pytest.raises(CheckpointError, match=r"holds mlx\.core\.int8"):
        load(tmp_path / "ours")


def test_transformers_rotary_buffers_and_prefixes(apple: Path, tmp_path: Path) -> None:
    theirs = layouts.transformers(apple, tmp_path / "theirs")
    expected = load(theirs).generate(IMAGE, "What is it?", max_tokens=4).token_ids
    weights(lambda t: t | {"model.language_model.rotary_emb.inv_freq": mx.ones((16,))})(theirs)
    renamed(lambda name: f"_orig_mod.{name}")(theirs)
    assert load(theirs).generate(IMAGE, "What is it?", max_tokens=4).token_ids == expected


@pytest.mark.parametrize("new", [100_000, 576, 1 << 30])
def test_a_tokenizer_with_an_id_beyond_the_embedding(apple: Path, tmp_path: Path, new: int) -> None:
    """It takes the place of another, so that there are no more tokens than before."""
    convert(apple, tmp_path / "ours")
    data = json.loads((tmp_path / "ours" / "tokenizer.json").read_text())
    data["model"]["vocab"]["H"] = new
    (tmp_path / "ours" / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(TokenizerError, match=f"ids up to {new}.*another model"):
        load(tmp_path / "ours")
