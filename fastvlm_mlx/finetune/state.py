"""A run as it lies on disk, to be gone on from: `OUT/state/`, of which `state.json` alone says which files count.

state.json  step-N.safetensors (what learns, and the optimizer's state)  best-N.safetensors (the adapter so far)

Files of a new state are written beside those of the last, and state.json takes its place at once: whenever a run is
killed, the last state that was saved is whole.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import CheckpointError, OutputError, listed, shown
from ..files import regular as files
from ..files import safetensors
from ..files.jsonfile import read_table
from ..storage.adapter import write_tensors
from .learner import Moment

FOLDER, TABLE = "state", "state.json"
STATE_VERSION = 1
PARAMETERS, OPTIMIZER = "parameters.", "optimizer."


@dataclass
class Progress:
    """How far a run has come: steps taken, of how many, the best score and its step, looks without a better one, and
    seconds.

    `lasting` are the options and data that it cannot be gone on with other values of.
    """

    lasting: dict[str, Any]
    total: int
    step: int = 0
    seconds: float = 0.0
    best_step: int = 0
    best_score: float | None = None
    waited: int = 0
    before: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """state.json as written, but for the names of the files."""
        return {"format_version": STATE_VERSION, **asdict(self)}


def save_state(out: Path, progress: Progress, moment: Moment, best: dict[str, mx.array]) -> None:
    """Write a run's state into its folder; raises OutputError, and then the last one still counts."""
    folder = out / FOLDER
    try:
        folder.mkdir(exist_ok=True)
        step, kept = f"step-{progress.step}.safetensors", f"best-{progress.best_step}.safetensors"
        tensors = {f"{PARAMETERS}{name}": array for name, array in moment.parameters.items()}
        tensors |= {f"{OPTIMIZER}{name}": array for name, array in moment.optimizer.items()}
        write_tensors(folder / step, tensors)
        if not (folder / kept).exists():
            write_tensors(folder / kept, best)
        files.write(folder / TABLE, json.dumps({**progress.to_dict(), "files": [step, kept]}, indent=2) + "\n")
        for path in folder.glob("*.safetensors"):
            if path.name not in (step, kept):
                path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be written ({error.strerror}); the last state that was saved is whole: make room, and "
            "go on from it "
            "with `resume=True`."
        ) from error


def read_state(out: Path) -> tuple[Progress, Moment, dict[str, mx.array]]:
    """The last state of a run and its best parameters; raises CheckpointError where there is none, or it is damaged."""
    folder = out / FOLDER
    if not (folder / TABLE).is_file():
        raise CheckpointError(f"{out}: there is no state of a run to go on from; leave `resume` out to begin one.")
    table = read_table(folder / TABLE)
    if table.get("format_version") != STATE_VERSION:
        raise CheckpointError(
            f"{folder / TABLE}: its version is {shown(table.get('format_version'))}, expected {STATE_VERSION}; begin "
            "a new run."
        )
    try:
        step, kept = table.pop("files")
        del table["format_version"]
        progress = Progress(**table)
        if Path(step).name != step or Path(kept).name != kept:
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / TABLE}: it is damaged; begin a new run with another `out`.") from error
    tensors, best = (_read(folder / name) for name in (step, kept))
    parts = [
        {name.removeprefix(start): array for name, array in tensors.items() if name.startswith(start)}
        for start in (PARAMETERS, OPTIMIZER)
    ]
    return progress, Moment(*parts), best


def _read(path: Path) -> dict[str, mx.array]:
    safetensors.read_header(path)
    tensors = dict(safetensors.load(path))
    mx.eval(tensors)
    return tensors


def check_fits(progress: Progress, lasting: dict[str, Any], total: int | None, out: Path) -> None:
    """Raise CheckpointError unless a run can be gone on with these options, data and base as if it had never ended."""
    names = {"base_digest": "another base model", "data": "other rows"}
    odd = [names.get(key, f"`{key}`") for key in lasting if lasting[key] != progress.lasting.get(key)]
    if total is not None and total != progress.total:
        odd.append(f"another length ({total} steps, and it was begun for {progress.total})")
    if odd:
        raise CheckpointError(
            f"{out}: its state is of a run with {listed(odd).replace(chr(39), '')} than now; give the same as then "
            "to go on, or "
            "another `out` to begin anew."
        )
