"""Whether both sides compute the same: stage by stage from pixels to logits, token by token, and whole answers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ...config import Dtype
from ...decoding.answer import finish
from ...decoding.generate import stream
from ...decoding.request import Options
from ...inputs.pieces import Piece
from ...inputs.prompt import PROMPT, Turn, render
from ...network.kv_cache import KVCache
from ...network.model import LEVELS, FastVLM
from ..bench import made_photo
from .finding import Finding, at_most, holds
from .setting import Setting, Side, open_model

Figures = npt.NDArray[np.float32]

GREEDY_TOKENS = 32
# Of a stage's largest value. Sums of up to 4864 products in another order differ by sqrt(4864) * 2**-24 = 4e-6 of it;
# 25 such sums that never cancel out make the limit. What a kernel does wrong is larger by far.
FLOAT32 = 1e-4
# With values rounded to eight bits (bfloat16), a step's error is 2**-9 of a value: random ones of 500 steps, as many as
# there are, add up to 0.044 of it, and the cosine is 1 - 0.044 ** 2 / 2.
MIN_COSINE = 0.999
MAX_FLOAT16 = 65504.0  # the largest value that float16 holds
QUESTIONS = ("How many shapes are there?", "Describe the image.", "What does the text say?")


@dataclass(frozen=True)
class Passage:
    """What a network computed for one prompt with a picture: each stage's values by name, and the tokens it chose.

    The last stages are the logits of the prefill (1, V) and of every step (GREEDY_TOKENS - 1, V).
    """

    stages: Mapping[str, Figures]
    tokens: Sequence[int]


def check(setting: Setting) -> Iterator[Finding]:
    """Findings for both sides with equal weights, in float32 and in 16 bits.

    In 16 bits the reference has the same rounded weights, in float32.
    """
    held, weights = "", dict[str, mx.array]()
    for name, size in setting.models:
        opened = open_model(name)
        if name != held:  # sizes of one model come one after another
            held, weights = name, {path: array.astype(mx.float32) for path, array in opened.weights()}
            mx.eval(list(weights.values()))
        pixels = picture(size)
        tokens = (-(-size // 64)) ** 2
        pieces = render(opened.tokenizer, [Turn(PROMPT, 1)], tokens, None)
        for dtype in setting.dtypes:
            title = f"{opened.name} at {size}, {dtype}"
            setting.say(title)
            rounded = None if dtype == "float32" else dtype
            expected = passage(
                setting.reference, setting.reference.network(opened, weights, "float32", rounded), pixels, pieces
            )
            found = passage(
                setting.subject, setting.subject.network(opened, weights, dtype), pixels, pieces, expected.tokens
            )
            mx.clear_cache()
            yield compare(title, found, expected, dtype)
            if dtype == "float32":
                yield same_tokens(f"{title}: tokens", found, expected)
                yield largest(f"{title}: largest |x|", expected)
    setting.say("answers")
    yield same_answers(setting)


def picture(size: int) -> npt.NDArray[np.uint8]:
    """A picture (1, S, S, 3) of soft colours with grain."""
    from io import BytesIO

    from PIL import Image

    return np.asarray(Image.open(BytesIO(made_photo(size, size))).convert("RGB"))[None]


def stages(
    model: FastVLM, pixels: npt.NDArray[np.uint8], pieces: Sequence[Piece], cache: list[KVCache]
) -> Iterator[tuple[str, mx.array]]:
    """Yield every stage of a network by name, in order.

    They lead from pixels (1, S, S, 3) to the logits (1, V) of the first token.
    """
    x = mx.array(LEVELS).astype(model.dtype)[mx.array(pixels)]
    yield "pixels", x
    x = model.vision.patch_embed(x)
    yield "stem", x
    for number, stage in enumerate(model.vision.stages):
        x = stage(x)
        yield f"stage {number}", x
    x = model.vision.conv_exp(x)
    yield "features", x
    x = model.projector(x.reshape(1, -1, x.shape[-1]))
    yield "projector", x
    yield "prefill", model.prefill(model.embed(pieces, {0: x[0]}), cache)


def passage(
    side: Side,
    model: FastVLM,
    pixels: npt.NDArray[np.uint8],
    pieces: Sequence[Piece],
    given: Sequence[int] | None = None,
) -> Passage:
    """Run a network for a prompt on a side; the tokens fed after it are the network's own, or those `given`."""
    found: dict[str, Figures] = {}
    with side.here():
        cache = model.text.make_cache()
        for name, x in stages(model, pixels, pieces, cache):
            found[name] = as_numpy(x)
        logits = found["prefill"]
        chosen, steps = [int(logits[0].argmax())], []
        for place in range(GREEDY_TOKENS - 1):
            token = chosen[-1] if given is None else given[place]
            logits = as_numpy(model.step(mx.array([token]), cache))
            steps.append(logits[0])
            chosen.append(int(logits[0].argmax()))
    found["steps"] = np.stack(steps)
    return Passage(found, chosen)


def as_numpy(x: mx.array) -> Figures:
    """An array's values in float32, as NumPy's."""
    return np.array(x.astype(mx.float32))


def distance(found: Figures, expected: Figures) -> float:
    """The largest difference, relative to the largest value expected; infinite where something is not finite."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    scale = float(np.abs(expected).max()) or 1.0
    return float(np.abs(found - expected).max()) / scale


def cosine(found: Figures, expected: Figures) -> float:
    """The cosine of the angle between two arrays of one shape; -1 where something is not finite."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return -1.0
    a, b = found.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / lengths if lengths else float(np.array_equal(a, b))


def compare(title: str, found: Passage, expected: Passage, dtype: Dtype) -> Finding:
    """Every stage of two passages; the finding names the first that is wrong, or else the one farthest off."""
    if dtype == "float32":
        details = {name: distance(x, expected.stages[name]) for name, x in found.stages.items()}
        limits = {name: 0.0 if name == "pixels" else FLOAT32 for name in details}
        wrong = [name for name in details if not details[name] <= limits[name]]
        worst = wrong[0] if wrong else max(details, key=lambda name: details[name])
        shown = f"{details[worst]:.1e} ({'first ' if wrong else ''}in {worst})"
        expects = (
            f"pixels equal, every stage within {FLOAT32:.0e} of its largest value (25 sums in another order, 4e-6 each)"
        )
        return at_most(
            title, details[worst], limits[worst], found=shown, expected=expects, unit="of the largest value", **details
        )
    details = {name: cosine(x, expected.stages[name]) for name, x in found.stages.items()}
    wrong = [name for name in details if not details[name] >= MIN_COSINE]
    worst = wrong[0] if wrong else min(details, key=lambda name: details[name])
    shown = f"cosine {details[worst]:.6f} ({'first ' if wrong else ''}in {worst})"
    expects = (
        f"every stage at least {MIN_COSINE} (eight bits, 500 steps: 1 - 0.044**2 / 2), against the same rounded "
        "weights in float32"
    )
    return at_least_cosine(title, details, worst, shown, expects)


def at_least_cosine(title: str, details: Mapping[str, float], worst: str, found: str, expected: str) -> Finding:
    """A finding about cosines by name, decided by the `worst`."""
    right = details[worst] >= MIN_COSINE
    return Finding(title, "right" if right else "wrong", found, expected, details[worst], MIN_COSINE, "cosine", details)


def same_tokens(title: str, found: Passage, expected: Passage) -> Finding:
    """Whether both sides choose the same next tokens, given the same ones before.

    Another token is right only where the expected logits of both are nearly equal.
    """
    logits = np.concatenate([expected.stages["prefill"], expected.stages["steps"]])
    gaps = []
    for row, ours, theirs in zip(logits, found.tokens, expected.tokens, strict=True):
        gaps.append(float(row[theirs] - row[ours]) / (float(np.abs(row).max()) or 1.0))
    same = sum(ours == theirs for ours, theirs in zip(found.tokens, expected.tokens, strict=True))
    expects = f"all, or another whose logit is within {2 * FLOAT32:.0e} of the largest (a step's limit, both ways)"
    return at_most(
        title, max(gaps), 2 * FLOAT32, found=f"{same} of {GREEDY_TOKENS} greedy tokens are the same", expected=expects,
        unit="of the largest value", same=float(same), tokens=float(GREEDY_TOKENS),
    )  # fmt: skip


def largest(title: str, expected: Passage) -> Finding:
    """How near the values of each stage come to the largest that float16 holds."""
    details = {name: float(np.abs(x).max()) for name, x in expected.stages.items()}
    worst = max(details, key=lambda name: details[name])
    shown = f"{details[worst]:.1f} in {worst}, {details[worst] / MAX_FLOAT16:.2%} of what float16 holds"
    return Finding(title, "measured", shown, "", details[worst], None, "", details)


def same_answers(setting: Setting) -> Finding:
    """Whether the built-in model's answers, from pixels to text, are the same on both sides."""
    sources = [picture(256)[0], np.full((96, 128, 3), (250, 220, 40), np.uint8)]
    texts = []
    for side in (setting.subject, setting.reference):
        engine = side.engine()
        with side.here():
            texts.append(
                [
                    finish(stream(engine, engine.prepare(source, question), Options(max_tokens=24))).text
                    for source in sources
                    for question in QUESTIONS
                ]
            )
    same = sum(ours == theirs for ours, theirs in zip(*texts, strict=True))
    shown = f"{same} of {len(texts[0])} answers are the same"
    return holds("tiny's answers", same == len(texts[0]), shown, "all of them, word for word (float32)")
