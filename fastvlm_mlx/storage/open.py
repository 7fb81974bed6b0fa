"""Our model folder, opened: its small files are read and checked, its weights are read when they are asked for.

config.json  model.safetensors (or shards with an index)  tokenizer.json  README.md  LICENSE
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ..config import MODEL_TYPE, ModelConfig
from ..errors import CheckpointError, TokenizerError, about_its_path, listed
from ..files import safetensors, shards
from ..files.adapters import check_whole
from ..files.jsonfile import read_table
from ..inputs.tokenizer import Tokenizer

Named = Iterable[tuple[str, mx.array]]


@dataclass(frozen=True)
class OpenModel:
    """A model folder whose small files have been read and checked.

    `weights()` reads the large files and yields (name, array), the names being the network's. `resolve()` gives the
    config that the weights fit; where config.json leaves something open, it reads some of the weights to find out.
    `built_in` is True for the model inside this package, and `folder` is where the model lies, None for one made in
    memory.
    """

    name: str
    config: ModelConfig
    tokenizer: Tokenizer
    weights: Callable[[], Named]
    resolve: Callable[[], ModelConfig]
    built_in: bool = False
    folder: Path | None = None


def is_ours(folder: Path) -> bool:
    """Whether config.json says that the folder is in our format; False where it cannot be read."""
    try:
        return read_table(folder / "config.json").get("model_type") == MODEL_TYPE
    except CheckpointError:
        return False


@about_its_path
def open_ours(folder: Path, name: str, tokenizer_file: Path | None = None) -> OpenModel:
    """Open a folder of ours; weights are not read yet.

    Raises CheckpointError where a file is missing or contradicts another, or where an adapter lies in the folder, and
    TokenizerError for a tokenizer of another model.
    """
    check_whole(folder)
    config = ModelConfig.from_dict(read_table(folder / "config.json"))
    tensors = shards.read_headers(folder)
    if not tensors:
        raise CheckpointError(
            f"{folder}: no weights in it; expected model.safetensors or its shards; convert the model again."
        )
    tokenizer = Tokenizer.open(tokenizer_file or folder / "tokenizer.json")
    check_tokenizer(tokenizer, config)

    def weights() -> Iterator[tuple[str, mx.array]]:
        for file in sorted({tensor.file for tensor in tensors.values()}):
            arrays = safetensors.load(file)
            for key in list(arrays):
                yield key, arrays.pop(key)

    return OpenModel(name, config, tokenizer, weights, lambda: config, folder=folder)


def check_tokenizer(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Raise TokenizerError for a tokenizer of another model.

    It has more tokens than the model, or the model's stop tokens are ordinary tokens of it.
    """
    if len(tokenizer) > config.text.vocab_size:
        raise TokenizerError(
            f"{tokenizer.origin}: its tokens have ids up to {len(tokenizer) - 1}, the model has "
            f"{config.text.vocab_size} tokens, so it belongs to another model; name the right one as `tokenizer`."
        )
    ordinary = [token for token in config.eos_token_ids if not tokenizer.is_special(token)]
    if ordinary:
        raise TokenizerError(
            f"{tokenizer.origin}: the model stops at token {listed(ordinary)}, which is no special token here, so the "
            "tokenizer belongs to another model; name the right one as `tokenizer`."
        )
