"""What was said in a conversation, and the JSON file it is saved in.

Pictures from files are referred to by path and digest, others are stored inside as PNG. Answers are stored as the token
ids that were generated beside their text, because tokenising the text again gives other ids about one time in three.
"""

import base64
import json
import os
import secrets
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from ..decoding.engine import Engine
from ..decoding.image_cache import digest
from ..errors import CheckpointError, OutputError, PromptError, shown
from ..files import paths
from ..files import regular as files
from ..inputs.image import Pixels, Source
from ..inputs.imagefile import MAX_PIXELS
from ..inputs.pieces import outside
from ..inputs.prompt import Turn, check_text

FORMAT = "fastvlm-mlx chat"
VERSION = 1
AFTER_ANSWER = "after_answer"  # what the ids of an answer spell beyond its text: the stop string that ended it
MAX_TRANSCRIPT_BYTES = 1_000_000_000  # of a transcript; a picture inside takes up to 4 MB


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture of a conversation: its prepared pixels (S, S, 3), and the path of the file it came from, if any."""

    pixels: Pixels
    path: str | None = None

    @classmethod
    def open(cls, source: Source, engine: Engine, *, max_pixels: int = MAX_PIXELS) -> "Picture":
        """Prepare a picture for a model; raises ImageError."""
        path = str(Path(paths.find(source)).absolute()) if isinstance(source, (str, os.PathLike)) else None
        return cls(engine.pixels(source, max_pixels=max_pixels), path)

    @cached_property
    def digest(self) -> bytes:
        """A digest of the pixels, the same for the same picture under another path."""
        return digest(self.pixels)

    def to_dict(self) -> dict[str, str]:
        """The picture's entry in a transcript: its path, or its pixels as PNG in base64, and its digest."""
        if self.path is not None:
            return {"path": self.path, "digest": self.digest.hex()}
        png = BytesIO()
        Image.fromarray(self.pixels).save(png, "PNG")
        return {"png": base64.b64encode(png.getvalue()).decode(), "digest": self.digest.hex()}


@dataclass(frozen=True)
class Exchange:
    """A question with its pictures, and its answer as text and as the token ids that were generated.

    The ids are without a stop token, but with those of a stop string, which the text is without. `before` is what the
    model no longer saw when the question was asked.
    """

    prompt: str
    pictures: tuple[Picture, ...]
    answer: str
    answer_ids: tuple[int, ...]
    before: "LeftOut | None" = field(default=None, compare=False, repr=False)  # what was left out until it was asked

    @property
    def turn(self) -> Turn:
        """The question, the number of its pictures and the answer's ids, as `prompt.render` takes them."""
        return Turn(self.prompt, len(self.pictures), self.answer_ids)


@dataclass(frozen=True)
class LeftOut:
    """How much of a conversation's beginning the model no longer sees: questions with their answers, and pictures.

    `pictures` counts from the first picture of the conversation.
    """

    exchanges: int = 0
    pictures: int = 0  # the first ones of the conversation

    def within(self, exchanges: Sequence[Exchange]) -> "LeftOut":
        """The part of this that exists in a conversation of these exchanges."""
        return LeftOut(
            min(self.exchanges, len(exchanges)), min(self.pictures, pictures_in(exchanges[: self.exchanges]))
        )

    def beyond(self, before: "LeftOut") -> str:
        """What this leaves out that `before` did not, as a phrase: "the oldest picture", or "" for nothing."""
        questions, pictures = self.exchanges - before.exchanges, self.pictures - before.pictures
        parts = []
        if questions > 0:
            some = f"{questions} questions with their answers" if questions > 1 else "question with its answer"
            parts.append(f"the oldest {some}")
        if pictures > 0:
            parts.append("the oldest picture" if pictures == 1 else f"the oldest {pictures} pictures")
        return " and ".join(parts)


def pictures_in(exchanges: Sequence[Exchange]) -> int:
    """The number of pictures in these exchanges."""
    return sum(len(exchange.pictures) for exchange in exchanges)


@dataclass(frozen=True)
class Transcript:
    """A whole conversation: system prompt, exchanges, and what the model no longer sees of them."""

    system: str | None
    exchanges: Sequence[Exchange]
    left_out: LeftOut

    def save(self, path: str | os.PathLike[str], engine: Engine) -> None:
        """Write the transcript as JSON, atomically; raises OutputError."""
        exchanges = [_described(exchange, engine) for exchange in self.exchanges]
        data = {
            "format": FORMAT,
            "version": VERSION,
            "model": engine.name,
            "resolution": engine.config.image.size,
            "system": self.system,
            "left_out": [self.left_out.exchanges, self.left_out.pictures],
            "exchanges": exchanges,
        }
        target = Path(paths.local(path))
        unfinished: Path | None = None
        try:
            target = Path(os.path.realpath(target))  # a link stays one
            unfinished = target.parent / f".{target.name[:100]}.{secrets.token_hex(8)}.partial"
            unfinished.write_bytes(_encoded(data))
            if target.exists():
                shutil.copymode(target, unfinished)
            unfinished.replace(target)
        except (OSError, ValueError) as error:  # ValueError for a NUL in the path
            reason = error.strerror if isinstance(error, OSError) else error
            raise OutputError(f"{target} cannot be written ({reason}); choose another place.", path=target) from error
        finally:
            if unfinished is not None:
                with suppress(OSError):
                    unfinished.unlink(missing_ok=True)

    @classmethod
    def open(cls, path: str | os.PathLike[str], engine: Engine, *, max_pixels: int = MAX_PIXELS) -> "Transcript":
        """Read a transcript and its pictures for a model; raises CheckpointError and ImageError.

        A picture file of more than `max_pixels` pixels is refused.
        """
        source = Path(paths.find(path))
        data = _read(source)
        if data.get("format") != FORMAT or data.get("version") != VERSION:
            raise CheckpointError(
                f"{source}: not a transcript of this version of fastvlm-mlx; check the path.", path=source
            )
        size = _entry(source, data, "resolution", int)
        if size != engine.config.image.size:
            raise CheckpointError(
                f"{source}: its pictures were shown at {size} pixels, this model shows them at "
                f"{engine.config.image.size}; load the model with `resolution={size}`.",
                path=source,
            )
        system = None if data.get("system", "") is None else _text(source, data, "system")
        exchanges = [_exchange(source, entry, engine, max_pixels) for entry in _entry(source, data, "exchanges", list)]
        gone = data.get("left_out", [0, 0])
        whole = (
            isinstance(gone, list) and len(gone) == 2 and all(type(number) is int and number >= 0 for number in gone)
        )
        if not whole or LeftOut(*gone) != LeftOut(*gone).within(exchanges):
            raise _damaged(source, f"left_out is {shown(gone)}")
        return cls(system, exchanges, LeftOut(*gone))


def _encoded(data: dict[str, Any]) -> bytes:
    """JSON in UTF-8; where a file name is not UTF-8, JSON in ASCII with everything else escaped."""
    try:
        return f"{json.dumps(data, ensure_ascii=False, indent=2)}\n".encode()
    except UnicodeEncodeError:
        return f"{json.dumps(data, indent=2)}\n".encode()


def _read(source: Path) -> dict[str, Any]:
    try:
        data = json.loads(files.read_text(source, MAX_TRANSCRIPT_BYTES))
    except FileNotFoundError as error:
        raise CheckpointError(f"{source}: no such transcript; check the path.", path=source) from error
    except OSError as error:
        raise CheckpointError(
            f"{source}: cannot be read ({error.strerror}); check the path and its permissions.",
            path=source,
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{source}: not a transcript that can be read ({str(error)[:200]}); check the path.",
            path=source,
        ) from error
    return data if isinstance(data, dict) else {}


def _described(exchange: Exchange, engine: Engine) -> dict[str, object]:
    """An exchange as JSON takes it."""
    described: dict[str, object] = {
        "prompt": exchange.prompt,
        "images": [picture.to_dict() for picture in exchange.pictures],
        "answer": exchange.answer,
        "answer_ids": list(exchange.answer_ids),
    }
    if rest := engine.tokenizer.decode(exchange.answer_ids)[len(exchange.answer) :]:
        described[AFTER_ANSWER] = rest
    return described


def _exchange(source: Path, entry: object, engine: Engine, max_pixels: int) -> Exchange:
    if not isinstance(entry, dict):
        raise _damaged(source, f"an exchange is {shown(entry)}")
    prompt, answer = _text(source, entry, "prompt"), _entry(source, entry, "answer", str)
    ids = _entry(source, entry, "answer_ids", list)
    spelled = answer + (_entry(source, entry, AFTER_ANSWER, str) if AFTER_ANSWER in entry else "")
    if outside(ids, engine.config.text.vocab_size) or engine.tokenizer.decode(ids) != spelled:
        raise CheckpointError(
            f"{source}: the token ids of the answer {shown(answer[:40])} do not spell it for this model; it belongs "
            "to another model, or the file was changed.",
            path=source,
        )
    pictures = tuple(_picture(source, image, engine, max_pixels) for image in _entry(source, entry, "images", list))
    return Exchange(prompt, pictures, answer, tuple(ids))


def _picture(source: Path, entry: object, engine: Engine, max_pixels: int) -> Picture:
    if not isinstance(entry, dict):
        raise _damaged(source, f"a picture is {shown(entry)}")
    path = _entry(source, entry, "path", str) if "path" in entry else None
    if path is not None:
        pixels = engine.pixels(path, max_pixels=max_pixels)
    else:
        try:
            png = base64.b64decode(_entry(source, entry, "png", str), validate=True)
        except ValueError as error:
            raise _damaged(source, f"a picture in it is {error}") from error
        pixels = engine.pixels(png)  # as large as the model takes, whatever files may be
    picture = Picture(pixels, path)
    if picture.digest.hex() != _entry(source, entry, "digest", str):
        raise CheckpointError(
            f"{source}: {path or 'a picture'} is no longer the picture that was shown; put it back.", path=source
        )
    return picture


def _text(source: Path, table: dict[str, Any], name: str) -> str:
    text: str = _entry(source, table, name, str)
    try:
        check_text(name, text)
    except PromptError as error:
        raise _damaged(source, str(error).rstrip(".")) from error
    return text


def _entry(source: Path, table: dict[str, Any], name: str, expected: type) -> Any:
    if name not in table:
        raise _damaged(source, f"{name} is missing")
    if type(table[name]) is not expected:
        raise _damaged(source, f"{name} is {shown(table[name])}")
    return table[name]


def _damaged(source: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{source}: the transcript is damaged ({what}); restore it from a copy.", path=source)
