"""An answer's text from its tokens: whole characters as they come, up to the first of its stop strings.

Where a stop string ends does not depend on how the text was cut into tokens: the one that is complete first ends the
answer before its own first character, and of those complete at the same character, the longest.
"""

from collections.abc import Sequence

from ..inputs.tokenizer import Tokenizer


class AnswerText:
    """The text of one answer, token by token; what may begin a stop string is held back until more has come."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._decoder = tokenizer.decoder()
        self._stop = tuple(stop)
        self._held = ""  # not handed out yet: it begins a stop string, as far as it goes
        self._pieces: list[str] = []
        self._ended = False

    @property
    def ended(self) -> bool:
        """Whether a stop string was found: the text ends before it."""
        return self._ended

    @property
    def text(self) -> str:
        """All that was handed out."""
        return "".join(self._pieces)

    def add(self, token: int) -> str:
        """The text that this token completes and no stop string can take back; "" once the text has ended."""
        return self._hand_out(self._decoder.add(token), held_back=True)

    def finish(self) -> str:
        """What was held back, at the end of the tokens; U+FFFD for an unfinished character."""
        return self._hand_out(self._decoder.finish(), held_back=False)

    def _hand_out(self, new: str, *, held_back: bool) -> str:
        if self._ended:
            return ""
        piece = new
        if self._stop:
            piece, self._held = self._split(self._held + new, held_back)
        if piece:
            self._pieces.append(piece)
        return piece

    def _split(self, text: str, held_back: bool) -> tuple[str, str]:
        """What of `text` can be handed out, and what is held back; a stop string that was found is in neither."""
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            self._ended = True
            return text[: min(found)[1]], ""
        if not held_back:
            return text, ""
        begun = max(_begun(text, stop) for stop in self._stop)
        return text[: len(text) - begun], text[len(text) - begun :]


def _begun(text: str, stop: str) -> int:
    """Characters at the end of a text that are the beginning of a stop string, but not all of it."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
