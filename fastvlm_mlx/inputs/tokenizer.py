"""Text <-> token ids: a byte-level BPE (Qwen2's) for which a user's text is never anything but text.

Enters: tokenizer.json of our folder. `prompt.py` places special tokens by name; where a message spells one out, it is
encoded letter by letter, so nobody can end a turn or fake a role by typing `<|im_end|>`.
"""

import codecs
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer as BPETokenizer

from ..errors import PromptError, TokenizerError
from ..files import regular as files
from ..files.jsonfile import MAX_JSON_BYTES

ROLE_TOKENS = ("<|im_start|>", "<|im_end|>")
END_OF_TEXT = "<|endoftext|>"


class Tokenizer:
    """A BPE tokenizer with Qwen2's special tokens; raises TokenizerError where one of these is missing.

    `origin` is what messages call it: the path of its file.
    """

    def __init__(self, bpe: BPETokenizer, origin: str):
        self.bpe, self.origin = bpe, origin
        bpe.encode_special_tokens = True  # the names of special tokens in a text are text
        bpe.no_padding()
        bpe.no_truncation()
        for name in ROLE_TOKENS:
            self.special(name)
        added = bpe.get_added_tokens_decoder()
        self._special_ids = {i for i, token in added.items() if token.special}
        self._whole = {i: token.content.encode() for i, token in added.items() if not token.special}

    @classmethod
    def open(cls, path: Path) -> "Tokenizer":
        """Read a tokenizer.json; raises TokenizerError where it is missing, damaged or not Qwen2's."""
        try:
            return cls(BPETokenizer.from_str(files.read_text(path, MAX_JSON_BYTES)), str(path))
        except FileNotFoundError as error:
            raise TokenizerError(
                f"{path.parent}: no tokenizer.json in it; fetch or convert the model again.",
                path=path.parent,
            ) from error
        except (TokenizerError, KeyboardInterrupt):
            raise
        except OSError as error:
            raise TokenizerError(
                f"{path}: cannot be read ({error.strerror}); check the file and its permissions.",
                path=path,
            ) from error
        except BaseException as error:  # the Rust side raises plain Exception, and where it panics not even that
            if isinstance(error, (SystemExit, MemoryError)):
                raise
            raise TokenizerError(
                f"{path}: not a tokenizer ({str(error)[:200]}); fetch or convert the model again.",
                path=path,
            ) from error

    def __len__(self) -> int:
        """One more than the largest token id."""
        dense = int(self.bpe.get_vocab_size(with_added_tokens=True))
        if all(map(self.bpe.id_to_token, range(dense))):
            return dense  # so many tokens have as many ids, none of them larger; a table of them takes longer to make
        return max(self.bpe.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """The token ids of a text in which nothing is special; raises PromptError for text that is not Unicode."""
        try:
            return list(self.bpe.encode(text, add_special_tokens=False).ids)
        except (UnicodeEncodeError, TypeError) as error:
            raise PromptError(
                "The text holds half of a surrogate pair, which is not a character; pass valid Unicode."
            ) from error
        except BaseException as error:  # see `open`
            if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
                raise
            raise TokenizerError(
                f"{self.origin}: the tokenizer fails at a text ({str(error)[:200]}); fetch or convert the model again."
            ) from error

    def special(self, name: str) -> int:
        """The id of a special token; raises TokenizerError where there is no such token."""
        token = self.bpe.token_to_id(name)
        if token is None:
            raise TokenizerError(f"{self.origin}: no {name} among its tokens; expected a Qwen2 tokenizer.")
        return int(token)

    def is_special(self, token: int) -> bool:
        """Whether an id is a special token's."""
        return token in self._special_ids

    def name_of(self, token: int) -> str:
        """What the tokenizer calls an id, such as "<|im_end|>"; "" where no token has it."""
        return self.bpe.id_to_token(token) or ""

    def find(self, name: str) -> int | None:
        """The id of a token by its name, or None."""
        return self.bpe.token_to_id(name)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; special tokens are left out, bytes that are not UTF-8 become U+FFFD."""
        decoder = self.decoder()
        return "".join(decoder.add(i) for i in ids) + decoder.finish()

    def decoder(self) -> "StreamDecoder":
        """A new decoder for tokens that arrive one at a time."""
        return StreamDecoder(self)

    def bytes_of(self, token: int) -> bytes:
        """The bytes that a token stands for; empty for special tokens and for ids without a token."""
        if token in self._special_ids:
            return b""
        if token in self._whole:  # added as it is written, not byte by byte
            return self._whole[token]
        symbols = self.bpe.id_to_token(token) or ""
        table = _bytes_of_symbols()
        return b"".join(bytes([table[s]]) if s in table else s.encode() for s in symbols)

    def every_bytes(self) -> list[bytes]:
        """The bytes of every id from 0 on, as `bytes_of` gives them, in less time than asking for each."""
        table = {ord(symbol): chr(byte) for symbol, byte in _bytes_of_symbols().items()}
        every = [b""] * len(self)
        for symbols, token in self.bpe.get_vocab(with_added_tokens=True).items():
            if token not in self._special_ids:
                try:
                    every[token] = symbols.translate(table).encode("latin-1")
                except UnicodeEncodeError:  # symbols that stand for themselves
                    every[token] = self.bytes_of(token)
        for token, content in self._whole.items():
            every[token] = content
        return every

    def to_json(self) -> str:
        """The tokenizer as the content of a tokenizer.json."""
        return str(self.bpe.to_str(pretty=False))


class StreamDecoder:
    """Decodes token ids one at a time into whole characters.

    A character that is split over several tokens appears with the token that has its last byte.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        """The text that this token completes, possibly ""."""
        return self._utf8.decode(self._tokenizer.bytes_of(token))

    def finish(self) -> str:
        """The text left at the end: U+FFFD for an incomplete character, else ""."""
        return self._utf8.decode(b"", final=True)


@cache
def _bytes_of_symbols() -> dict[str, int]:
    """The byte that each symbol of a byte-level BPE stands for.

    GPT-2's scheme writes each byte as one visible character: printable ones as themselves, the others from U+0100 on.
    """
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(shown)]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
