"""Which tokens may come next, for an answer to be JSON of a given schema.

The rules are llguidance's, an extra (`fastvlm-mlx[schema]`). Its view of a tokenizer is built once for each, and the
automaton of a schema once for each tokenizer; an answer gets a copy of the automaton, which takes microseconds.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from ..errors import OptionError
from ..inputs.tokenizer import Tokenizer
from .schema import check, grammar, library, new_matcher

MAX_SCHEMAS = 32  # automata kept for each tokenizer

Allowed = npt.NDArray[np.bool_]


class Constraint:
    """The place of one answer in its grammar: what may come next (`allowed`), and what came (`accept`).

    `matcher` is llguidance's, at the beginning and used by nothing else. `texts` says of each id that the tokenizer
    knows whether it stands for text: the others never occur within JSON, nor do those it does not know, of the
    `vocabulary` that logits have. `stop` are the ids that end an answer, allowed where the JSON is complete.
    """

    def __init__(self, matcher: Any, texts: Allowed, vocabulary: int, stop: Sequence[int]):
        self._matcher, self._texts, self._vocabulary = matcher, texts, vocabulary
        self._stop = [token for token in stop if token < vocabulary]
        self._bits = np.zeros((1, -(-len(texts) // 32)), np.int32)
        self._ended = False

    @property
    def ended(self) -> bool:
        """Whether nothing may follow but a token that ends the answer: the JSON is complete."""
        return self._ended

    def allowed(self) -> Allowed:
        """Which tokens (V,) may come next, at least one; raises OptionError where the grammar has become too large."""
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self._matcher, self._bits)
        check(self._matcher)
        bits = np.unpackbits(self._bits.view(np.uint8), count=len(self._texts), bitorder="little").view(np.bool_)
        known = min(len(self._texts), self._vocabulary)
        found: Allowed = np.zeros(self._vocabulary, np.bool_)
        found[:known] = (bits & self._texts)[:known]
        found[self._stop] = self._matcher.is_accepting()
        if not found.any():
            raise OptionError(
                "`schema` cannot be kept to: the model has no token for what comes next; write that part of it in "
                "another way."
            )
        return found

    def accept(self, token: int) -> None:
        """Go on behind a token that was allowed."""
        if token in self._stop:
            self._ended = True
            return
        self._matcher.consume_token(token)
        check(self._matcher)
        self._ended = self._matcher.is_stopped()


class Constraints:
    """What llguidance knows of one tokenizer, and the automata of its schemas; see `constraints_of`."""

    def __init__(self, tokenizer: Tokenizer):
        llguidance = library()
        every = tokenizer.every_bytes()
        self._texts = np.array([bool(text) for text in every])
        self._tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Described(tokenizer, every)))
        self._automata: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def constraint(self, schema: str, vocabulary: int, stop: Sequence[int]) -> Constraint:
        """A new answer's constraint for the JSON text of a schema, a model of `vocabulary` logits, and the ids that end
        an answer.

        Raises OptionError for a schema that cannot be kept to.
        """
        return Constraint(self._automaton(schema), self._texts, vocabulary, stop)

    def _automaton(self, schema: str) -> Any:
        """The automaton of a schema, at its beginning and the caller's own."""
        with self._lock:
            found = self._automata.pop(schema, None)
            if found is None:
                found = new_matcher(self._tokenizer, grammar(schema))
            self._automata[schema] = found
            if len(self._automata) > MAX_SCHEMAS:
                self._automata.popitem(last=False)
            return found.deep_copy()


class _Described:
    """A tokenizer as llguidance asks for it; which tokens end an answer is decided by `Constraint`, not there."""

    def __init__(self, tokenizer: Tokenizer, every: Sequence[bytes]):
        # What begins with the byte 255, which no text holds, is not text to llguidance.
        self.tokens = [text or b"\xff<%d>" % token for token, text in enumerate(every)]
        self.special_token_ids = [token for token, text in enumerate(every) if not text]
        self.eos_token_id = tokenizer.special("<|im_end|>")
        self.bos_token_id = None
        self._bpe = tokenizer.bpe  # not the tokenizer, which this is kept for as long as it is there

    def __call__(self, text: bytes) -> list[int]:
        return list(self._bpe.encode(text.decode(), add_special_tokens=False).ids)


_built: WeakKeyDictionary[Tokenizer, Constraints] = WeakKeyDictionary()
_building = threading.Lock()


def constraints_of(tokenizer: Tokenizer) -> Constraints:
    """The constraints of a tokenizer, built the first time, in about a second for 150,000 tokens.

    May be called ahead, from any thread. Raises OptionError without llguidance.
    """
    with _building:
        found = _built.get(tokenizer)
        if found is None:
            found = _built[tokenizer] = Constraints(tokenizer)
        return found
