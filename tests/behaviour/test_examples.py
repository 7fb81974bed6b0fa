"""Every script in examples/ runs and prints, with the small random checkpoint and with the built-in model."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
PICTURES = [str(EXAMPLES / name) for name in ("shapes.png", "sign.png")]


def run(script: str, *args: object) -> str:
    done = subprocess.run([sys.executable, EXAMPLES / script, *map(str, args)], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b""), done.stderr.decode()
    return done.stdout.decode()


def test_all_are_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"describe.py", "questions.py", "compare.py"}


@pytest.mark.parametrize(("script", "pictures"), [("describe.py", 1), ("questions.py", 1), ("compare.py", 2)])
def test_with_a_model_of_ones_own(apple: Path, script: str, pictures: int) -> None:
    assert run(script, *PICTURES[:pictures], apple).strip()


@pytest.mark.parametrize("script", ["describe.py", "questions.py", "compare.py"])
def test_with_the_built_in_model(script: str) -> None:
    assert run(script).strip()
