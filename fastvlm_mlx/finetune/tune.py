"""Fine-tuning from the outside: a model and rows in, an adapter and the history of the run out."""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from ..config import ModelConfig
from ..decoding.engine import Engine
from ..errors import OptionError, OutputError, PromptError
from ..hub.find import find, find_tokenizer
from ..hub.names import BUILT_IN
from ..inputs.tokenizer import Tokenizer
from ..network.lora import attached
from ..network.model import FastVLM
from ..storage.adapter import Adapter, AdapterConfig, digests_of, is_adapter, write_adapter
from ..storage.place import new_folder, target_of
from . import ranks as processes
from .formats import Data, read_rows
from .learner import Learner, Moment
from .log import Log
from .material import Material, Rows, divided, fingerprint, prepare
from .options import NONE, TuneOptions
from .parts import adapter_of, network_to_train
from .ranks import Ranks
from .state import FOLDER, Progress, check_fits, read_state, save_state
from .trainer import Listener, Plan, Trainer, steps_in
from .vocabulary import with_tokenizer
from .watchdog import FAILED

PACED = 5  # steps whose pace is measured where a run is to take so many minutes
Watcher = Callable[[str, int, int], None]


class HasEngine(Protocol):
    """A VLM, or whatever has an engine."""

    @property
    def engine(self) -> Engine:
        """What answers."""


@dataclass(frozen=True)
class Tuned:
    """What fine-tuning came to: the adapter of the best step, and every step and look of the run.

    `before` and `after` are scores (loss in nats per token, shares of tokens and of rows exactly right) of held-out new
    rows and of held-out old ones, before the first step and at the best.
    """

    adapter: Adapter
    history: list[dict[str, Any]] = field(repr=False)
    before: dict[str, Any]
    after: dict[str, Any]
    best_step: int
    out: Path | None = None


def tune(
    vlm: HasEngine | Engine,
    rows: Data,
    options: TuneOptions | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    tokenizer: str | os.PathLike[str] | None = None,
    listen: Listener = lambda event: None,
    watch: Watcher = lambda label, done, total: None,
) -> Tuned:
    """Fine-tune a loaded model on rows and return what it learned as an adapter; the model itself stays as it is.

    `rows` are a path (JSON lines, JSON, a folder with metadata.jsonl, or pictures with texts beside them), or a list of
    tables with the same keys, whose pictures may be PIL images as well. `out` is the folder that the adapter, its log
    and the state of the run are written to; with `resume`, the run that was ended there goes on. `tokenizer` is the
    folder of another tokenizer to learn with. `listen` is told of
    every step and look as a table, `watch` how many pictures are encoded. Use the result by `vlm.use(tuned.adapter)`.

    Raises PromptError and ImageError that name rows that cannot be used, OptionError, OutputError, CheckpointError
    where a run cannot be gone on with, and TrainingError where the loss is no number.
    """
    options = (options or TuneOptions()).resolved()
    engine = vlm if isinstance(vlm, Engine) else vlm.engine
    target = None if out is None else target_of(out)
    ranks = processes.join()
    if ranks.rank == 0:
        check_target(target, resume)
    if attached(engine.model):
        raise OptionError("An adapter is in use; take it off with `use(None)` before fine-tuning, or fuse it first.")
    base = base_config(engine, options)
    changed = None
    if tokenizer is not None:
        engine, changed = with_tokenizer(engine, new_tokenizer(tokenizer), base)
        if changed is not None:
            more = () if "full" in (options.train or ()) else ("embeddings",)
            options = replace(options, train=(*(options.train or ()), *more))
            base = replace(changed.config, trained=())
    words = None if changed is None else engine.tokenizer
    data = gather(engine, rows, options)
    network = network_to_train(engine.model, engine.config, options)
    materials = [prepare(each, data, options, watch) for each in engines(engine, options)]
    lasting = {**options.lasting(), "base_digest": base.base_digest, "data": fingerprint(materials)}
    if resume:
        assert target is not None  # checked
        known = None if options.minutes is not None else length_of(options, materials[0])
        progress, learner, best = _taken_up(target, network, options, ranks, lasting, known)
        log = Log.taken_up(target, progress.step) if ranks.rank == 0 else Log(None)
    else:
        total = _total(network, materials, options, ranks)
        learner = Learner(network, options, total, ranks.total)
        progress, best = Progress(lasting, total), None
        if target is not None and ranks.rank == 0:
            _begin(target, base, network, learner, progress, words)
        log = Log(target if ranks.rank == 0 else None)
    trainer = Trainer(learner, materials, options, progress, log, out=target, ranks=ranks, listen=listen, best=best)
    if target is not None and ranks.rank == 0:
        (target / FOLDER / FAILED).unlink(missing_ok=True)
    if ranks.watchdog is not None:
        ranks.watchdog.folder, ranks.watchdog.keep = target and target / FOLDER, trainer.save
    trainer.run()
    if ranks.watchdog is not None:
        ranks.watchdog.end()
    adapter = adapter_of(base, trainer.best, network, words)
    if target is not None and ranks.rank == 0:
        write_adapter(target, adapter)
    looks = [event for event in log.events if "best" in event and event["step"] == progress.best_step]
    after = {str(name): look[name] for look in looks[-1:] for name in ("held_out", "old") if name in look}
    return Tuned(adapter, log.events, progress.before, after, progress.best_step, target)


def gather(engine: Engine, rows: Data, options: TuneOptions) -> Rows:
    """All rows of a run, some held out."""
    new = read_rows(rows, images=options.images, prompt=options.prompt)
    apart = None if options.eval is None else read_rows(options.eval, images=options.images, prompt=options.prompt)
    old = read_rows(replayed, prompt=options.prompt) if (replayed := _replayed(engine, options)) is not None else []
    data = divided(new, apart, old, options.seed)
    if not data.new:
        raise PromptError("There are no rows left to learn from beside those held out; add rows.")
    return data


def _replayed(engine: Engine, options: TuneOptions) -> Data | None:
    """The old rows to be replayed: those given, the built-in model's own, or none."""
    if isinstance(options.replay, str) and options.replay == NONE:
        return None
    if options.replay is None and engine.opened.built_in:
        return find(BUILT_IN).folder / "calibration"
    return options.replay


def engines(engine: Engine, options: TuneOptions) -> list[Engine]:
    """The engine at each resolution to be trained at."""
    return [engine.at(size) for size in options.resolution] or [engine]


def base_config(engine: Engine, options: TuneOptions) -> AdapterConfig:
    """What an adapter's settings say of its base and of the updates."""
    config: ModelConfig = engine.config
    every, norms = digests_of(engine.opened)
    sizes = options.resolution or (config.image.size,)
    return AdapterConfig(
        engine.name, every, norms, rank=options.rank, alpha=float(options.alpha), scale=float(options.scale),
        rslora=options.rslora, dora=options.dora, resolution=max(sizes), license=config.source.license,
    )  # fmt: skip


def length_of(options: TuneOptions, material: Material) -> int:
    """The steps of a run that is not measured in minutes."""
    if options.steps is not None:
        return options.steps
    assert options.epochs is not None  # resolved
    per_step = Plan.of(options, bool(material.old)).new
    return max(1, -(-int(options.epochs * len(material.new) * 1000) // (per_step * 1000)))


def _total(network: FastVLM, materials: Sequence[Material], options: TuneOptions, ranks: Ranks) -> int:
    if options.minutes is None:
        return length_of(options, materials[0])
    learner = Learner(network, options, 1, ranks.total)
    trainer = Trainer(
        learner, materials, options, Progress({}, PACED), Log(None), out=None, ranks=ranks, listen=lambda event: None
    )
    seconds = []
    for step in range(PACED):
        started = time.perf_counter()
        learner.gradient([part for some in trainer.drawn(step) for part in some])
        seconds.append(time.perf_counter() - started)
    slowest = ranks.total(mx.array(float(sorted(seconds)[PACED // 2]))) / ranks.size
    return steps_in(options.minutes, np.array(slowest).reshape(-1))


def _taken_up(
    target: Path, network: FastVLM, options: TuneOptions, ranks: Ranks, lasting: dict[str, Any], total: int | None
) -> tuple[Progress, Learner, dict[str, mx.array]]:
    """The run whose state lies in a folder of the first process, at all of them."""
    moment, best = None, None
    said = b""
    if ranks.rank == 0:
        progress, moment, best = read_state(target)
        check_fits(progress, lasting, total, target)
        said = json.dumps(asdict(progress)).encode()
    progress = Progress(**json.loads(ranks.told(said)))
    learner = Learner(network, options, progress.total, ranks.total)
    own = learner.moment()
    moment = moment or own
    learner.go_back(Moment(ranks.shared(moment.parameters), ranks.shared(moment.optimizer)))
    return progress, learner, ranks.shared(best or own.parameters)


def check_target(target: Path | None, resume: bool) -> None:
    """Raise OutputError unless a run can be begun, or gone on with, in this folder; OptionError where there is none to
    go on in.
    """
    if resume and target is None:
        raise OptionError("`resume` was given without `out`; name the folder of the run to go on with.")
    if target is not None and not resume and os.path.lexists(target):
        raise OutputError(f"{target} exists already; give `resume=True` to go on with the run in it, or another `out`.")
    if target is not None and resume and not is_adapter(target):
        raise OutputError(f"{target} is no adapter's folder, so there is no run to go on with; leave `resume` out.")


def new_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer in a folder, in tokenizer.json or in the files that checkpoints have; raises TokenizerError."""
    from ..convert.tokenizer import read_tokenizer

    path = find_tokenizer(folder)
    assert path is not None  # which only None gives
    return read_tokenizer(path)


def _begin(
    target: Path, base: AdapterConfig, network: FastVLM, learner: Learner, progress: Progress, words: Tokenizer | None
) -> None:
    """The folder of a run that has learned nothing yet, there as a whole or not at all."""
    moment = learner.moment()
    adapter = adapter_of(base, moment.parameters, network, words)
    nbytes = 2 * adapter.nbytes + sum(array.nbytes for array in moment.optimizer.values())
    with new_folder(target, nbytes, force=False) as partial:
        write_adapter(partial, adapter)
        save_state(partial, progress, moment, moment.parameters)
