"""An answer on its way: chunks to loop over, or, in a notebook, a picture and a text that grows beside it."""

from collections.abc import Iterator, Sequence

from ..inputs.image import Pixels
from .generate import Chunk


class Stream(Iterator[Chunk]):
    """The chunks of an answer, made as they are asked for, once.

    A notebook that is given a stream to display (the last line of a cell) reads it to its end and shows it growing in place.
    """

    def __init__(self, chunks: Iterator[Chunk], pictures: Sequence[Pixels]):
        self._chunks, self._pictures = chunks, pictures

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def close(self) -> None:
        """Break the answer off."""
        close = getattr(self._chunks, "close", None)
        if close is not None:
            close()

    def _ipython_display_(self) -> None:
        from .notebook import show

        show(self, self._pictures)
