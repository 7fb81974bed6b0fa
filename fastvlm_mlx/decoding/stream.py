"""An answer while it is made: chunks to loop over, or, in a notebook, a picture beside a text that grows."""

import time
from collections.abc import Iterator, Sequence

from ..inputs.image import Pixels
from . import notebook
from .answer import Chunk

INTERVAL = 0.1  # seconds between two updates of a growing answer


class Stream(Iterator[Chunk]):
    """The chunks of an answer, made as they are asked for, once.

    A notebook that is given a stream to display (the last line of a cell) reads it to its end and shows it growing in
    place.
    """

    def __init__(self, chunks: Iterator[Chunk], pictures: Sequence[Pixels]):
        self._chunks, self._pictures = chunks, pictures

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def close(self) -> None:
        """End the answer early and free what it holds."""
        close = getattr(self._chunks, "close", None)
        if close is not None:
            close()

    def _ipython_display_(self) -> None:
        from IPython.display import display

        thumbnails = [notebook.thumbnail(pixels) for pixels in self._pictures]
        handle = display({"text/html": notebook.html("", thumbnails)}, raw=True, display_id=True)
        text, drawn = "", time.monotonic()
        for chunk in self:
            text += chunk.text
            if chunk.answer is not None:
                handle.update({"text/html": chunk.answer._repr_html_(), "text/plain": chunk.answer.text}, raw=True)
            elif time.monotonic() - drawn >= INTERVAL:
                handle.update({"text/html": notebook.html(text, thumbnails), "text/plain": text}, raw=True)
                drawn = time.monotonic()
