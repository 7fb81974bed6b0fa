"""Recovery from an allocation that no machine can make: one sentence is raised, and later answers are right.

On a GPU the allocation is real, in a process of its own, in case that process does not survive. On a CPU, where MLX
would end the process, the error that Metal raises stands in for it.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...decoding.answer import finish
from ...decoding.engine import Engine
from ...decoding.generate import stream
from ...decoding.image_cache import digest
from ...decoding.prefix import Prefix
from ...decoding.request import Options
from ...errors import FastVLMError
from .finding import Finding, holds
from .process import python
from .setting import Setting, here

OPTIONS = Options(max_tokens=12)
ENCODER = "image encoder"
PARTS = (ENCODER, "decoder")
QUESTIONS = ("How many shapes are there?", "Describe the image.")
CODE = f"from {__name__} import main; main()"
STAND_IN = (
    "[metal::malloc] Attempting to allocate 1125899906842624 bytes which is greater than the maximum "
    "allowed buffer size"
)


@dataclass(frozen=True)
class Outcome:
    """What an allocation that fails in one part of a network leads to.

    `kind` and `message` are the error's type and text, `ours` says whether it is this package's; `pictures` and
    `positions` count what the failed answer left in the caches; `after` is the next answer, `alone` the answer without
    a failure.
    """

    part: str
    kind: str
    message: str
    ours: bool
    pictures: int
    positions: int
    after: str
    alone: str


class Overloaded(nn.Module):
    """A part of a network that also asks for more memory than there is; its values are the part's."""

    def __init__(self, part: nn.Module, allocate: Callable[[], mx.array]):
        super().__init__()
        self.part = part
        self._allocate = allocate

    def __call__(self, x: mx.array) -> mx.array:
        """The part's values, with the allocation added to the computation."""
        y: mx.array = self.part(x)
        return y + self._allocate().astype(y.dtype)


def a_petabyte() -> mx.array:
    """More memory than any address space holds, unevaluated."""
    return mx.zeros((1 << 30, 1 << 18)).sum()


def as_metal_does() -> mx.array:
    """Raise the error that MLX raises on Metal for such an allocation."""
    raise RuntimeError(STAND_IN)


def check(setting: Setting) -> Iterator[Finding]:
    """Findings about the error, about what it leaves behind, and about the answers after it."""
    if setting.on_gpu:
        yield from findings(in_a_process())
        return
    with setting.subject.here():
        engine = setting.subject.engine()
        yield from findings([overload(engine, part, as_metal_does) for part in PARTS])


def overload(engine: Engine, part: str, allocate: Callable[[], mx.array]) -> Outcome:
    """Ask two questions of a conversation, the second one first with a failing allocation in `part`."""
    one, two = (np.full((96, 128, 3), colour, np.uint8) for colour in ((240, 240, 90), (20, 20, 30)))
    first, second = engine.prepare(one, QUESTIONS[0]), engine.prepare([one, two], QUESTIONS[1])
    engine.images.clear()
    alone = finish(stream(engine, second, OPTIONS)).text
    engine.images.clear()
    prefix = Prefix()
    finish(stream(engine, first, OPTIONS, prefix))
    before = prefix.held
    place, name = (engine.model, "vision") if part == ENCODER else (engine.model.text.layers[-1], "mlp")
    whole = getattr(place, name)
    error: BaseException | None = None
    try:
        setattr(place, name, Overloaded(whole, allocate))
        finish(stream(engine, second, OPTIONS, prefix))
    except Exception as raised:
        error = raised
    finally:
        setattr(place, name, whole)
    pictures = sum(engine.images.get(digest(pixels)) is not None for pixels in second.pixels[1:])
    positions = sum(ours != theirs for ours, theirs in zip_longest(prefix.held, before[: len(prefix.held)]))
    try:
        after = finish(stream(engine, second, OPTIONS, prefix)).text
    except Exception as raised:
        after = f"{type(raised).__name__}: {raised}"
    ours = isinstance(error, FastVLMError) and "memory" in str(error)
    return Outcome(part, type(error).__name__, str(error or ""), ours, pictures, positions, after, alone)


def in_a_process() -> list[Outcome]:
    """The outcomes of `main` in a new process; raises RuntimeError where it prints none."""
    return [Outcome(**each) for each in json.loads(python(["-c", CODE]).splitlines()[-1])]


def main() -> None:
    """Print the outcomes on this machine as one line of JSON; on a CPU, those of the stand-in."""
    setting = here()
    engine, allocate = setting.subject.engine(), a_petabyte if setting.on_gpu else as_metal_does
    print(json.dumps([asdict(overload(engine, part, allocate)) for part in PARTS]))


def findings(outcomes: Sequence[Outcome]) -> Iterator[Finding]:
    """The outcomes as findings, which name the first one that is wrong."""
    one = next((each for each in outcomes if not each.ours), outcomes[0])
    said = (
        one.message
        if one.ours
        else f"{one.kind}: {one.message}"
        if one.message
        else f"nothing was raised in the {one.part}"
    )
    yield holds("an allocation too large", one.ours, said, "a sentence of this package about memory")
    one = next((each for each in outcomes if each.pictures or each.positions), outcomes[0])
    kept = one.pictures + one.positions > 0
    shown = f"pictures: {one.pictures}, positions: {one.positions}" + (
        f", of a failure in the {one.part}" if kept else ""
    )
    yield holds("what the failed answer left behind", not kept, shown, "no picture and no position of it")
    one = next((each for each in outcomes if each.after != each.alone), outcomes[0])
    right = one.after == one.alone
    shown = "the same as asked alone" if right else f"{one.after!r} in place of {one.alone!r}"
    yield holds("the next answer", right, shown, "the answer that the question gets alone")
