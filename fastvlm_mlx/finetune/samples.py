"""Rows -> samples: token ids with the places of pictures, and which of the tokens are to be learned.

A row is rendered as a question is (`inputs.prompt.render`), so pictures stand where they stand when the model answers.
Of every answer its own tokens and the end of the turn are learned, and nothing else.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..decoding.engine import Engine
from ..decoding.image_cache import digest
from ..errors import FastVLMError, ImageError, PromptError
from ..inputs.image import Pixels, Source
from ..inputs.pieces import ImageSlot
from ..inputs.prompt import Turn
from .formats import raise_faults
from .rows import Row

Ids = npt.NDArray[np.int32]
IMAGE = -1  # stands in `ids` for a position of a picture


@dataclass(frozen=True)
class Sample:
    """A row as the decoder reads it.

    `ids` (L,) are token ids, IMAGE where a picture's embedding stands. `places` (T,) are the positions whose tokens are
    learned, each of which the position before it predicts. `pictures` are the indices of its pictures among all, in
    order.
    """

    ids: Ids
    places: Ids
    pictures: tuple[int, ...]
    row: Row

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def targets(self) -> Ids:
        """The tokens to be learned (T,)."""
        return self.ids[self.places]


@dataclass(frozen=True)
class Pictures:
    """Every picture of the rows once: its source, and what identifies its pixels."""

    sources: list[Source]
    digests: list[bytes]


def samples_of(engine: Engine, rows: Sequence[Row], pictures: dict[object, int]) -> list[Sample]:
    """Render rows; `pictures` gives each picture its index, and grows. Raises PromptError naming rows that are too
    long.
    """
    samples, faults = [], []
    for row in rows:
        try:
            samples.append(_sample(engine, row, pictures))
        except FastVLMError as error:
            faults.append(str(error))
    raise_faults(faults, PromptError)
    return samples


def _sample(engine: Engine, row: Row, pictures: dict[object, int]) -> Sample:
    turns: list[Turn] = []
    places: list[int] = []
    for exchange in row.exchanges:
        asked = [*turns, Turn(exchange.question, exchange.images)]
        start = sum(map(len, engine.pieces(asked, row.system)))
        answer = tuple(engine.tokenizer.encode(exchange.answer))
        places += range(start, start + len(answer) + 1)  # the end of the turn as well
        turns.append(Turn(exchange.question, exchange.images, answer))
    pieces = engine.pieces(turns, row.system)
    ids = np.concatenate(
        [np.full(len(p), IMAGE) if isinstance(p, ImageSlot) else np.array(p, np.int64) for p in pieces]
    ).astype(np.int32)[: places[-1] + 1]  # nothing after the last token to be learned
    if len(ids) > engine.context:
        images = engine.image_tokens * len(row.images)
        raise PromptError(
            f"{row.origin}: it takes {len(ids)} tokens, {images} of them for pictures, and the model has room for "
            f"{engine.context}; "
            "shorten it, show fewer pictures, or use a lower `resolution`."
        )
    shown_here = tuple(pictures.setdefault(_identity(source), len(pictures)) for source in row.images)
    return Sample(ids, np.array(places, np.int32), shown_here, row)


def _identity(source: Source) -> object:
    """What makes two mentions one picture: the same path, or the same object."""
    return str(source) if isinstance(source, (str, Path)) else id(source)


def open_pictures(engine: Engine, samples: Sequence[Sample], seen: Callable[[int, Pixels], None]) -> Pictures:
    """Open every picture of the samples once, and hand its prepared pixels to `seen` with its index.

    Raises ImageError that names every row with a broken picture, up to five.
    """
    first: dict[int, tuple[Source, str]] = {}
    for sample in samples:
        for index, source in zip(sample.pictures, sample.row.images, strict=True):
            first.setdefault(index, (source, sample.row.origin))
    digests, faults = [], []
    for index in range(len(first)):
        source, origin = first[index]
        try:
            pixels = engine.pixels(source)
        except ImageError as error:
            faults.append(f"{origin}: {error}")
            continue
        digests.append(digest(pixels))
        if not faults:
            seen(index, pixels)
    raise_faults(faults, ImageError)
    return Pictures([first[n][0] for n in range(len(first))], digests)


def as_shown(engine: Engine, sample: Sample) -> str:
    """A sample as text for people: special tokens by name, a picture as its positions, and in ⟦brackets⟧ what is
    learned.
    """
    learned, text = set(sample.places.tolist()), ""
    ids: list[Any] = sample.ids.tolist()
    position = 0
    inside = False
    while position < len(ids):
        if (position in learned) != inside:
            inside = not inside
            text += "⟦" if inside else "⟧"
        if ids[position] == IMAGE:
            end = next((n for n in range(position, len(ids)) if ids[n] != IMAGE), len(ids))
            text += f"[a picture: {end - position} positions]"
            position = end
            continue
        end = position
        while end < len(ids) and ids[end] != IMAGE and (end in learned) == inside:
            end += 1
        text += "".join(_spelled(engine, ids[position:end]))
        position = end
    return text + ("⟧" if inside else "")


def _spelled(engine: Engine, ids: Sequence[int]) -> list[str]:
    """Runs of token ids as text, special tokens by their names."""
    parts: list[str] = []
    plain: list[int] = []
    for token in ids:
        if engine.tokenizer.is_special(token):
            parts += [engine.tokenizer.decode(plain), str(engine.tokenizer.bpe.id_to_token(token))]
            plain = []
        else:
            plain.append(token)
    return [*parts, engine.tokenizer.decode(plain)]
