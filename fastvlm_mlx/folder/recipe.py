"""What decides an answer besides its pictures and its question, as a short text: another recipe, a stale answer."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

from ..decoding.engine import Engine
from ..decoding.request import Options
from .captions import Rules

SAMPLES, SAMPLE_BYTES = 8, 1 << 16  # of each file of weights: reading all of them would take as long as loading
RECIPE_CHARS = 16  # hexadecimal digits
WEIGHTS = (".safetensors", ".bin", ".pth", ".pt")


def recipe_of(
    engine: Engine, options: Options, rules: Rules, *, system: str | None = None, loaded: str = "", adapter: str = ""
) -> str:
    """The recipe of an engine's answers, with the dtype or bits it is `loaded` in, and an adapter's identity."""
    decides = {
        "model": list(_model(engine)),
        "config": repr(engine.config),
        "options": asdict(options),
        "rules": asdict(rules),
        "system": system,
        "loaded": loaded,
        "adapter": adapter,
    }
    return sha256(json.dumps(decides, sort_keys=True, default=repr).encode()).hexdigest()[:RECIPE_CHARS]


def _model(engine: Engine) -> Iterator[str]:
    """A model's name, and what tells its weights from others of the same name."""
    yield engine.name
    folder = engine.opened.folder
    if engine.opened.built_in or folder is None:
        return
    for path in sorted(folder.iterdir()):
        if path.suffix in WEIGHTS:
            yield f"{path.name} {_sampled(path)}"


def _sampled(path: Path) -> str:
    """A digest of a file's size and of parts of it, evenly spread."""
    size = path.stat().st_size
    found = sha256(str(size).encode())
    with path.open("rb") as file:
        for number in range(SAMPLES):
            file.seek(max(0, size - SAMPLE_BYTES) * number // (SAMPLES - 1))
            found.update(file.read(SAMPLE_BYTES))
    return found.hexdigest()
