"""`POST /v1/chat/completions`: a finished answer as one object, or an answer on its way as chunks."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator
from typing import Any

from ..decoding.answer import Answer
from ..decoding.logprobs import Logprobs
from .events import DONE, event
from .names import ModelNames
from .questions import Question, chat_question
from .reply import Reply
from .usage import timings, usage

FINGERPRINT = "fastvlm-mlx"


class ChatCompletions:
    """The form of chat completions, for a model of these names."""

    def __init__(self, names: ModelNames):
        self._names = names

    def question(self, body: dict[str, Any]) -> Question:
        """What a body asks; raises a Refusal."""
        return chat_question(body)

    def whole(self, identity: str, body: dict[str, Any], reply: Reply) -> dict[str, Any]:
        """The object of a finished reply."""
        answers = reply.given
        choices = [
            {
                "index": number,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": None if answer.logprobs is None else _logprobs(answer.logprobs, 0, answer),
                "finish_reason": answer.finish_reason,
            }
            for number, answer in enumerate(answers)
        ]
        head = self._head(identity, "chat.completion")
        return {**head, "choices": choices, "usage": usage(reply), "timings": timings(reply, answers[0])}

    async def events(
        self, identity: str, body: dict[str, Any], question: Question, reply: Reply
    ) -> AsyncIterator[bytes]:
        """A chunk with the role, chunks of text, one with the reason why it ends, one with usage where that is asked
        for.
        """
        head = self._head(identity, "chat.completion.chunk")
        if question.include_usage:
            head["usage"] = None  # in every chunk but the last, as the API has it

        def chunk(number: int, delta: dict[str, str], logprobs: Any = None, answer: Answer | None = None) -> bytes:
            choice: dict[str, Any] = {"index": number, "delta": delta, "logprobs": logprobs}
            choice["finish_reason"] = answer.finish_reason if answer is not None else None
            more = {"timings": timings(reply, answer)} if answer is not None else {}
            return event({**head, "choices": [choice], **more})

        told = [0] * len(question.options)  # bytes of the tokens whose log-probabilities have gone out
        yield b"".join(chunk(number, {"role": "assistant", "content": ""}) for number in range(len(question.options)))
        async for pieces in reply.pieces():
            found = []
            for number, piece in pieces:
                logprobs = None
                if question.options[number].logprobs is not None:
                    logprobs = _logprobs(piece.logprobs, told[number], piece.answer)
                    told[number] += sum(len(token.bytes) for token in piece.logprobs)
                if piece.text or (logprobs and logprobs["content"]):
                    found.append(chunk(number, {"content": piece.text}, logprobs))
                if piece.answer is not None:
                    found.append(chunk(number, {}, answer=piece.answer))
            if found or not pieces:
                yield b"".join(found)
        if question.include_usage:
            yield event({**head, "choices": [], "usage": usage(reply)})
        yield DONE

    def _head(self, identity: str, kind: str) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{identity}",
            "object": kind,
            "created": int(time.time()),
            "model": self._names.served,
            "system_fingerprint": FINGERPRINT,
        }


def _logprobs(found: Logprobs, start: int, answer: Answer | None) -> dict[str, Any]:
    """The log-probabilities of tokens that begin at byte `start` of an answer.

    They are those that its text is made of, which neither the token that ended it nor those of a stop string are.
    """
    end = math.inf if answer is None else len(answer.text.encode())
    content = []
    for token in found:
        if token.bytes and start < end:
            content.append(token.to_json())
        start += len(token.bytes)
    return {"content": content, "refusal": None}
