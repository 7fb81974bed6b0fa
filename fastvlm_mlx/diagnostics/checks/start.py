"""Cold start: the command in two new processes; the first may compile kernels or read from disk."""

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ..bench import made_photo
from ..bench import seconds as in_words
from .finding import Finding, holds
from .process import python
from .setting import Setting

USES = ("first use", "second use")
COMMAND = "fastvlm-mlx generate --model tiny --json --image"


def check(setting: Setting) -> Iterator[Finding]:
    """Findings with the time of each process, and whether both gave the same answer."""
    texts = []
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "picture.jpg"
        picture.write_bytes(made_photo(256, 256))
        command = ["-m", "fastvlm_mlx", *COMMAND.split()[1:], str(picture)]
        for use in USES:
            setting.say(use)
            started = time.perf_counter()
            answer = json.loads(python(command))
            taken = time.perf_counter() - started
            texts.append(str(answer["text"]))
            load, first = float(answer["load_seconds"]), float(answer["ttft_seconds"])
            shown = f"{in_words(taken)}, of which load {in_words(load)}, first token {in_words(first)}"
            yield Finding(use, "measured", shown, "", taken, None, "s", {"load_seconds": load, "ttft_seconds": first})
    same = texts[0] == texts[1] != ""
    yield holds(
        "answers of both processes", same, "the same" if same else f"{texts[0]!r}, then {texts[1]!r}", "the same"
    )
