"""Back to transformers' layout: what is written, read again, is what it was; and nothing is half-written."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from fastvlm_mlx import load
from fastvlm_mlx.convert import convert, to_transformers
from fastvlm_mlx.errors import CheckpointError, FastVLMWarning, OptionError, OutputError

from .. import checkpoint, layouts
from ..converted import assert_equal, stored, unpacked

IMAGE = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)


@pytest.mark.parametrize("tied", [True, False])
def test_there_and_back_again(tmp_path: Path, tokenizer_files: Path, tied: bool) -> None:
    """Tensor by tensor in float32, norms and scales of one having changed nothing."""
    source = checkpoint.write(tmp_path / "apple", tokenizer_files, tied=tied)
    convert(source, tmp_path / "ours", dtype="float32")
    written = to_transformers(tmp_path / "ours", tmp_path / "theirs")
    again = convert(tmp_path / "theirs", tmp_path / "again")
    assert_equal(stored(tmp_path / "again"), stored(tmp_path / "ours"))
    assert again.source.layout == "transformers" and again.dtype == written.dtype == "float32"
    ours = json.loads((tmp_path / "ours" / "config.json").read_text())
    for name in ("text", "vision", "image", "eos_token_ids"):
        assert json.loads((tmp_path / "again" / "config.json").read_text())[name] == ours[name]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["llava", "mlx-vlm", "transformers", "apple-mlx"])
def test_from_any_layout(apple: Path, tmp_path: Path, layout: str) -> None:
    writers: dict[str, Any] = {
        "mlx-vlm": layouts.mlx_vlm,
        "transformers": layouts.transformers,
        "apple-mlx": layouts.apple_mlx,
    }
    source = apple if layout == "llava" else writers[layout](apple, tmp_path / "source")
    said: list[str] = []
    tower = apple if layout == "apple-mlx" else None
    to_transformers(source, tmp_path / "theirs", dtype="float32", vision_from=tower, fit="crop", say=said.append)
    assert said == [layout]
    convert(tmp_path / "theirs", tmp_path / "a")
    convert(apple, tmp_path / "b", dtype="float32")
    assert_equal(stored(tmp_path / "a"), stored(tmp_path / "b"))
    assert load(str(tmp_path / "theirs")).config.image.fit == "crop"


@pytest.mark.filterwarnings("ignore:.*dequantised")
def test_quantised_layers_are_written_as_their_values(apple: Path, tmp_path: Path) -> None:
    convert(layouts.mlx_vlm(apple, tmp_path / "quantised", layouts.alike(8)), tmp_path / "ours")
    with pytest.warns(FastVLMWarning, match="10 quantised layers"):
        to_transformers(tmp_path / "ours", tmp_path / "theirs", dtype="float32")
    assert "10 layers had been quantised" in (tmp_path / "theirs" / "README.md").read_text(encoding="utf-8")
    convert(tmp_path / "theirs", tmp_path / "again")
    values = {name: array.astype(mx.float32) for name, array in unpacked(tmp_path / "ours").items()}
    assert_equal(stored(tmp_path / "again"), values)


def test_the_files(apple: Path, tmp_path: Path) -> None:
    (apple / "LICENSE").write_text("the agreement")
    to_transformers(apple, tmp_path / "theirs", name="someone/model")
    assert {path.name for path in (tmp_path / "theirs").iterdir()} == {
        *(
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "preprocessor_config.json",
            "processor_config.json",
        ),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md", "LICENSE"),
    }
    assert (tmp_path / "theirs" / "LICENSE").read_text() == "the agreement"
    card = (tmp_path / "theirs" / "README.md").read_text()
    assert "base_model: someone/model" in card and "Apple Machine Learning Research Model is licensed under" in card
    assert {array.dtype for array in stored(tmp_path / "theirs").values()} == {mx.bfloat16, mx.int64}


@pytest.mark.slow
def test_the_built_in_model(tmp_path: Path) -> None:
    import fastvlm_mlx

    to_transformers(Path(fastvlm_mlx.__file__).parent / "tiny", tmp_path / "theirs", dtype="float32")
    picture = Path(__file__).parents[2] / "examples" / "shapes.png"
    answers = [load(model, dtype="float32").generate(picture).text for model in ("tiny", str(tmp_path / "theirs"))]
    assert answers[0] == answers[1] != ""


def test_nothing_half_written(apple: Path, tmp_path: Path) -> None:
    weights = checkpoint.read(apple)
    weights["model.norm.weight"] = mx.full((64,), float("nan"))
    checkpoint.save(apple / "model.safetensors", weights)
    with pytest.raises(CheckpointError, match="not finite"):
        to_transformers(apple, tmp_path / "theirs")
    assert [path.name for path in tmp_path.iterdir()] == ["apple"]


def test_what_is_refused(apple: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        to_transformers(apple, tmp_path / "there")
    with pytest.raises(OutputError, match="the checkpoint itself"):
        to_transformers(apple, apple)
    with pytest.raises(OptionError, match="float8"):
        to_transformers(apple, tmp_path / "theirs", dtype="float8")  # type: ignore[arg-type]
    convert(apple, tmp_path / "ours")
    with pytest.raises(OptionError, match="`layout`"):
        to_transformers(tmp_path / "ours", tmp_path / "theirs", layout="llava")


def test_pictures_that_are_no_whole_number_of_tokens(apple: Path, tmp_path: Path) -> None:
    config = json.loads((apple / "config.json").read_text())
    (apple / "config.json").write_text(json.dumps(config | {"mm_vision_tower": "mobileclip_l_100"}))
    with pytest.raises(CheckpointError, match="100 pixels"):
        to_transformers(apple, tmp_path / "theirs")


def test_progress_reaches_the_end(apple: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    to_transformers(apple, tmp_path / "theirs", progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1]
