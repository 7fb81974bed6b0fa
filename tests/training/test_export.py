"""Export: Apple's training-form names, and the way back."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("training.model")  # before timm: it makes room for a mismatched torchvision

from safetensors.torch import load_file  # noqa: E402

from training import tokenizer as bpe  # noqa: E402
from training.data import additive_mask, fixed_items, make_batch, positions  # noqa: E402
from training.evaluate import greedy, wilson  # noqa: E402
from training.export import TOWER, read_checkpoint, write_checkpoint  # noqa: E402
from training.model import FastVLM, ModelConfig  # noqa: E402
from training.questions import Question, corpus  # noqa: E402
from training.world import Options  # noqa: E402

pytestmark = pytest.mark.slow

SMALL = ModelConfig(
    widths=(32, 32, 64, 64, 128), depths=(1, 1, 1, 1, 1), hidden_size=64, layers=2, heads=1, intermediate_size=64
)
BATCH_NORM = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


@pytest.fixture(scope="module")
def model() -> FastVLM:
    torch.manual_seed(0)
    model = FastVLM(SMALL)
    model.see(torch.rand(4, 3, 192, 192))  # moves the running statistics
    return model.eval()


@pytest.fixture(scope="module")
def folder(model: FastVLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    bpe.save(path / "tokenizer", *bpe.build(corpus()))
    write_checkpoint(model, path / "tokenizer", path / "out")
    return path / "out"


def test_keys_are_apples(folder: Path) -> None:
    tensors = load_file(str(folder / "model.safetensors"))
    tower = {key.removeprefix(TOWER) for key in tensors if key.startswith(TOWER)}

    def batch_norm(name: str) -> set[str]:
        return {f"{name}.{part}" for part in BATCH_NORM}

    def conv(name: str) -> set[str]:
        return {f"{name}.conv.weight"} | batch_norm(f"{name}.bn")

    expected: set[str] = set()
    for index in range(3):
        expected |= conv(f"patch_embed.{index}.rbr_conv.0")
    expected |= batch_norm("patch_embed.2.rbr_skip")
    for index in (0, 2, 4):
        block = f"network.{index}.0."
        expected |= {block + "layer_scale", block + "token_mixer.layer_scale"}
        expected |= batch_norm(block + "token_mixer.norm.rbr_skip") | batch_norm(block + "token_mixer.mixer.rbr_skip")
        expected |= conv(block + "token_mixer.mixer.rbr_conv.0") | conv(block + "token_mixer.mixer.rbr_scale")
    for index in (7, 10):
        block = f"network.{index}.0."
        expected |= {block + name for name in ("layer_scale_1", "layer_scale_2", "norm.weight", "norm.bias")}
        expected |= {block + f"token_mixer.{name}" for name in ("qkv.weight", "proj.weight", "proj.bias")}
        expected |= {f"network.{index - 1}.pe.{name}" for name in ("weight", "bias")}
    for index in (0, 2, 4, 7, 10):
        block = f"network.{index}.0.convffn."
        expected |= conv(block + "conv")
        expected |= {block + f"{name}.{part}" for name in ("fc1", "fc2") for part in ("weight", "bias")}
    for index in (1, 3, 5, 8):
        down = f"network.{index}.proj."
        expected |= conv(down + "0.lkb_origin") | conv(down + "0.small_conv")
        expected |= batch_norm(down + "1.rbr_skip") | conv(down + "1.rbr_conv.0")
    expected |= conv("conv_exp.rbr_conv.0") | conv("conv_exp.rbr_scale")
    expected |= {f"conv_exp.se.{name}.{part}" for name in ("reduce", "expand") for part in ("weight", "bias")}
    assert tower == expected

    rest = {key for key in tensors if not key.startswith(TOWER)}
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} <= rest
    assert {f"model.mm_projector.{index}.{part}" for index in (0, 2) for part in ("weight", "bias")} <= rest
    assert all(re.match(r"model\.(layers|mm_projector|embed_tokens|norm)\b|lm_head", key) for key in rest)
    assert tensors[TOWER + "network.0.0.layer_scale"].shape == (32, 1, 1)
    assert tensors[TOWER + "network.10.0.layer_scale_1"].shape == (128, 1, 1)
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in tensors.values())


def test_config_and_tokenizer_files(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    tokenizer = bpe.load(folder)
    assert config["vision_config"] == {"depths": [1, 1, 1, 1, 1], "widths": [32, 32, 64, 64, 128]}
    assert config["mm_vision_tower"] == "mobileclip_l_192"
    assert config["eos_token_id"] == tokenizer.token_to_id("<|im_end|>")
    assert not (folder / "tokenizer.json").exists()


def test_reading_gives_the_same_model(model: FastVLM, folder: Path) -> None:
    again = read_checkpoint(folder)
    pixels = torch.rand(1, 3, 192, 192)
    assert torch.equal(model.see(pixels)[-1], again.see(pixels)[-1])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_packed_questions_equal_single_ones(model: FastVLM, folder: Path) -> None:
    """A question in a packed sequence gets the logits that it gets alone."""
    tokenizer = bpe.load(folder)
    (scene, questions), *_ = fixed_items(Options(), 1, seed=5, held_out=True)

    def states(asked: list[Question]) -> Any:
        batch = make_batch([(scene, asked)], tokenizer, SMALL)
        _, _, cells = model.see(batch.pixels.float() / 255)
        prefix = batch.before.shape[1] + cells.shape[1]
        mask, places = additive_mask(batch.block, prefix), positions(batch.offset, prefix)
        hidden = model.hidden(model.embed(cells, batch.before, batch.after), mask, places)
        return hidden[0, prefix:][batch.labels[0] != -100]

    packed = states(questions)
    alone = torch.cat([states([question]) for question in questions])
    # float32 sums in another order
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


def test_greedy_answers_every_question(model: FastVLM, folder: Path) -> None:
    (scene, questions), *_ = fixed_items(Options(), 1, seed=6, held_out=True)
    asked = [question.question for question in questions]
    assert len(greedy(model, bpe.load(folder), scene, asked)) == len(asked)


def test_wilson() -> None:
    low, high = wilson(95, 100)
    assert low == pytest.approx(0.888, abs=0.001) and high == pytest.approx(0.978, abs=0.001)
    assert wilson(0, 0) == (0.0, 1.0)
