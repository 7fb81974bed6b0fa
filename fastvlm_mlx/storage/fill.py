"""Weights by name -> the parameters of a network, each checked, and cast to the dtype to compute in."""

import math
from collections.abc import Sequence

import mlx.core as mx

from ..backend import ops
from ..config import QuantConfig
from ..errors import CheckpointError, listed, shown
from ..network.model import FastVLM
from ..quantize.recipes import Plan
from ..quantize.rounding import quantized, scale_type
from .open import OpenModel

BATCH_BYTES = 300_000_000  # of weights that are read, checked and loaded together


def check_finite(origin: str, cast: Sequence[tuple[str, mx.array, mx.array]]) -> None:
    """Raise CheckpointError, naming the cause, where a tensor holds infinities or NaN; evaluates the tensors.

    `cast` holds (name, tensor as it is to be used, tensor as it was read). A tensor's values are checked one by one
    only where its sum is not finite.
    """
    mx.eval([stored for _, stored, _ in cast])
    floating = [tensor for tensor in cast if mx.issubdtype(tensor[1].dtype, mx.floating)]
    totals = ops.totals([stored for _, stored, _ in floating])
    for (name, stored, array), total in zip(floating, totals, strict=True):
        if math.isfinite(total) or mx.isfinite(stored).all().item():
            continue
        if mx.isfinite(array).all().item():
            stored_dtype = str(stored.dtype).removeprefix("mlx.core.")
            raise CheckpointError(
                f"{origin}: {name} does not fit {stored_dtype}; choose `dtype='bfloat16'` or `dtype='float32'`."
            )
        raise CheckpointError(
            f"{origin}: {name} holds values that are not finite numbers, so it is damaged; fetch it again."
        )


def fill(model: FastVLM, opened: OpenModel, dtype: mx.Dtype, quantization: Plan) -> None:
    """Load every weight into the network, cast to `dtype`; layers in `quantization` are quantised on the way.

    Works on BATCH_BYTES at a time, so little more than the model itself is in memory. Raises CheckpointError unless
    names, shapes and dtypes match the network exactly.
    """
    parameters, done = model.flat_parameters(), set[str]()
    batch: list[tuple[str, mx.array, mx.array]] = []
    waiting = 0  # bytes

    def put() -> None:
        check_finite(opened.name, batch)
        tensors: list[tuple[str, mx.array]] = []
        for name, stored, _ in batch:
            settings = quantization.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
            tensors += (
                [(name, stored)] if settings is None else _packed(name, stored, settings, opened.config.dtype, dtype)
            )
        mx.eval([tensor for _, tensor in tensors])
        model.load_weights(tensors, strict=False)
        done.update(name for name, _ in tensors)
        batch.clear()

    for name, array in opened.weights():
        path = name.removesuffix(".weight")
        expected = parameters.get(name)
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
        right = floating if mx.issubdtype(expected.dtype, mx.floating) else array.dtype == expected.dtype
        if settings is None and not right:
            raise CheckpointError(
                f"{opened.name}: {name!r} holds {array.dtype}, expected {expected.dtype}; convert it again."
            )
        batch.append((name, array.astype(dtype) if floating else array, array))
        waiting += batch[-1][1].nbytes
        if waiting > BATCH_BYTES:
            put()
            waiting = 0
    put()
    missing = parameters.keys() - done
    if missing:
        raise CheckpointError(
            f"{opened.name}: {listed(sorted(missing))} are missing from its weights; convert it again."
        )


def _packed(
    name: str, weight: mx.array, settings: QuantConfig, stored: str, dtype: mx.Dtype
) -> list[tuple[str, mx.array]]:
    """A weight quantised as our folder would hold it, its scales and biases cast to the dtype to compute in."""
    parts = quantized(name, weight, settings, scale_type(stored))
    return [
        (part, tensor.astype(dtype) if mx.issubdtype(tensor.dtype, mx.floating) else tensor) for part, tensor in parts
    ]
