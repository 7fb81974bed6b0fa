"""Folders for mlx-lm and mlx-vlm, loaded and computed by those programs themselves.

mlx-vlm wants a Python of its own, without PyTorch:

    FASTVLM_PYTHON_MLX_VLM=.../bin/python python -m pytest -m large tests/export/test_mlx_folder.py
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import fastvlm_mlx
from benchmarks.checkpoint import write_random
from fastvlm_mlx.convert import open_foreign
from fastvlm_mlx.decoding.engine import Engine
from fastvlm_mlx.decoding.loading import open_model
from fastvlm_mlx.errors import CheckpointError, FastVLMWarning, OptionError, OutputError
from fastvlm_mlx.export import mlx_folder
from fastvlm_mlx.export.mlx_folder import FolderOptions, Program
from fastvlm_mlx.hub.find import find
from fastvlm_mlx.network.model import LEVELS

from .. import checkpoint
from . import features

PYTHON = os.environ.get("FASTVLM_PYTHON_MLX_VLM")
IDS = [list(range(60, 90)), list(range(130, 160))]


def write(model: str | Path, out: Path, program: Program = "mlx-lm", **how: Any) -> Path:
    found = find(model)
    mlx_folder.write(open_model(found), found.folder, out, program, FolderOptions(**how))
    return out


def logits_of(model: str | Path, ids: list[list[int]]) -> np.ndarray[Any, Any]:
    """What our decoder gives for token ids (B, L) alone, (B, L, V)."""
    text = fastvlm_mlx.load(str(model), dtype="float32").model.text
    return np.array(text.logits(text(text.embed_tokens(mx.array(ids)))))


@pytest.mark.parametrize("tied", [True, False])
def test_mlx_lm_computes_the_same(tied: bool, tokenizer_files: Path, tmp_path: Path) -> None:
    mlx_lm = pytest.importorskip("mlx_lm")
    source = checkpoint.write(tmp_path / "apple", tokenizer_files, tied=tied)
    model, words = mlx_lm.load(str(write(source, tmp_path / "out", dtype="float32")))
    assert features.difference(np.array(model(mx.array(IDS))), logits_of(source, IDS)) < 1e-5
    assert words.encode("What is on the table?") == fastvlm_mlx.load(str(source)).tokenizer.encode(
        "What is on the table?"
    )


@pytest.mark.parametrize(("bits", "most"), [(8, 5e-2), (4, 1.0)])
def test_mlx_lm_takes_quantised_matrices(bits: int, most: float, tmp_path: Path) -> None:
    mlx_lm = pytest.importorskip("mlx_lm")
    out = write("tiny", tmp_path / "out", bits=bits, group_size=64)
    model, _ = mlx_lm.load(str(out))
    assert {layer.bits for _, layer in model.named_modules() if hasattr(layer, "bits")} == {bits}
    assert features.difference(np.array(model(mx.array(IDS)).astype(mx.float32)), logits_of("tiny", IDS)) < most
    assert json.loads((out / "config.json").read_text())["quantization"]["bits"] == bits


def test_quantised_layers_are_dequantised_first(tmp_path: Path) -> None:
    from fastvlm_mlx.calibrate import pipeline
    from fastvlm_mlx.quantize.recipes import choose

    found = find("tiny")
    pipeline.quantize(open_model(found), found.folder, tmp_path / "small", choose("8bit"))
    with pytest.warns(FastVLMWarning, match="quantised layers"):
        out = write(tmp_path / "small", tmp_path / "out", dtype="float32")
    report = json.loads((out / "report.json").read_text())
    assert report["target"] == "mlx-lm" and report["dtype"] == "float32" and report["quantization"] is None


def test_what_is_refused(apple: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tiny: its image encoder has \[1, 1, 2, 2, 2\] blocks.*mlx-vlm has"):
        write("tiny", tmp_path / "out", "mlx-vlm")
    with pytest.raises(OptionError, match="`bits` is 7"):
        write("tiny", tmp_path / "out", bits=7)
    with pytest.raises(OptionError, match="`group_size` is 128, and tiny has matrices of width"):
        write("tiny", tmp_path / "out", bits=4, group_size=128)
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        write("tiny", tmp_path / "taken")
    weights = checkpoint.read(apple)
    weights["model.norm.weight"] = weights["model.norm.weight"] * float("inf")
    checkpoint.save(apple / "model.safetensors", weights)
    with pytest.raises(CheckpointError, match="not finite"):
        write(apple, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"apple", "taken"}


@pytest.mark.large
@pytest.mark.skipif(PYTHON is None, reason="FASTVLM_PYTHON_MLX_VLM is not set")
@pytest.mark.parametrize("bits", [None, 8])
def test_mlx_vlm_computes_the_same(bits: int | None, tmp_path: Path) -> None:
    """FastViTHD at full width before two decoder layers, loaded strictly; and our own reader takes the folder back."""
    assert PYTHON is not None
    source = write_random(tmp_path / "apple", "0.5b", layers=2)
    out = write(source, tmp_path / "out", "mlx-vlm", dtype="float32", bits=bits)
    pixels = LEVELS[np.stack([features.picture(128, seed) for seed in range(2)])]
    np.savez(tmp_path / "inputs.npz", pixels=pixels, ids=np.array(IDS))
    script = Path(__file__).with_name("mlx_vlm_features.py")
    command = [PYTHON, str(script), str(out), str(tmp_path / "inputs.npz"), str(tmp_path / "outputs.npz")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "outputs.npz")
    engine = Engine(open_foreign(out, "again"))
    engine.load_weights(dtype="float32")
    vision = engine.model.vision(mx.array(pixels))
    embeddings, text = np.array(engine.model.projector(vision)), engine.model.text
    assert features.difference(found["embeddings"], embeddings) < 1e-4
    logits = np.array(text.logits(text(text.embed_tokens(mx.array(IDS)))))
    # mlx-vlm computes in the type of the scales, which are bfloat16.
    assert features.difference(found["logits"], logits) < (1e-4 if bits is None else 3e-2)
    assert engine.opened.config.source.layout == "mlx-vlm"
    if bits is None:
        assert features.difference(found["logits"], logits_of(source, IDS)) < 1e-4
