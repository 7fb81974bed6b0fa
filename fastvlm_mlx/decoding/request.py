"""What is asked, made ready: the pixels of each picture, the prompt in pieces, and how the answer is to be drawn."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

import mlx.core as mx

from ..config import is_number, is_whole
from ..errors import OptionError, shown
from ..inputs.image import Pixels
from ..inputs.pieces import ImageSlot, Piece

MAX_TEMPERATURE = 100.0
LEAST_TEMPERATURE, LEAST_TOP_P = 1e-6, 1e-30  # below, they would be zero, or logits infinite, in float32


@dataclass(frozen=True)
class Options:
    """How an answer is drawn. Temperature 0 is greedy; with a seed, the same draw every time.

    `stop_tokens` are the ids that end an answer: by default the model's own, () for none.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop_tokens: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not is_whole(self.max_tokens) or self.max_tokens < 1:
            raise OptionError(f"`max_tokens` is {shown(self.max_tokens)}, expected a whole number of at least 1.")
        if not is_number(self.temperature) or not (
            self.temperature == 0 or LEAST_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE
        ):
            raise OptionError(
                f"`temperature` is {shown(self.temperature)}, expected 0 (greedy) or a number from {LEAST_TEMPERATURE:g} "
                f"to {MAX_TEMPERATURE:g}."
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
                f"`stop_tokens` is {shown(self.stop_tokens)}, expected a list or tuple of token ids, whole numbers from 0 on."
            )
        self._use_pythons_own()

    def _use_pythons_own(self) -> None:
        """Put Python's numbers in the place of NumPy's, which wrap around, and which JSON does not take."""
        numbers = {
            "max_tokens": int(self.max_tokens),
            "temperature": float(self.temperature),
            "top_p": float(self.top_p),
        }
        if self.seed is not None:
            numbers["seed"] = int(self.seed)
        if self.stop_tokens is not None:
            object.__setattr__(self, "stop_tokens", tuple(map(int, self.stop_tokens)))
        for name, number in numbers.items():
            object.__setattr__(self, name, number)

    def keys(self) -> Iterator[mx.array | None]:
        """A random key for every token, or None where the likeliest is taken."""
        if self.temperature == 0:
            yield from repeat(None)
        key = mx.random.key(self.seed if self.seed is not None else time.time_ns())
        while True:
            key, drawn = mx.random.split(key)
            mx.async_eval(key)  # a reader's next thread cannot compute what this one has left undone
            yield drawn


@dataclass(frozen=True)
class Request:
    """A question made ready: pixels of each image, the prompt in pieces, how long that took, and digests already known."""

    pixels: list[Pixels]
    pieces: list[Piece]
    preprocess_seconds: float
    digests: Sequence[bytes] | None = None

    @property
    def image_tokens(self) -> int:
        """Positions taken by images."""
        return sum(len(piece) for piece in self.pieces if isinstance(piece, ImageSlot))

    @property
    def prompt_tokens(self) -> int:
        """Positions taken by everything."""
        return sum(map(len, self.pieces))
