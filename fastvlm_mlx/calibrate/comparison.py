"""One model compared with another, or with itself in every recipe: how near the answers are."""

from collections.abc import Callable, Sequence
from pathlib import Path

from ..decoding.engine import Engine
from ..errors import OptionError
from ..hub.consent import Agree
from ..quantize.recipes import RECIPES
from . import quality
from .examples import questions_for
from .pipeline import trial
from .quality import Quality

ALL_RECIPES = "recipes"  # as the second model: the first one, quantised by every recipe


def compare(
    first: str,
    second: str,
    *,
    pictures: Path | None = None,
    agree: Agree | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Sequence[Quality]:
    """Measure `second` against `first` on questions about `pictures`; the first result is the reference's own.

    `second` is a model, or ALL_RECIPES for `first` quantised by every recipe. `pictures` is a folder (see
    `examples.read_questions`); the built-in model has its own. `agree` is asked before a first download, `say` is told
    what is being measured. One model is in memory at a time. Raises FastVLMError.
    """
    if first == ALL_RECIPES:
        raise OptionError("The first model of `quality` is the one to compare with; name a model.")
    engines = [Engine.open(name, agree=agree) for name in (first, second) if name != ALL_RECIPES]
    if second == ALL_RECIPES and engines[0].config.quantization:
        raise OptionError(f"{first} is quantised already; name the model it was made from to try the recipes on.")
    questions = questions_for(engines[0].opened, pictures)
    exact = engines.pop(0)
    exact.load_weights()
    reference = quality.reference(exact, questions, first)
    opened = exact.opened
    del exact
    results = [reference.own]
    for engine in engines:
        engine.load_weights()
        results.append(quality.compare(engine, reference, questions, second))
    for name, recipe in RECIPES.items() if second == ALL_RECIPES else ():
        say(f"{name} ...")
        results.append(quality.compare(trial(opened, recipe, questions), reference, questions, name))
    return results
