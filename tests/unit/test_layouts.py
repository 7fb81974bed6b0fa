"""Every layout: recognised, converted to the same tensors as the same weights in Apple's layout, quantised ones kept
so."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from fastvlm_mlx import VLM, load
from fastvlm_mlx.convert import convert
from fastvlm_mlx.convert.packed import values
from fastvlm_mlx.errors import CheckpointError, FastVLMWarning, OptionError

from .. import checkpoint, layouts
from ..converted import assert_equal, stored, unpacked

IMAGE = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
WHOLE: dict[str, Callable[[Path, Path], Path]] = {"transformers": layouts.transformers, "mlx-vlm": layouts.mlx_vlm}


def converted(source: Path, out: Path, **options: Any) -> dict[str, mx.array]:
    convert(source, out, dtype="float32", **options)
    return stored(out)


@pytest.fixture(params=["tied", "untied"])
def source(request: pytest.FixtureRequest, tmp_path: Path, tokenizer_files: Path) -> Path:
    return checkpoint.write(tmp_path / "apple", tokenizer_files, tied=request.param == "tied")


@pytest.mark.parametrize("layout", WHOLE)
def test_the_same_tensors_as_by_apples_layout(source: Path, tmp_path: Path, layout: str) -> None:
    theirs = WHOLE[layout](source, tmp_path / "theirs")
    assert_equal(converted(theirs, tmp_path / "a"), converted(source, tmp_path / "b"))
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["source"]["layout"] == layout
    apples = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["image"] == {"size": 128, "fit": "crop" if layout == "transformers" else "pad"}
    assert {name: config[name] for name in ("text", "vision", "eos_token_ids")} == {
        name: apples[name] for name in ("text", "vision", "eos_token_ids")
    }


@pytest.mark.parametrize("layout", WHOLE)
def test_loaded_directly(apple: Path, small: VLM, tmp_path: Path, layout: str) -> None:
    theirs = load(str(WHOLE[layout](apple, tmp_path / "theirs")), dtype="float32")
    assert (
        theirs.generate([], "What is it?", max_tokens=8).token_ids
        == small.generate([], "What is it?", max_tokens=8).token_ids
    )
    square = IMAGE[:70, :70]  # neither padded nor cropped
    assert np.array_equal(np.array(theirs.encode_image(square)), np.array(small.encode_image(square)))


def test_the_stored_type_is_kept(apple: Path, tmp_path: Path) -> None:
    assert convert(layouts.transformers(apple, tmp_path / "theirs"), tmp_path / "ours").dtype == "bfloat16"


# Quantised


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [layouts.alike(), layouts.alike(8, 32), layouts.alike(4, 32, "mxfp4"), layouts.mixed, layouts.whole]
)
def test_quantised_layers_stand_for_the_same_values(source: Path, tmp_path: Path, how: layouts.Bits) -> None:
    """Against a folder of Apple's that holds what mlx-vlm's quantised layers stand for."""
    theirs = layouts.mlx_vlm(source, tmp_path / "theirs", how)
    with pytest.warns(FastVLMWarning, match="dequantised"):
        config = convert(theirs, tmp_path / "a", dtype="float32")
    tied = config.text.tie_word_embeddings
    kept = {"text.embed_tokens", "projector.linear_2"} | (set() if tied else {"text.lm_head"})
    kept |= {
        f"text.layers.{i}.{name}"
        for i in range(2)
        for name in ("self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    }
    kept |= {f"text.layers.{i}.self_attn.qkv_proj" for i in range(2) if how is not layouts.mixed or i == 1}
    assert set(config.quantization) == kept

    dequantised, quantised = checkpoint.read(source), stored(theirs)
    for name, array in dequantised.items():
        path = layouts.mlx_vlm_name(name).removesuffix(".weight")
        if f"{path}.scales" in quantised:
            parts = [
                quantised[f"{path}.{part}"] for part in ("weight", "scales", "biases") if f"{path}.{part}" in quantised
            ]
            dequantised[name] = values(*parts, settings=checkpoint.quant(how(path)))
        else:
            dequantised[name] = array
    if tied:
        dequantised["lm_head.weight"] = dequantised["model.embed_tokens.weight"]
    checkpoint.save(source / "model.safetensors", dequantised)
    assert_equal(unpacked(tmp_path / "a"), converted(source, tmp_path / "b"))


def test_a_quantised_folder_loaded_directly_and_converted(apple: Path, tmp_path: Path) -> None:
    theirs = layouts.mlx_vlm(apple, tmp_path / "theirs", layouts.alike(8))
    with pytest.warns(FastVLMWarning, match=r"are dequantised: 'mm_projector\.0\.weight'\."):
        direct = load(str(theirs), dtype="float32")
        config = convert(theirs, tmp_path / "ours")
    assert config.dtype == "bfloat16"
    again = load(str(tmp_path / "ours"), dtype="float32")
    one, two = (vlm.generate([], "What is it?", max_tokens=8).token_ids for vlm in (direct, again))
    assert one == two
    assert {q.bits for q in again.config.quantization.values()} == {8}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda q: q.clear(), "quantization"),
        (lambda q: q.update(bits=5), "do not fit"),
        (lambda q: q.update(bits=7), "MLX has no 7 bits"),
        (lambda q: q.update(bits="4"), "MLX has no '4' bits"),
        (lambda q: q.update(group_size=32), "do not fit"),
        (lambda q: q.update(mode="mxfp4"), "MLX has no 4 bits in groups of 64"),
        (lambda q: q.update(mode=["affine"]), "mode"),
        (lambda q: q.update({"language_model.model.embed_tokens": False}), "which is quantised"),
        (lambda q: q.update({"mm_projector.0": {"bits": 8}}), "mm_projector.0.weight"),
    ],
)
def test_settings_that_do_not_fit(
    apple: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], says: str
) -> None:
    theirs = layouts.mlx_vlm(apple, tmp_path / "theirs", layouts.alike())
    config = json.loads((theirs / "config.json").read_text())
    change(config["quantization"])
    config["quantization_config"] = config["quantization"]
    (theirs / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=says):
        convert(theirs, tmp_path / "ours")


@pytest.mark.parametrize("part", ["weight", "scales", "biases"])
def test_a_part_that_is_missing(apple: Path, tmp_path: Path, part: str) -> None:
    theirs = layouts.mlx_vlm(apple, tmp_path / "theirs", layouts.alike())
    (theirs / "model.safetensors.index.json").unlink()
    weights = checkpoint.read(theirs)
    del weights[f"language_model.model.layers.1.mlp.up_proj.{part}"]
    checkpoint.save(theirs / "model.safetensors", weights)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj"):
        convert(theirs, tmp_path / "ours")


# Apple's exports for its app: the tower comes from another folder


@pytest.mark.slow
@pytest.mark.parametrize("tower", ["llava", "transformers", "mlx-vlm"])
def test_an_export_takes_its_tower_from_another_folder(source: Path, tmp_path: Path, tower: str) -> None:
    export = layouts.apple_mlx(source, tmp_path / "export")
    other = source if tower == "llava" else WHOLE[tower](source, tmp_path / "other")
    assert_equal(converted(export, tmp_path / "a", vision_from=other), converted(source, tmp_path / "b"))
    assert json.loads((tmp_path / "a" / "config.json").read_text())["source"]["layout"] == "apple-mlx"


def test_a_quantised_export(apple: Path, tmp_path: Path) -> None:
    export = layouts.apple_mlx(apple, tmp_path / "export", layouts.alike(8))
    with pytest.warns(FastVLMWarning, match="dequantised"):
        config = convert(export, tmp_path / "ours", vision_from=apple)
    assert len(config.quantization) == 10
    load(str(tmp_path / "ours"), dtype="float32").generate(IMAGE, "What is it?", max_tokens=2)


def test_an_export_without_a_tower_is_refused_in_a_sentence(apple: Path, tmp_path: Path) -> None:
    export = layouts.apple_mlx(apple, tmp_path / "export")
    for attempt in (lambda: load(str(export)), lambda: convert(export, tmp_path / "ours")):
        with pytest.raises(CheckpointError, match="Core ML package; convert it with `vision_from`"):
            attempt()
    with pytest.raises(CheckpointError, match="no image encoder either"):
        convert(export, tmp_path / "ours", vision_from=export)
    convert(apple, tmp_path / "converted")
    with pytest.raises(CheckpointError, match="converted already"):
        convert(export, tmp_path / "ours", vision_from=tmp_path / "converted")
    with pytest.raises(OptionError, match="its own image encoder"):
        convert(apple, tmp_path / "ours", vision_from=apple)


def test_a_tower_of_another_model_is_refused(apple: Path, tmp_path: Path, tokenizer_files: Path) -> None:
    export = layouts.apple_mlx(apple, tmp_path / "export")
    theirs = checkpoint.read(apple)
    theirs["model.mm_projector.0.weight"] = mx.zeros((64, 64))
    for name in [name for name in theirs if "network.10" in name]:
        del theirs[name]
    checkpoint.save(apple / "model.safetensors", theirs)
    with pytest.raises(CheckpointError, match=r"network\.10.*missing"):
        convert(export, tmp_path / "ours", vision_from=apple)


# Recognised, or as told


def test_what_is_recognised_is_said(apple: Path, tmp_path: Path) -> None:
    said: list[str] = []
    convert(layouts.mlx_vlm(apple, tmp_path / "theirs"), tmp_path / "ours", say=said.append)
    assert said == ["mlx-vlm"]


def test_a_layout_can_be_told(apple: Path, tmp_path: Path) -> None:
    theirs = layouts.mlx_vlm(apple, tmp_path / "theirs", model_type="somebody_elses")
    with pytest.raises(CheckpointError, match="somebody_elses"):
        convert(theirs, tmp_path / "ours")
    convert(theirs, tmp_path / "ours", layout="mlx-vlm")
    with pytest.raises(CheckpointError, match="not the 'transformers' layout"):
        convert(apple, tmp_path / "again", layout="transformers")
    with pytest.raises(OptionError, match="onnx"):
        convert(apple, tmp_path / "again", layout="onnx")


def test_stage_2_and_stage_3_alike(apple: Path, tmp_path: Path) -> None:
    """A checkpoint of stage 2 differs in settings of its training alone."""
    expected = converted(apple, tmp_path / "a")
    config = json.loads((apple / "config.json").read_text())
    config |= {
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "mm_projector_lr": None,
        "use_mm_proj": True,
    }
    (apple / "config.json").write_text(json.dumps(config))
    assert_equal(converted(apple, tmp_path / "b"), expected)


# transformers' settings


def picture(folder: Path, **settings: Any) -> None:
    usual = {
        "size": {"shortest_edge": 128},
        "crop_size": {"height": 128, "width": 128},
        "image_mean": [0.0] * 3,
        "image_std": [1.0] * 3,
        "rescale_factor": 0.00392156862745098,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(usual | settings))


@pytest.mark.parametrize(
    ("settings", "image"),
    [
        ({}, (128, "crop")),
        ({"size": {"shortest_edge": 256}, "crop_size": {"height": 256, "width": 256}}, (256, "crop")),
        ({"size": 192, "crop_size": None}, (192, "crop")),
        ({"size": {"height": 192, "width": 192}, "crop_size": 192}, (192, "crop")),
        ({"do_pad": True, "image_processor_type": "LlavaImageProcessor"}, (128, "pad")),
    ],
)
def test_the_picture_is_as_the_processor_has_it(
    apple: Path, tmp_path: Path, settings: Any, image: tuple[int, str]
) -> None:
    theirs = layouts.transformers(apple, tmp_path / "theirs", image_seq_length=25)
    picture(theirs, **settings)
    config = convert(theirs, tmp_path / "ours")
    assert (config.image.size, config.image.fit) == image


def test_the_picture_without_a_file_of_its_own(apple: Path, tmp_path: Path) -> None:
    theirs = layouts.transformers(apple, tmp_path / "theirs", image_seq_length=25)
    assert convert(theirs, tmp_path / "a").image.size == 320
    (theirs / "processor_config.json").write_text(
        json.dumps({"patch_size": 64, "image_processor": {"size": {"shortest_edge": 192}}})
    )
    assert convert(theirs, tmp_path / "b").image.size == 192
    assert convert(theirs, tmp_path / "c", fit="pad").image.fit == "pad"
    with pytest.raises(OptionError, match="stretch"):
        convert(theirs, tmp_path / "d", fit="stretch")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings",
    [{"image_mean": [0.5] * 3}, {"image_std": [0.2] * 3}, {"do_resize": False}, {"rescale_factor": 1.0},
     {"resample": 2},
     {"size": {"shortest_edge": 100}}, {"size": {"height": 128, "width": 64}}, {"size": "big"},
     {"do_center_crop": False}],
)  # fmt: skip
def test_a_picture_treated_otherwise_is_refused(apple: Path, tmp_path: Path, settings: Any) -> None:
    theirs = layouts.transformers(apple, tmp_path / "theirs")
    picture(theirs, **settings)
    with pytest.raises(CheckpointError, match="image"):
        convert(theirs, tmp_path / "ours")


def test_settings_of_earlier_releases(apple: Path, tmp_path: Path) -> None:
    """Rope's base beside the sizes; a flag for tied heads in the decoder's table alone; sizes unsaid where they are
    usual."""
    theirs = layouts.transformers(apple, tmp_path / "theirs")
    config = json.loads((theirs / "config.json").read_text())
    text = config["text_config"]
    end_of_text = json.loads((theirs / "added_tokens.json").read_text())["<|endoftext|>"]
    text |= {"rope_theta": text.pop("rope_parameters")["rope_theta"], "rope_scaling": None, "eos_token_id": end_of_text}
    text["tie_word_embeddings"] = config.pop("tie_word_embeddings")
    (theirs / "config.json").write_text(json.dumps(config))
    assert_equal(converted(theirs, tmp_path / "a"), converted(apple, tmp_path / "b"))


def test_nothing_is_warned_of_where_nothing_is_amiss(apple: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for layout, write in WHOLE.items():
            convert(write(apple, tmp_path / layout), tmp_path / f"{layout} converted")


# PyTorch's own files


def as_pickle(folder: Path, files: int = 1) -> None:
    torch = pytest.importorskip("torch")
    weights = checkpoint.read(folder)
    (folder / "model.safetensors").unlink()
    kinds = {mx.bfloat16: torch.bfloat16, mx.float32: torch.float32, mx.int64: torch.int64}
    tensors = {n: torch.from_numpy(np.array(a.astype(mx.float32))).to(kinds[a.dtype]) for n, a in weights.items()}
    names = sorted(tensors)
    for i in range(files):
        file = "pytorch_model.bin" if files == 1 else f"pytorch_model-{i + 1:05d}-of-{files:05d}.bin"
        torch.save({name: tensors[name] for name in names[i::files]}, folder / file)


@pytest.mark.slow
@pytest.mark.parametrize("files", [1, 3])
def test_pickles_of_tensors(apple: Path, tmp_path: Path, files: int) -> None:
    other = Path(shutil.copytree(apple, tmp_path / "pickled"))
    as_pickle(other, files)
    (other / "training_args.bin").write_bytes(b"whatever Trainer leaves")
    assert_equal(converted(other, tmp_path / "a"), converted(apple, tmp_path / "b"))


def test_pickles_without_pytorch_name_the_extra(apple: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_pickle(apple)
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(CheckpointError, match=r"pip install torch \(the extra 'pickles'\)"):
        load(str(apple))


def test_pickles_with_a_loader_that_ran_code(apple: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    as_pickle(apple)
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(CheckpointError, match=r"before 2\.6"):
        load(str(apple))
