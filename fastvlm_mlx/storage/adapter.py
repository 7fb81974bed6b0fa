"""An adapter's folder: what fine-tuning has changed of a model, and which model that was.

adapter_config.json  adapter.safetensors  README.md  (and what training leaves: log.jsonl, curve.svg, state/)

`adapter.safetensors` holds, by our paths of layers, `PATH.lora_a` (rank, I), `PATH.lora_b` (O, rank) and with DoRA
`PATH.magnitude` (O,) of every layer in `targets`, and under their own names the parameters in `trained`, whole.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..config import is_number, is_whole
from ..errors import CheckpointError, OutputError, listed, shown, warn
from ..files import regular as files
from ..files import safetensors
from ..files.adapters import ADAPTER_CONFIG
from ..files.jsonfile import read_table
from ..inputs.tokenizer import Tokenizer
from .open import OpenModel

ADAPTER_TYPE = "fastvlm_mlx_adapter"
ADAPTER_VERSION = 1
WEIGHTS = "adapter.safetensors"
PARTS = ("lora_a", "lora_b", "magnitude")
SAMPLED = 1024  # elements of each tensor that a digest is taken of
MAX_RANK = 4096


@dataclass(frozen=True)
class AdapterConfig:
    """adapter_config.json: the base's name and digests (`digests_of`), and how the updates are to be computed.

    `scale` is what each update is multiplied with: alpha / rank, or alpha / sqrt(rank) with `rslora`. `resolution` is
    the side in pixels of the pictures it was trained on. `vocab_size` and
    `eos_token_ids` are given where it has a tokenizer of its own.
    """

    base_model: str
    base_digest: str
    base_norms_digest: str
    targets: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()
    rank: int = 16
    alpha: float = 32.0
    scale: float = 2.0
    rslora: bool = False
    dora: bool = False
    resolution: int | None = None
    vocab_size: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    license: str = ""

    def to_dict(self) -> dict[str, Any]:
        """adapter_config.json as written."""
        return {"model_type": ADAPTER_TYPE, "format_version": ADAPTER_VERSION, **asdict(self)}


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory: its config, its tensors by name, and where it was read."""

    config: AdapterConfig
    tensors: dict[str, mx.array] = field(repr=False)
    origin: str = "the adapter"
    tokenizer: Tokenizer | None = field(default=None, repr=False)  # where it brings its own

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(array.nbytes for array in self.tensors.values())

    @property
    def digest(self) -> str:
        """32 hexadecimal digits that stand for its config and all its tensors: another one, other answers."""
        found = blake2b(json.dumps(self.config.to_dict(), sort_keys=True).encode(), digest_size=16)
        for name in sorted(self.tensors):
            array = self.tensors[name]
            found.update(f"{name} {array.dtype} {array.shape}".encode())
            found.update(np.array(array.view(mx.uint8)).tobytes())
        return found.hexdigest()


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter of ours."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return False
    try:
        return read_table(folder / ADAPTER_CONFIG).get("model_type") == ADAPTER_TYPE
    except CheckpointError:
        return False


def read_adapter(folder: Path) -> Adapter:
    """Open an adapter's folder of ours; raises CheckpointError where a file is missing, foreign, or contradicts the
    other.
    """
    config = _config(read_table(folder / ADAPTER_CONFIG), folder / ADAPTER_CONFIG)
    path = folder / WEIGHTS
    header = safetensors.read_header(path)
    expected = {*config.trained, *names_of(config.targets, config.dora)}
    if expected != header.keys():
        odd = sorted(expected ^ header.keys())
        raise CheckpointError(
            f"{path}: {listed(odd)} stand in one of {ADAPTER_CONFIG} and the file only; fetch or train it again."
        )
    tensors = dict(safetensors.load(path))
    broken = [name for name, array in tensors.items() if not mx.isfinite(array).all().item()]
    if broken:
        raise CheckpointError(f"{path}: {listed(broken)} hold values that are not finite numbers; train it again.")
    words = folder / "tokenizer.json"
    tokenizer = Tokenizer.open(words) if words.exists() else None
    return Adapter(config, tensors, str(folder), tokenizer)


def _config(table: dict[str, Any], path: Path) -> AdapterConfig:
    """A parsed adapter_config.json, checked field by field."""

    def fail(problem: str) -> CheckpointError:
        return CheckpointError(f"{path}: {problem}; fetch or train the adapter again.")

    if table.get("model_type") != ADAPTER_TYPE:
        raise fail(f"model_type is {shown(table.get('model_type'))}, expected {ADAPTER_TYPE!r}")
    if table.get("format_version") != ADAPTER_VERSION:
        raise fail(
            f"format_version is {shown(table.get('format_version'))}, this release reads {ADAPTER_VERSION}, so "
            "update it"
        )
    data = {key: value for key, value in table.items() if key not in ("model_type", "format_version")}
    if unknown := data.keys() - {each.name for each in fields(AdapterConfig)}:
        raise fail(f"unknown entries {listed(sorted(unknown))}")
    if missing := {"base_model", "base_digest", "base_norms_digest"} - data.keys():
        raise fail(f"missing entries {listed(sorted(missing))}")
    for name, value in data.items():
        expected, right = next(kind for kind in _KINDS if name in kind[0])[1:]
        if not right(value):
            raise fail(f"{name} is {shown(value)}, expected {expected}")
    data |= {name: tuple(data[name]) for name in ("targets", "trained", "eos_token_ids") if name in data}
    return AdapterConfig(**data)


def _names(value: object) -> bool:
    return (
        isinstance(value, (list, tuple))
        and all(isinstance(each, str) for each in value)
        and len(set(value)) == len(value)
    )


_KINDS: tuple[tuple[tuple[str, ...], str, Callable[[Any], bool]], ...] = (
    (("base_model", "base_digest", "base_norms_digest", "license"), "a text", lambda value: isinstance(value, str)),
    (("rslora", "dora"), "true or false", lambda value: isinstance(value, bool)),
    (("rank",), f"a whole number up to {MAX_RANK}", lambda value: is_whole(value) and 0 < value <= MAX_RANK),
    (("alpha", "scale"), "a number", lambda value: is_number(value) and abs(value) < 1e6),
    (
        ("resolution", "vocab_size"),
        "a whole number or null",
        lambda value: value is None or (is_whole(value) and 0 < value < 1 << 31),
    ),
    (("targets", "trained"), "a list of names, none of them twice", _names),
    (("eos_token_ids",), "a list of token ids", lambda value: isinstance(value, list) and all(map(is_whole, value))),
)


def write_adapter(folder: Path, adapter: Adapter) -> None:
    """Write an adapter's files into a folder that is there, each of them whole or not at all; raises OutputError."""
    write_tensors(folder / WEIGHTS, adapter.tensors)
    try:
        files.write(folder / ADAPTER_CONFIG, json.dumps(adapter.config.to_dict(), indent=2) + "\n")
        files.write(folder / "README.md", card(adapter.config))
        if adapter.tokenizer is not None:
            files.write(folder / "tokenizer.json", adapter.tokenizer.to_json())
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be written ({error.strerror}); make room or check its permissions."
        ) from error


def write_tensors(path: Path, tensors: Mapping[str, mx.array]) -> None:
    """Write a safetensors file in the place of one that may be there, whole or not at all; raises OutputError."""
    new = path.with_name(f".{path.name}.{os.getpid()}.new.safetensors")  # several processes may write the same
    try:
        mx.save_safetensors(str(new), dict(sorted(tensors.items())), metadata={"format": "mlx"})
        if safetensors.read_header(new).keys() != tensors.keys():
            raise OSError(28, "it took only part of the data")
        with new.open("rb") as file:
            os.fsync(file.fileno())
        new.replace(path)
    except (OSError, RuntimeError, ValueError, CheckpointError) as error:
        new.unlink(missing_ok=True)
        raise OutputError(f"{path.parent} cannot take {path.name} (is the disk full?); make room and go on.") from error


def digests_of(opened: OpenModel) -> tuple[str, str]:
    """What identifies a model's weights as stored: a digest of all, and one of its norms and biases alone.

    Both are of SAMPLED elements of each tensor, evenly spread. Quantising leaves norms and biases as they are, unless
    scales were folded into them, so an adapter that fits a model by the second fits it quantised as well.
    """
    every, norms = blake2b(digest_size=16), blake2b(digest_size=16)
    stored: mx.Dtype = getattr(mx, opened.config.dtype)
    tensors = dict(opened.weights())
    for name in sorted(tensors):
        array = tensors.pop(name)
        kept = array.astype(stored) if mx.issubdtype(array.dtype, mx.floating) else array
        flat = kept.reshape(-1)[:: max(1, kept.size // SAMPLED)].astype(mx.float32)
        data = name.encode() + repr(kept.shape).encode() + np.asarray(flat).tobytes()
        every.update(data)
        if array.ndim == 1 and name.startswith("text."):
            norms.update(data)
    return every.hexdigest(), norms.hexdigest()


def check_base(adapter: Adapter, opened: OpenModel) -> None:
    """Raise CheckpointError unless an adapter was made for this model, or for what this model was before it was
    quantised.
    """
    config = adapter.config
    if not config.base_digest:  # of another library, which has none
        return
    every, norms = digests_of(opened)
    if every == config.base_digest:
        return
    if norms == config.base_norms_digest and opened.config.quantization:
        warn(
            f"{adapter.origin}: it was trained on {shown(config.base_model)} before that was quantised, as far as "
            "the norms tell; "
            "answers may differ a little from those it was measured with."
        )
        return
    raise CheckpointError(
        f"{adapter.origin}: it was trained on {shown(config.base_model)}, whose weights have the digest "
        f"{config.base_digest[:12]}, and "
        f"those of {opened.name} have {every[:12]}; load the model that it was trained on."
    )


def card(config: AdapterConfig) -> str:
    """README.md of an adapter's folder."""
    layers = f"low-rank updates of {len(config.targets)} layers (rank {config.rank}, scale {config.scale:g})"
    parts = [layers] if config.targets else []
    if config.trained:
        parts.append(f"{len(config.trained)} parameters stored whole")
    terms = f"\nThe base's licence ({config.license}) goes for the adapter as well.\n" if config.license else ""
    return f"""---
library_name: mlx
base_model: {json.dumps(config.base_model)}
tags: [mlx, fastvlm, fastvlm-mlx, adapter]
---
# An adapter for {config.base_model}

Made by fastvlm-mlx tune: {", ".join(parts)}.

    fastvlm-mlx generate --model BASE --adapter FOLDER --image photo.jpg --prompt "What is it?"
{terms}"""


def names_of(targets: Iterable[str], dora: bool) -> list[str]:
    """The tensors that the updates of these layers consist of."""
    return [f"{target}.{part}" for target in targets for part in (PARTS if dora else PARTS[:2])]
