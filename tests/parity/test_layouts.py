"""transformers' own folders, as its save_pretrained writes them, and back: against PyTorch, and against Apple's layout."""

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from timm.utils.model import reparameterize_model

from fastvlm_mlx import load
from fastvlm_mlx.convert import convert
from fastvlm_mlx.prompt import ImageSlot

from . import original
from .test_against_pytorch import TIGHT, difference, features_from, features_of, pixels, prompt_embeddings

ROUNDING = 3e-7  # of the largest value of a tensor: two roundings of float32


def save_native(model: Any, folder: Path, tokenizer: Path) -> Path:
    """As transformers saves it, with the tokenizer's files beside."""
    model.config.image_seq_length = 4
    model.save_pretrained(folder)
    return Path(shutil.copytree(tokenizer, folder, dirs_exist_ok=True))


def stored(folder: Path) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in mx.load(str(folder / "model.safetensors")).items()}


@torch.no_grad()
def logits_of(theirs: torch.nn.Module, image: np.ndarray, before: list[int], after: list[int]) -> torch.Tensor:
    embeddings = prompt_embeddings(theirs, image, before, after)
    return theirs.lm_head(theirs.model.language_model(inputs_embeds=embeddings).last_hidden_state[:, -1])


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
