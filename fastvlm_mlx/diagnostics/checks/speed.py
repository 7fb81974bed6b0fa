"""Speed: the machine's own rates, and the share of them that each stage reaches.

First the bytes that can be moved and the products that can be summed in a second; from these, the least time that a
stage could take (for its products or its bytes, whichever is longer). A stage's share is that time divided by the time
it takes. No figure of another machine is involved.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import numpy as np

from ...backend import ops
from ...config import ATTENTION_STAGES, Dtype, ModelConfig
from ...inputs.prompt import PROMPT, Turn, render
from ...network import memory
from ...network.model import FastVLM
from ..bench import seconds as in_words
from .finding import Finding, at_least
from .setting import Setting, open_model

ROUNDS = 3
PLAIN_LOOPS_FACTOR = 45  # products take that many times as long in plain loops (`blas`) as by their kernels
MIN_SHARE = 1 / PLAIN_LOOPS_FACTOR  # a stage in plain loops stays below it, however near its kernels come to the bound


@dataclass(frozen=True)
class Work:
    """The least work of a stage: floating-point operations of its products, and bytes to read and write."""

    operations: float
    nbytes: float

    def seconds(self, per_second: float, bytes_per_second: float) -> float:
        """The least time it takes at these rates."""
        return max(self.operations / per_second, self.nbytes / bytes_per_second)


def check(setting: Setting) -> Iterator[Finding]:
    """Findings with the machine's rates, then with every stage's share of them."""
    side = setting.local
    dtypes: tuple[Dtype, ...] = ("bfloat16", "float16") if setting.on_gpu else ("float32",)
    with side.here():
        moved = copy_rate(1 << (28 if setting.on_gpu else 24))
        yield _rate("copy", moved, "GB/s", 1e9)
        for number, dtype in enumerate(dtypes):
            done = product_rate(4096 if setting.on_gpu else 1024, dtype)
            yield _rate(f"product of matrices, {dtype}", done, "TFLOPS", 1e12)
            if setting.quick:
                continue
            model = "0.5b" if setting.on_gpu else "small"
            size = 1024 if setting.on_gpu else 512
            setting.say(f"random {model} at {size}, {dtype}")
            opened = open_model(model)
            weights = {path: array.astype(mx.float32) for path, array in opened.weights()}
            network = side.network(opened, weights, dtype)
            tokens = (size // 64) ** 2
            prompt = render(opened.tokenizer, [Turn(PROMPT, 1)], tokens, None)
            length = sum(map(len, prompt))
            read = max(moved, row_rate()) if not setting.on_gpu else moved
            item = 2 if dtype != "float32" else 4
            stages = [*tower(network, opened.config, size, item), *decoder(network, opened.config, length, item)]
            for name, run, work in stages if number == 0 else stages[-2:]:
                yield share(f"{opened.name} at {size}, {dtype}: {name}", seconds_of(run), work, done, read)
            mx.clear_cache()


def _rate(what: str, rate: float, unit: str, scale: float) -> Finding:
    return Finding(what, "measured", f"{rate / scale:.3g} {unit}", "", rate / scale, None, unit)


def seconds_of(run: Callable[[], mx.array], rounds: int = ROUNDS) -> float:
    """The shortest time of computing an array, after one time that does not count; other programs only lengthen it."""
    mx.eval(run())
    taken = []
    for _ in range(rounds):
        mx.synchronize()
        started = time.perf_counter()
        mx.eval(run())
        taken.append(time.perf_counter() - started)
    return min(taken)


def copy_rate(elements: int) -> float:
    """Bytes read and written per second when one is added to `elements` float32 elements."""
    x = mx.zeros((elements,))
    mx.eval(x)
    return 2 * x.nbytes / seconds_of(lambda: x + 1)


def product_rate(side: int, dtype: Dtype) -> float:
    """Floating-point operations per second of a product of two square matrices."""
    x = mx.random.normal((side, side)).astype(getattr(mx, dtype))
    return float(2 * side**3) / seconds_of(lambda: x @ x)


def row_rate() -> float:
    """Bytes of a matrix per second when one row is multiplied with it.

    On a CPU every core reads then, and only one for a copy.
    """
    weight = mx.random.normal((8192, 2048))
    x = mx.random.normal((1, 2048))
    mx.eval(weight, x)
    return weight.nbytes / seconds_of(lambda: ops.linear(x, weight))


def share(what: str, taken: float, work: Work, per_second: float, bytes_per_second: float) -> Finding:
    """A finding with a stage's time, as a share of the least time it could take here."""
    least = work.seconds(per_second, bytes_per_second)
    bound = "products" if work.operations / per_second >= work.nbytes / bytes_per_second else "bytes"
    shown = f"{in_words(taken)}, {least / taken:.0%} of this machine's bound ({bound})"
    expects = (
        f"at least {MIN_SHARE:.1%}: plain loops, in place of the kernels meant, take {PLAIN_LOOPS_FACTOR} times as long"
    )
    return at_least(what, least / taken, MIN_SHARE, found=shown, expected=expects, unit="of the bound", seconds=taken)


def tower(
    network: FastVLM, config: ModelConfig, size: int, item: int
) -> Iterator[tuple[str, Callable[[], mx.array], Work]]:
    """The stages of the image encoder and the projector for one picture: name, function to run, work."""
    pixels = np.random.default_rng(0).integers(0, 256, (1, size, size, 3), dtype=np.uint8)
    x = mx.array(pixels).astype(network.dtype) / 255
    mx.eval(x)
    vision, half, side, ratio = network.vision, size // 2, size // 4, config.vision.mlp_ratio
    width = config.vision.widths[0]
    operations = 2.0 * (27 * width * half**2 + 9 * width * side**2 + width**2 * side**2)
    nbytes = item * float(3 * size**2 + 2 * width * half**2 + 3 * width * side**2)
    yield "stem", partial(vision.patch_embed, x), Work(operations, nbytes)
    x = vision.patch_embed(x)
    for number, stage in enumerate(vision.stages):
        mx.eval(x)
        operations, nbytes, width = 0.0, item * float(x.size), config.vision.widths[number]
        if number > 0:
            side = -(-side // 2)
            operations += 2 * side**2 * width * (49 + width)
            nbytes += item * (3 * side**2 * width + width**2)
        pixels_now = side**2
        mixer = 2 * 9 * width if number not in ATTENTION_STAGES else 2 * 4 * width**2 + 4 * pixels_now * width
        block = pixels_now * (mixer + 2 * 49 * width + 4 * ratio * width**2)
        operations += config.vision.depths[number] * block
        nbytes += config.vision.depths[number] * item * (4 * pixels_now * width + 2 * ratio * width**2)
        yield f"stage {number}", partial(stage, x), Work(operations, nbytes)
        x = stage(x)
    mx.eval(x)
    width = 2 * config.vision.widths[-1]
    work = Work(2.0 * 9 * width * side**2 + width**2 / 4, item * float(2 * width * side**2 + width**2 / 8))
    yield "features", partial(vision.conv_exp, x), work
    x = vision.conv_exp(x).reshape(1, -1, width)
    mx.eval(x)
    hidden = config.text.hidden_size
    work = Work(
        2.0 * side**2 * hidden * (width + hidden), item * float(hidden * (width + hidden) + side**2 * (width + hidden))
    )
    yield "projector", partial(network.projector, x), work


def decoder(
    network: FastVLM, config: ModelConfig, length: int, item: int
) -> Iterator[tuple[str, Callable[[], mx.array], Work]]:
    """The prefill of `length` positions, and a step after it: name, function to run, work."""
    text = config.text
    head = text.vocab_size * text.hidden_size
    counts = memory.parameters(config)
    layers = counts["decoder"]
    scores = 4.0 * text.num_hidden_layers * text.hidden_size
    embeddings = mx.random.normal((1, length, text.hidden_size)).astype(network.dtype)
    mx.eval(embeddings)
    work = Work(
        2.0 * layers * length + 2 * head + scores * length**2 / 2, item * float(layers + head + 2 * embeddings.size)
    )
    yield f"prefill of {length}", lambda: network.prefill(embeddings, network.text.make_cache()), work
    cache = network.text.make_cache()
    mx.eval(network.prefill(embeddings, cache))
    token = mx.array([0])

    def step() -> mx.array:
        for layer in cache:
            layer.trim(length)
        return network.step(token, cache)

    yield "step", step, Work(2.0 * (layers + head) + scores * length, item * float(layers + head))
