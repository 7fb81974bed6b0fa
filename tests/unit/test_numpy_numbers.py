"""NumPy's numbers where Python's are expected, and values that are of no use."""

from dataclasses import replace
from io import BytesIO
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from fastvlm_mlx import VLM, load
from fastvlm_mlx.errors import OptionError, PromptError

IMAGE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_bits(kind: type) -> None:
    assert load("tiny", bits=kind(4)).config.quantization == load("tiny", bits=4).config.quantization


def test_an_attention_map(small: VLM) -> None:
    answer = small.generate(IMAGE, "What is it?", max_tokens=3)
    plain = small.attention_map(IMAGE, "What is it?", answer, layers=[0])
    forms: list[Any] = [
        np.array(answer.token_ids),
        mx.array(answer.token_ids),
        [np.int64(token) for token in answer.token_ids],
    ]
    layers: Any = np.array([0, 0])
    for ids in forms:
        same = small.attention_map(IMAGE, "What is it?", replace(answer, token_ids=ids), layers=layers)
        assert same.on_pictures == plain.on_pictures
    for layers in (5, [True], [99], [0.5]):
        with pytest.raises(OptionError, match="`layers` is"):
            small.attention_map(IMAGE, "What is it?", answer, layers=layers)
    wrong: list[Any] = [None, 5, iter([1])]
    for ids in wrong:
        with pytest.raises(PromptError, match="expected a list"):
            small.attention_map(IMAGE, "What is it?", replace(answer, token_ids=ids))


def test_a_row_of_a_dataset(small: VLM) -> None:
    file = BytesIO()
    Image.fromarray(IMAGE).save(file, "PNG")
    expected = small.generate(IMAGE, "What is it?", max_tokens=3).text
    row = {"bytes": np.frombuffer(file.getvalue(), np.uint8), "path": None}
    assert small.generate(row, "What is it?", max_tokens=3).text == expected


@pytest.mark.parametrize("questions", [None, 5, "What is it?"])
@pytest.mark.parametrize("on_error", ["raise", "return"])
def test_a_batch_of_nothing_that_is_a_list(small: VLM, questions: object, on_error: str) -> None:
    with pytest.raises(PromptError, match="expected a list of pairs"):
        small.batch(questions, on_error=on_error)  # type: ignore[call-overload]


@pytest.mark.parametrize("revision", [5, "", "../x"])
def test_a_revision(revision: object) -> None:
    with pytest.raises(OptionError, match="`revision` is"):
        load("apple/FastVLM-0.5B", revision=revision)  # type: ignore[arg-type]
