"""transformers' own folders, as its save_pretrained writes them, and back: against PyTorch, and against Apple's
layout."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from timm.utils.model import reparameterize_model

from fastvlm_mlx import load
from fastvlm_mlx.convert import convert, to_transformers
from fastvlm_mlx.inputs.pieces import ImageSlot

from .. import checkpoint
from . import original
from .original import Original
from .stages import TIGHT, difference, features_from, features_of, pixels, prompt_embeddings, to_torch

pytestmark = pytest.mark.slow

ROUNDING = 3e-7  # of the largest value of a tensor: two roundings of float32


def save_native(model: Any, folder: Path, tokenizer: Path) -> Path:
    """As transformers saves it, with the tokenizer's files beside."""
    model.config.image_seq_length = 4
    model.save_pretrained(folder)
    return Path(shutil.copytree(tokenizer, folder, dirs_exist_ok=True))


def stored(folder: Path) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in checkpoint.load(folder / "model.safetensors").items()}


@torch.no_grad()
def logits_of(theirs: Original, image: np.ndarray, before: list[int], after: list[int]) -> torch.Tensor:
    embeddings = prompt_embeddings(theirs, image, before, after)
    hidden = theirs.model.language_model(inputs_embeds=embeddings).last_hidden_state
    logits: torch.Tensor = theirs.lm_head(hidden[:, -1])
    return logits


@pytest.mark.parametrize("training", [False, True], ids=["reparameterised", "training"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_folder_of_transformers_computes_what_transformers_does(
    tmp_path: Path, tokenizer_files: Path, training: bool, tied: bool
) -> None:
    theirs = original.build(original.ODD, seed=11, training=training, tied=tied)
    folder = save_native(theirs, tmp_path / "native", tokenizer_files)
    vlm = load(str(folder))
    assert vlm.config.source.layout == ("transformers-training" if training else "transformers")
    assert (vlm.config.image.size, vlm.config.image.fit) == (128, "crop")
    image, before, after = pixels(128, 128, 2), [1, 2, 3], list(range(40, 60))
    assert difference(features_from(vlm.model, image), features_of(theirs, image)) < TIGHT
    prompt = vlm.model.embed([before, ImageSlot(0, 4), after], {0: vlm.model.encode(mx.array(image))[0]})
    logits = vlm.model.prefill(prompt, vlm.model.text.make_cache())
    assert difference(logits, logits_of(theirs, image, before, after)) < TIGHT

    convert(folder, tmp_path / "a")
    convert(original.save_apple(theirs, tmp_path / "apple", tokenizer_files), tmp_path / "b")
    ours, apples = stored(tmp_path / "a"), stored(tmp_path / "b")
    assert ours.keys() == apples.keys()
    assert not [name for name in ours if not np.array_equal(ours[name], apples[name])]


def test_the_training_form_merges_to_what_timm_merges_it_to(tmp_path: Path, tokenizer_files: Path) -> None:
    theirs = original.build(original.ODD, seed=12, training=True)
    convert(original.save_apple(theirs, tmp_path / "training", tokenizer_files), tmp_path / "a")
    theirs.model.vision_tower.timm_model = reparameterize_model(theirs.model.vision_tower.timm_model)
    convert(original.save_apple(theirs, tmp_path / "merged", tokenizer_files), tmp_path / "b")
    ours, timms = stored(tmp_path / "a"), stored(tmp_path / "b")
    assert ours.keys() == timms.keys()
    far = {name: np.abs(ours[name] - timms[name]).max() / np.abs(timms[name]).max() for name in ours}
    assert max(far.values()) < ROUNDING, {name: value for name, value in far.items() if value >= ROUNDING}


# Back again


@pytest.fixture(params=["tied", "untied"])
def there_and_back(request: pytest.FixtureRequest, tmp_path: Path, tokenizer_files: Path) -> tuple[Original, Any, Path]:
    """An original, what transformers loads from what we wrote of it by way of our folder, and the folder written."""
    from transformers import FastVlmForConditionalGeneration

    theirs = original.build(original.ODD, seed=13, tied=request.param == "tied")
    convert(original.save_apple(theirs, tmp_path / "apple", tokenizer_files), tmp_path / "ours")
    to_transformers(tmp_path / "ours", tmp_path / "back")
    from_pretrained: Any = FastVlmForConditionalGeneration.from_pretrained
    again, report = from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report.values()), report
    assert again.dtype == torch.float32
    return theirs, again.eval(), tmp_path / "back"


def test_there_and_back_again(there_and_back: tuple[Original, Any, Path]) -> None:
    theirs, again, _ = there_and_back
    for size in ((128, 128), (100, 260)):
        image = pixels(*size)
        assert difference(mx.array(features_of(again, image).numpy()), features_of(theirs, image)) < TIGHT
    image, before, after = pixels(128, 128, 3), [1, 2, 3], list(range(40, 60))
    logits, expected = (logits_of(model, image, before, after) for model in (again, theirs))
    assert difference(mx.array(logits.numpy()), expected) < TIGHT


def test_norms_left_behind_change_nothing(there_and_back: tuple[Original, Any, Path]) -> None:
    again = there_and_back[1]
    norms = [module for module in again.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert len(norms) == sum(original.ODD["depths"])
    x = torch.randn(1, norms[0].num_features, 9, 9, generator=torch.manual_seed(0))
    with torch.no_grad():
        assert torch.equal(norms[0](x), x)


def test_its_processor_prepares_what_ours_does(there_and_back: tuple[Original, Any, Path]) -> None:
    """Pixels and token ids of a question about a picture, and 8 greedy tokens of an answer, through transformers
    alone."""
    from PIL import Image
    from transformers import AutoProcessor, LlavaProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    _, again, folder = there_and_back
    processor = AutoProcessor.from_pretrained(folder)
    assert isinstance(processor, LlavaProcessor)
    picture = Image.fromarray(pixels(100, 140, 5)[0])
    question: Any = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is on the table?"}]}
    ]
    prompt = processor.apply_chat_template(question, add_generation_prompt=True)
    inputs = processor(images=picture, text=prompt, return_tensors="pt")

    vlm = load(str(folder), dtype="float32")
    assert vlm.config.image.fit == "pad"
    request = vlm.engine.prepare(picture, "What is on the table?")
    ids: list[int] = []
    for piece in request.pieces:
        ids += [again.config.image_token_id] * len(piece) if isinstance(piece, ImageSlot) else piece
    assert inputs["input_ids"][0].tolist() == ids
    by_pillow = LlavaImageProcessorPil.from_pretrained(folder)  # torchvision's bicubic, the default, is not Pillow's
    same = {**inputs, "pixel_values": by_pillow(picture, return_tensors="pt")["pixel_values"]}
    assert inputs["pixel_values"].shape == same["pixel_values"].shape
    assert torch.equal(
        (same["pixel_values"] * 255).round(), to_torch(vlm.engine.pixels(picture)[None]).mul(255).round()
    )
    with torch.no_grad():
        tokens = again.generate(**same, max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()
    answer = vlm.generate(picture, "What is on the table?", max_tokens=8)
    assert list(answer.token_ids) == [token for token in tokens if token not in vlm.config.eos_token_ids]


def test_a_vocabulary_without_room_grows(tmp_path: Path, tokenizer_files: Path) -> None:
    """`<image>` takes the next id, rows are added up to a multiple of 64, and no logit that was there changes."""
    from transformers import FastVlmForConditionalGeneration

    full = max(json.loads((tokenizer_files / "added_tokens.json").read_text()).values()) + 1
    theirs = original.build(original.ODD, seed=14, vocab=full, tied=False)
    convert(original.save_apple(theirs, tmp_path / "apple", tokenizer_files), tmp_path / "ours")
    to_transformers(tmp_path / "ours", tmp_path / "back")
    again = FastVlmForConditionalGeneration.from_pretrained(tmp_path / "back").eval()
    assert (again.config.text_config.vocab_size, again.config.image_token_id) == (full + 64 - full % 64, full)
    image, before, after = pixels(128, 128, 3), [1, 2, 3], list(range(40, 60))
    logits, expected = (logits_of(model, image, before, after) for model in (again, theirs))
    assert difference(mx.array(logits[:, :full].numpy()), expected) < TIGHT
    assert logits[:, full:].max() < expected.max()
