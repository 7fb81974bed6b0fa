"""How results look in a notebook: HTML and Markdown of a text beside its pictures, and thumbnails.

Nothing here needs IPython. What a model wrote is text, never markup.
"""

import re
from base64 import b64encode
from collections.abc import Sequence
from io import BytesIO

from PIL import Image

from .. import progress
from ..inputs.image import Pixels

THUMBNAIL = 256  # pixels of a side, at most
MARKUP = re.compile(r"([\\`*_\[\]<>&#|~$]|^[-+=])")  # what can mean something in Markdown
NUMBER = re.compile(r"^(\d+)([.)])")  # so can this, and it becomes the first item of a list


def thumbnail(pixels: Pixels) -> bytes:
    """A small JPEG of a prepared picture (S, S, 3)."""
    image, file = Image.fromarray(pixels), BytesIO()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(file, "JPEG", quality=85)
    return file.getvalue()


def thumbnails(pictures: Sequence[Pixels]) -> tuple[bytes, ...]:
    """Small JPEGs of prepared pictures in a notebook; none elsewhere, where they would cost time for nothing."""
    return tuple(map(thumbnail, pictures)) if progress.in_notebook() else ()


def html(text: str, thumbnails: Sequence[bytes], details: str = "") -> str:
    """HTML of pictures (JPEG bytes) beside a text, which is escaped, with `details` folded below."""
    from html import escape  # not on the way to a first token

    images = "".join(
        f'<img src="data:image/jpeg;base64,{b64encode(jpeg).decode()}" alt="picture">' for jpeg in thumbnails
    )
    folded = ""
    if details:
        summary, _, rest = escape(details).partition("\n")
        folded = f'<details style="opacity:0.7"><summary>{summary}</summary><pre>{rest}</pre></details>'
    return (
        # "$5" is no formula.
        '<div class="tex2jax_ignore mathjax_ignore" style="display:flex;gap:1em;align-items:flex-start">'
        f'{images}<div><div style="white-space:pre-wrap">{escape(text)}</div>{folded}</div></div>'
    )


def markdown(text: str, details: str) -> str:
    """Markdown of a text as it is, with `details` folded below it; pictures are in the HTML alone."""
    from html import escape

    lines = "  \n".join(NUMBER.sub(r"\1\\\2", MARKUP.sub(r"\\\1", line.strip())) for line in text.splitlines())
    if not details:
        return f"{lines}\n"
    summary, _, rest = escape(details).partition("\n")
    return f"{lines}\n\n<details><summary>{summary}</summary><pre>{rest}</pre></details>\n"
