"""A new Python process with this package, for checks that need a fresh start or may end the process."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PACKAGE = Path(__file__).parents[3]  # the folder that this package is imported from
MAX_SECONDS = 120.0  # seconds; the checks take a few


def python(arguments: Sequence[str]) -> str:
    """Run Python with these arguments and return what it prints.

    Raises RuntimeError, with its last line, where it fails.
    """
    path = os.pathsep.join([str(PACKAGE), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=MAX_SECONDS,
        check=False,
        env={**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"},
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"the process ended with {done.returncode} ({last})")
    return done.stdout
