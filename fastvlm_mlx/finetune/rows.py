"""What a model learns from: conversations about pictures, each of which says where it was read.

Enters: a row of a data file as a table, in any of the forms people have. Leaves: a checked `Row`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import PromptError, counted, listed, shown
from ..inputs.image import Source
from ..inputs.prompt import PROMPT, check_text

MARK = "<image>"  # how LLaVA's and ShareGPT's files mark a picture's place in a text
ROLES = {
    "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant",
    "system": "system",
}  # fmt: skip
FORMS = (
    "'messages', 'conversations', 'question' and 'answer', or a picture with a 'text'; docs/tune.md has an example "
    "of each"
)


@dataclass(frozen=True)
class Exchange:
    """A question, the number of pictures shown with it, and the answer to be learned."""

    question: str
    answer: str
    images: int = 0


@dataclass(frozen=True)
class Row:
    """A conversation to learn from; `origin` says where it was read, as messages name it.

    Raises PromptError where there is nothing to learn in it, or where its pictures and their places are not as many.
    """

    images: tuple[Source, ...]
    exchanges: tuple[Exchange, ...]
    system: str | None = None
    origin: str = field(default="a row", compare=False)

    def __post_init__(self) -> None:
        if not self.exchanges:
            raise PromptError(f"{self.origin}: there is no answer to learn from; add one, or remove the row.")
        for exchange in self.exchanges:
            for name, text in (("question", exchange.question), ("answer", exchange.answer)):
                try:
                    check_text(name, text)
                except PromptError as error:
                    raise PromptError(f"{self.origin}: {error}") from error
            if not exchange.answer.strip():
                raise PromptError(f"{self.origin}: an answer is empty; write one, or remove the row.")
        places = sum(exchange.images for exchange in self.exchanges)
        if places != len(self.images):
            raise PromptError(
                f"{self.origin}: it has {counted(len(self.images), 'picture')} and {counted(places, 'place')} for "
                "them; name as "
                f"many pictures as its messages show."
            )


Place = Callable[[str], Source]  # the name of a picture in a row -> the picture


def row_of(table: Any, origin: str, place: Place = Path, prompt: str = PROMPT) -> Row:
    """A row of any accepted form; `place` finds the picture that a name stands for, `prompt` asks for a picture's plain
    text.

    Raises PromptError, which begins with `origin`, for a row of no such form.
    """
    if isinstance(table, Row):
        return table
    if not isinstance(table, dict):
        raise PromptError(f"{origin}: it is {shown(table)}, expected a table with {FORMS}.")
    images = _images(table, origin, place)
    if "messages" in table:
        return _conversation(table["messages"], "role", "content", images, origin)
    if "conversations" in table:
        return _conversation(table["conversations"], "from", "value", images, origin)
    question = next((table[key] for key in ("question", "prompt") if key in table), None)
    answer = table.get("answer")
    if question is None and answer is None and images:
        answer = next((table[key] for key in ("text", "caption") if key in table), None)
        question = prompt
    if not isinstance(question, str) or not isinstance(answer, str):
        raise PromptError(f"{origin}: it has {listed(table)}, expected {FORMS}.")
    system = table.get("system")
    if system is not None and not isinstance(system, str):
        raise PromptError(f"{origin}: its system prompt is {shown(system)}, expected a text.")
    return Row(images, (Exchange(question, answer, len(images)),), system, origin)


def _images(table: dict[str, Any], origin: str, place: Place) -> tuple[Source, ...]:
    """The pictures that a row names, or holds."""
    found: list[Any] = []
    for key in ("images", "image", "file_name"):
        value = table.get(key)
        if value is not None:
            found += value if isinstance(value, (list, tuple)) else [value]
    if any(isinstance(each, str) and not each for each in found):
        raise PromptError(f"{origin}: the name of a picture is empty; name the file, or leave it out.")
    return tuple(place(each) if isinstance(each, str) else each for each in found)


def _conversation(messages: Any, role_key: str, text_key: str, images: tuple[Source, ...], origin: str) -> Row:
    """A row from messages that each say who speaks and what."""
    if not isinstance(messages, (list, tuple)) or not all(isinstance(message, dict) for message in messages):
        raise PromptError(f"{origin}: its messages are {shown(messages)}, expected a list of tables.")
    said = [_said(message, role_key, text_key, origin) for message in messages]
    system = None
    if said and said[0].role == "system":
        system, said = said[0].text, said[1:]
    turns = [each.role for each in said]
    if turns != ["user", "assistant"] * (len(turns) // 2) or not turns:
        order = ", ".join(turns) or "nobody"
        raise PromptError(
            f"{origin}: {order if len(order) < 100 else order[:100] + '...'} speaks in this order, expected user and "
            "assistant in "
            "turn, each question with its answer; mend the row."
        )
    questions = _placed([each for each in said if each.role == "user"], len(images), origin)
    answers = [each.text for each in said if each.role == "assistant"]
    exchanges = tuple(Exchange(q.text, answer, q.images) for q, answer in zip(questions, answers, strict=True))
    return Row(images, exchanges, system, origin)


@dataclass(frozen=True)
class _Said:
    """A message: who speaks, the text, and the number of pictures that its parts show."""

    role: str
    text: str
    images: int = 0


def _said(message: dict[str, Any], role_key: str, text_key: str, origin: str) -> _Said:
    role = ROLES.get(str(message.get(role_key, message.get("role"))))
    if role is None:
        raise PromptError(
            f"{origin}: a message is by {shown(message.get(role_key))}, expected one of {listed(ROLES)}; mend the row."
        )
    content = message.get(text_key, message.get("content"))
    parts = content if isinstance(content, list) else [content]
    texts, images = [], 0
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else "text"
        text = part.get("text") if isinstance(part, dict) else part
        if kind in ("image", "image_url") and role == "user":
            images += 1
        elif kind == "text" and isinstance(text, str):
            texts.append(text)
        else:
            raise PromptError(f"{origin}: a message holds {shown(part)}, expected a text, or parts of text and images.")
    return _Said(role, "".join(texts), images)


def _placed(questions: Sequence[_Said], pictures: int, origin: str) -> list[_Said]:
    """Questions with the number of pictures each shows: as their parts say, else by marks in the texts, else all with
    the first.
    """
    if any(question.images for question in questions) or not pictures:
        return list(questions)
    marks = [question.text.count(MARK) for question in questions]
    if not any(marks):
        return [_Said("user", questions[0].text, pictures), *questions[1:]]
    if sum(marks) != pictures:
        raise PromptError(
            f"{origin}: its questions say {MARK} {counted(sum(marks), 'time')}, and it has "
            f"{counted(pictures, 'picture')}; write one "
            "mark for each picture, or none to show them all first."
        )
    return [_Said("user", _unmarked(q.text), n) for q, n in zip(questions, marks, strict=True)]


def _unmarked(text: str) -> str:
    """A text without the marks of pictures and the line ends that set them apart."""
    for mark in (f"{MARK}\n", f"\n{MARK}", MARK):
        text = text.replace(mark, "")
    return text
