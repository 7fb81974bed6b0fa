"""The work on a listing: what is wanted is decoded ahead, answered together, judged, and written down one by one."""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

from ..decoding.answer import Answer
from ..decoding.engine import Engine
from ..decoding.mapping import Together
from ..decoding.request import Options, Request
from ..decoding.window import WINDOW, Window
from ..errors import DeviceError, FastVLMError, ImageError, OutputError, shown
from ..inputs.imagefile import MAX_PIXELS
from . import captions
from .captions import Rules
from .lines import Line
from .listing import Item
from .output import digest, modified

IMAGE_CACHE_BYTES = 32_000_000  # of embeddings: questions about one picture follow each other


@dataclass(frozen=True)
class Work:
    """How items are asked and what is made of their answers; `recipe` stands for all of it, with the model.

    `window` items are decoded ahead.
    """

    options: Options
    rules: Rules
    recipe: str
    system: str | None = None
    adapter: str | None = None
    window: int = WINDOW
    max_pixels: int = MAX_PIXELS


@dataclass
class Tally:
    """What a run has done so far. `answered` and `failed` count items; `again` and `cut` answers; `seconds` is since
    the first was asked.
    """

    answered: int = 0
    failed: int = 0
    again: int = 0
    cut: int = 0
    seconds: float = 0.0

    @property
    def per_minute(self) -> float:
        """Items a minute."""
        return 60 * (self.answered + self.failed) / self.seconds if self.seconds > 0 else 0.0


@dataclass
class _Prepared:
    """An item with its questions made ready."""

    requests: list[Request]
    digest: str | list[str]
    modified: int


@dataclass
class _UnderWay:
    """An item whose questions are being answered: a line for each that is finished. Of one that has `failed`, answers
    still come and count no more.
    """

    item: Item
    prepared: _Prepared
    lines: dict[int, Line] = field(default_factory=dict)
    failed: bool = False


@dataclass(frozen=True)
class _Asked:
    """One question of an item under way, and what it was asked again for."""

    under_way: _UnderWay
    question: int
    options: Options
    began: float
    reasons: tuple[str, ...] = ()

    def __hash__(self) -> int:
        return id(self)


class Sink(Protocol):
    """Where answers go: an `Output`, or stdout."""

    @property
    def settled(self) -> int:
        """How many items needed nothing."""

    def wants(self, item: Item) -> bool:
        """Whether an item is still to be answered; those that are not are counted in `settled`."""

    def write(self, item: Item, lines: list[Line]) -> None:
        """Take an item's lines."""


def run(
    engine: Engine, items: Iterable[Item], output: Sink, work: Work, load_weights: Callable[[], None]
) -> Iterator[Tally]:
    """Answer what `output` wants of `items`, and write it there; gives the tally once for every item that is settled.

    `load_weights` is called where there is anything to answer. What is wrong with an item is written in the place of
    its answer. Raises DeviceError, and OutputError where nothing more can be written.
    """
    return _Run(engine, output, work).over(items, load_weights)


class _Run:
    def __init__(self, engine: Engine, output: Sink, work: Work):
        self._engine, self._output, self._work = engine, output, work
        engine.images.capacity = min(engine.images.capacity, IMAGE_CACHE_BYTES)
        self._prepare_question = engine.preparer(system=work.system, max_pixels=work.max_pixels)
        self._tally, self._told = Tally(), 0

    def over(self, items: Iterable[Item], load_weights: Callable[[], None]) -> Iterator[Tally]:
        with Window(self._wanted(items), self._prepare, self._work.window) as coming:
            if not coming.exhausted:
                load_weights()  # while the first pictures are being decoded
                self._began = time.monotonic()
                yield from self._answer(coming)
            yield from self._settled()

    def _answer(self, coming: Window[Item, _Prepared]) -> Iterator[Tally]:
        with Together[_Asked](self._engine) as together:
            while together.busy or not coming.exhausted:
                while together.room and (each := coming.take(wait=not together.busy)) is not None:
                    item, prepared = each
                    if isinstance(prepared, Exception):
                        self._fail(item, prepared)
                        continue
                    under_way = _UnderWay(item, prepared)
                    for question, request in enumerate(prepared.requests):
                        asked = _Asked(under_way, question, self._work.options, time.monotonic())
                        together.add(asked, request, asked.options)
                for asked, answer in together.turn():
                    self._take(together, asked, answer)
                self._tally.seconds = time.monotonic() - self._began
                yield from self._settled()

    def _settled(self) -> Iterator[Tally]:
        """The tally, once for every item that has been settled since."""
        while self._told < self._output.settled + self._tally.answered + self._tally.failed:
            self._told += 1
            yield self._tally

    def _wanted(self, items: Iterable[Item]) -> Iterator[Item]:
        for item in items:
            try:
                if self._output.wants(item):
                    yield item
            except ImageError as error:
                self._fail(item, error)

    def _prepare(self, item: Item) -> _Prepared:
        """An item's pictures and questions made ready, in a thread of the window."""
        requests = [
            self._prepare_question(number, (list(item.images), prompt))
            for number, prompt in enumerate(item.prompts, start=1)
        ]
        return _Prepared(requests, digest(item), modified(item))

    def _take(self, together: Together[_Asked], asked: _Asked, answer: Answer | Exception) -> None:
        under_way, item = asked.under_way, asked.under_way.item
        if under_way.failed:
            return
        if isinstance(answer, Exception):
            self._give_up(under_way, answer)
            return
        text = answer.text
        other = self._other_options(asked, answer)
        if other is not None:
            reason, options = other
            self._tally.again += 1
            again = replace(asked, options=options, reasons=(*asked.reasons, reason))
            together.add(again, under_way.prepared.requests[asked.question], options)
            return
        rules, schema = self._work.rules, self._work.options.schema
        if phrase := rules.breach(text):
            self._give_up(under_way, FastVLMError(f"The answer holds {shown(phrase)}, which is forbidden, again."))
            return
        if schema is not None and answer.finish_reason == "length":
            tokens = self._work.options.max_tokens
            self._give_up(
                under_way, FastVLMError(f"The JSON is not complete after {tokens} tokens; give a larger `max_tokens`.")
            )
            return
        self._tally.cut += answer.finish_reason == "length"
        under_way.lines[asked.question] = self._line(asked, answer)
        if len(under_way.lines) == len(item.prompts):
            self._write(item, [under_way.lines[question] for question in range(len(item.prompts))])
            self._tally.answered += 1

    def _other_options(self, asked: _Asked, answer: Answer) -> tuple[str, Options] | None:
        """Why and how to ask a question again, each reason once; None where its answer counts."""
        rules, name = self._work.rules, asked.under_way.item.name
        if "forbidden" not in asked.reasons and rules.breach(answer.text):
            return "forbidden", captions.other_words(asked.options, name)
        looked_at = rules.repeats and self._work.options.schema is None
        if looked_at and "repeats" not in asked.reasons and captions.repeated(answer.text):
            return "repeats", captions.without_repeats(asked.options)
        return None

    def _line(self, asked: _Asked, answer: Answer) -> Line:
        item, work, prepared = asked.under_way.item, self._work, asked.under_way.prepared
        schema = work.options.schema is not None
        again = asked.reasons  # without "repeats", the answer has been looked through and does not
        doubt = ["repeats"] if "repeats" in again and captions.repeated(answer.text) else []
        line: Line = {
            "image": _images(item),
            "digest": prepared.digest,
            "prompt": item.prompts[asked.question],
            "text": answer.text.strip() if schema else work.rules.caption(answer.text),
        }
        if schema and isinstance(record := json.loads(answer.text), dict):
            line["record"] = record
        line |= {
            "finish_reason": answer.finish_reason,
            "model": self._engine.name,
            "adapter": work.adapter,
            "seconds": round(time.monotonic() - asked.began, 3),
            "name": item.name,
        }
        line |= {"question": asked.question} if len(item.prompts) > 1 else {}
        line |= {"recipe": work.recipe, "modified": prepared.modified}
        line |= {"again": list(again)} if again else {}
        return line | ({"doubt": doubt} if doubt else {})

    def _give_up(self, under_way: _UnderWay, error: Exception) -> None:
        """Write an item's error, whatever else comes of its questions."""
        under_way.failed = True
        self._fail(under_way.item, error)

    def _fail(self, item: Item, error: Exception) -> None:
        if isinstance(error, DeviceError):
            raise error
        reason = str(error) if isinstance(error, FastVLMError) else f"{type(error).__name__}: {error}"
        line: Line = {"image": _images(item), "error": reason, "name": item.name}
        self._write(item, [line])
        self._tally.failed += 1

    def _write(self, item: Item, lines: list[Line]) -> None:
        try:
            self._output.write(item, lines)
        except OutputError as error:
            done = self._tally.answered
            raise OutputError(f"{error} This run has written {done} before.", path=error.path) from error


def _images(item: Item) -> str | list[str]:
    return item.images[0] if len(item.images) == 1 else list(item.images)
