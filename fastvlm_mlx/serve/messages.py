"""The messages of a request, in the forms of chat completions and of responses -> what is said, and the pictures shown
with it.

Within a turn the pictures stand before its text, as the model was trained, in the order in which they were sent; they
never move to another turn. Texts of several parts are joined by a line end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..inputs.prompt import MAX_PROMPT_CHARS, SYSTEM
from .fields import MAX_PICTURES
from .refusal import Refusal, bad_request

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class PictureLink:
    """A picture as a request has it: its address, `data:` or another, and the field it stands in; or its bytes
    themselves.
    """

    address: str
    param: str
    data: bytes | None = None


@dataclass(frozen=True)
class Said:
    """A message: who says it, its text, and its pictures in order."""

    role: Role
    text: str
    pictures: tuple[PictureLink, ...] = ()


def chat_messages(messages: Sequence[Mapping[str, Any]]) -> list[Said]:
    """The messages of a chat completion, of the shape of `fields.CHAT_FIELDS`; raises a Refusal.

    Where the first is not the system's, the usual system prompt stands before it, as `generate` has it.
    """
    return _complete([_said(message, f"messages[{number}]") for number, message in enumerate(messages)])


def response_messages(asked: str | Sequence[Mapping[str, Any]], instructions: str | None) -> list[Said]:
    """The messages of a response, of the shape of `fields.RESPONSE_FIELDS`; raises a Refusal."""
    said = [Said("system", instructions)] if instructions else []
    if isinstance(asked, str):
        return _complete([*said, Said("user", asked)])
    return _complete([*said, *(_said(message, f"input[{number}]") for number, message in enumerate(asked))])


def _complete(said: list[Said]) -> list[Said]:
    """With a system prompt; raises a Refusal where there is too much of anything."""
    pictures = [picture for message in said for picture in message.pictures]
    if len(pictures) > MAX_PICTURES:
        raise bad_request(
            f"The request shows {len(pictures)} pictures, expected up to {MAX_PICTURES}; show fewer.",
            pictures[-1].param,
        )
    characters = sum(len(message.text) for message in said)
    if characters > MAX_PROMPT_CHARS:
        raise bad_request(f"The messages hold {characters:,} characters, more than {MAX_PROMPT_CHARS:,}; shorten them.")
    return said if said[0].role == "system" else [Said("system", SYSTEM), *said]


def _said(message: Mapping[str, Any], path: str) -> Said:
    role: Role = "system" if message["role"] == "developer" else message["role"]
    content = message.get("content")
    if content is None and role != "assistant":  # an assistant's is null where it would call a tool
        raise bad_request(f"`{path}.content` is missing.", f"{path}.content")
    if content is None or isinstance(content, str):
        return Said(role, content or "")
    texts, pictures = [], []
    for number, part in enumerate(content):
        where = f"{path}.content[{number}]"
        if part["type"] not in ("image_url", "input_image"):
            texts.append(part["text"])
        elif role == "user":
            pictures.append(_link(part, where))
        else:
            raise _misplaced(where, role)
    return Said(role, "\n".join(texts), tuple(pictures))


def _link(part: Mapping[str, Any], where: str) -> PictureLink:
    found = part["image_url"]
    if isinstance(found, str):
        return PictureLink(found, f"{where}.image_url")
    return PictureLink(found["url"], f"{where}.image_url.url")


def _misplaced(where: str, role: str) -> Refusal:
    return bad_request(f"`{where}` is a picture in a message of the role {role}; pictures are shown by users.", where)
