"""The converter: every name accounted for, shards, heads, types, and a folder that is whole or not there."""

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from fastvlm_mlx import VLM, load
from fastvlm_mlx.convert import convert
from fastvlm_mlx.errors import CheckpointError, OptionError, OutputError
from fastvlm_mlx.storage import save as saving

from .. import checkpoint

IMAGE = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)


def load32(folder: Path) -> VLM:
    """In float32, whatever the backend's default."""
    return load(str(folder), dtype="float32")


def weights_of(vlm: VLM) -> dict[str, np.ndarray]:

    return {name: np.array(array) for name, array in vlm.model.flat_parameters().items()}


def assert_same(a: VLM, b: VLM) -> None:
    ours, theirs = weights_of(a), weights_of(b)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_saved_and_loaded_is_identical(apple: Path, tmp_path: Path) -> None:
    """Folded to float32 and stored as such, a folder holds exactly what loading the checkpoint directly gives."""
    convert(apple, tmp_path / "ours", dtype="float32")
    direct, saved = load32(apple), load32(tmp_path / "ours")
    assert_same(direct, saved)
    assert (
        direct.generate(IMAGE, "What is it?", max_tokens=12).token_ids
        == saved.generate(IMAGE, "What is it?", max_tokens=12).token_ids
    )


def test_shards_load_as_one_file_does(apple: Path, small: VLM) -> None:
    checkpoint.shard(apple, 3)
    assert_same(load32(apple), small)


def test_our_own_shards(apple: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "SHARD_BYTES", 100_000)
    convert(apple, tmp_path / "ours", dtype="float32")
    files = sorted(path.name for path in (tmp_path / "ours").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert_same(load32(tmp_path / "ours"), load32(apple))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_types(apple: Path, tmp_path: Path, dtype: str) -> None:
    config = convert(apple, tmp_path / "ours", dtype=dtype)  # type: ignore[arg-type]
    stored = checkpoint.load(tmp_path / "ours" / "model.safetensors")
    assert {array.dtype for array in stored.values()} == {getattr(mx, dtype)}
    assert config.dtype == dtype == json.loads((tmp_path / "ours" / "config.json").read_text())["dtype"]


def test_the_stored_type_is_kept_unless_told(apple: Path, tmp_path: Path) -> None:
    assert convert(apple, tmp_path / "ours").dtype == "bfloat16"


def test_folder_contents(apple: Path, tmp_path: Path) -> None:
    (apple / "LICENSE").write_text("the agreement")
    convert(apple, tmp_path / "ours")
    names = {path.name for path in (tmp_path / "ours").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "README.md", "LICENSE"}
    assert (tmp_path / "ours" / "LICENSE").read_text() == "the agreement"
    assert "Apple Machine Learning Research Model is licensed under" in (tmp_path / "ours" / "README.md").read_text()


def test_a_tied_head_that_equals_the_embedding_is_dropped(small: VLM) -> None:
    assert small.config.text.tie_word_embeddings
    assert not any("lm_head" in name for name in weights_of(small))


def test_a_head_said_to_be_tied_that_differs_is_kept(apple: Path) -> None:
    weights = checkpoint.read(apple)
    weights["lm_head.weight"] = weights["lm_head.weight"] * 2
    checkpoint.save(apple / "model.safetensors", weights)
    vlm = load32(apple)
    assert not vlm.config.text.tie_word_embeddings
    assert np.array_equal(np.array(vlm.model.text.lm_head.weight), 2 * np.array(vlm.model.text.embed_tokens.weight))


def test_an_untied_head(tmp_path: Path, tokenizer_files: Path) -> None:
    vlm = load32(checkpoint.write(tmp_path / "untied", tokenizer_files, tied=False))
    assert "text.lm_head.weight" in weights_of(vlm)


def test_an_untied_head_that_is_missing(tmp_path: Path, tokenizer_files: Path) -> None:
    folder = checkpoint.write(tmp_path / "untied", tokenizer_files, tied=False)
    weights = checkpoint.read(folder)
    del weights["lm_head.weight"]
    checkpoint.save(folder / "model.safetensors", weights)
    with pytest.raises(CheckpointError, match=r"lm_head.*missing"):
        load(str(folder))


def all_names() -> list[str]:
    return sorted(checkpoint.random_weights(512))


def droppable(name: str) -> bool:
    return name.endswith(("num_batches_tracked", "head.proj")) or name == "lm_head.weight"


@pytest.mark.parametrize("name", [name for name in all_names() if not droppable(name)][::7])
def test_a_missing_tensor_is_named(apple: Path, name: str) -> None:
    weights = checkpoint.read(apple)
    del weights[name]
    checkpoint.save(apple / "model.safetensors", weights)
    with pytest.raises(CheckpointError, match="missing") as caught:
        load(str(apple))
    assert repr(name) in str(caught.value)


def test_an_unknown_tensor_is_named(apple: Path) -> None:
    weights = checkpoint.read(apple) | {"model.layers.0.self_attn.sinks": mx.zeros((16,))}
    checkpoint.save(apple / "model.safetensors", weights)
    with pytest.raises(CheckpointError, match=r"1 tensor of unknown name, .*self_attn\.sinks"):
        load(str(apple))


def test_a_layer_too_many_is_named(apple: Path) -> None:
    weights = checkpoint.read(apple)
    weights["model.layers.2.input_layernorm.weight"] = weights["model.layers.0.input_layernorm.weight"]
    checkpoint.save(apple / "model.safetensors", weights)
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.input_layernorm\.weight.*more than"):
        load(str(apple))


@pytest.mark.parametrize("name", [name for name in all_names() if not droppable(name)][3::11])
def test_a_wrong_shape_is_named_with_both_shapes(apple: Path, name: str) -> None:
    weights = checkpoint.read(apple)
    weights[name] = mx.zeros((*weights[name].shape[:-1], weights[name].shape[-1] + 1), dtype=mx.bfloat16)
    checkpoint.save(apple / "model.safetensors", weights)
    with pytest.raises(CheckpointError, match="shape") as caught:
        load(str(apple))
    assert name in str(caught.value)


def test_values_that_do_not_fit_float16(apple: Path, tmp_path: Path) -> None:
    weights = checkpoint.read(apple)
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1e6
    checkpoint.save(apple / "model.safetensors", weights)
    with pytest.raises(CheckpointError, match=r"norm\.weight does not fit float16"):
        convert(apple, tmp_path / "ours", dtype="float16")
    assert not (tmp_path / "ours").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["apple"]


def test_an_unknown_type(apple: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="float8"):
        convert(apple, tmp_path / "ours", dtype="float8")  # type: ignore[arg-type]


def test_a_folder_that_exists_is_kept_unless_forced(apple: Path, tmp_path: Path) -> None:
    convert(apple, tmp_path / "ours")
    before = (tmp_path / "ours" / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(OutputError, match="exists already"):
        convert(apple, tmp_path / "ours", dtype="float32")
    assert (tmp_path / "ours" / "model.safetensors").stat().st_mtime_ns == before
    convert(apple, tmp_path / "ours", dtype="float32", force=True)
    assert load(str(tmp_path / "ours")).config.dtype == "float32"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["apple", "ours"]


def test_force_does_not_replace_what_is_no_model(apple: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(OutputError, match="not a model folder"):
        convert(apple, tmp_path / "thesis", force=True)
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "years of work"


def test_a_converted_folder_is_not_converted_again(apple: Path, tmp_path: Path) -> None:
    convert(apple, tmp_path / "ours")
    with pytest.raises(CheckpointError, match="converted already"):
        convert(tmp_path / "ours", tmp_path / "again")


def test_progress_reaches_the_end(apple: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    convert(apple, tmp_path / "ours", progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_peak_memory_of_a_conversion(tmp_path: Path, tokenizer_files: Path) -> None:
    """Below 1.6 times the larger of source and result, beyond what the imports alone take."""
    folder = checkpoint.write(
        tmp_path / "large", tokenizer_files, hidden_size=1024, num_hidden_layers=8, intermediate_size=4096
    )
    out = tmp_path / "ours"
    code = (
        "import sys, re; from pathlib import Path; from fastvlm_mlx.convert import convert\n"
        "import mlx.core as mx; mx.eval(mx.zeros((512, 512)) @ mx.zeros((512, 512)))\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) * 1024\n"
        "before = peak(); convert(Path(sys.argv[1]), Path(sys.argv[2]), dtype=sys.argv[3]); print(peak() - before)"
    )
    for dtype in ("bfloat16", "float32"):
        command = [sys.executable, "-c", code, str(folder), str(out / dtype), dtype]
        grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        sizes = [(path / "model.safetensors").stat().st_size for path in (folder, out / dtype)]
        assert max(sizes) > 200_000_000
        assert grown < 1.6 * max(sizes), f"{dtype}: {grown / max(sizes):.2f} times"


def test_what_a_killed_run_moved_aside_is_put_back_not_removed(apple: Path, tmp_path: Path) -> None:
    """A forced run killed between its two renames leaves the old model under another name; any later run restores
    it."""
    convert(apple, tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / ".first.fastvlm-replaced")
    convert(apple, tmp_path / "second")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["apple", "first", "second"]
    load(str(tmp_path / "first"))


def test_the_licence_is_apples_unless_the_config_says_otherwise(apple: Path, tmp_path: Path) -> None:
    assert convert(apple, tmp_path / "apples").source.license == "apple-amlr"
    config = json.loads((apple / "config.json").read_text())
    (apple / "config.json").write_text(json.dumps(config | {"license": "mit"}))
    assert convert(apple, tmp_path / "own", name="someone/model").source.license == "mit"
    card = (tmp_path / "own" / "README.md").read_text()
    assert "license: mit\nbase_model: someone/model" in card and "Apple Machine Learning" not in card
    assert "base_model" not in (tmp_path / "apples" / "README.md").read_text()
