"""Many questions, each answered as if alone, in less time than one by one and in memory that does not grow with their
number.

Enters: requests, prepared as they are needed. Leaves: answers, in order or as they are finished. `rows` says how they
go on together; here the calling thread takes the turns.
"""

from collections.abc import Generator, Iterable

import mlx.core as mx

from .. import progress
from ..backend.residency import wired
from ..errors import DeviceError, FastVLMError
from .answer import Answer, Answers
from .engine import Engine
from .finished import Finished
from .request import Options, Request
from .row import Row
from .rows import MAX_BATCH_ROWS, Rows

MAX_PREPARED = 2 * MAX_BATCH_ROWS  # requests that wait with their pixels, 3 MB each at 1024 pixels
BATCH_POOL_BYTES = 64_000_000  # of answers that are over; most of what questions share is in rows under way


def answer_in_order(
    engine: Engine, requests: Iterable[Request | FastVLMError], options: Options, count: int | None = None
) -> Answers[Answer]:
    """The answers to requests in the order of these, with a progress bar of `count` steps where it takes long.

    The first error ends everything, one that stands in the place of a request before anything is computed if it is
    among the first MAX_PREPARED.
    """
    found: dict[int, Answer] = {}
    with progress.bar("Answering", count) as track:
        for index, answer in track(answer_all(engine, requests, options)):
            if not isinstance(answer, Answer):
                raise answer
            found[index] = answer
    return Answers(found[index] for index in range(len(found)))


def answer_or_return(
    engine: Engine, requests: Iterable[Request | FastVLMError], options: Options, count: int | None = None
) -> Answers[Answer | FastVLMError]:
    """`answer_in_order` where the error of a question stands in the place of its answer; but those of the device are
    raised.
    """
    found: dict[int, Answer | FastVLMError] = {}
    with progress.bar("Answering", count) as track:
        for index, answer in track(answer_all(engine, requests, options)):
            if isinstance(answer, DeviceError) or not isinstance(answer, (Answer, FastVLMError)):
                raise answer
            found[index] = answer
    return Answers(found[index] for index in range(len(found)))


def answer_all(
    engine: Engine, requests: Iterable[Request | FastVLMError], options: Options, *, max_rows: int | None = None
) -> Generator[tuple[int, Answer | Exception], None, None]:
    """Answer requests MAX_BATCH_ROWS at a time; each answer comes with its request's index, as soon as it is finished.

    Requests are asked for as others are answered, so that no more than MAX_PREPARED wait. An error in the place of a
    request is handed on, and what goes wrong with one is given in the place of its answer; the others are answered.
    """
    rows = Rows(engine, max_rows=max_rows or MAX_BATCH_ROWS, pool_bytes=BATCH_POOL_BYTES, fill=True)
    coming, finished = enumerate(requests), Finished[int]()
    try:
        with wired(engine.model.backend):
            while True:
                while len(rows.waiting) < MAX_PREPARED and (each := next(coming, None)) is not None:
                    index, request = each
                    if isinstance(request, Request):
                        rows.add(Row(engine, request, options, finished.of(index)))
                    else:
                        yield index, request
                if not rows.busy:
                    break
                rows.turn()
                yield from finished.take()
    finally:
        rows.close(FastVLMError("The questions were not answered to the end."))
        mx.clear_cache()
