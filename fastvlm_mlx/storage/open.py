"""Our folder: opened strictly, saved whole or not at all.

config.json  model.safetensors (or shards with an index)  tokenizer.json  README.md  LICENSE
"""

import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ..backend import ops as backends
from ..config import MODEL_TYPE, ModelConfig, QuantConfig
from ..errors import CheckpointError, OutputError, TokenizerError, listed, shown
from ..files import safetensors, shards
from ..files.jsonfile import read_table
from ..files.shards import INDEX
from ..inputs.tokenizer import Tokenizer
from ..network.model import FastVLM
from ..quantize import Plan, quantized, scale_type

SHARD_BYTES = 5_000_000_000
BATCH_BYTES = 300_000_000
NO_ROOM = "is the disk full?); make room or choose another --out"
PARTIAL, REPLACED = ".fastvlm-partial", ".fastvlm-replaced"

Named = Iterable[tuple[str, mx.array]]


@dataclass(frozen=True)
class OpenModel:
    """A model folder whose small files have been read and checked.

    `weights` reads the large ones, in our names. `settle` gives the config they fit, which may take a look at them.
    """

    name: str
    config: ModelConfig
    tokenizer: Tokenizer
    weights: Callable[[], Named]
    settle: Callable[[], ModelConfig]


def is_ours(folder: Path) -> bool:
    """Whether config.json says the folder is in our format; an unreadable one is left to the reader's error."""
    try:
        return read_table(folder / "config.json").get("model_type") == MODEL_TYPE
    except CheckpointError:
        return False


def open_ours(folder: Path, name: str, tokenizer: Path | None = None) -> OpenModel:
    """Open our folder; raises CheckpointError where a file is missing or contradicts another."""
    config = ModelConfig.from_dict(read_table(folder / "config.json"))
    tensors = shards.read_headers(folder)
    if not tensors:
        raise CheckpointError(f"{folder}: no weights in it; expected model.safetensors or its shards; convert the model again.")
    words = Tokenizer.open(tokenizer or folder / "tokenizer.json")
    check_words(words, config)

    def weights() -> Iterator[tuple[str, mx.array]]:
        for file in sorted({tensor.file for tensor in tensors.values()}):
            arrays = safetensors.load(file)
            for key in list(arrays):
                yield key, arrays.pop(key)

    return OpenModel(name, config, words, weights, lambda: config)


def check_words(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Raise TokenizerError for a tokenizer of another model: more tokens than the model has, or ordinary ones to stop at."""
    if len(tokenizer) > config.text.vocab_size:
        raise TokenizerError(
            f"{tokenizer.origin}: its {len(tokenizer)} tokens are more than the model's {config.text.vocab_size}, so it belongs "
            "to another model; name the right one with --tokenizer-path."
        )
    ordinary = [token for token in config.eos_token_ids if not tokenizer.is_special(token)]
    if ordinary:
        raise TokenizerError(
            f"{tokenizer.origin}: the model stops at token {listed(ordinary)}, which is no special token here, so the tokenizer "
            "belongs to another model; name the right one with --tokenizer-path."
        )


def check_finite(origin: str, cast: Sequence[tuple[str, mx.array, mx.array]]) -> None:
    """Evaluate tensors (name, as stored, before the cast); raise CheckpointError for infinities and NaN, naming their cause.

    The sum of a tensor is a number unless a value is not, or unless it overflows: only then is every value looked at.
    """
    mx.eval([stored for _, stored, _ in cast])
    floating = [tensor for tensor in cast if mx.issubdtype(tensor[1].dtype, mx.floating)]
    totals = backends.totals([stored for _, stored, _ in floating], backends.current())
    for (name, stored, array), total in zip(floating, totals, strict=True):
        if math.isfinite(total) or mx.isfinite(stored).all().item():
            continue
        if mx.isfinite(array).all().item():
            kind = str(stored.dtype).removeprefix("mlx.core.")
            raise CheckpointError(f"{origin}: {name} does not fit {kind}; choose --dtype bfloat16 or float32.")
        raise CheckpointError(f"{origin}: {name} holds values that are not finite numbers, so it is damaged; fetch it again.")


def fill(model: FastVLM, opened: OpenModel, dtype: mx.Dtype, quantization: Plan) -> None:
    """Put every weight in its place in the type to compute in, quantising those of `quantization` on the way.

    A few hundred megabytes at a time, so that no more than the model itself is ever in memory for long. Raises
    CheckpointError unless names, shapes and types match exactly.
    """
    places, done = model.places(), set[str]()
    batch: list[tuple[str, mx.array, mx.array]] = []
    waiting = 0  # bytes

    def put() -> None:
        check_finite(opened.name, batch)
        tensors: list[tuple[str, mx.array]] = []
        for name, stored, _ in batch:
            settings = quantization.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
            tensors += [(name, stored)] if settings is None else _packed(name, stored, settings, opened.config.dtype, dtype)
        mx.eval([tensor for _, tensor in tensors])
        model.load_weights(tensors, strict=False)
        done.update(name for name, _ in tensors)
        batch.clear()

    for name, array in opened.weights():
        path = name.removesuffix(".weight")
        expected = places.get(name)
        if expected is None or name in done:
            raise CheckpointError(
                f"{opened.name}: it holds {shown(name)}, which its config.json does not call for; convert it again."
            )
        settings = quantization.get(path) if name.endswith(".weight") else None
        shape = expected.shape if settings is None else (expected.shape[0], expected.shape[1] * 32 // settings.bits)
        if shape != array.shape:
            raise CheckpointError(
                f"{opened.name}: {name!r} has shape {array.shape}, its config.json calls for {shape}; convert it again."
            )
        floating = mx.issubdtype(array.dtype, mx.floating)
        if settings is None and floating != mx.issubdtype(expected.dtype, mx.floating):
            raise CheckpointError(f"{opened.name}: {name!r} holds {array.dtype}, expected {expected.dtype}; convert it again.")
        batch.append((name, array.astype(dtype) if floating else array, array))
        waiting += batch[-1][1].nbytes
        if waiting > BATCH_BYTES:
            put()
            waiting = 0
    put()
    missing = places.keys() - done
    if missing:
        raise CheckpointError(f"{opened.name}: {listed(sorted(missing))} are missing from its weights; convert it again.")


def _packed(name: str, weight: mx.array, settings: QuantConfig, stored: str, dtype: mx.Dtype) -> list[tuple[str, mx.array]]:
    """A weight quantised as our folder would hold it, and its scales in the type to compute in."""
    parts = quantized(name, weight, settings, scale_type(stored))
    return [(part, tensor.astype(dtype) if mx.issubdtype(tensor.dtype, mx.floating) else tensor) for part, tensor in parts]


def save(out: Path, config: ModelConfig, weights: Named, texts: dict[str, str], *, nbytes: int, force: bool = False) -> None:
    """Write a folder of `texts` by file name, config.json and the weights, of about `nbytes` bytes; all of it or nothing."""
    with new_folder(out, nbytes, force) as partial:
        write(partial, config, weights, texts)


def write(folder: Path, config: ModelConfig, weights: Named, texts: dict[str, str]) -> None:
    """Fill a new folder, see `new_folder`."""
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
    save_weights(folder, weights)


def check_target(out: Path, nbytes: int, force: bool, *, advice: str = "choose another --out") -> None:
    """Raise OutputError unless a folder of about `nbytes` bytes can be written at `out`; see `new_folder`."""
    try:
        out = Path(os.path.realpath(out))
        _clear_leftovers(out)
        _check_free(out, force)
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
    except (OSError, ValueError) as error:
        raise OutputError(f"{out} cannot be written ({_reason(error)}); {advice}.") from error
    if free < nbytes:
        raise OutputError(f"{out.parent} has {free / 1e9:.1f} GB free, the result takes {nbytes / 1e9:.1f} GB; make room.")


@contextmanager
def new_folder(out: Path, nbytes: int, force: bool, *, advice: str = "choose another --out") -> Iterator[Path]:
    """A folder beside `out` that takes its place when the block ends well, and is removed otherwise.

    What killed runs left behind there is removed by the next one; runs at the same time are told apart by locks. `advice` is
    what messages about the place tell people to do.
    """
    check_target(out, nbytes, force, advice=advice)
    out = Path(os.path.realpath(out))
    partial = out.parent / f".{out.name}{PARTIAL}"
    lock = -1
    try:
        partial.mkdir(exist_ok=True)
        lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        if not _lock(lock):
            os.close(lock)
            lock = -1
            raise OutputError(f"{out} is being written by another process; wait for it to end.")
        for leftover in partial.iterdir():
            leftover.unlink()
        yield partial
        _check_free(out, force)  # again: what has come there meanwhile is not ours to remove
        _take_place(partial, out)
    except OSError as error:
        raise OutputError(f"{out} cannot be written ({_reason(error)}), and nothing is left of it; {advice}.") from error
    finally:
        if lock >= 0:
            shutil.rmtree(partial, ignore_errors=True)
            os.close(lock)


def _check_free(out: Path, force: bool) -> None:
    """Raise OutputError unless `out` is free, or an empty folder or one of ours that `force` lets us replace."""
    if not out.exists():
        return
    if not force:
        raise OutputError(f"{out} exists already; give another --out, or --force to replace it.")
    if not out.is_dir() or (any(out.iterdir()) and not is_ours(out)):
        raise OutputError(f"{out} is not a model folder of ours, so it is not replaced even with --force; give another --out.")


def _clear_leftovers(out: Path) -> None:
    """Undo what a run killed in the middle of a rename did, and remove the unfinished folders beside `out` nobody works on."""
    for old in out.parent.glob(f".*{REPLACED}"):
        home = old.with_name(old.name[1:].removesuffix(REPLACED))
        if not home.exists() and not old.is_symlink():
            old.rename(home)
    for leftover in (*out.parent.glob(f".*{PARTIAL}"), *out.parent.glob(f".*{REPLACED}")):
        if leftover.is_symlink() or not leftover.is_dir():
            continue
        lock = os.open(leftover, os.O_RDONLY)
        try:
            if _lock(lock):
                shutil.rmtree(leftover, ignore_errors=True)
        finally:
            os.close(lock)


def _lock(folder: int) -> bool:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _take_place(partial: Path, out: Path) -> None:
    old = out.parent / f".{out.name}{REPLACED}"
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def save_weights(folder: Path, weights: Named, order: str = "mlx") -> None:
    """Shards of up to SHARD_BYTES, one of them in memory at a time; a single one is plain model.safetensors.

    `order` is noted in the files: whose order of axes kernels have, "mlx" or "pt" (PyTorch's).
    """
    done: list[tuple[Path, list[str]]] = []
    total = 0

    def flush(shard: dict[str, mx.array]) -> None:
        path = folder / f"shard-{len(done)}.safetensors"
        try:
            mx.save_safetensors(str(path), shard, metadata={"format": order})
            written = safetensors.read_header(path).keys()
        except (RuntimeError, ValueError, CheckpointError) as error:
            raise OutputError(f"{folder.parent} cannot take the weights ({NO_ROOM}.") from error
        if written != shard.keys():
            raise OutputError(f"{folder.parent} took only part of the weights ({NO_ROOM}.")
        done.append((path, list(shard)))

    shard: dict[str, mx.array] = {}
    size = 0
    for name, array in weights:
        if shard and size + array.nbytes > SHARD_BYTES:
            flush(shard)
            shard, size = {}, 0
        shard[name] = array
        size += array.nbytes
        total += array.nbytes
    flush(shard)
    if len(done) == 1:
        done[0][0].rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, (path, names) in enumerate(done, start=1):
        file = f"model-{number:05d}-of-{len(done):05d}.safetensors"
        path.rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
