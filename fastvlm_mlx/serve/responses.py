"""`POST /v1/responses`: the newer form of the API, without what would have to be stored."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from itertools import count
from typing import Any

from ..decoding.answer import Answer
from .events import event
from .names import ModelNames
from .questions import Question, response_question
from .reply import Reply
from .usage import response_usage, timings


class Responses:
    """The form of responses, for a model of these names. Every one stands alone, and says that it is not stored."""

    def __init__(self, names: ModelNames):
        self._names = names

    def question(self, body: dict[str, Any]) -> Question:
        """What a body asks; raises a Refusal."""
        return response_question(body)

    def whole(self, identity: str, body: dict[str, Any], reply: Reply) -> dict[str, Any]:
        """The object of a finished reply."""
        (answer,) = reply.given
        return self._finished(identity, body, int(time.time()), reply, answer)

    async def events(
        self, identity: str, body: dict[str, Any], question: Question, reply: Reply
    ) -> AsyncIterator[bytes]:
        """The events of one answer, numbered, from `response.created` to `response.completed` or
        `response.incomplete`.
        """
        created, numbers = int(time.time()), count()

        def named(kind: str, **fields: Any) -> bytes:
            return event({"type": kind, "sequence_number": next(numbers), **fields}, kind)

        place = {"item_id": f"msg_{identity}", "output_index": 0, "content_index": 0}
        begun = self._response(identity, body, created, "in_progress", [], None)
        yield b"".join(
            (
                named("response.created", response=begun),
                named("response.in_progress", response=begun),
                named("response.output_item.added", output_index=0, item=_item(identity, "in_progress", None)),
                named("response.content_part.added", **place, part=_part("")),
            )
        )
        finished: Answer | None = None
        async for pieces in reply.pieces():
            found = []
            for _, piece in pieces:
                if piece.text:
                    found.append(named("response.output_text.delta", **place, delta=piece.text, logprobs=[]))
                finished = piece.answer or finished
            if found or not pieces:
                yield b"".join(found)
        assert finished is not None  # with which pieces end
        whole = self._finished(identity, body, created, reply, finished)
        yield b"".join(
            (
                named("response.output_text.done", **place, text=finished.text, logprobs=[]),
                named("response.content_part.done", **place, part=_part(finished.text)),
                named("response.output_item.done", output_index=0, item=whole["output"][0]),
                named(f"response.{whole['status']}", response=whole),
            )
        )

    def _finished(
        self, identity: str, body: dict[str, Any], created: int, reply: Reply, answer: Answer
    ) -> dict[str, Any]:
        status = "completed" if answer.finish_reason == "stop" else "incomplete"
        found = self._response(identity, body, created, status, [_item(identity, status, answer.text)], reply)
        return {**found, "timings": timings(reply, answer)}

    def _response(
        self,
        identity: str,
        body: dict[str, Any],
        created: int,
        status: str,
        output: list[dict[str, Any]],
        reply: Reply | None,
    ) -> dict[str, Any]:
        """The object of a response, with what was asked in it as the API echoes it."""
        return {
            "id": f"resp_{identity}",
            "object": "response",
            "created_at": created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.get("instructions"),
            "max_output_tokens": body.get("max_output_tokens"),
            "metadata": body["metadata"] if isinstance(body.get("metadata"), dict) else {},
            "model": self._names.served,
            "output": output,
            "parallel_tool_calls": bool(body.get("parallel_tool_calls")),
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": body.get("temperature") or 0.0,
            "text": {"format": (body.get("text") or {}).get("format") or {"type": "text"}},
            "tool_choice": body.get("tool_choice") or "auto",
            "tools": [],
            "top_p": body.get("top_p") if body.get("top_p") is not None else 1.0,
            "truncation": "disabled",
            "usage": response_usage(reply) if reply is not None else None,
        }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _item(identity: str, status: str, text: str | None) -> dict[str, Any]:
    content = [] if text is None else [_part(text)]
    return {"id": f"msg_{identity}", "type": "message", "status": status, "role": "assistant", "content": content}
