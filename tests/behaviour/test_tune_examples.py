"""Every script in examples/tune/ runs, with few steps, and leaves an adapter that `tiny` answers with."""

import subprocess
import sys
from pathlib import Path

import pytest

import fastvlm_mlx

FOLDER = Path(__file__).parents[2] / "examples" / "tune"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py"))


def test_all_are_here() -> None:
    assert SCRIPTS == ["chinese.py", "defects.py", "formulas.py", "style.py"]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_it_runs_and_its_adapter_answers(tmp_path: Path, script: str) -> None:
    out = tmp_path / "adapter"
    command = [sys.executable, str(FOLDER / script), "--steps", "2", "--out", str(out)]
    if script == "chinese.py":
        command += ["--pictures", "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert len(done.stdout.splitlines()) >= 3
    vlm = fastvlm_mlx.load("tiny", adapter=out)
    answer = vlm.generate(FOLDER.parent / "shapes.png", "How many shapes are there?", max_tokens=8)
    assert answer.token_ids
    if script == "chinese.py":
        assert len(vlm.tokenizer.encode("红色")) == 1
