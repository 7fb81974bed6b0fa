"""How results look in a notebook: HTML and Markdown of an answer, a stream that grows in place, thumbnails.

Nothing here needs IPython, except `show`, which a notebook calls. What a model wrote is text, never markup.
"""

import re
import time
from base64 import b64encode
from collections.abc import Iterable, Sequence
from io import BytesIO
from typing import TYPE_CHECKING

from PIL import Image

from .. import progress
from ..inputs.image import Pixels

if TYPE_CHECKING:
    from .generate import Answer, Chunk

THUMBNAIL = 256  # pixels of a side, at most
INTERVAL = 0.1  # seconds between two updates of a growing answer
MARKUP = re.compile(r"([\\`*_\[\]<>&#|~$]|^[-+=])")  # what can mean something in Markdown
NUMBER = re.compile(r"^(\d+)([.)])")  # so can this, and it becomes the first item of a list


def thumbnail(pixels: Pixels) -> bytes:
    """A small JPEG of a prepared picture (S, S, 3)."""
    image, file = Image.fromarray(pixels), BytesIO()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(file, "JPEG", quality=85)
    return file.getvalue()


def thumbnails(pictures: Sequence[Pixels]) -> tuple[bytes, ...]:
    """Thumbnails of prepared pictures in a notebook; none elsewhere, where they would cost time and nobody would look."""
    return tuple(map(thumbnail, pictures)) if progress.in_notebook() else ()


def html(text: str, thumbnails: Sequence[bytes], details: str = "") -> str:
    """Pictures beside a text, `details` folded below it; both in full, as they are."""
    from html import escape  # not on the way to a first token

    images = "".join(f'<img src="data:image/jpeg;base64,{b64encode(jpeg).decode()}" alt="picture">' for jpeg in thumbnails)
    folded = ""
    if details:
        summary, _, rest = escape(details).partition("\n")
        folded = f'<details style="opacity:0.7"><summary>{summary}</summary><pre>{rest}</pre></details>'
    return (
        '<div class="tex2jax_ignore mathjax_ignore" style="display:flex;gap:1em;align-items:flex-start">'  # $5 is no formula
        f'{images}<div><div style="white-space:pre-wrap">{escape(text)}</div>{folded}</div></div>'
    )


def markdown(text: str, details: str) -> str:
    """A text as it is, and `details` folded below it. The pictures are left to the HTML: a notebook keeps both forms."""
    from html import escape

    lines = "  \n".join(NUMBER.sub(r"\1\\\2", MARKUP.sub(r"\\\1", line.strip())) for line in text.splitlines())
    summary, _, rest = escape(details).partition("\n")
    return f"{lines}\n\n<details><summary>{summary}</summary><pre>{rest}</pre></details>\n"


def show(chunks: Iterable["Chunk"], pictures: Sequence[Pixels]) -> "Answer | None":
    """Display an answer in the running notebook as it grows, beside its pictures; returns it when it is finished."""
    from IPython.display import display

    thumbnails = [thumbnail(pixels) for pixels in pictures]
    handle = display({"text/html": html("", thumbnails)}, raw=True, display_id=True)
    text, drawn = "", time.monotonic()
    for chunk in chunks:
        text += chunk.text
        if chunk.answer is not None:
            handle.update({"text/html": chunk.answer._repr_html_(), "text/plain": chunk.answer.text}, raw=True)
            return chunk.answer
        if time.monotonic() - drawn >= INTERVAL:
            handle.update({"text/html": html(text, thumbnails), "text/plain": text}, raw=True)
            drawn = time.monotonic()
    return None
