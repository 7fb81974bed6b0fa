"""The server's log: a line for each request, written by a thread of its own, so that neither a full disk nor a reader
who has stopped reading holds an answer up.

No line holds what people ask, show or are answered: requests are told by their route, their status and their counts,
errors by their kind and the place in the code.
"""

import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable
from queue import Full, Queue
from types import TracebackType
from typing import TextIO

PENDING_LINES = 1000  # that wait to be written; what comes on top of them is lost, and counted
CLOSING_SECONDS = 1.0  # that the last lines get to be written


class Journal:
    """Lines on their way to a stream; `lost` counts those that could not be written.

    A context manager: lines are written from its beginning to its end.
    """

    def __init__(self, stream: TextIO | None = None):
        self.lost = 0
        self._stream = stream
        self._lines: Queue[str | None] = Queue(PENDING_LINES)
        self._thread = threading.Thread(target=self._run, name="fastvlm-journal", daemon=True)

    def __enter__(self) -> "Journal":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._lines.put(None, timeout=CLOSING_SECONDS)
        except Full:  # the stream takes nothing any more, and the thread ends with the process
            return
        self._thread.join(CLOSING_SECONDS)

    def write(self, line: str) -> None:
        """Have a line written; returns at once."""
        try:
            self._lines.put_nowait(f"{time.strftime('%H:%M:%S')} {line}")
        except Full:
            self.lost += 1

    def failed(self, what: str, error: BaseException) -> None:
        """Have written what failed, by which kind of exception and where; its message may hold what somebody asked, and
        is not.
        """
        while error.__cause__ is not None:  # where it began
            error = error.__cause__
        self.write(f"{what} failed: {type(error).__name__}{_where(error.__traceback__)}")

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                stream = self._stream or sys.stderr
                print(line, file=stream, flush=True)
            except (OSError, ValueError):  # the disk is full, the reader has left, or the stream is closed
                self.lost += 1


def _where(trace: TracebackType | None) -> str:
    frames = traceback.extract_tb(trace)
    return f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""


class Handler(logging.Handler):
    """What libraries log (uvicorn, asyncio), from warnings on, as lines of a journal: their own words, no
    exception's.
    """

    def __init__(self, write: Callable[[str], None]):
        super().__init__(logging.WARNING)
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        error = record.exc_info[1] if record.exc_info else None
        kind = f": {type(error).__name__}{_where(error.__traceback__)}" if error is not None else ""
        self._write(f"{record.name}: {str(record.msg).splitlines()[0][:200] if record.msg else ''}{kind}")
