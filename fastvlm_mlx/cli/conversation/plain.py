"""The chat in a pipe, or in a terminal without cursor movement: answers on stdout, everything else on stderr."""

import sys
from collections.abc import Callable, Iterator

from ...decoding.answer import Answer, Chunk
from ...errors import FastVLMError, PromptError
from .. import process
from ..messages import for_stdout, printable, say

MAX_LINE_BYTES = 4_000_000  # bytes, of up to as many characters as a prompt may have


class Plain:
    """A `Front` of plain text."""

    def __init__(self, *, typing: bool):
        """With `typing`, a person types the lines, and gets a prompt."""
        self.typing = typing
        self.failed = False

    def lines(self, status: Callable[[], str]) -> Iterator[str]:
        """Yield the lines of stdin; one that is not text is reported and skipped."""
        while True:
            try:
                if self.typing:
                    self.note(f"[{status()}]")
                    print("> ", end="", file=sys.stderr, flush=True)
                line = _read()
            except FastVLMError as error:
                self.complain(str(error))
                continue
            except KeyboardInterrupt:
                if not self.typing:
                    raise
                process.take()
                self.note("\nCtrl-D leaves.")
                continue
            if line is None:
                if self.typing:
                    self.note("")
                return
            yield line

    def show(self, chunks: Iterator[Chunk]) -> Answer:
        """Print an answer as it arrives, and a line break."""
        answer = None
        try:
            for chunk in chunks:
                print(for_stdout(chunk.text), end="", flush=True)
                answer = chunk.answer
        finally:
            print(flush=True)
        assert answer is not None
        return answer

    def full(self, text: str) -> str:
        """The text unchanged: nothing is abbreviated here."""
        return text

    def note(self, text: str) -> None:
        """Print something that is not an answer."""
        print(printable(text), file=sys.stderr, flush=True)

    def complain(self, text: str) -> None:
        """Print what is wrong with a line."""
        self.failed = True
        say(text)


def _read() -> str | None:
    """The next line of stdin, None at its end; raises PromptError for one that is too long or not UTF-8."""
    if sys.stdin is None:
        return None
    data = sys.stdin.buffer.readline(MAX_LINE_BYTES + 1)
    if len(data) > MAX_LINE_BYTES:
        while data and not data.endswith(b"\n"):
            data = sys.stdin.buffer.readline(MAX_LINE_BYTES)
        raise PromptError(f"A line on stdin is longer than {MAX_LINE_BYTES:,} bytes; shorten it.")
    try:
        return data.decode("utf-8") if data else None
    except UnicodeDecodeError as error:
        raise PromptError(f"A line on stdin is not UTF-8 (byte {error.start}); convert it first.") from error
