"""A question about pictures -> the decoder's input, in order: runs of token ids with image slots between them.

The template is "qwen_2" of apple/ml-fastvlm (ChatML). Text is tokenised piece by piece around special tokens and images.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from .errors import PromptError
from .tokenizer import Tokenizer

SYSTEM = "You are a helpful assistant."


@dataclass(frozen=True)
class ImageSlot:
    """The place of one picture, `index` counting from 0 in the order the pictures were given."""

    index: int


Piece = list[int] | ImageSlot


def render(tokenizer: Tokenizer, prompt: str, images: int, system: str | None = None) -> list[Piece]:
    """The first turn of a conversation up to where the answer begins, as runs of token ids and image slots.

    Each image stands on a line of its own before the text, as in LLaVA. Raises PromptError for text that is no Unicode.
    """
    for text in (prompt, system or ""):
        if "\x00" in text:
            raise PromptError("The text holds a NUL character; remove it.")
    start, end = (tokenizer.special(name) for name in ("<|im_start|>", "<|im_end|>"))
    closing = [end, *tokenizer.encode("\n")]
    instructions = SYSTEM if system is None else system
    pieces: list[Piece] = [
        [start, *tokenizer.encode(f"system\n{instructions}"), *closing, start],
        *_message(tokenizer, prompt, images),
        [*closing, start, *tokenizer.encode("assistant\n")],
    ]
    return list(_joined(pieces))


def _message(tokenizer: Tokenizer, prompt: str, images: int) -> Iterator[Piece]:
    """What follows <|im_start|> in the user's turn."""
    if not images:
        yield tokenizer.encode(f"user\n{prompt}")
        return
    yield tokenizer.encode("user\n")
    for index in range(images):
        yield ImageSlot(index)
        yield tokenizer.encode("\n" if index < images - 1 else f"\n{prompt}")


def _joined(pieces: list[Piece]) -> Iterator[Piece]:
    """Neighbouring runs of tokens as one run."""
    run: list[int] = []
    for piece in pieces:
        if isinstance(piece, list):
            run += piece
        else:
            yield from (run, piece)
            run = []
    yield run
