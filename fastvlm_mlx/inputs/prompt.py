"""A question about pictures -> the decoder's input, in order: runs of token ids with image slots between them.

The template is "qwen_2" of apple/ml-fastvlm (ChatML). Text is tokenised piece by piece around special tokens and
images.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from ..errors import PromptError
from .pieces import ImageSlot, Piece
from .tokenizer import Tokenizer

PROMPT = "Describe the image."
SYSTEM = "You are a helpful assistant."
# What the text of a role is called in messages.
CALLED = {"system": "system prompt", "user": "prompt", "assistant": "answer"}
MAX_PROMPT_CHARS = 1_000_000  # far beyond any context; bounds the time and memory of tokenising


@dataclass(frozen=True)
class Turn:
    """A question, the number of its pictures, and the token ids of its answer; None while there is no answer."""

    prompt: str
    images: int = 0
    answer: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Message:
    """What one side says, and the number of pictures shown with it, which only the user has.

    `ids` are the ids that an answer was generated as; without them, its text is tokenised.
    """

    role: Literal["system", "user", "assistant"]
    text: str
    images: int = 0
    ids: tuple[int, ...] | None = None


def render(tokenizer: Tokenizer, turns: Sequence[Turn], image_tokens: int, system: str | None = None) -> list[Piece]:
    """A conversation as runs of token ids and image slots, up to where its last answer begins, or ends if it is given.

    Each image takes `image_tokens` positions and stands on a line of its own before the text of its turn, as in LLaVA;
    slots count through all turns. An answer is given by the ids that were generated, and its turn is closed even where
    it was cut short. Raises PromptError for text that is not Unicode or is too long.
    """
    messages = [Message("system", SYSTEM if system is None else system)]
    for turn in turns:
        messages.append(Message("user", turn.prompt, turn.images))
        if turn.answer is not None:
            messages.append(Message("assistant", "", ids=turn.answer))
    return render_messages(tokenizer, messages, image_tokens, answering=bool(turns) and turns[-1].answer is None)


def render_messages(
    tokenizer: Tokenizer, messages: Sequence[Message], image_tokens: int, *, answering: bool = True
) -> list[Piece]:
    """Messages in any order, as runs of token ids and image slots; with `answering`, up to where an answer begins.

    Images take their places as in `render`. Raises PromptError for text that is no Unicode or far too long.
    """
    start, end = (tokenizer.special(name) for name in ("<|im_start|>", "<|im_end|>"))
    closing = [end, *tokenizer.encode("\n")]
    assistant = [start, *tokenizer.encode("assistant\n")]
    pieces: list[Piece] = []
    shown = 0
    for message in messages:
        check_text(CALLED[message.role], message.text)
        if message.role == "system":
            pieces.append([start, *tokenizer.encode(f"system\n{message.text}"), *closing])
        elif message.role == "user":
            slots = [ImageSlot(index, image_tokens) for index in range(shown, shown + message.images)]
            pieces += [[start], *_message(tokenizer, message.text, slots), closing]
            shown += message.images
        else:
            said = tokenizer.encode(message.text) if message.ids is None else message.ids
            pieces.append([*assistant, *said, *closing])
    return list(_joined([*pieces, assistant] if answering else pieces))


def check_text(name: str, text: str) -> None:
    """Raise PromptError unless `text` is valid Unicode of at most MAX_PROMPT_CHARS characters.

    The message calls it `name`.
    """
    if not isinstance(text, str):
        raise PromptError(f"The {name} is a {type(text).__name__}, expected text.")
    if len(text) > MAX_PROMPT_CHARS:
        raise PromptError(f"The {name} holds {len(text):,} characters, more than {MAX_PROMPT_CHARS:,}; shorten it.")
    if "\x00" in text:
        raise PromptError(f"The {name} holds a NUL character; remove it.")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError(
                f"The {name} holds bytes that are not UTF-8, or half of a surrogate pair (character "
                f"{error.start + 1}); pass valid Unicode."
            ) from error


def _message(tokenizer: Tokenizer, prompt: str, slots: list[ImageSlot]) -> Iterator[Piece]:
    """The pieces that follow <|im_start|> in the user's turn."""
    if not slots:
        yield tokenizer.encode(f"user\n{prompt}")
        return
    yield tokenizer.encode("user\n")
    for slot in slots:
        yield slot
        yield tokenizer.encode("\n" if slot is not slots[-1] else f"\n{prompt}")


def _joined(pieces: list[Piece]) -> Iterator[Piece]:
    """The pieces with neighbouring runs of tokens joined into one."""
    run: list[int] = []
    for piece in pieces:
        if isinstance(piece, list):
            run += piece
        else:
            yield from (run, piece)
            run = []
    yield run
