"""Rows in, answers out, both as they come: what is asked is read a window ahead, and answers are given in order.

Enters: an iterable of rows, of any length, or without end. Leaves: an iterator of answers; memory does not grow with
their number.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Generic, Self

import mlx.core as mx

from ..backend.residency import wired
from ..config import is_whole
from ..errors import DeviceError, FastVLMError, ImageError, OptionError, PromptError, shown
from ..inputs.image import Images
from .answer import Answer
from .batch import BATCH_POOL_BYTES
from .engine import Engine
from .finished import Finished, Key
from .request import Options, Request
from .row import Row
from .rows import MAX_BATCH_ROWS, Rows
from .window import WINDOW, Window

IMAGE_KEYS = ("image", "images")
PROMPT_KEYS = ("prompt", "question")


def map_rows(
    engine: Engine,
    rows: Iterable[object],
    prompt: str,
    options: Options,
    *,
    system: str | None = None,
    on_error: str = "return",
    window: int | None = None,
) -> Iterator[Answer | FastVLMError]:
    """The answers to rows, in order, as they are taken; see `VLM.map`. Raises OptionError and PromptError at once."""
    if on_error not in ("raise", "return"):
        raise OptionError(f"`on_error` is {shown(on_error)}, expected 'raise' or 'return'.")
    if window is not None and not (is_whole(window) and window >= 1):
        raise OptionError(f"`window` is {shown(window)}, expected a whole number of rows of at least 1.")
    if not isinstance(rows, Iterable) or isinstance(rows, (str, bytes, Mapping)):
        raise PromptError(f"The rows are {shown(rows)}, expected a list or another iterable of rows.")
    answers = _answers(engine, rows, prompt, options, system, WINDOW if window is None else int(window))
    return _checked(answers, raising=on_error == "raise")


def _checked(answers: Iterator[Answer | Exception], *, raising: bool) -> Iterator[Answer | FastVLMError]:
    """The answers, and errors in their place where these are about a row; others are raised."""
    for answer in answers:
        if not isinstance(answer, (Answer, FastVLMError)) or (raising and isinstance(answer, FastVLMError)):
            raise answer
        yield answer


def _answers(
    engine: Engine, rows: Iterable[object], prompt: str, options: Options, system: str | None, window: int
) -> Iterator[Answer | Exception]:
    """The answer to each row, or what went wrong with it, in the order of the rows."""
    prepare = engine.preparer(system=system)
    found: dict[int, Answer | Exception] = {}
    given = 0
    coming = Window(enumerate(rows), lambda item: prepare(item[0] + 1, question(item[1], prompt)), window)
    with coming, Together[int](engine) as together:
        while together.busy or not coming.exhausted:
            while together.room and (each := coming.take(wait=not together.busy)) is not None:
                (index, _), request = each
                if isinstance(request, Exception):
                    found[index] = request
                    break  # it may be its turn
                together.add(index, request, options)
            found.update(together.turn())
            while given in found:
                yield found.pop(given)
                given += 1


def question(row: object, prompt: str) -> tuple[Images, str]:
    """A row as its picture and its question, by default `prompt`; raises PromptError.

    A row is a pair (image, prompt), a dict with "image" or "images", and perhaps "prompt" or "question", or anything
    else: a picture.
    """
    if isinstance(row, (list, tuple)):
        if len(row) != 2:
            raise PromptError(
                f"The row is {shown(row)}, expected a picture, a pair (image, prompt), or a dict with 'image'."
            )
        return row[0], row[1]
    if isinstance(row, Mapping) and (key := next((key for key in IMAGE_KEYS if key in row), None)) is not None:
        asked = next((row[name] for name in PROMPT_KEYS if row.get(name) is not None), prompt)
        return _there(row[key]), asked
    return _there(row), prompt


def _there(image: object) -> Images:
    """A row's picture; raises ImageError where the row has none, rather than ask about nothing."""
    if image is None:
        raise ImageError("The row has no image; expected a path, bytes, a PIL image or an array in it.")
    return image  # type: ignore[return-value]  # whatever it is, the loader of pictures says what is wrong


class Together(Generic[Key]):
    """Answers under way together, each known by a key, with options of its own; whoever calls takes the turns.

    A context manager, at whose end what is under way is given up.
    """

    def __init__(self, engine: Engine, max_rows: int = MAX_BATCH_ROWS):
        self._engine, self._held = engine, ExitStack()
        self._rows = Rows(engine, max_rows=max_rows, pool_bytes=BATCH_POOL_BYTES, fill=True)
        self._finished = Finished[Key]()

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return self._rows.busy

    @property
    def room(self) -> int:
        """How many more can be under way."""
        return max(0, self._rows.max_rows - self._rows.under_way - len(self._rows.waiting))

    def add(self, key: Key, request: Request, options: Options) -> None:
        """Let a request join at the next turn; what is wrong with its options is its answer."""
        try:
            self._rows.add(Row(self._engine, request, options, self._finished.of(key)))
        except FastVLMError as error:
            self._finished.add(key, error)

    def turn(self) -> list[tuple[Key, Answer | Exception]]:
        """Take the newcomers in and go one token on with all; returns what has been finished. Raises DeviceError."""
        if self._rows.busy:
            self._rows.turn()
        found = self._finished.take()
        for _, answer in found:
            if isinstance(answer, DeviceError) or not isinstance(answer, (Answer, FastVLMError)):
                raise answer
        return found

    def __enter__(self) -> Self:
        self._held.enter_context(wired(self._engine.model.backend))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._rows.close(FastVLMError("The questions were not answered to the end."))
        mx.clear_cache()
        self._held.__exit__(kind, error, traceback)
