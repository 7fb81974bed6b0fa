"""ONNX graphs of `tiny` and of small checkpoints, computed by onnxruntime; and what is refused.

Differences are relative to the largest value. float32 sums in another order: 1e-6 or so.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

import fastvlm_mlx  # noqa: E402
from fastvlm_mlx.calibrate.examples import read_questions  # noqa: E402
from fastvlm_mlx.decoding.loading import open_model  # noqa: E402
from fastvlm_mlx.errors import CheckpointError, OptionError, OutputError  # noqa: E402
from fastvlm_mlx.export import onnx_folder, onnx_graph  # noqa: E402
from fastvlm_mlx.export.report import Report  # noqa: E402
from fastvlm_mlx.hub.find import find  # noqa: E402
from fastvlm_mlx.inputs.prompt import Turn  # noqa: E402
from fastvlm_mlx.network.model import LEVELS  # noqa: E402
from fastvlm_mlx.vlm import VLM  # noqa: E402

from .. import checkpoint  # noqa: E402
from . import features  # noqa: E402
from .interpreter import Array  # noqa: E402

CALIBRATION = Path(fastvlm_mlx.__file__).parent / "tiny" / "calibration"
MOST_TOKENS = 48


def write(model: str | Path, out: Path, **how: Any) -> Report:
    found = find(model)
    return onnx_folder.write(open_model(found), found.folder, out, **how)


class Graphs:
    """The three graphs of a folder, and greedy answers by them alone."""

    def __init__(self, folder: Path, suffix: str = ""):
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1
        self.config = json.loads((folder / "config.json").read_text())
        self.vision, self.embed, self.decoder = (
            onnxruntime.InferenceSession(str(folder / "onnx" / f"{name}{suffix}.onnx"), settings)
            for name in ("vision_encoder", "embed_tokens", "decoder_model_merged")
        )

    def encode(self, pixels: Array) -> Array:
        """Image embeddings (B, N, D) of pixels (B, H, W, 3), uint8."""
        planes = np.ascontiguousarray(LEVELS[pixels].transpose(0, 3, 1, 2))
        return np.asarray(self.vision.run(None, {"pixel_values": planes})[0])

    def embedded(self, ids: list[list[int]]) -> Array:
        return np.asarray(self.embed.run(None, {"input_ids": np.array(ids, np.int64)})[0])

    def step(self, embeddings: Array, mask: Array, past: list[Array]) -> tuple[Array, list[Array]]:
        """Logits (B, L, V) and the cache after more positions; mask (B, P + L) is 0 for padding."""
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -embeddings.shape[1] :]
        inputs = {"inputs_embeds": embeddings, "attention_mask": mask, "position_ids": positions}
        for place, held in enumerate(past):
            inputs[f"past_key_values.{place // 2}.{('key', 'value')[place % 2]}"] = held
        logits, *present = self.decoder.run(None, inputs)
        return logits, present

    def nothing(self, rows: int) -> list[Array]:
        """An empty cache."""
        shape = (rows, self.config["num_key_value_heads"], 0, self.config["head_dim"])
        return [np.zeros(shape, np.float32)] * (2 * self.config["num_hidden_layers"])

    def answer(self, embeddings: Array) -> Iterator[int]:
        """The greedy answer to embeddings (1, L, D), token by token through the cache."""
        past = self.nothing(1)
        mask = np.ones((1, embeddings.shape[1]), np.int64)
        for _ in range(MOST_TOKENS):
            logits, past = self.step(embeddings, mask, past)
            token = int(logits[0, -1].argmax())
            yield token
            if token in self.config["eos_token_id"]:
                return
            embeddings, mask = self.embedded([[token]]), np.ones((1, mask.shape[1] + 1), np.int64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("onnx") / "tiny"
    write("tiny", out)
    return out


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return fastvlm_mlx.load("tiny", dtype="float32")


@pytest.mark.parametrize("side", [192, 128])
def test_the_encoder_takes_any_batch_and_size(folder: Path, vlm: VLM, side: int) -> None:
    pixels = np.stack([features.picture(side, seed) for seed in range(3)])
    expected = np.array(vlm.model.encode(mx.array(pixels)))
    assert features.difference(Graphs(folder).encode(pixels), expected) < 1e-5


def test_a_picture_that_is_not_square(folder: Path, vlm: VLM) -> None:
    pixels = features.picture(256)[None, :, :128]
    expected = np.array(vlm.model.encode(mx.array(pixels)))
    assert features.difference(Graphs(folder).encode(pixels), expected) < 1e-5


def _answers(graphs: Graphs, vlm: VLM, count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Greedy token ids of both sides to questions that `tiny` is calibrated on."""
    ours, theirs = [], []
    seen: dict[str, Array] = {}
    for question in read_questions(CALIBRATION)[:count]:
        picture = str(question.image)
        if picture not in seen:
            seen[picture] = graphs.encode(vlm.engine.pixels(question.image)[None])
        before, _, after = vlm.engine.render([Turn(question.text, 1)])
        assert isinstance(before, list) and isinstance(after, list)
        parts = [graphs.embedded([before]), seen[picture], graphs.embedded([after])]
        theirs.append(list(graphs.answer(np.concatenate(parts, axis=1))))
        answer = vlm.generate(question.image, question.text, max_tokens=MOST_TOKENS)
        ours.append(list(answer.token_ids))
    return ours, [[token for token in ids if token not in graphs.config["eos_token_id"]] for ids in theirs]


def test_a_hundred_greedy_answers_are_the_same(folder: Path, vlm: VLM) -> None:
    ours, theirs = _answers(Graphs(folder), vlm, 100)
    assert len(ours) == 100
    assert theirs == [[token for token in ids if token not in vlm.config.eos_token_ids] for ids in ours]


@pytest.mark.parametrize(("precision", "suffix"), [("float16", "_fp16"), ("int8", "_quantized")])
def test_smaller_forms_answer_alike(folder: Path, vlm: VLM, tmp_path: Path, precision: str, suffix: str) -> None:
    out = tmp_path / "small"
    report = write("tiny", out, precision=precision)
    assert report.facts["bytes"] < sum(file.stat().st_size for file in (folder / "onnx").iterdir()) / 1.8
    ours, theirs = _answers(Graphs(out, suffix), vlm, 40)
    stops = vlm.config.eos_token_ids
    same = sum([token for token in a if token not in stops] == b for a, b in zip(ours, theirs, strict=True))
    assert same == 40 if precision == "float16" else same >= 36  # 8 bits change an answer now and then


def test_rows_of_different_lengths(folder: Path, vlm: VLM) -> None:
    """Padding on the left changes nothing of a row, with and without a cache."""
    graphs = Graphs(folder)
    long, short = list(range(60, 80)), list(range(100, 107))
    padded = graphs.embedded([long, [0] * 13 + short])
    mask = np.array([[1] * 20, [0] * 13 + [1] * 7], np.int64)
    together, past = graphs.step(padded, mask, graphs.nothing(2))
    alone, held = graphs.step(graphs.embedded([short]), np.ones((1, 7), np.int64), graphs.nothing(1))
    np.testing.assert_allclose(together[1, -1], alone[0, -1], atol=1e-4)
    more = np.concatenate([mask, np.ones((2, 1), np.int64)], axis=1)
    together, _ = graphs.step(graphs.embedded([[5], [6]]), more, past)
    alone, _ = graphs.step(graphs.embedded([[6]]), np.ones((1, 8), np.int64), held)
    np.testing.assert_allclose(together[1, -1], alone[0, -1], atol=1e-4)


def test_names_that_transformers_js_loads(folder: Path) -> None:
    graphs = Graphs(folder)
    config = graphs.config
    assert config["model_type"] == "llava_qwen2" and config["image_token_index"] < config["vocab_size"]
    names = [each.name for each in graphs.decoder.get_inputs()]
    assert names[:4] == ["inputs_embeds", "attention_mask", "position_ids", "past_key_values.0.key"]
    assert [each.name for each in graphs.decoder.get_outputs()][:3] == ["logits", "present.0.key", "present.0.value"]
    assert [each.name for each in graphs.vision.get_inputs() + graphs.vision.get_outputs()] == [
        "pixel_values",
        "image_features",
    ]
    processor = json.loads((folder / "processor_config.json").read_text())
    assert (processor["processor_class"], processor["patch_size"]) == ("LlavaProcessor", 64)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    assert added["<image>"] == config["image_token_index"]


def test_the_report_and_the_card(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    assert report["target"] == "onnx" and set(report["files"]) == {file.name for file in (folder / "onnx").iterdir()}
    assert all(each["difference"] < 1e-5 for each in report["comparison"].values())
    assert "library_name: transformers.js" in (folder / "README.md").read_text()
    assert "MIT License" in (folder / "LICENSE").read_text()


@pytest.mark.parametrize("tied", [True, False])
def test_other_checkpoints(tmp_path: Path, tokenizer_files: Path, tied: bool) -> None:
    """Grouped heads, a head of its own, and a vocabulary that gets rows for `<image>`."""
    source = checkpoint.write(tmp_path / "apple", tokenizer_files, tied=tied)
    report = write(source, tmp_path / "out")
    assert all(each["difference"] < 1e-5 for each in report.facts["comparison"].values())


def test_weights_beside_a_graph_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_folder, "BEYOND_PROTOBUF", 1_000_000)
    report = write("tiny", tmp_path / "out")
    assert {"vision_encoder.onnx_data", "decoder_model_merged.onnx_data"} <= set(report.facts["files"])
    assert report.facts["files"]["vision_encoder.onnx"] < 200_000
    assert all(each["difference"] < 1e-5 for each in report.facts["comparison"].values())
    assert onnx_graph.BEYOND_PROTOBUF < 2**31


def test_what_is_refused(apple: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="`precision` is 'int4'"):
        write("tiny", tmp_path / "out", precision="int4")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        write("tiny", tmp_path / "taken")
    with pytest.raises(OutputError, match="is not a folder that was exported"):
        write("tiny", tmp_path / "taken", force=True)
    weights = checkpoint.read(apple)
    weights["model.norm.weight"] = weights["model.norm.weight"] * float("nan")
    checkpoint.save(apple / "model.safetensors", weights)
    with pytest.raises(CheckpointError, match="not finite"):
        write(apple, tmp_path / "out")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(OptionError, match=r"extra 'onnx': pip install 'fastvlm-mlx\[onnx\]' \(onnxruntime"):
        write("tiny", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"apple", "taken"}


def test_an_export_is_replaced_with_force(tmp_path: Path) -> None:
    write("tiny", tmp_path / "out")
    write("tiny", tmp_path / "out", force=True, precision="float16")
    assert {file.name for file in (tmp_path / "out" / "onnx").iterdir()} == {
        "vision_encoder_fp16.onnx",
        "embed_tokens_fp16.onnx",
        "decoder_model_merged_fp16.onnx",
    }
