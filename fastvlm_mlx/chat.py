"""Conversations: questions and answers that build on each other, about pictures that are shown once.

What was computed is kept and reused exactly: a follow-up question costs its own tokens only. Whatever changes (a turn undone,
the system prompt replaced), only what comes after the change is computed again.
"""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from .errors import CheckpointError, OutputError, PromptError
from .generate import Answer, Chunk, Options, Request, finish
from .image import Images, Pixels, Source, as_list
from .imagecache import digest
from .prefix import Prefix
from .prompt import Turn

if TYPE_CHECKING:
    from .vlm import VLM

FORMAT = "fastvlm-mlx chat"
VERSION = 1


@dataclass(frozen=True)
class Picture:
    """A picture shown in a conversation: its prepared pixels, and the path it came from, if it came from a file."""

    pixels: Pixels
    path: str | None

    def to_dict(self) -> dict[str, str]:
        """As a transcript refers to it: by path and content; one without a path is written out, as PNG."""
        content = digest(self.pixels).hex()
        if self.path is not None:
            return {"path": self.path, "digest": content}
        png = BytesIO()
        Image.fromarray(self.pixels).save(png, "PNG")
        return {"png": base64.b64encode(png.getvalue()).decode(), "digest": content}


@dataclass(frozen=True)
class Exchange:
    """A question with its pictures, and the answer as text and as the ids that were generated (without a stop token)."""

    prompt: str
    pictures: tuple[Picture, ...]
    answer: str
    answer_ids: tuple[int, ...]

    @property
    def turn(self) -> Turn:
        """As the prompt is rendered from."""
        return Turn(self.prompt, len(self.pictures), self.answer_ids)


class Chat:
    """A conversation with a model; see `VLM.chat`."""

    def __init__(self, vlm: VLM, *, system: str | None = None):
        self.system = system
        self._vlm = vlm
        self._exchanges: list[Exchange] = []
        self._prefix = Prefix(vlm.model.text.make_cache())

    def ask(
        self,
        prompt: str,
        image: Images = None,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Answer:
        """Ask, showing a picture, several or none; the answer is remembered. Options and errors as for `VLM.generate`."""
        return finish(self.stream(prompt, image, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed))

    def stream(
        self,
        prompt: str,
        image: Images = None,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[Chunk]:
        """The same, chunk by chunk. An answer that is not read to its end is not remembered, and costs nothing later."""
        options = Options(max_tokens, temperature, top_p, seed)
        started = time.perf_counter()
        pictures = tuple(Picture(self._vlm.pixels(source), _path(source)) for source in as_list(image))
        turns = [exchange.turn for exchange in self._exchanges]
        pieces = self._vlm.render([*turns, Turn(prompt, len(pictures))], self.system)
        shown = [picture.pixels for exchange in self._exchanges for picture in exchange.pictures]
        request = Request([*shown, *(picture.pixels for picture in pictures)], pieces, time.perf_counter() - started)
        return self._answer(prompt, pictures, request, options)

    def _answer(self, prompt: str, pictures: tuple[Picture, ...], request: Request, options: Options) -> Iterator[Chunk]:
        for chunk in self._vlm.answer(request, options, self._prefix):
            if chunk.answer is not None:
                ids = chunk.answer.token_ids
                ended = chunk.answer.finish_reason == "stop"
                self._exchanges.append(Exchange(prompt, pictures, chunk.answer.text, tuple(ids[:-1] if ended else ids)))
            yield chunk

    def undo(self) -> Exchange:
        """Take back the last question and its answer, and return them; raises PromptError where there is none."""
        if not self._exchanges:
            raise PromptError("There is nothing to undo: the conversation has not begun.")
        return self._exchanges.pop()

    def clear(self) -> None:
        """Begin anew, with the same system prompt."""
        self._exchanges.clear()

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation as {"role", "content", "images"}, images as paths, or None for those not from a file."""
        out: list[dict[str, Any]] = []
        if self.system is not None:
            out.append({"role": "system", "content": self.system, "images": []})
        for exchange in self._exchanges:
            images = [picture.path for picture in exchange.pictures]
            out.append({"role": "user", "content": exchange.prompt, "images": images})
            out.append({"role": "assistant", "content": exchange.answer, "images": []})
        return out

    @property
    def nbytes(self) -> int:
        """Memory of everything said, in bytes, without the picture embeddings (`vlm.images.nbytes`)."""
        return self._prefix.nbytes

    def __repr__(self) -> str:
        return f"Chat({self._vlm.name!r}, {len(self._exchanges)} questions)"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the transcript as JSON, pictures from files by their path and others inside; raises OutputError."""
        exchanges = [
            {
                "prompt": exchange.prompt,
                "images": [picture.to_dict() for picture in exchange.pictures],
                "answer": exchange.answer,
                "answer_ids": list(exchange.answer_ids),
            }
            for exchange in self._exchanges
        ]
        data = {
            "format": FORMAT,
            "version": VERSION,
            "model": self._vlm.name,
            "resolution": self._vlm.config.image.size,
            "system": self.system,
            "exchanges": exchanges,
        }
        target = Path(path).expanduser()
        partial = target.with_name(target.name + ".partial")
        try:
            partial.write_text(json.dumps(data, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
            partial.replace(target)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise OutputError(f"{target} cannot be written ({error.strerror}); choose another place.") from error

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take up a saved conversation in place of this one; raises CheckpointError, and changes nothing, where it cannot."""
        source = Path(path).expanduser()
        try:
            data = json.loads(source.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise CheckpointError(f"{source}: no such transcript; check the path.") from error
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{source}: not a transcript that can be read ({error}).") from error
        try:
            if data["format"] != FORMAT or data["version"] != VERSION:
                raise CheckpointError(f"{source}: not a transcript of this version of fastvlm-mlx.")
            if data["resolution"] != self._vlm.config.image.size:
                raise CheckpointError(
                    f"{source}: its pictures were shown at {data['resolution']} pixels, this model shows them at "
                    f"{self._vlm.config.image.size}; load the model with resolution={data['resolution']}."
                )
            system = data["system"]
            exchanges = [self._restored(source, entry) for entry in data["exchanges"]]
            if not (system is None or isinstance(system, str)):
                raise TypeError("system")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{source}: the transcript is damaged ({error}).") from error
        self.system, self._exchanges = system, exchanges

    def _restored(self, source: Path, entry: dict[str, Any]) -> Exchange:
        ids = tuple(entry["answer_ids"])
        vocabulary = self._vlm.config.text.vocab_size
        if not all(isinstance(token, int) and 0 <= token < vocabulary for token in ids):
            raise CheckpointError(f"{source}: an answer has token ids this model does not know; it belongs to another model.")
        pictures = tuple(self._restored_picture(source, image) for image in entry["images"])
        prompt, answer = entry["prompt"], entry["answer"]
        if not isinstance(prompt, str) or not isinstance(answer, str):
            raise TypeError("prompt")
        return Exchange(prompt, pictures, answer, ids)

    def _restored_picture(self, source: Path, entry: dict[str, str]) -> Picture:
        path = entry.get("path")
        pixels = self._vlm.pixels(path if path is not None else base64.b64decode(entry["png"]))
        if digest(pixels).hex() != entry["digest"]:
            raise CheckpointError(f"{source}: {path or 'a picture'} is no longer the picture that was shown; put it back.")
        return Picture(pixels, path)


def _path(source: Source) -> str | None:
    return str(Path(os.fspath(source)).absolute()) if isinstance(source, (str, os.PathLike)) else None
