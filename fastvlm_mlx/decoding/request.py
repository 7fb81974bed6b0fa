"""A question made ready, and how its answer is to be drawn: pixels, the prompt in pieces, options."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..config import is_number, is_whole
from ..errors import OptionError, shown
from ..inputs.image import Pixels
from ..inputs.pieces import ImageSlot, Piece
from .logprobs import MAX_LOGPROBS

MAX_TEMPERATURE = 100.0
LEAST_TEMPERATURE, LEAST_TOP_P = 1e-6, 1e-30  # below, they would be zero, or logits infinite, in float32
LEAST_PENALTY, MAX_PENALTY = 0.01, 100.0
MAX_STOPS = 4  # stop strings of an answer, as the OpenAI API takes
MAX_STOP_CHARS = 1000  # characters of a stop string: so much of an answer may be held back

Schema = dict[str, Any] | str | os.PathLike[str] | type | bool  # see `schema.read_schema`


@dataclass(frozen=True)
class Options:
    """How an answer is drawn, and where it ends. Temperature 0 is greedy; with a seed, the same draw every time.

    `stop_tokens` are the ids that end an answer: by default the model's own, () for none. When drawing, tokens are
    taken from the `top_k` likeliest (0: all), of these from those that add up to `top_p`, and of these from those at
    least `min_p` times as likely as the likeliest. `repetition_penalty` divides the positive logits of tokens that came
    before in the text of the prompt or in the answer, and multiplies the negative ones (1: nothing;
    `sampling.REPETITION_WINDOW`). `stop` are up to 4 strings, or one, before the first of which the answer ends.
    `logprobs` is for how many of the likeliest tokens, 0 to 20, the log-probabilities are wanted beside that of each
    token that came. With a `schema`, the answer is JSON that keeps to it (`schema.read_schema`); it is held here as
    JSON text. Raises OptionError for what is out of range.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop_tokens: tuple[int, ...] | None = None
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: Sequence[str] = ()
    logprobs: int | None = None
    schema: Schema | None = None

    def __post_init__(self) -> None:
        if not is_whole(self.max_tokens) or self.max_tokens < 1:
            raise OptionError(f"`max_tokens` is {shown(self.max_tokens)}, expected a whole number of at least 1.")
        if not is_number(self.temperature) or not (
            self.temperature == 0 or LEAST_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE
        ):
            raise OptionError(
                f"`temperature` is {shown(self.temperature)}, expected 0 (greedy) or a number from "
                f"{LEAST_TEMPERATURE:g} to {MAX_TEMPERATURE:g}."
            )
        if not is_number(self.top_p) or not LEAST_TOP_P <= self.top_p <= 1:
            raise OptionError(f"`top_p` is {shown(self.top_p)}, expected a number above 0 and up to 1 (everything).")
        if self.seed is not None and (not is_whole(self.seed) or not 0 <= self.seed < 1 << 64):
            raise OptionError(f"`seed` is {shown(self.seed)}, expected a whole number from 0 to 2**64 - 1.")
        if self.stop_tokens is not None and not (
            isinstance(self.stop_tokens, (list, tuple))
            and all(is_whole(token) and token >= 0 for token in self.stop_tokens)
        ):
            raise OptionError(
                f"`stop_tokens` is {shown(self.stop_tokens)}, expected a list or tuple of token ids, whole "
                "numbers from 0 on."
            )
        self._check_filters()
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        self._use_pythons_own()
        if self.schema is not None:
            if self.stop:
                raise OptionError(
                    "`stop` and `schema` were given together, and a stop string would cut the JSON; give one of them."
                )
            from .schema import read_schema  # not on the way to a first token

            object.__setattr__(self, "schema", read_schema(self.schema))

    def _check_filters(self) -> None:
        if not is_whole(self.top_k) or self.top_k < 0:
            raise OptionError(f"`top_k` is {shown(self.top_k)}, expected a whole number from 1, or 0 for all tokens.")
        if not is_number(self.min_p) or not 0 <= self.min_p <= 1:
            raise OptionError(f"`min_p` is {shown(self.min_p)}, expected a number from 0 (all tokens) to 1.")
        if not is_number(self.repetition_penalty) or not LEAST_PENALTY <= self.repetition_penalty <= MAX_PENALTY:
            raise OptionError(
                f"`repetition_penalty` is {shown(self.repetition_penalty)}, expected a number from {LEAST_PENALTY:g} "
                f"to {MAX_PENALTY:g}, 1 for none."
            )
        if self.logprobs is not None and (not is_whole(self.logprobs) or not 0 <= self.logprobs <= MAX_LOGPROBS):
            raise OptionError(
                f"`logprobs` is {shown(self.logprobs)}, expected a whole number from 0 to {MAX_LOGPROBS}: how many of "
                "the likeliest tokens to list."
            )

    def _use_pythons_own(self) -> None:
        """Put Python's numbers in the place of NumPy's, which wrap around, and which JSON does not take."""
        numbers = {
            "max_tokens": int(self.max_tokens),
            "temperature": float(self.temperature),
            "top_p": float(self.top_p),
            "top_k": int(self.top_k),
            "min_p": float(self.min_p),
            "repetition_penalty": float(self.repetition_penalty),
        }
        if self.seed is not None:
            numbers["seed"] = int(self.seed)
        if self.logprobs is not None:
            numbers["logprobs"] = int(self.logprobs)
        if self.stop_tokens is not None:
            object.__setattr__(self, "stop_tokens", tuple(map(int, self.stop_tokens)))
        for name, number in numbers.items():
            object.__setattr__(self, name, number)

    def key(self) -> mx.array | None:
        """The random key that those of an answer's tokens are split from, or None where the likeliest are taken."""
        if self.temperature == 0:
            return None
        return mx.random.key(self.seed if self.seed is not None else time.time_ns())


def _stop_strings(stop: object) -> tuple[str, ...]:
    """Up to MAX_STOPS strings, from a list of them, one, or None; raises OptionError for anything else."""
    strings = (stop,) if isinstance(stop, str) else () if stop is None else stop
    if not isinstance(strings, (list, tuple)) or not all(isinstance(each, str) for each in strings):
        raise OptionError(f"`stop` is {shown(stop)}, expected a string or a list of up to {MAX_STOPS}.")
    if len(strings) > MAX_STOPS:
        raise OptionError(f"`stop` holds {len(strings)} strings, expected up to {MAX_STOPS}.")
    for each in strings:
        if not each:
            raise OptionError("`stop` holds an empty string, which would end every answer at once; remove it.")
        if len(each) > MAX_STOP_CHARS:
            raise OptionError(
                f"`stop` holds a string of {len(each):,} characters, expected up to {MAX_STOP_CHARS:,}; shorten it."
            )
        try:
            each.encode()
        except UnicodeEncodeError as error:
            raise OptionError(
                f"`stop` holds {shown(each)}, with half of a surrogate pair, which is not a character; pass valid "
                "Unicode."
            ) from error
    return tuple(map(str, strings))


@dataclass(frozen=True)
class Request:
    """A question made ready: pixels (S, S, 3) of each picture, uint8, and the prompt in pieces.

    `preprocess_seconds` is how long that took. `digests` identify the pictures, where they are known already.
    """

    pixels: list[Pixels]
    pieces: list[Piece]
    preprocess_seconds: float
    digests: Sequence[bytes] | None = None

    @property
    def image_tokens(self) -> int:
        """The number of positions that pictures take."""
        return sum(len(piece) for piece in self.pieces if isinstance(piece, ImageSlot))

    @property
    def text_ids(self) -> list[int]:
        """The token ids of everything but images, in order."""
        return [token for piece in self.pieces if isinstance(piece, list) for token in piece]

    @property
    def prompt_tokens(self) -> int:
        """The number of positions that the whole prompt takes."""
        return sum(map(len, self.pieces))
