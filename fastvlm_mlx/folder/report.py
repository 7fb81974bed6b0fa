"""What an output holds, in figures and examples: lines in, a `Report` out, as text."""

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..errors import counted
from .job import Tally
from .lines import Line, name_of

MAX_WORDS = 20  # most frequent words listed
MAX_EXAMPLES = 200  # lines of each kind that are shown: failed, doubtful, and others drawn from all
MAX_LISTED = 5  # of each kind in the text
MAX_DIFFERENT_WORDS = 200_000  # words that are counted
WORD = re.compile(r"[^\W\d_]{3,}")
STOP_WORDS = frozenset(
    (
        "the", "and", "with", "are", "has", "have", "from", "that", "this", "its", "for", "was", "were", "there",
        "their", "them", "into", "onto", "over", "which", "image", "picture", "photo", "shows", "showing", "can",
        "you", "your", "not", "but", "also", "some", "two", "one", "they", "she", "her", "his", "him", "who", "what",
        "where", "when", "being", "been",
    )
)  # fmt: skip


@dataclass
class Report:
    """Counts of lines, the most frequent words with the number of answers that have them, and examples of each kind.

    `doubtful` are answers that were cut, repeat themselves, are empty, or are the same as many others.
    """

    answers: int = 0
    failed: int = 0
    cut: int = 0
    repeats: int = 0
    empty: int = 0
    same: int = 0
    words: list[tuple[str, int]] = field(default_factory=list)
    failures: list[Line] = field(default_factory=list)
    doubtful: list[tuple[str, Line]] = field(default_factory=list)
    examples: list[Line] = field(default_factory=list)

    def text(self, tally: Tally, done_before: int, kept: int) -> str:
        """The report in a few lines, with what this run did."""
        asked = tally.answered + tally.failed
        rate = f", {tally.per_minute:.0f} a minute" if tally.answered else ""
        rows = [
            f"{counted(self.answers, 'answer')} in all, {self.failed} failed; this run: {counted(asked, 'item')} in "
            f"{tally.seconds:.0f} s{rate}, {done_before} were done before."
        ]
        if kept:
            rows.append(
                f"{counted(kept, 'item')} left as found, made in another way or by others (`existing='overwrite'` "
                "replaces them)."
            )
        doubts = {
            "cut at the limit": self.cut, "repeat themselves": self.repeats, "empty": self.empty,
            "the same as many others": self.same, "asked again": tally.again,
        }  # fmt: skip
        if found := [f"{count} {what}" for what, count in doubts.items() if count]:
            rows.append(f"Answers: {', '.join(found)}.")
        if self.words:
            rows.append("Most frequent words: " + ", ".join(f"{word} {count}" for word, count in self.words) + ".")
        rows += [f"Failed: {name_of(line)}: {line['error']}" for line in self.failures[:MAX_LISTED]]
        rows += [f"Doubtful ({why}): {name_of(line)}: {line['text'][:100]}" for why, line in self.doubtful[:MAX_LISTED]]
        return "\n".join(rows)


def report(lines: Iterable[Line]) -> Report:
    """The report of lines, read once; of the examples, those that are not failed or doubtful are drawn from all."""
    found, words, texts = Report(), Counter[str](), Counter[int]()
    draw = random.Random(0)
    for line in lines:
        if "error" in line:
            found.failed += 1
            if len(found.failures) < MAX_EXAMPLES:
                found.failures.append(line)
            continue
        found.answers += 1
        text = line["text"]
        texts[hash(text)] += 1
        for word in set(WORD.findall(text.casefold())) - STOP_WORDS:
            if word in words or len(words) < MAX_DIFFERENT_WORDS:
                words[word] += 1
        for why in _doubts(found, line, texts[hash(text)]):
            if len(found.doubtful) < MAX_EXAMPLES:
                found.doubtful.append((why, line))
        if len(found.examples) < MAX_EXAMPLES:
            found.examples.append(line)
        elif (place := draw.randrange(found.answers)) < MAX_EXAMPLES:
            found.examples[place] = line
    found.words = words.most_common(MAX_WORDS)
    return found


def _doubts(found: Report, line: Line, same: int) -> Sequence[str]:
    """What is doubtful about an answer, counted in the report."""
    doubts = []
    if line.get("finish_reason") == "length":
        found.cut += 1
        doubts.append("cut")
    if "repeats" in line.get("doubt", ()):
        found.repeats += 1
        doubts.append("repeats")
    if not line["text"].strip():
        found.empty += 1
        doubts.append("empty")
    if same > 10 and same > found.answers / 2 and "record" not in line:
        found.same += 1
        doubts.append("same")
    return doubts
