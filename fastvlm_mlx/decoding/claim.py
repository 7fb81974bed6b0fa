"""Who may use the caches of a conversation: one thread at a time, and of its answers only the one begun last."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import BusyError, PromptError


class Claim:
    """A lock that refuses instead of waiting, and counts how often what it guards has changed.

    An answer is read piece by piece, and its reader may walk away. The thread that began it may begin another one, or
    change the conversation, and the first answer ends there; other threads are refused until it has ended, or its
    thread has.
    """

    def __init__(self) -> None:
        self.state = 0  # counts changes and answers begun
        self._lock = threading.RLock()  # taken again where a forgotten answer is collected in the middle of a change
        self._answering: threading.Thread | None = None

    @contextmanager
    def change(self) -> Iterator[None]:
        """A context manager for the moment of a change; raises BusyError while another thread is answering."""
        with self._lock:
            self._check_thread()
            yield
            self.state += 1
            self._answering = None

    @contextmanager
    def complete(self, state: int) -> Iterator[None]:
        """A context manager for the moment in which the answer begun with `state` is recorded, in whichever thread.

        Raises PromptError where something has begun or changed since.
        """
        with self._lock:
            self.check(state)
            yield
            self.state += 1
            self._answering = None

    def begin(self, state: int | None = None) -> int:
        """Begin an answer to what was in `state`, or to what there is now; returns the state it holds on to.

        Raises BusyError while another thread is answering, PromptError where something has changed since.
        """
        with self._lock:
            self._check_thread()
            if state is not None:
                self.check(state)
            self.state += 1
            self._answering = threading.current_thread()
            return self.state

    @contextmanager
    def ending(self, state: int) -> Iterator[bool]:
        """A context manager for the end of the answer begun with `state`; gives whether nothing has changed since."""
        with self._lock:
            yield self.state == state

    def end(self, state: int) -> None:
        """Record that the answer begun with `state` has ended, however it did."""
        with self._lock:
            if self.state == state:
                self._answering = None

    def check(self, state: int) -> None:
        """Raise PromptError unless the state is still this one."""
        if self.state != state:
            raise PromptError(
                "Another question was asked, or the conversation was changed, before this answer was read to its end; "
                "ask again."
            )

    def _check_thread(self) -> None:
        owner = self._answering
        if owner is not None and owner is not threading.current_thread() and owner.is_alive():
            raise BusyError(
                "This conversation is answering a question in another thread; wait for that answer, or begin another "
                "conversation with vlm.chat()."
            )
