"""Stage by stage against transformers' FastVLM in float32, the weights having gone through the production converter."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch

from fastvlm_mlx import load
from fastvlm_mlx.backend.ops import Backend, forms_of
from fastvlm_mlx.convert import convert, open_foreign
from fastvlm_mlx.decoding.generate import stream
from fastvlm_mlx.decoding.request import Options, Request
from fastvlm_mlx.inputs.pieces import ImageSlot
from fastvlm_mlx.network.model import FastVLM
from fastvlm_mlx.storage.fill import fill
from fastvlm_mlx.vlm import VLM

from . import original
from .original import Original
from .stages import TIGHT, TOLERANCE, difference, features_from, features_of, pixels, prompt_embeddings, to_torch

pytestmark = pytest.mark.slow

PICTURE = 4  # positions of a picture of 128 x 128 pixels


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, tokenizer_files: Path) -> tuple[Original, VLM]:
    """A small original and ours, converted to a folder and loaded from it."""
    theirs = original.build(original.SMALL)
    root = tmp_path_factory.mktemp("small")
    convert(original.save_apple(theirs, root / "apple", tokenizer_files), root / "ours")
    return theirs, load(str(root / "ours"))


@pytest.mark.parametrize("size", [(64, 64), (128, 128), (192, 320), (256, 64), (100, 333), (65, 63), (1, 1)])
def test_tower_at_any_size(pair: tuple[Original, VLM], size: tuple[int, int]) -> None:
    theirs, ours = pair
    image = pixels(*size)
    assert difference(features_from(ours.model, image), features_of(theirs, image)) < TIGHT


def test_tower_takes_a_batch(pair: tuple[Original, VLM]) -> None:
    theirs, ours = pair
    image = np.concatenate([pixels(128, 192, seed) for seed in range(3)])
    assert difference(features_from(ours.model, image), features_of(theirs, image)) < TIGHT


def test_projector(pair: tuple[Original, VLM]) -> None:
    theirs, ours = pair
    image = pixels(192, 192)
    with torch.no_grad():
        expected = theirs.model.get_image_features(to_torch(image)).pooler_output
    assert difference(ours.model.encode(mx.array(image)), expected) < TIGHT


def test_prefill_and_cached_decode(pair: tuple[Original, VLM]) -> None:
    theirs, ours = pair
    image, before, after = pixels(128, 128), [1, 2, 3], list(range(40, 60))
    embeddings = prompt_embeddings(theirs, image, before, after)
    ids = [7, 300, 25, 411]
    with torch.no_grad():
        following = theirs.model.language_model.embed_tokens(torch.tensor([ids]))
        hidden = theirs.model.language_model(inputs_embeds=torch.cat([embeddings, following], dim=1)).last_hidden_state
        expected = theirs.lm_head(hidden)[:, -len(ids) - 1 :]
    model = ours.model
    prompt = model.embed([before, ImageSlot(0, PICTURE), after], {0: model.encode(mx.array(image))[0]})
    assert difference(prompt, embeddings) < TIGHT
    cache = model.text.make_cache()
    logits = [model.prefill(prompt, cache)]
    logits += [model.step(mx.array([token]), cache) for token in ids]
    for got, want in zip(logits, expected.unbind(1), strict=True):
        assert difference(got, want) < TIGHT


def test_cached_equals_uncached(pair: tuple[Original, VLM]) -> None:
    model = pair[1].model
    ids = np.random.default_rng(1).integers(0, 500, 300).tolist()  # over the cache's first growth, at 256
    cache = model.text.make_cache()
    model.prefill(model.embed([ids[:250]], {}), cache)
    for token in ids[250:-1]:
        model.step(mx.array([token]), cache)
    cached = model.step(mx.array(ids[-1:]), cache)
    whole = model.prefill(model.embed([ids], {}), model.text.make_cache())
    assert np.abs(np.array(cached - whole)).max() / np.abs(np.array(whole)).max() < 1e-5


def test_prefill_in_chunks_equals_one_pass(pair: tuple[Original, VLM], monkeypatch: pytest.MonkeyPatch) -> None:
    model = pair[1].model
    ids = np.random.default_rng(2).integers(0, 500, 200).tolist()
    whole = model.prefill(model.embed([ids], {}), model.text.make_cache())
    for chunk in (1, 64, 100, 199, 200):
        monkeypatch.setattr("fastvlm_mlx.network.model.PREFILL_CHUNK", chunk)
        cache = model.text.make_cache()
        parts = model.prefill(model.embed([ids], {}), cache)
        assert [layer.length for layer in cache] == [200] * len(cache)
        assert np.abs(np.array(parts - whole)).max() / np.abs(np.array(whole)).max() < 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_32_greedy_tokens(tmp_path: Path, tokenizer_files: Path, tied: bool) -> None:
    theirs = original.build(original.ODD, seed=3, tied=tied)
    ours = load(str(original.save_apple(theirs, tmp_path / "apple", tokenizer_files, image_size=192)))
    image, before, after = pixels(192, 192, 4), [5, 6, 7, 8], list(range(100, 130))
    embeddings = prompt_embeddings(theirs, image, before, after)
    expected: list[int] = []
    with torch.no_grad():
        for _ in range(32):
            hidden = theirs.model.language_model(inputs_embeds=embeddings).last_hidden_state[:, -1:]
            expected.append(int(theirs.lm_head(hidden).argmax()))
            embeddings = torch.cat(
                [embeddings, theirs.model.language_model.embed_tokens(torch.tensor([expected[-1:]]))], dim=1
            )
    request = Request([image[0]], [before, ImageSlot(0, 9), after], 0.0)
    *_, last = stream(ours.engine, request, Options(max_tokens=32, stop_tokens=()))
    assert last.answer is not None and last.answer.token_ids == expected
    assert len(set(expected)) > 4  # a model stuck on one token would prove little


@pytest.mark.parametrize("sizes", [original.SMALL, original.ODD], ids=["small", "odd"])
def test_training_form(tmp_path: Path, tokenizer_files: Path, sizes: dict[str, tuple[int, ...]]) -> None:
    theirs = original.build(sizes, seed=5, training=True)
    ours = load(str(original.save_apple(theirs, tmp_path / "apple", tokenizer_files)))
    assert ours.config.source.layout == "llava-training"
    for size in [(128, 128), (100, 260)]:
        image = pixels(*size)
        assert difference(features_from(ours.model, image), features_of(theirs, image)) < TIGHT


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, tokenizer_files: Path) -> tuple[Original, Path]:
    """FastViTHD at its full widths and depths, with a small decoder."""
    theirs = original.build(original.FULL, seed=6)
    return theirs, original.save_apple(
        theirs, tmp_path_factory.mktemp("full") / "apple", tokenizer_files, image_size=256
    )


@pytest.mark.parametrize("size", [(256, 256), (192, 320)])
def test_full_fastvithd(full: tuple[Original, Path], size: tuple[int, int]) -> None:
    theirs, folder = full
    ours = load(str(folder))
    image = pixels(*size)
    assert difference(features_from(ours.model, image), features_of(theirs, image)) < TIGHT


def test_an_answer_at_full_widths(full: tuple[Original, Path]) -> None:
    """FastViTHD as published in front of a small decoder: embeddings, prefill logits, and cached decoding."""
    theirs, folder = full
    model = load(str(folder), dtype="float32").model
    image, before, after, ids = pixels(128, 192), [1, 2, 3], list(range(40, 60)), [7, 300, 25]
    embeddings = prompt_embeddings(theirs, image, before, after)
    with torch.no_grad():
        following = theirs.model.language_model.embed_tokens(torch.tensor([ids]))
        hidden = theirs.model.language_model(inputs_embeds=torch.cat([embeddings, following], dim=1)).last_hidden_state
        expected = theirs.lm_head(hidden)[:, -len(ids) - 1 :]
    prompt = model.embed([before, ImageSlot(0, 6), after], {0: model.encode(mx.array(image))[0]})
    assert difference(prompt, embeddings) < TIGHT
    cache = model.text.make_cache()
    logits = [model.prefill(prompt, cache)] + [model.step(mx.array([token]), cache) for token in ids]
    for got, want in zip(logits, expected.unbind(1), strict=True):
        assert difference(got, want) < TOLERANCE


def test_bfloat16_features_at_full_widths(full: tuple[Original, Path]) -> None:
    theirs, folder = full
    model = load(str(folder), dtype="bfloat16").model
    image = pixels(64, 64)
    a, b = np.array(features_from(model, image).astype(mx.float32)).ravel(), features_of(theirs, image).numpy().ravel()
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.999


def test_bfloat16_features(pair: tuple[Original, VLM], tmp_path: Path, tokenizer_files: Path) -> None:
    theirs, _ = pair
    ours = load(str(original.save_apple(theirs, tmp_path / "apple", tokenizer_files)), dtype="bfloat16")
    image = pixels(128, 128)
    a = np.array(features_from(ours.model, image).astype(mx.float32)).ravel()
    b = features_of(theirs, image).numpy().ravel()
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.999


@pytest.mark.parametrize("backend", ["metal", "cuda"])
def test_the_gpu_forms_of_the_tower(
    pair: tuple[Original, VLM], tmp_path: Path, tokenizer_files: Path, backend: Backend
) -> None:
    """The graphs built for Metal and CUDA, run here by MLX's general CPU kernels (maps no smaller than a 7x7 kernel's
    reach: MLX's grouped convolution on a CPU writes outside smaller ones).
    """
    theirs, _ = pair
    opened = open_foreign(original.save_apple(theirs, tmp_path / "apple", tokenizer_files), "small")
    model = FastVLM(opened.config)
    fill(model, opened, mx.float32, {})
    image = pixels(512, 448)
    with forms_of(backend):
        assert difference(features_from(model, image), features_of(theirs, image)) < TIGHT
