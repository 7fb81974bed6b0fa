"""An answer while it is being written: token ids in, pieces of text out, at the end the `Answer` and what it took."""

import time

import mlx.core as mx

from . import notebook
from .answer import Answer, Chunk, Stats
from .engine import Engine
from .logprobs import Logprobs
from .request import Options, Request
from .sampling import Sampler
from .text import AnswerText


class Draft:
    """The tokens and the text of one answer so far, and the clock it is timed by.

    Whoever computes sets `vision_seconds` and `prefill_seconds`; everything else is taken down here. `reason` is None
    until the answer has ended, then "stop" or "length".
    """

    def __init__(self, engine: Engine, request: Request, options: Options, sampler: Sampler, *, kept: int = 0):
        """`sampler` draws the tokens, and has accepted each before it is added; `kept` positions were in a cache
        already.
        """
        self.request = request
        self.limit = min(options.max_tokens, engine.context - request.prompt_tokens)  # tokens, the stop token included
        self.tokens: list[int] = []
        self.reason: str | None = None
        self.kept = kept
        self.vision_seconds = self.prefill_seconds = 0.0
        self.thumbnails: tuple[bytes, ...] = ()
        self.started = self.first_token_at = self.last_token_at = time.perf_counter()
        self._stop = engine.stop_tokens(options)
        self._sampler = sampler
        self._text = AnswerText(engine.tokenizer, options.stop)
        self._logprobs = options.logprobs is not None
        self._told = 0  # of how many tokens a chunk has told the log-probabilities

    @property
    def room(self) -> int:
        """Tokens that there is still room for."""
        return self.limit - len(self.tokens)

    def add(self, token: int) -> Chunk | None:
        """Take a token; returns a chunk of the text it completes, None where there is none."""
        self.last_token_at = time.perf_counter()
        if not self.tokens:
            self.first_token_at = self.last_token_at
        self.tokens.append(token)
        piece = self._text.add(token) if token not in self._stop else ""
        if token in self._stop or self._text.ended or self._sampler.ended:
            self.reason = "stop"
        elif self.room <= 0:
            self.reason = "length"
        return self._chunk(piece) if piece else None

    def finish(self) -> Chunk:
        """The last chunk: the text that was held back, and the answer."""
        rest = self._text.finish()
        reason = "stop" if self._text.ended else self.reason or "length"
        request = self.request
        stats = Stats(
            images=len(request.pixels),
            image_tokens=request.image_tokens,
            prompt_tokens=request.prompt_tokens,
            reused_tokens=self.kept,
            completion_tokens=len(self.tokens),
            preprocess_seconds=request.preprocess_seconds,
            vision_seconds=self.vision_seconds,
            prefill_seconds=self.prefill_seconds,
            ttft_seconds=self.first_token_at - self.started + request.preprocess_seconds,
            decode_tokens_per_second=(len(self.tokens) - 1) / max(self.last_token_at - self.first_token_at, 1e-9),
            peak_memory_bytes=mx.get_peak_memory(),
        )
        logprobs = Logprobs(self._sampler.logprobs) if self._logprobs else None
        answer = Answer(self._text.text, self.tokens, reason, stats, self.thumbnails, logprobs=logprobs)
        return self._chunk(rest, answer)

    def _chunk(self, piece: str, answer: Answer | None = None) -> Chunk:
        told, self._told = self._told, len(self._sampler.logprobs)
        return Chunk(piece, answer, Logprobs(self._sampler.logprobs[told:]))

    def take_thumbnails(self) -> None:
        """Make the small pictures that the answer shows itself with in a notebook."""
        self.thumbnails = notebook.thumbnails(self.request.pixels)
