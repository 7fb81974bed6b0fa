"""An answer -> a caption: what it may begin with is cut, what it must not hold is asked again, then dropped."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from ..decoding.request import Options
from ..errors import OptionError, shown
from ..files import paths, regular
from .ledger import mark

MAX_FORBIDDEN_BYTES = 1 << 20  # of a file with forbidden phrases
MAX_REPEATED_WORDS = 5  # times that a word may come in a row
MAX_REPEATED_PHRASES = 4  # times that a phrase of several words may, such as of things that lie side by side
LONG_PHRASE_WORDS, MAX_LONG_PHRASES = 8, 2  # a phrase of so many words, and how many times that may
PUNCTUATION = ".,;:!?\"'"  # around words that are compared
MAX_PHRASE_WORDS = 24  # of a phrase that is looked for
AGAIN_TEMPERATURE = 0.7  # at least, where a forbidden phrase came: the likeliest answer would hold it again
AGAIN_PENALTY = 1.2  # at least, where phrases were repeated


@dataclass(frozen=True)
class Rules:
    """What is done with every answer. `strip_start` are beginnings to cut, whatever their capitals; `forbidden` are
    phrases, of whole words. `repeats` says whether answers that repeat themselves are asked again.
    """

    prefix: str = ""
    suffix: str = ""
    strip_start: tuple[str, ...] = ()
    forbidden: tuple[str, ...] = ()
    repeats: bool = True

    def caption(self, text: str) -> str:
        """The caption that an answer becomes."""
        text = text.strip()
        for start in sorted(self.strip_start, key=len, reverse=True):
            if start and text.casefold().startswith(start.casefold()):
                cut = text[len(start) :].lstrip(" \t\n,:;-")
                text = cut[:1].upper() + cut[1:] if text[:1].isupper() else cut
                break
        return self.prefix + text + self.suffix

    def breach(self, text: str) -> str | None:
        """The first forbidden phrase in a text, None where there is none."""
        found = self._pattern.search(text) if self._pattern is not None else None
        return None if found is None else found[0]

    @cached_property
    def _pattern(self) -> re.Pattern[str] | None:
        if not self.forbidden:
            return None
        phrases = (r"\s+".join(map(re.escape, phrase.split())) for phrase in self.forbidden)
        return re.compile(rf"(?<!\w)(?:{'|'.join(phrases)})(?!\w)", re.IGNORECASE)


def read_forbidden(path: str | None) -> tuple[str, ...]:
    """The phrases in a text file, one a line; none for None. Raises OptionError."""
    if path is None:
        return ()
    try:
        text = regular.read_text(Path(paths.find(path)), MAX_FORBIDDEN_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise OptionError(f"`forbid` is {shown(path)}, which cannot be read ({reason}); check it.") from error
    return tuple(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))


def repeated(text: str) -> str | None:
    """The phrase that a text repeats in a row, again and again; None where it does not."""
    words = text.split()
    plain = [word.casefold().strip(PUNCTUATION) for word in words]
    for size in range(1, min(MAX_PHRASE_WORDS, len(words) // 2) + 1):
        most = MAX_REPEATED_WORDS if size == 1 else MAX_REPEATED_PHRASES
        if size >= LONG_PHRASE_WORDS:
            most = MAX_LONG_PHRASES
        run = 0  # words in a row that are those `size` places before
        for place in range(size, len(plain)):
            run = run + 1 if plain[place] == plain[place - size] else 0
            if run >= most * size:
                return " ".join(words[place - size + 1 : place + 1])
    return None


def other_words(options: Options, name: str) -> Options:
    """How an item is asked again whose answer held what is forbidden: drawn, always in the same way."""
    return replace(options, temperature=max(options.temperature, AGAIN_TEMPERATURE), seed=mark(name, options.seed) >> 1)


def without_repeats(options: Options) -> Options:
    """How an item is asked again whose answer repeated itself."""
    return replace(options, repetition_penalty=max(options.repetition_penalty, AGAIN_PENALTY))


def listed_starts(starts: Sequence[str] | None) -> tuple[str, ...]:
    """The beginnings that --strip-start names, without blanks around them."""
    return tuple(start.strip() for start in starts or () if start.strip())
