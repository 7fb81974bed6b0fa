"""What a converted folder holds, to compare it with another one."""

import json
from pathlib import Path

import mlx.core as mx

from fastvlm_mlx.convert.packed import values

from . import checkpoint


def stored(folder: Path) -> dict[str, mx.array]:
    return checkpoint.load(folder / "model.safetensors")


def assert_equal(found: dict[str, mx.array], expected: dict[str, mx.array]) -> None:
    assert found.keys() == expected.keys()
    assert not [name for name in found if not mx.array_equal(found[name], expected[name])]


def unpacked(folder: Path) -> dict[str, mx.array]:
    """A converted folder's tensors, quantised ones as the values they stand for."""
    tensors = stored(folder)
    config = json.loads((folder / "config.json").read_text())
    for path, how in config["quantization"].items():
        parts = [
            tensors.pop(f"{path}.{part}") for part in ("weight", "scales", "biases") if f"{path}.{part}" in tensors
        ]
        tensors[f"{path}.weight"] = values(*parts, settings=checkpoint.quant(how))
    return tensors
