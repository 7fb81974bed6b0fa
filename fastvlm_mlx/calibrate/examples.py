"""Pictures, questions and, where they are known, right answers: what a model is calibrated on and measured with.

Enters: a folder of pictures, with or without a questions.jsonl that has one {"image", "question", "answer"} a line.
Leaves: questions ready for the network, each followed by the answer the model itself gives.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..decoding.answer import finish
from ..decoding.engine import Engine
from ..decoding.generate import stream
from ..decoding.request import Options, Request
from ..errors import CheckpointError, ImageError, OptionError, PromptError, shown
from ..files import paths
from ..files import regular as files
from ..files.jsonfile import parse_table
from ..hub.find import find
from ..hub.names import BUILT_IN
from ..inputs.folder import is_picture
from ..inputs.image import Pixels, Source
from ..inputs.pieces import Piece
from ..inputs.prompt import PROMPT, Turn
from ..storage.open import OpenModel

QUESTIONS = "questions.jsonl"
MAX_QUESTIONS_BYTES = 20_000_000  # of questions.jsonl
MAX_ANSWER_TOKENS = 64  # tokens

Progress = Callable[[int, int], None]  # steps done, steps in all


@dataclass(frozen=True)
class Question:
    """A question about a picture, and its right answer where one is known."""

    image: Source
    text: str
    answer: str | None = None


@dataclass(frozen=True)
class Example:
    """A question ready for the network, with the model's own greedy answer.

    `picture` is an index into `Examples.pixels`, `pieces` the prompt, `ids` and `text` the answer, and `label` the
    right answer where one is known.
    """

    picture: int
    pieces: list[Piece]
    ids: tuple[int, ...]
    text: str
    label: str | None


@dataclass(frozen=True)
class Examples:
    """Questions about pictures; the prepared pixels (S, S, 3) of each picture are stored once."""

    pixels: list[Pixels]
    items: list[Example]

    @property
    def tokens(self) -> int:
        """Number of tokens in all answers."""
        return sum(len(item.ids) for item in self.items)

    def fingerprint(self) -> str:
        """A digest of every pixel, every prompt and every answer."""
        digest = hashlib.blake2b(digest_size=16)
        for pixels in self.pixels:
            digest.update(repr(pixels.shape).encode() + pixels.tobytes())
        digest.update(repr([(item.picture, item.pieces, item.ids) for item in self.items]).encode())
        return digest.hexdigest()


def read_questions(folder: Path) -> list[Question]:
    """The questions of a folder; without a questions.jsonl, one that asks to describe each picture.

    Raises ImageError where there is no folder or nothing in it, and PromptError for a line that cannot be used.
    """
    folder = Path(paths.find(folder))
    if not folder.is_dir():
        raise ImageError(
            f"{shown(str(folder))}: no such folder; name one that holds pictures, and perhaps a {QUESTIONS}.",
            path=folder,
        )
    listing = folder / QUESTIONS
    if listing.exists():
        try:
            lines = files.read_text(listing, MAX_QUESTIONS_BYTES).encode().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            raise PromptError(f"{listing}: cannot be read ({reason}); check the file.", path=listing) from error
        questions = [
            _question(folder, line, f"{listing}, line {n}") for n, line in enumerate(lines, start=1) if line.strip()
        ]
    else:
        pictures = sorted(path for path in folder.iterdir() if is_picture(path.name))
        questions = [Question(path, PROMPT) for path in pictures]
    if not questions:
        raise ImageError(f"{folder}: no pictures and no {QUESTIONS} in it; name a folder of pictures.", path=folder)
    return questions


def _question(folder: Path, line: bytes, where: str) -> Question:
    try:
        entry = parse_table(line, where)
    except CheckpointError as error:
        raise PromptError(str(error)) from error
    image, text, answer = entry.get("image"), entry.get("question", PROMPT), entry.get("answer")
    right = isinstance(image, str) and isinstance(text, str) and (answer is None or isinstance(answer, str))
    if not right or Path(str(image)).name != image:
        raise PromptError(
            f"{where}: expected an image (the name of a file in the folder), a question and perhaps an answer, each a "
            "text; mend the line."
        )
    return Question(folder / image, text, answer)


def questions_for(opened: OpenModel, pictures: Path | None) -> list[Question]:
    """The questions to calibrate a model on: those of the folder `pictures`, or the built-in model's own.

    Raises OptionError where `pictures` is None for any other model.
    """
    if pictures is not None:
        return read_questions(pictures)
    if not opened.built_in:
        raise OptionError(
            "Calibration needs pictures like those the model will be shown; name a folder of them (`pictures`)."
        )
    return read_questions(find(BUILT_IN).folder / "calibration")


def answered(engine: Engine, questions: Sequence[Question], progress: Progress | None = None) -> Examples:
    """Have the model answer every question, greedily; raises ImageError and PromptError."""
    indices: dict[int | str, int] = {}
    pixels: list[Pixels] = []
    items = []
    for done, question in enumerate(questions, start=1):
        key = str(question.image) if isinstance(question.image, (str, Path)) else id(question.image)
        if key not in indices:
            indices[key] = len(pixels)
            pixels.append(engine.pixels(question.image))
        index = indices[key]
        pieces = engine.render([Turn(question.text, 1)])
        ids, text = answer(engine, pixels[index], pieces)
        items.append(Example(index, pieces, ids, text, question.answer))
        if progress:
            progress(done, len(questions))
    return Examples(pixels, items)


def answer(engine: Engine, pixels: Pixels, pieces: list[Piece]) -> tuple[tuple[int, ...], str]:
    """Token ids and text of the greedy answer to one prepared question."""
    given = finish(stream(engine, Request([pixels], pieces, 0.0), Options(MAX_ANSWER_TOKENS)))
    return tuple(given.token_ids), given.text.strip()
