"""A model folder -> a quantised one: open, calibrate where the recipe asks for it, round, save, measure."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import mlx.core as mx

from ..config import Dtype, ModelConfig, check_dtype
from ..decoding.engine import Engine
from ..errors import CheckpointError, OutputError, counted
from ..network.memory import weight_bytes
from ..network.model import FastVLM
from ..quantize.recipes import Plan, Recipe, plan
from ..quantize.rounding import quantized, scale_type
from ..storage.fill import check_finite
from ..storage.open import Named, OpenModel, open_ours
from ..storage.place import check_target, new_folder
from ..storage.save import write
from . import quality, report, search
from .examples import Examples, Question, answered, questions_for

STATE_SUFFIX = ".calibration"  # of the file beside the result with the state of an interrupted run
SAME = "\nThese are the questions it was calibrated on; others may tell more.\n"
Progress = Callable[[str, float], None]  # what is being done, and the share of everything that is done, 0-1


@dataclass(frozen=True)
class Quantized:
    """The result of `quantize`: the folder's config, layers left alone with the reason, and its quality if measured."""

    config: ModelConfig
    left: dict[str, str]
    qualities: list[quality.Quality]

    def lines(self) -> list[str]:
        """What was done and what was left alone, as lines of text: layers by their bits, and by the reason."""
        counts = Counter(
            f"{q.bits} bits in groups of {q.group_size} ({q.mode})" for q in self.config.quantization.values()
        )
        lines = [f"{counted(count, 'layer')}: {description}" for description, count in sorted(counts.items())]
        reasons: dict[str, Counter[str]] = defaultdict(Counter)
        for path, reason in self.left.items():
            reasons[reason][re.sub(r"\.\d+", ".*", path)] += 1
        for reason, paths in reasons.items():
            names = ", ".join(path if count == 1 else f"{path} ({count})" for path, count in sorted(paths.items()))
            lines.append(f"{counted(sum(paths.values()), 'layer')} left alone, {reason}: {names}")
        return lines


def state_file(out: Path) -> Path:
    """The file in which a calibration that writes to `out` keeps its state."""
    return out.with_name(f"{out.name}{STATE_SUFFIX}")


def quantize(
    opened: OpenModel,
    folder: Path,
    out: Path,
    recipe: Recipe,
    *,
    dtype: Dtype | None = None,
    questions: Sequence[Question] = (),
    pictures: Path | None = None,
    measure: bool = False,
    force: bool = False,
    progress: Progress = lambda label, share: None,
) -> Quantized:
    """Quantise a model opened from `folder`, of any accepted layout, and write it as a folder of ours at `out`.

    A recipe with a budget is calibrated on `questions`, by default those about the folder `pictures` (see
    `examples.questions_for`). With `measure`, the result is compared with the source on them, and its model card has
    the figures. `dtype` is the dtype of everything that is not quantised, by default the source's. `progress` is told
    what is being done and the share of everything that is done, 0-1. Raises CheckpointError, OptionError and
    OutputError; nothing is left half-written, but for the state of an interrupted calibration.
    """
    from ..convert.card import licence_text, model_card

    check_dtype(dtype)
    if "\0" not in str(out) and folder.resolve().is_relative_to(Path(os.path.realpath(out))):
        raise OutputError(
            f"{out} is the source itself or holds it, so it is not written to; give another `out`.", path=out
        )
    if (recipe.target_bits is not None or measure) and not questions:
        questions = questions_for(opened, pictures)
    if opened.config.quantization:
        raise CheckpointError(f"{folder} is quantised already; quantise the model it was made from.", path=folder)
    config = opened.resolve()
    config = replace(config, dtype=dtype or config.dtype)
    chosen, left = plan(FastVLM(config), recipe)
    nbytes = sum(weight_bytes(replace(config, quantization=chosen)).values())
    check_target(out, nbytes, force)

    step = _in_phases(recipe, measure, progress)
    exact = Engine(opened)
    reference: quality.Reference | None = None
    state: search.SearchState | None = None
    weights = opened.weights
    if recipe.target_bits is not None or measure:
        exact.load_weights()
    if measure:
        reference = quality.reference(
            exact, questions, "unquantised", lambda done, total: step("Answering", done, total)
        )
    if recipe.target_bits is not None:
        search.budget_bytes(exact.model, chosen, recipe)
        examples = (
            reference.examples
            if reference
            else answered(exact, questions, lambda done, total: step("Answering", done, total))
        )
        state = search.SearchState.open(state_file(out), search.fingerprint(exact, examples, recipe))
        chosen = _calibrated(exact, examples, recipe, state, partial(step, "Calibrating"))
        weights = exact.model.flat_parameters().items  # with the scales folded in
    config = replace(config, quantization=chosen)

    scaled = state is not None
    texts = {
        "tokenizer.json": opened.tokenizer.to_json(),
        "README.md": model_card(config, scaled=scaled),
        "LICENSE": licence_text(folder, config),
    }
    qualities: list[quality.Quality] = []
    with new_folder(out, nbytes, force) as unfinished:
        total = len(FastVLM(config).flat_parameters())
        write(
            unfinished,
            config,
            _stored(weights(), config, str(folder), lambda done: step("Writing", done, total)),
            texts,
        )
        if reference is not None:
            del exact, weights
            result = Engine(open_ours(unfinished, out.name))
            result.load_weights()
            qualities = [reference.own, quality.compare(result, reference, questions, recipe.name)]
            text = report.markdown(qualities) + (SAME if scaled else "")
            (unfinished / "README.md").write_text(model_card(config, quality=text, scaled=scaled), encoding="utf-8")
            (unfinished / "quality.json").write_text(report.to_json(qualities), encoding="utf-8")
    if state is not None:
        state.remove()
    return Quantized(config, left, qualities)


def trial(opened: OpenModel, recipe: Recipe, questions: Sequence[Question]) -> Engine:
    """A model quantised in memory and ready to answer; a recipe with a budget is calibrated on `questions`."""
    config = opened.resolve()
    chosen, _ = plan(FastVLM(config), recipe)
    if recipe.target_bits is not None:
        exact = Engine(opened)
        exact.load_weights()
        chosen = search.calibrate(exact, answered(exact, questions), recipe, search.SearchState(None, ""))
        opened = replace(opened, weights=exact.model.flat_parameters().items)
        del exact
    engine = Engine(opened)
    engine.load_weights(plan=chosen)
    return engine


def _in_phases(recipe: Recipe, measure: bool, progress: Progress) -> Callable[[str, int, int], None]:
    """A function that is told (phase, steps done, steps in all), and reports the share of the whole work done."""
    calibrated = recipe.target_bits is not None
    phases = ["Answering"] * (calibrated or measure) + ["Calibrating"] * calibrated + ["Writing"]

    def step(phase: str, done: int, total: int) -> None:
        progress(phase, (phases.index(phase) + done / total) / len(phases))

    return step


def _calibrated(
    exact: Engine, examples: Examples, recipe: Recipe, state: search.SearchState, progress: Callable[[int, int], None]
) -> Plan:
    total = search.steps(exact, examples, recipe)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    return search.calibrate(exact, examples, recipe, state, step)


def _stored(
    weights: Named, config: ModelConfig, origin: str, progress: Callable[[int], None]
) -> Iterator[tuple[str, mx.array]]:
    """Every tensor as it is stored in the folder, one at a time."""
    dtype: mx.Dtype = getattr(mx, config.dtype)
    for done, (name, array) in enumerate(weights, start=1):
        settings = config.quantization.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if settings is None:
            stored = array.astype(dtype)
            check_finite(origin, [(name, stored, array)])
            yield name, stored
        else:
            check_finite(origin, [(name, array, array)])
            parts = quantized(name, array, settings, scale_type(config.dtype))
            mx.eval([tensor for _, tensor in parts])
            yield from parts
        progress(done)
