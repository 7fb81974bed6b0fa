"""Conversations: questions and answers that build on each other, about pictures that are encoded once.

What was computed is kept and reused: for a follow-up question only its own tokens are computed. Where a turn is undone
or edited, or the system prompt replaced, what comes after the change is computed again.
"""

from __future__ import annotations

import os
import time
from bisect import bisect
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import product
from typing import Any

from ..decoding import generate
from ..decoding.answer import Answer, Chunk, finish
from ..decoding.claim import Claim
from ..decoding.engine import Engine
from ..decoding.prefix import Prefix
from ..decoding.request import Options, Request, Schema
from ..decoding.stream import Stream
from ..errors import PromptError
from ..inputs.image import Images, Source, as_list
from ..inputs.imagefile import MAX_PIXELS
from ..inputs.prompt import Turn, check_text
from .transcript import Exchange, LeftOut, Picture, Transcript, pictures_in

# A crowded conversation is cut until a quarter of the context is free, so that it is not cut at every question.
FREE_CONTEXT_SHARE = 4


class Chat:
    """A conversation with a model; `VLM.chat()` makes one.

    It belongs to one thread at a time: while an answer is being read in one thread, asking or changing the conversation
    in another raises BusyError.
    """

    def __init__(self, engine: Engine, *, system: str | None = None):
        self._engine = engine
        self._system = system
        self._exchanges: list[Exchange] = []
        self._left_out = LeftOut()
        self._claim = Claim()
        self._prefix = Prefix(self._claim)

    def ask(
        self,
        prompt: str,
        image: Images | Picture | Sequence[Picture] = None,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
        schema: Schema | None = None,
    ) -> Answer:
        """Ask a question with one picture, several or none, and remember the answer.

        Arguments and errors are those of `VLM.generate`. Where the context is full, the oldest questions and answers
        are left out first (see `crowded_out`), and the answer's `left_out` says which.
        """
        return finish(
            self.stream(
                prompt,
                image,
                max_tokens=max_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                top_k=top_k,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                stop=stop,
                logprobs=logprobs,
                schema=schema,
            )
        )

    def stream(
        self,
        prompt: str,
        image: Images | Picture | Sequence[Picture] = None,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
        schema: Schema | None = None,
    ) -> Stream:
        """Ask as `ask` does, and give the answer chunk by chunk; the last chunk has the whole `answer`.

        An answer that is not read to its end is not remembered.
        """
        options = Options(
            max_tokens,
            temperature,
            top_p,
            seed,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            stop=stop,
            logprobs=logprobs,
            schema=schema,
        )
        started = time.perf_counter()
        state = self._claim.state
        pictures = tuple(source if isinstance(source, Picture) else self.look(source) for source in as_list(image))  # type: ignore[arg-type]
        question, cut = Turn(prompt, len(pictures)), self._left_out
        pieces = self._engine.pieces(self._turns(question, cut), self._system)
        if sum(map(len, pieces)) + self._answer_room(options.max_tokens) > self.context:
            cut = self.crowded_out(prompt, len(pictures), max_tokens=options.max_tokens)
            pieces = self._engine.render(self._turns(question, cut), self._system)
        shown = [*self._shown(cut), *pictures]
        request = Request(
            [picture.pixels for picture in shown],
            pieces,
            time.perf_counter() - started,
            [picture.digest for picture in shown],
        )
        return Stream(self._answer(prompt, pictures, request, options, state, cut), request.pixels)

    def _answer(
        self, prompt: str, pictures: tuple[Picture, ...], request: Request, options: Options, state: int, cut: LeftOut
    ) -> Iterator[Chunk]:
        """The chunks of an answer, which becomes part of the conversation with the last one.

        `state` is the state of the conversation that the request was made for, `cut` what was left out of it.
        """
        state = self._claim.begin(state)
        try:
            with closing(generate.stream(self._engine, request, options, self._prefix, state)) as chunks:
                for chunk in chunks:
                    if chunk.answer is not None:
                        ids = chunk.answer.token_ids
                        ended = ids[-1] in self._engine.stop_tokens(options)
                        with self._claim.complete(state):
                            said = tuple(ids[:-1] if ended else ids)  # with the tokens of a stop string, as they were
                            exchange = Exchange(prompt, pictures, chunk.answer.text, said, self._left_out)
                            chunk = replace(chunk, answer=replace(chunk.answer, left_out=cut.beyond(self._left_out)))
                            self._exchanges.append(exchange)
                            self._left_out = cut
                    yield chunk
        finally:
            self._claim.end(state)

    def look(self, source: Source, *, max_pixels: int = MAX_PIXELS) -> Picture:
        """Open a picture now, to be asked about later; raises ImageError.

        A picture of more than `max_pixels` pixels is refused.
        """
        return Picture.open(source, self._engine, max_pixels=max_pixels)

    def undo(self) -> Exchange:
        """Take back the last question and its answer, and return them.

        What was left out of the context for it is part of the context again. Raises PromptError where nothing has been
        asked.
        """
        with self._claim.change():
            if not self._exchanges:
                raise PromptError("There is nothing to undo: the conversation has not begun.")
            last = self._exchanges.pop()
            self._left_out = (last.before or self._left_out).within(self._exchanges)
            return last

    def edit(self, number: int, *, prompt: str | None = None, answer: str | None = None) -> None:
        """Replace the text of a question, its answer, or both.

        `number` counts from 0, or from the end as -1, -2 and so on. What was said after it stays as it is. Raises
        PromptError where there is no such question, or for a text that `ask` would refuse.
        """
        with self._claim.change():
            if not -len(self._exchanges) <= number < len(self._exchanges):
                raise PromptError(
                    f"There is no question {number}: the conversation has {len(self._exchanges)}; count from 0."
                )
            edited = self._exchanges[number]
            if prompt is not None:
                check_text("prompt", prompt)
                edited = replace(edited, prompt=prompt)
            if answer is not None:
                check_text("answer", answer)
                ids = self._engine.tokenizer.encode(answer)
                edited = replace(edited, answer=self._engine.tokenizer.decode(ids), answer_ids=tuple(ids))
            self._exchanges[number] = edited

    def clear(self) -> None:
        """Forget everything said, and free its memory; the system prompt stays."""
        with self._claim.change():
            self._exchanges.clear()
            self._prefix = Prefix(self._claim)
            self._left_out = LeftOut()

    @property
    def system(self) -> str | None:
        """The system prompt, None for the usual one. Setting it raises PromptError as `ask` does."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        """The system prompt; None for the default one.

        Setting it raises PromptError for a text that `ask` would refuse.
        """
        if text is not None:
            check_text("system prompt", text)
        with self._claim.change():
            self._system = text

    @property
    def exchanges(self) -> tuple[Exchange, ...]:
        """Every question so far, with its pictures and its answer."""
        return tuple(self._exchanges)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation as a list of {"role", "content", "images"}.

        An image is the path of its file, or None where it is not from a file.
        """
        out: list[dict[str, Any]] = []
        if self._system is not None:
            out.append({"role": "system", "content": self._system, "images": []})
        for exchange in self.exchanges:
            images = [picture.path for picture in exchange.pictures]
            out.append({"role": "user", "content": exchange.prompt, "images": images})
            out.append({"role": "assistant", "content": exchange.answer, "images": []})
        return out

    @property
    def tokens(self) -> int:
        """Positions of the model's context that the conversation takes so far."""
        carried = 0 if self._exchanges[self._left_out.exchanges :] else len(self._shown(self._left_out))
        return self._length(None, self._left_out) + carried * self._engine.image_tokens

    @property
    def context(self) -> int:
        """Positions of the model's context."""
        return self._engine.context

    @property
    def nbytes(self) -> int:
        """Memory of the conversation's keys and values in bytes; `vlm.images.nbytes` counts the picture embeddings."""
        return self._prefix.nbytes

    @property
    def left_out(self) -> LeftOut:
        """How much of the beginning the model no longer sees; `messages` and a saved transcript still have it."""
        return self._left_out

    def crowded_out(self, prompt: str, images: int = 0, *, max_tokens: int = 256) -> LeftOut:
        """What has to be left out so that a question with `images` pictures, and its answer, fit into the context.

        It is `left_out` where they fit already. The oldest questions and answers go first, while their pictures stay;
        if that is not enough, the oldest pictures go too, all but the last one. System prompt and question always stay:
        raises PromptError where they do not fit by themselves.
        """
        check_text("prompt", prompt)
        question, now = Turn(prompt, images), self._left_out
        answer = self._answer_room(max_tokens)
        if self._length(question, now) + answer <= self.context:
            return now
        spoken, pictures = len(self._exchanges), pictures_in(self._exchanges)
        by_questions = [LeftOut(number, now.pictures) for number in range(now.exchanges, spoken + 1)]
        by_pictures = [
            LeftOut(spoken, number)
            for number in range(now.pictures, max(pictures if images else pictures - 1, now.pictures) + 1)
        ]
        self._engine.render(self._turns(question, by_pictures[-1]), self._system)
        for cuts, room in product((by_questions, by_pictures), (self.context // FREE_CONTEXT_SHARE, answer)):
            first = bisect(cuts, False, key=lambda cut, room=room: self._length(question, cut) + room <= self.context)  # type: ignore[misc]
            if first < len(cuts):
                return cuts[first]
        return by_pictures[-1]

    def leave_out(self, cut: LeftOut) -> None:
        """Leave out of the model's context what `crowded_out` has returned."""
        with self._claim.change():
            self._left_out = cut.within(self._exchanges)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the conversation as JSON, atomically; raises OutputError.

        Pictures from files are stored as their paths, others inside the file.
        """
        Transcript(self._system, self.exchanges, self._left_out).save(path, self._engine)

    def load(self, path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> Chat:
        """Replace this conversation by a saved one, and return it.

        A picture file of more than `max_pixels` pixels is refused. Raises CheckpointError or ImageError, and then this
        conversation stays as it was.
        """
        self.take_up(Transcript.open(path, self._engine, max_pixels=max_pixels))
        return self

    def take_up(self, found: Transcript) -> None:
        """Replace this conversation by a transcript."""
        with self._claim.change():
            self._system, self._exchanges, self._left_out = found.system, list(found.exchanges), found.left_out

    def __repr__(self) -> str:
        return f"Chat({self._engine.name!r}, {len(self._exchanges)} questions)"

    def _shown(self, cut: LeftOut) -> list[Picture]:
        """The pictures that the model sees, in order."""
        return [picture for exchange in self._exchanges for picture in exchange.pictures][cut.pictures :]

    def _turns(self, question: Turn | None, cut: LeftOut) -> list[Turn]:
        """The turns that the model sees.

        Pictures of questions that are left out stand before the first question that is not.
        """
        turns = [exchange.turn for exchange in self._exchanges[cut.exchanges :]]
        turns += [question] if question is not None else []
        carried = pictures_in(self._exchanges[: cut.exchanges]) - cut.pictures
        if turns and carried:
            turns[0] = replace(turns[0], images=turns[0].images + carried)
        return turns

    def _answer_room(self, max_tokens: int) -> int:
        """Positions to keep free for an answer: `max_tokens`, but at most an eighth of the context."""
        return min(max_tokens, self.context // FREE_CONTEXT_SHARE // 2)

    def _length(self, question: Turn | None, cut: LeftOut) -> int:
        """Positions that the conversation takes, with a further question if there is one."""
        return sum(map(len, self._engine.pieces(self._turns(question, cut), self._system)))
