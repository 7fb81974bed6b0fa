"""The chat without a terminal, or in one that can only write line after line: answers on stdout, everything else on stderr."""

import sys
from collections.abc import Callable, Iterator

from ...decoding.answer import Answer, Chunk
from ...errors import FastVLMError, PromptError
from .. import process
from ..messages import for_stdout, printable, say

MAX_LINE_BYTES = 4_000_000  # bytes, of up to as many characters as a prompt may have


class Plain:
    """A `Front` of bare text."""

    def __init__(self, *, typing: bool):
        """A person at the other end of stdin, `typing`, wants a prompt; a program wants none."""
        self.typing = typing
        self.failed = False

    def lines(self, status: Callable[[], str]) -> Iterator[str]:
        """The lines of stdin; one that is no text is complained of and passed over."""
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
        """Write an answer as it comes, and a line's end."""
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
        """Nothing is ever left out of a line."""
        return text

    def note(self, text: str) -> None:
        """Write what is no answer."""
        print(printable(text), file=sys.stderr, flush=True)

    def complain(self, text: str) -> None:
        """Write what is wrong with a line."""
        self.failed = True
        say(text)


def _read() -> str | None:
    """The next line of stdin, or None at its end; raises PromptError for one that is too long, or no UTF-8."""
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
