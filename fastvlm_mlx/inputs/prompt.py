"""A question about pictures -> the decoder's input, in order: runs of token ids with image slots between them.

The template is "qwen_2" of apple/ml-fastvlm (ChatML). Text is tokenised piece by piece around special tokens and
images.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..errors import PromptError
from .pieces import ImageSlot, Piece
from .tokenizer import Tokenizer

PROMPT = "Describe the image."
SYSTEM = "You are a helpful assistant."
MAX_PROMPT_CHARS = 1_000_000  # far beyond any context; bounds the time and memory of tokenising


@dataclass(frozen=True)
class Turn:
    """A question, the number of its pictures, and the token ids of its answer; None while there is no answer."""

    prompt: str
    images: int = 0
    answer: tuple[int, ...] | None = None


def render(tokenizer: Tokenizer, turns: Sequence[Turn], image_tokens: int, system: str | None = None) -> list[Piece]:
    """A conversation as runs of token ids and image slots, up to where its last answer begins, or ends if it is given.

    Each image takes `image_tokens` positions and stands on a line of its own before the text of its turn, as in LLaVA;
    slots count through all turns. An answer is given by the ids that were generated, and its turn is closed even where
    it was cut short. Raises PromptError for text that is not Unicode or is too long.
    """
    start, end = (tokenizer.special(name) for name in ("<|im_start|>", "<|im_end|>"))
    closing = [end, *tokenizer.encode("\n")]
    assistant = [start, *tokenizer.encode("assistant\n")]
    instructions = SYSTEM if system is None else system
    check_text("system prompt", instructions)
    pieces: list[Piece] = [[start, *tokenizer.encode(f"system\n{instructions}"), *closing]]
    shown = 0
    for turn in turns:
        check_text("prompt", turn.prompt)
        slots = [ImageSlot(index, image_tokens) for index in range(shown, shown + turn.images)]
        pieces += [[start], *_message(tokenizer, turn.prompt, slots), [*closing, *assistant]]
        shown += turn.images
        if turn.answer is not None:
            pieces.append([*turn.answer, *closing])
    return list(_joined(pieces))


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
