"""Answers in several threads: caches are shared, any thread may read a stream on, and a thread may end early."""

import threading
from collections.abc import Callable, Iterator

import numpy as np

from ...decoding.answer import finish
from ...decoding.engine import Engine
from ...decoding.generate import stream
from ...decoding.image_cache import ImageCache
from ...decoding.request import Options, Request
from .finding import Finding, holds
from .setting import Setting

THREAD_SECONDS = 5.0  # seconds that one thread waits for another
ANSWER_SECONDS = 60.0  # seconds for an answer of the built-in model; it takes a fraction of one
OPTIONS = Options(max_tokens=12)
QUESTION = "Describe the image."


class _Watched(ImageCache):
    """A cache that makes the thread that caches the first picture wait until another thread has used it."""

    def __init__(self) -> None:
        super().__init__()
        self.cached, self.used = threading.Event(), threading.Event()

    def put(self, key: bytes, embeddings: object) -> None:
        super().put(key, embeddings)  # type: ignore[arg-type]
        if not self.cached.is_set():
            self.cached.set()
            self.used.wait(THREAD_SECONDS)


def check(setting: Setting) -> Iterator[Finding]:
    """Findings for each way of sharing a model among threads, decided by the answers."""
    engine = setting.subject.engine()
    with setting.subject.here():
        request = engine.prepare(np.full((96, 128, 3), (40, 90, 220), np.uint8), QUESTION)
        right = finish(stream(engine, request, OPTIONS)).text
        for name, way in WAYS.items():
            engine.images.clear()
            answers = way(engine, request)
            found = next((answer for answer in answers if answer != right), right)
            shown = f"{len(answers)} of {len(answers)} answers are right" if found == right else found
            yield holds(name, found == right, shown, "the answer that one thread gets alone")


def outcome(work: Callable[[], str]) -> str:
    """The answer that `work` returns, or its exception as text."""
    try:
        return work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def in_thread(work: Callable[[], str]) -> Callable[[], str]:
    """Start `work` in a new thread; returns a function that waits for its `outcome`."""
    result = [f"no answer after {ANSWER_SECONDS:.0f} s"]

    def run() -> None:
        result[0] = outcome(work)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def answer() -> str:
        thread.join(ANSWER_SECONDS)
        return result[0]

    return answer


def cached_by_one(engine: Engine, request: Request) -> list[str]:
    """Two threads ask about one picture: the second uses its embeddings as soon as the first has cached them."""
    shared = engine.at(engine.config.image.size)
    images = shared.images = _Watched()

    def second() -> str:
        images.cached.wait(THREAD_SECONDS)
        try:
            return finish(stream(shared, request, OPTIONS)).text
        finally:
            images.used.set()

    answers = [in_thread(work) for work in (lambda: finish(stream(shared, request, OPTIONS)).text, second)]
    return [answer() for answer in answers]


def read_in_turns(engine: Engine, request: Request) -> list[str]:
    """One answer, each chunk of which is read by a new thread, as a server's thread pool does."""
    chunks = stream(engine, request, OPTIONS)
    text, ended = "", False

    def read() -> str:
        nonlocal ended
        chunk = next(chunks)
        ended = chunk.answer is not None
        return chunk.text

    for _ in range(OPTIONS.max_tokens + 2):
        before = len(text)
        text += in_thread(read)()
        if ended or ": " in text[before:]:
            break
    return [text]


def left_in_the_middle(engine: Engine, request: Request) -> list[str]:
    """An answer whose thread ends after the first chunk; then the question again, in another thread and in this one."""
    chunks = stream(engine, request, OPTIONS)
    in_thread(lambda: next(chunks).text)()
    chunks.close()

    def again() -> str:
        return finish(stream(engine, request, OPTIONS)).text

    return [in_thread(again)(), outcome(again)]


WAYS = {
    "cached by one thread, used by another": cached_by_one,
    "a stream read by a new thread for each chunk": read_in_turns,
    "a thread that ends in the middle of an answer": left_in_the_middle,
}
