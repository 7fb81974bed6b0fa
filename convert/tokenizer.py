"""A tokenizer's published files (vocab.json, merges.txt, added_tokens.json) or tokenizer.json -> one tokenizer.

Text is normalised to NFC, cut by Qwen2's pattern, written byte by byte and merged. The ids are those of transformers'
Qwen2Tokenizer.
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as BPETokenizer
from tokenizers.models import BPE

from fastvlm_mlx.errors import CheckpointError, TokenizerError, shown
from fastvlm_mlx.files import regular as files
from fastvlm_mlx.files.jsonfile import MAX_JSON_BYTES, parse_table
from fastvlm_mlx.inputs.tokenizer import Tokenizer

# How Qwen2 cuts text before merging: English contractions, words with one leading mark, single digits, runs of other
# signs with the line ends after them, line ends, and blanks. (transformers, models/qwen2/tokenization_qwen2.py)
WORDS = "|".join([
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
    r"[^\r\n\p{L}\p{N}]?\p{L}+",
    r"\p{N}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
])  # fmt: skip


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder, from tokenizer.json where it exists, else from the published files.

    Raises TokenizerError.
    """
    if (folder / "tokenizer.json").exists():
        return Tokenizer.open(folder / "tokenizer.json")
    vocab, merges = _vocab(folder / "vocab.json"), _merges(folder / "merges.txt")
    made = {left + right for left, right in merges}
    if not made and any(len(token) > 1 for token in vocab):
        raise TokenizerError(f"{folder / 'merges.txt'}: no merges in it; fetch it again.", path=folder / "merges.txt")
    try:
        bpe = BPETokenizer(BPE(vocab=vocab, merges=merges))
    except Exception as error:  # the Rust side raises plain Exception
        raise TokenizerError(
            f"{folder}: vocab.json and merges.txt do not fit together ({str(error)[:200]}); fetch them again.",
            path=folder,
        ) from error
    bpe.normalizer = normalizers.NFC()
    cut = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    _add_tokens(bpe, folder)
    return Tokenizer(bpe, str(folder))


def _read(path: Path) -> str:
    try:
        return files.read_text(path, MAX_JSON_BYTES)
    except FileNotFoundError as error:
        raise TokenizerError(
            f"{path.parent}: no {path.name}; expected tokenizer.json, or vocab.json and merges.txt. "
            "Another folder with the tokenizer can be named as `tokenizer`.",
            path=path.parent,
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise TokenizerError(f"{path}: cannot be read ({reason}); fetch it again.", path=path) from error


def _json(path: Path) -> dict[str, Any]:
    try:
        return parse_table(_read(path).encode(), str(path))
    except TokenizerError:
        raise
    except CheckpointError as error:
        raise TokenizerError(str(error), path=path) from error


def _vocab(path: Path) -> dict[str, int]:
    vocab = _json(path)
    if not all(type(token) is int and 0 <= token < 1 << 31 for token in vocab.values()):
        raise TokenizerError(f"{path}: expected a table of tokens and their ids; fetch it again.", path=path)
    return vocab


def _merges(path: Path) -> list[tuple[str, str]]:
    every = (line.removesuffix("\r") for line in _read(path).split("\n"))
    lines = [line for line in every if line and not line.startswith("#version")]
    pairs = [tuple(line.split(" ")) for line in lines]
    bad = next((line for line, pair in zip(lines, pairs, strict=True) if len(pair) != 2), None)
    if bad is not None:
        raise TokenizerError(f"{path}: {bad[:40]!r} is not a pair of tokens; fetch it again.", path=path)
    return [(left, right) for left, right in pairs]


def _add_tokens(bpe: BPETokenizer, folder: Path) -> None:
    """Add the tokens beyond the vocabulary under their files' ids, special or not as tokenizer_config.json says."""
    settings = _json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    try:
        described = {str(entry["content"]): dict(entry) for entry in settings.get("added_tokens_decoder", {}).values()}
        ids = {str(entry["content"]): int(token) for token, entry in settings.get("added_tokens_decoder", {}).items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TokenizerError(
            f"{folder / 'tokenizer_config.json'}: 'added_tokens_decoder' is no table of ids and tokens; fetch it "
            "again.",
            path=folder / "tokenizer_config.json",
        ) from error
    if (folder / "added_tokens.json").exists():
        ids |= _vocab(folder / "added_tokens.json")
    for name, token in sorted(ids.items(), key=lambda item: item[1]):
        entry = described.get(name, {})
        special = bool(entry.get("special", name.startswith("<|")))
        flags = {flag: bool(entry.get(flag, False)) for flag in ("single_word", "lstrip", "rstrip", "normalized")}
        bpe.add_tokens([AddedToken(name, special=special, **flags)])
        if bpe.token_to_id(name) != token:
            raise TokenizerError(
                f"{folder}: {shown(name)} should have id {token} and follows the vocabulary as "
                f"{bpe.token_to_id(name)}; vocab.json and added_tokens.json do not belong together; fetch them again.",
                path=folder,
            )
