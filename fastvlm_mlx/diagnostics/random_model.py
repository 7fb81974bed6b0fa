"""Models of the published sizes with random weights, for measuring: what a stage takes does not depend on their values.

Enters: the name of a size. Leaves: an `OpenModel` as a folder gives, but with a tokenizer that cuts text about as
Qwen2's does and has one id for every word. Sizes: Qwen2's config.json in Apple's published FastVLM checkpoints.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten
from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as AnyTokenizer

from ..config import ImageConfig, ModelConfig, SourceConfig, TextConfig, VisionConfig
from ..errors import OptionError, listed
from ..inputs.tokenizer import END_OF_TEXT, ROLE_TOKENS, Tokenizer
from ..network.model import FastVLM
from ..storage.open import OpenModel

SMALL_VISION = VisionConfig(depths=(1, 2, 2, 1, 1), widths=(32, 64, 128, 256, 512))
PASSING = ("token_mixer.weight", "position.weight")  # filters near the identity: a skip is folded into them
NOISE = 1_000_003  # random values, repeated for all weights; a prime, so that no two rows of a matrix are equal


def _text(hidden: int, layers: int, heads: int, kv: int, inner: int, vocab: int, tied: bool) -> TextConfig:
    return TextConfig(hidden, layers, heads, kv, inner, vocab, tied)


SIZES: dict[str, ModelConfig] = {
    "0.5b": ModelConfig(_text(896, 24, 14, 2, 4864, 151936, True)),
    "1.5b": ModelConfig(_text(1536, 28, 12, 2, 8960, 151936, True)),
    "7b": ModelConfig(_text(3584, 28, 28, 4, 18944, 152064, False)),
    "small": ModelConfig(
        _text(128, 3, 2, 1, 384, 2048, True), SMALL_VISION, ImageConfig(256)
    ),  # not published: for tests
}


def config(size: str, layers: int | None = None) -> ModelConfig:
    """The config of a size in SIZES, with only the first `layers` decoder layers if given; raises OptionError."""
    if size not in SIZES:
        raise OptionError(f"`size` is {size!r}, expected one of {listed(SIZES)}.")
    chosen = SIZES[size]
    full = chosen.text.num_hidden_layers
    if layers is not None and not 1 <= layers <= full:
        raise OptionError(f"`layers` is {layers}, expected 1 to {full}, the decoder layers of {size}.")
    text = replace(chosen.text, num_hidden_layers=layers or full)
    return replace(chosen, text=text, source=SourceConfig(f"random {size}", "random"))


def open_random(size: str, layers: int | None = None) -> OpenModel:
    """A model of random weights; they are made when they are asked for, and are the same every time."""
    chosen = config(size, layers)
    name = f"random {size}" + (f", {layers} decoder layers" if layers else "")

    def weights() -> Iterator[tuple[str, mx.array]]:
        noise = np.random.default_rng(0).uniform(-1, 1, NOISE).astype(np.float32)
        model: Any = FastVLM(chosen)  # MLX leaves `parameters` untyped
        for path, place in cast(list[tuple[str, mx.array]], tree_flatten(model.parameters())):
            yield path, mx.array(_values(path, place.shape, noise))

    return OpenModel(name, chosen, word_counter(), weights, lambda: chosen)


def _values(path: str, shape: tuple[int, ...], noise: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Random values for a parameter, such that activations keep about their size at any depth.

    Norms are around 1 and biases small.
    """
    values = np.resize(noise, shape)
    if "norm" in path and path.endswith("weight"):
        return 1 + 0.1 * values
    if len(shape) == 1:
        return 0.05 * values
    fan_in = shape[-1] if len(shape) == 2 else int(np.prod(shape[1:]))
    values = values * np.float32((3 / fan_in) ** 0.5 * (0.3 if "fc2" in path else 1.0))
    if len(shape) == 4 and path.endswith(PASSING):
        values *= np.float32(0.1)
        values[:, shape[1] // 2, shape[2] // 2] += 1
    return values


def word_counter() -> Tokenizer:
    """A tokenizer with one id for every word, sign and line break, and with Qwen2's special tokens."""
    tokenizer = AnyTokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n| ?\w+|[^\w\s]"), behavior="isolated")
    tokenizer.add_special_tokens([*ROLE_TOKENS, END_OF_TEXT])
    return Tokenizer(tokenizer, "random model")
