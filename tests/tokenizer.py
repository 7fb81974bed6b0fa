"""A small byte-level tokenizer, trained on a few sentences and written in the published form."""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from fastvlm_mlx.convert.tokenizer import WORDS

CORPUS = [
    "Describe the image. What is on the table? A red circle and a blue square, left of the star.",
    "def main(argv: list[str]) -> int:\n    return len(argv)\n\n\nif __name__ == '__main__':\n\tmain()",
    "快速视觉语言模型 看图说话 这是什么？ naïve café, l'été, it's, they'll, I'd",
    "system user assistant You are a helpful assistant. 0123456789 😀🎉👩‍👩‍👧‍👦",
]
VOCAB = 500


def write(folder: Path) -> Path:
    """vocab.json, merges.txt, added_tokens.json and tokenizer_config.json in the folder, which is returned."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    cut = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=VOCAB, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(bpe.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]) + "\n")
    size = len(model["vocab"])
    added = {name: size + i for i, name in enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    described = {str(i): {"content": name, "special": True, "normalized": False} for name, i in added.items()}
    settings = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": described, "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | {"pad_token": "<|endoftext|>", "unk_token": None})
    )
    return folder
