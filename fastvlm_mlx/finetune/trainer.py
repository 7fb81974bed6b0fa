"""A run from its first step to its last: draw, learn, look at held-out rows, keep the best, save, and stop.

What is drawn at a step depends on the seed and the step alone, so a run that was ended goes on from its last state as
if it had never been; where nothing else changes, bit for bit.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import TrainingError
from .batches import Batch, order
from .evaluation import row_losses, score
from .learner import Learner, Part, Taken
from .log import Log
from .material import Material
from .options import TuneOptions
from .ranks import Ranks
from .state import Progress, save_state

SAVE_SECONDS = 60.0  # between two states on disk, beside those of looks
LOOKS = 20  # at held-out rows in a run, where nothing else is asked for
Listener = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Plan:
    """What a step draws: sequences of new rows and of old ones, each from an endless shuffled stream."""

    new: int
    old: int

    @classmethod
    def of(cls, options: TuneOptions, has_old: bool) -> "Plan":
        """From the options, whose `replay_share` counts where there are old rows."""
        every = options.batch * options.accumulate
        old = min(every - 1, max(1, round(options.replay_share * every))) if has_old and options.replay_share else 0
        return cls(every - old, old)


class Trainer:
    """A run over `materials`, one for each resolution, of which every step takes one.

    `out` is the folder whose state is written, None for none; `listen` is told of every step and look.
    """

    def __init__(
        self, learner: Learner, materials: Sequence[Material], options: TuneOptions, progress: Progress, log: Log, *,
        out: Path | None, ranks: Ranks, listen: Listener, best: dict[str, mx.array] | None = None,
    ):  # fmt: skip
        self.learner, self.materials, self.options, self.progress = learner, materials, options, progress
        self.log, self.out, self.ranks, self.listen = log, out, ranks, listen
        self.plan = Plan.of(options, bool(materials[0].old))
        self.moment = learner.moment()
        self.best = best if best is not None else self.moment.parameters
        self._saved = time.monotonic()
        self._whole = threading.Lock()  # held while the state changes or is written: a watchdog's thread saves it, too
        self._every = options.eval_every or max(1, progress.total // LOOKS)

    def run(self) -> None:
        """Take the steps that are left; raises TrainingError where the loss or the gradient is no number.

        Interrupted, it saves the last whole step and raises KeyboardInterrupt.
        """
        progress = self.progress
        try:
            if not progress.step and not progress.before:
                progress.before = self._look()
                self.save()
            while progress.step < progress.total and not self._has_waited():
                self._step()
                if progress.step % self._every == 0 or progress.step == progress.total:
                    self._look()
                    self.save()
                elif time.monotonic() - self._saved > SAVE_SECONDS:
                    self.save()
        except KeyboardInterrupt:
            self.learner.go_back(self.moment)
            self.save()
            raise
        finally:
            with self._whole:
                self.log.draw()

    def drawn(self, step: int) -> list[list[Part]]:
        """The batches of a step by micro-batch: this process's share of them."""
        options, plan = self.options, self.plan
        which = int(np.random.default_rng([options.seed, 3, step]).integers(len(self.materials)))
        material = self.materials[which]
        every = [material.new[i] for i in order(len(material.new), options.seed, 0, step * plan.new, plan.new)]
        if plan.old:
            every += [material.old[i] for i in order(len(material.old), options.seed, 1, step * plan.old, plan.old)]
        micro = [every[start :: options.accumulate] for start in range(options.accumulate)]
        return [material.parts(some[self.ranks.rank :: self.ranks.size]) for some in micro]

    def _step(self) -> None:
        started = time.perf_counter()
        progress = self.progress
        parts = [part for some in self.drawn(progress.step) for part in some]
        taken = self.learner.step(parts)
        if not np.isfinite([taken.loss, taken.norm]).all():
            self._fail(taken, parts)
        seconds = time.perf_counter() - started
        with self._whole:
            self.moment = self.learner.moment()
            progress.step += 1
            progress.seconds += seconds
        rate = float(self.learner.optimizer.optimizers[0].learning_rate.item())
        self._tell({
            "step": progress.step, "loss": taken.loss, "tokens": taken.tokens, "norm": taken.norm, "lr": rate,
            "seconds": round(seconds, 4), "tokens_per_second": round(taken.tokens / max(seconds, 1e-9), 1),
        })  # fmt: skip

    def _fail(self, taken: Taken, parts: Sequence[Part]) -> None:
        """Name the step and the row; what was learned before is kept."""
        progress = self.progress
        worst = [found for part in parts for found in row_losses(self.learner.model, part, self.learner.tower_learns)]
        bad = [origin for origin, loss in worst if not np.isfinite(loss)]
        where = bad[0] if bad else max(worst, key=lambda found: found[1])[0]
        which = "is of" if bad else "is largest of"
        what = "loss" if not np.isfinite(taken.loss) else "gradient"
        self.save()
        kept = f"; the state of step {progress.step} is kept in {self.out}" if self.out else ""
        raise TrainingError(
            f"Step {progress.step + 1}: the {what} is not a finite number, and the loss {which} {where}{kept}. Check "
            "that row, or "
            "begin again with a lower `lr`."
        )

    def _look(self) -> dict[str, Any]:
        """Measure the held-out rows; keep what is best. The look before the first step is told as step 0."""
        model, first, learns = self.learner.model, self.materials[0], self.learner.tower_learns
        scores = {
            "held_out": score(model, self._parts(first.held_out), learns),
            "old": score(model, self._parts(first.old_held_out), learns),
        }
        found: dict[str, Any] = {name: asdict(each) for name, each in scores.items() if each is not None}
        progress = self.progress
        if found:
            value = sum(each["loss"] for each in found.values()) / len(found)
            better = progress.best_score is None or value < progress.best_score
        else:
            value, better = None, True
        with self._whole:
            if better:
                progress.best_score, progress.best_step, progress.waited = value, progress.step, 0
                self.best = self.moment.parameters
            else:
                progress.waited += 1
        self._tell({"step": progress.step, **found, "best": progress.best_step})
        return found

    def _parts(self, batches: Sequence[Batch]) -> Iterator[Part]:
        """Held-out batches with their pictures, one at a time."""
        for batch in batches:
            yield self.materials[0].part(batch)
            self.ranks.alive()

    def _has_waited(self) -> bool:
        patience = self.options.patience
        return patience is not None and self.progress.waited >= patience

    def _tell(self, event: dict[str, Any]) -> None:
        if self.ranks.rank == 0:
            self.log.add(event)
            self.listen(event)

    def save(self) -> None:
        """Write the state of the last whole step, where there is a folder for it."""
        self._saved = time.monotonic()
        if self.out is not None and self.ranks.rank == 0:
            with self._whole:
                save_state(self.out, self.progress, self.moment, self.best)
                self.log.draw()


def steps_in(minutes: float, seconds: Sequence[float] | np.ndarray) -> int:
    """How many steps fit into so many minutes at the pace of some."""
    return max(1, int(minutes * 60 / max(1e-6, float(np.median(seconds)))))
