"""Pictures of a request -> prepared pixels: `data:` addresses decoded strictly, within bounds, a few at a time.

Nothing else is opened: a path is refused like any address that is not `data:`, without a look at whether it is there.
Addresses of the web are for `fetching`, where that was allowed.
"""

from __future__ import annotations

import binascii
import re
import threading
from collections import OrderedDict
from hashlib import blake2b

from ..decoding.engine import Engine
from ..decoding.image_cache import digest
from ..errors import shown
from ..inputs.image import Pixels
from ..inputs.imagefile import MAX_PIXELS
from .refusal import Refusal, bad_request, refusal_of

DATA = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w.+-]+=[\w.+-]*)*);base64,", re.IGNORECASE)
WEB = re.compile(r"https?://", re.IGNORECASE)
MAX_HEADER = 200  # characters before the comma of a data: address
PREPARED_BYTES = 64_000_000  # of prepared pixels that are kept
MAX_PREPARED = 20  # pictures whose pixels are kept: at 1024, so many bytes
UNKNOWN_TYPES = ("", "application/octet-stream", "binary/octet-stream")


def is_web_address(address: str) -> bool:
    """Whether a picture's address is one of the web."""
    return WEB.match(address) is not None


def data_of(address: str, param: str) -> bytes:
    """The bytes in a `data:` address; raises a Refusal (400) for anything else, and for base64 that is not exact."""
    found = DATA.match(address[:MAX_HEADER])
    if found is None:
        if address[:5].lower() == "data:":
            raise bad_request(
                f"`{param}` begins with {shown(address[:40])}, expected 'data:image/jpeg;base64,' or the like and "
                "base64.",
                param,
            )
        raise bad_request(
            f"`{param}` is {shown(address[:100])}, and pictures are taken from 'data:' addresses only: no file "
            "and no other "
            "address is opened; send the picture itself, as 'data:image/jpeg;base64,...'.",
            param,
        )
    kind = (found[1] or "").lower()
    if kind not in UNKNOWN_TYPES and not kind.startswith("image/"):
        raise bad_request(f"`{param}` is of type {shown(kind)}, expected a picture, such as 'image/jpeg'.", param)
    encoded = address[found.end() :]
    try:
        data = binascii.a2b_base64(encoded, strict_mode=True)
        if len(encoded) != -(-len(data) // 3) * 4:  # which Python's strictness lets through
            raise ValueError("excess padding")
        return data
    except ValueError as error:  # binascii.Error, and characters that are not ASCII
        raise bad_request(f"`{param}` is not base64 ({str(error)[:80]}); encode the picture again.", param) from error


class PreparedPictures:
    """Prepares pictures for one engine and keeps the pixels of recent ones, which a conversation shows with every turn.

    What is kept is found by the file's bytes and by whose it is (`salt`): nobody learns from the time taken what others
    show.
    """

    def __init__(self, engine: Engine, *, max_pixels: int = MAX_PIXELS, capacity: int = PREPARED_BYTES):
        self._engine, self._max_pixels = engine, max_pixels
        self.capacity = capacity  # bytes of pixels
        self._kept: OrderedDict[bytes, tuple[Pixels, bytes]] = OrderedDict()
        self._lock = threading.Lock()
        self.nbytes = 0  # memory held, in bytes

    def prepare(self, data: bytes, salt: bytes, param: str) -> tuple[Pixels, bytes]:
        """The pixels (S, S, 3), uint8, of a picture's file, and their digest; raises a Refusal (400)."""
        key = blake2b(data, digest_size=16, key=salt).digest()
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
                return found
        try:
            pixels = self._engine.pixels(data, max_pixels=self._max_pixels)
        except Exception as error:
            raise self._refused(error, param) from error
        prepared = pixels, digest(pixels)
        with self._lock:
            if pixels.nbytes <= self.capacity and key not in self._kept:
                self._kept[key] = prepared
                self.nbytes += pixels.nbytes
                while self.nbytes > self.capacity or len(self._kept) > MAX_PREPARED:
                    self.nbytes -= self._kept.popitem(last=False)[1][0].nbytes
        return prepared

    def __len__(self) -> int:
        """Pictures kept."""
        return len(self._kept)

    @staticmethod
    def _refused(error: Exception, param: str) -> Refusal:
        refusal = refusal_of(error, param)
        if refusal.status == 500 and isinstance(error, (ValueError, OSError, MemoryError)):
            return bad_request("The picture cannot be decoded; save it as PNG or JPEG.", param)
        return refusal
