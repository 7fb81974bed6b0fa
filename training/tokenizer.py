"""The tokenizer of ``tiny``: byte-level BPE in Qwen2's form, with merges made from the questions and answers.

Plain BPE training would also learn pieces such as "st" and "er", and then printed words would be read as pieces. Here
every merge grows a word of the corpus from its first character (with the space before it), so words of questions and
answers are one token each, and anything printed between quotation marks is spelled one character at a time.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (END_OF_TEXT, START, END)
PATTERN = (  # Qwen2's
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
VOCABULARY_MULTIPLE = 64


def byte_characters() -> list[str]:
    """The 256 characters that stand for bytes, in GPT-2's order (index = byte)."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table, spare = {}, 256
    for byte in range(256):
        if byte in kept:
            table[byte] = chr(byte)
        else:
            table[byte] = chr(spare)
            spare += 1
    return [table[byte] for byte in range(256)]


def build(corpus: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary and the merges for a corpus of lines.

    Words after a space, and words with a capital at the start of a line, become one token. A system prompt's role
    names stay spelled: they come once in a prompt, except "assistant", which is merged around its double s.
    """
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    counts: dict[str, int] = {}
    for line in corpus:
        for piece, _ in splitter.pre_tokenize_str(line):
            counts[piece] = counts.get(piece, 0) + 1
    merges: dict[tuple[str, str], None] = {}
    for piece in sorted(counts, key=lambda p: (-counts[p], p)):
        space = piece[0] == "Ġ"
        if len(piece) > 1 and (space or (piece[0].isupper() and piece[1:].islower())):
            for end in range(1, len(piece)):
                merges.setdefault((piece[:end], piece[end]))
    inside = [("s", "s"), ("ss", "i"), ("ssi", "s"), ("ssis", "t"), ("ssist", "a"), ("ssista", "n"), ("ssistan", "t")]
    for pair in [*inside, ("a", "ssistant")]:
        merges.setdefault(pair)
    vocabulary = {character: index for index, character in enumerate(sorted(byte_characters()))}
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    return vocabulary, list(merges)


def padded_size(vocabulary: dict[str, int]) -> int:
    """Rows of the embedding: all tokens, up to a multiple of 64."""
    count = len(vocabulary) + len(SPECIAL)
    return -(-count // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def save(folder: Path, vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> None:
    """Write the files of a published Qwen2 tokenizer (no tokenizer.json) into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = {token: len(vocabulary) + index for index, token in enumerate(SPECIAL)}
    added = {
        str(index): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token, index in ids.items()
    }
    special: dict[str, object] = {"additional_special_tokens": [START, END], "eos_token": END, "pad_token": END_OF_TEXT}
    config: dict[str, object] = {
        "add_prefix_space": False, "added_tokens_decoder": added, "additional_special_tokens": [START, END],
        "bos_token": None, "clean_up_tokenization_spaces": False, "eos_token": END, "errors": "replace",
        "model_max_length": 8192, "pad_token": END_OF_TEXT, "padding_side": "right", "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer", "unk_token": None,
    }  # fmt: skip
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    for name, content in (("added_tokens", ids), ("special_tokens_map", special), ("tokenizer_config", config)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def load(folder: Path) -> Tokenizer:
    """The tokenizer of a folder written by ``save``."""
    vocabulary: dict[str, int] = json.loads((folder / "vocab.json").read_text("utf-8"))
    lines = (folder / "merges.txt").read_text("utf-8").splitlines()[1:]
    merges = [(left, right) for left, right in (line.split(" ") for line in lines)]
    return assemble(vocabulary, merges)


def assemble(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """A tokenizer from a vocabulary and merges, the special tokens after them."""
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer
