"""API keys: who may ask, and which caches are whose.

Keys are kept as digests only, and compared in constant time, each of them, so that neither how long a comparison takes
nor what a log or a crash shows tells anything about one.
"""

import hmac
import secrets
from collections.abc import Sequence
from hashlib import blake2b

from ..errors import OptionError
from .refusal import Refusal

LEAST_KEY_CHARS = 8  # shorter ones are guessed
KEY_BYTES = 24  # of randomness in a key made here
SCHEME = "bearer"


def new_key() -> str:
    """A key that nobody can guess."""
    return f"sk-{secrets.token_urlsafe(KEY_BYTES)}"


class Keys:
    """The keys that open the server; none, and it is open to whoever reaches it."""

    def __init__(self, keys: Sequence[str] = ()):
        for number, key in enumerate(keys, start=1):
            if len(key) < LEAST_KEY_CHARS or not key.isascii() or not key.isprintable() or " " in key:
                raise OptionError(
                    f"`api_key` number {number} is shorter than {LEAST_KEY_CHARS} characters, or holds others "
                    "than printable "
                    "ASCII without spaces; choose another one."
                )
        self._digests = [_digest(key) for key in keys]

    def __len__(self) -> int:
        return len(self._digests)

    def salt_of(self, authorization: str | None) -> bytes:
        """What caches are salted with for this `Authorization` header, b"" on an open server.

        Raises a Refusal (401) unless it holds one of the keys.
        """
        if not self._digests:
            return b""
        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() != SCHEME or not given.strip():
            raise _unauthorized("An API key is needed; send it as 'Authorization: Bearer KEY'.")
        found = _digest(given.strip())
        matches = [hmac.compare_digest(found, known) for known in self._digests]
        if not any(matches):
            raise _unauthorized("The API key is not one of this server's; check it.")
        return found


def _digest(key: str) -> bytes:
    return blake2b(key.encode("utf-8", "surrogateescape"), digest_size=16, person=b"fastvlm-mlx key").digest()


def _unauthorized(message: str) -> Refusal:
    return Refusal(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
