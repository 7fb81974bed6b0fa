"""The two sides that are compared: the subject, which is checked, and the reference it has to agree with.

With a GPU, the subject computes on it and the reference on the CPU. Without one, the subject is the graph that a GPU
gets, run by MLX's general operations on the CPU, so that every check can run (and be tested) anywhere. The reference
always has the CPU's own forms, which the tests compare with PyTorch.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import mlx.core as mx

from ...backend import ops
from ...backend.ops import Backend
from ...config import Dtype
from ...decoding.engine import Engine
from ...network.model import FastVLM
from ...storage.fill import fill
from ...storage.open import OpenModel
from ..machine import usable_memory
from ..random_model import open_random

ROOMY_BYTES = 6_000_000_000  # bytes a model can take; with less, the random 0.5b keeps FEW_LAYERS of its decoder
FEW_LAYERS = 4
TINY_SIDE = 192  # pixels; what the built-in model was trained at


@dataclass(frozen=True)
class Side:
    """A device, and the backend whose forms are used on it."""

    name: str
    backend: Backend
    device: mx.Device

    @contextmanager
    def here(self) -> Iterator[None]:
        """The setting of this machine."""
        with mx.stream(self.device), ops.forms_of(self.backend):
            yield

    def network(
        self, opened: OpenModel, weights: Mapping[str, mx.array], dtype: Dtype, rounded: Dtype | None = None
    ) -> FastVLM:
        """A network of these float32 weights on this side, computing in `dtype`.

        With `rounded`, the weights are rounded to that dtype first.
        """

        def read() -> Iterator[tuple[str, mx.array]]:
            for name, array in weights.items():
                yield name, array if rounded is None else array.astype(getattr(mx, rounded)).astype(mx.float32)

        with self.here():
            model = FastVLM(opened.config)
            fill(model, replace(opened, weights=read), getattr(mx, dtype), {})
        return model

    def engine(self, model: str = "tiny", *, dtype: Dtype | None = "float32") -> Engine:
        """The built-in model, or a random one by its size, ready to answer on this side."""
        engine = Engine(open_model(model))
        with self.here():
            engine.load_weights(dtype=dtype)
        return engine


def _silent(_: str) -> None:
    return


@dataclass(frozen=True)
class Setting:
    """A run of doctor: both sides, whether it is to be quick, and a function that is told what is being checked."""

    subject: Side
    reference: Side
    quick: bool = False
    say: Callable[[str], None] = field(default=_silent, repr=False)

    @property
    def on_gpu(self) -> bool:
        """Whether the subject is a GPU."""
        return self.subject.device.type == mx.DeviceType.gpu

    @property
    def local(self) -> Side:
        """The side on which models answer on this machine."""
        return self.subject if self.on_gpu else self.reference

    @property
    def model(self) -> str:
        """The size of the random model to check: a published one on a GPU, "small" elsewhere."""
        return "0.5b" if self.on_gpu else "small"

    @property
    def models(self) -> list[tuple[str, int]]:
        """The models to check, each with the side of its pictures in pixels."""
        sizes: Iterable[int] = (256, 1024, 1088) if self.on_gpu else (256, 320)
        return [("tiny", TINY_SIDE), *([] if self.quick else [(self.model, size) for size in sizes])]

    @property
    def dtypes(self) -> tuple[Dtype, ...]:
        """The dtypes to compute in."""
        return ("float32", "bfloat16") if self.quick else ("float32", "bfloat16", "float16")


def here(*, quick: bool = False, say: Callable[[str], None] = _silent) -> Setting:
    """The setting of this machine."""
    reference = Side("the CPU's own forms", "cpu", mx.Device(mx.DeviceType.cpu, 0))
    backend = ops.current()
    if backend == "cpu":
        return Setting(Side("the general forms", "metal", reference.device), reference, quick, say)
    return Setting(Side(f"the GPU ({backend})", backend, mx.default_device()), reference, quick, say)


def open_model(name: str) -> OpenModel:
    """The built-in model, or a random one by its size; its weights are not read yet."""
    if name == "tiny":
        return Engine.open("tiny").opened
    return open_random(name, FEW_LAYERS if name != "small" and usable_memory() < ROOMY_BYTES else None)
