"""What is given back: an answer with its figures, whole or in chunks, and several answers as a list."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TypeVar

from ..errors import FastVLMError, counted
from . import notebook
from .logprobs import Logprobs


@dataclass(frozen=True)
class Stats:
    """Figures of one answer: counts of pictures and tokens, wall time in seconds, memory in bytes.

    `reused_tokens` are positions of the prompt that were in a cache already. `ttft_seconds` is the time from the
    question to the first token, waiting included; `peak_memory_bytes` is MLX's, shared by all answers under way.
    """

    images: int
    image_tokens: int
    prompt_tokens: int
    reused_tokens: int
    completion_tokens: int
    preprocess_seconds: float
    vision_seconds: float
    prefill_seconds: float
    ttft_seconds: float
    decode_tokens_per_second: float
    peak_memory_bytes: int

    def describe(self, *, load_seconds: float | None = None) -> str:
        """The figures as two lines of text; `load_seconds` is what loading the model took, where it is to be told."""
        load = f"load {load_seconds:.2f} s, " if load_seconds is not None else ""
        return (
            f"{load}preprocess {self.preprocess_seconds * 1e3:.0f} ms, "
            f"vision {self.vision_seconds * 1e3:.0f} ms ({counted(self.image_tokens, 'token')}), "
            f"prefill {self.prefill_seconds * 1e3:.0f} ms ({counted(self.prompt_tokens, 'token')})\n"
            f"first token after {self.ttft_seconds:.2f} s, then {self.decode_tokens_per_second:.1f} tokens/s"
            f" ({counted(self.completion_tokens, 'token')}), peak memory {self.peak_memory_bytes / 1e9:.2f} GB"
        )


@dataclass(frozen=True)
class Answer:
    """A finished answer; `str(answer)` is its text. `finish_reason` is "stop" or "length".

    `token_ids` are all that were generated, with the one that ended the answer, or those of the stop string that did,
    which `text` is without. `thumbnails` are small JPEGs of the pictures, made in notebooks only, where an answer shows
    itself. `left_out` says in words what was left out of a full conversation to make room for this answer, "" where
    nothing was. `logprobs` are the log-probabilities of the tokens, one for each of `token_ids`, where they were asked
    for.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    stats: Stats
    thumbnails: tuple[bytes, ...] = field(default=(), repr=False, compare=False)
    left_out: str = ""
    logprobs: Logprobs | None = None

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        table = self.logprobs._repr_html_() if self.logprobs is not None else ""
        return notebook.html(self.text, self.thumbnails, self._details) + table

    def _repr_markdown_(self) -> str:
        return notebook.markdown(self.text, self._details)

    @property
    def _details(self) -> str:
        tokens = counted(self.stats.completion_tokens, "token")
        return f"{tokens}, the first after {self.stats.ttft_seconds:.2f} s\n{self.stats.describe()}"

    def to_json(self, **extra: object) -> str:
        """One JSON object as text: the answer, `extra` and every figure.

        `left_out` is in it where something was left out, and `logprobs`, as the OpenAI API writes their `content`,
        where they were asked for.
        """
        extra |= {"left_out": self.left_out} if self.left_out else {}
        extra |= {"logprobs": self.logprobs.to_json()} if self.logprobs is not None else {}
        figures = asdict(self.stats)
        del figures["reused_tokens"]  # 0 for a question asked alone
        return json.dumps(
            {"text": self.text, **extra, "finish_reason": self.finish_reason, **figures}, ensure_ascii=False
        )


Outcome = TypeVar("Outcome", Answer, Answer | FastVLMError)


class Answers(list[Outcome]):
    """The answers to several questions, in their order; printed and shown in a notebook one below the other.

    With `on_error="return"`, a question that could not be answered has its exception in the place of the answer.
    """

    def __str__(self) -> str:
        texts = [answer.text if isinstance(answer, Answer) else _named(answer) for answer in self]
        return ("\n\n" if any("\n" in text for text in texts) else "\n").join(texts)

    def _repr_html_(self) -> str:
        return "".join(
            answer._repr_html_() if isinstance(answer, Answer) else notebook.html(_named(answer), ()) for answer in self
        )

    def _repr_markdown_(self) -> str:
        return "\n".join(
            answer._repr_markdown_() if isinstance(answer, Answer) else notebook.markdown(_named(answer), "")
            for answer in self
        )


def _named(error: FastVLMError) -> str:
    return f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class Chunk:
    """The next piece of a streamed answer: whole characters. The last one, perhaps empty, carries the finished answer.

    `logprobs` are those of the tokens since the chunk before, where they were asked for.
    """

    text: str
    answer: Answer | None = None
    logprobs: Logprobs = field(default=Logprobs(), repr=False)


def finish(chunks: Iterator[Chunk]) -> Answer:
    """Read a stream of chunks to its end; returns the answer that the last chunk carries."""
    *_, last = chunks
    if last.answer is None:
        raise AssertionError("a stream ends with the answer")
    return last.answer
