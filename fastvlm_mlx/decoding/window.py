"""Questions prepared ahead in threads, while the model works: a window of them, in their order.

Enters: items, read one by one in the thread of whoever takes; a function that prepares one. Leaves: what it gives.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

Item = TypeVar("Item")
Prepared = TypeVar("Prepared")

WINDOW = 32  # questions that are prepared or being prepared, 3 MB each for a picture at 1024 pixels
MAX_THREADS = 8  # that decode pictures; Pillow and NumPy compute outside Python's lock


class Window(Generic[Item, Prepared]):
    """Up to `size` items that are being prepared or are prepared, and not taken yet; a context manager.

    `exhausted` says whether the last item has been read and taken.
    """

    def __init__(self, items: Iterable[Item], prepare: Callable[[Item], Prepared], size: int = WINDOW):
        self._items, self._prepare, self._size = iter(items), prepare, size
        self._threads = ThreadPoolExecutor(
            min(size, MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="fastvlm-window"
        )
        self._coming: deque[tuple[Item, Future[Prepared]]] = deque()
        self._ended = False

    @property
    def exhausted(self) -> bool:
        """Whether nothing more will come."""
        self._fill()
        return self._ended and not self._coming

    def take(self, *, wait: bool) -> tuple[Item, Prepared | Exception] | None:
        """The next item, and what was made of it or what was raised over it.

        None where there is none left, and without `wait` also where it is not ready yet.
        """
        self._fill()
        if not self._coming or not (wait or self._coming[0][1].done()):
            return None
        item, future = self._coming.popleft()
        error = future.exception()
        self._fill()
        if error is None:
            return item, future.result()
        if not isinstance(error, Exception):
            raise error
        return item, error

    def _fill(self) -> None:
        while not self._ended and len(self._coming) < self._size:
            try:
                item = next(self._items)
            except StopIteration:
                self._ended = True
                return
            self._coming.append((item, self._threads.submit(self._prepare, item)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give up what has not begun; what has begun ends by itself."""
        self._threads.shutdown(wait=False, cancel_futures=True)
