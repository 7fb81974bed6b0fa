"""Every script in examples/ runs and prints, with the built-in model and with a small random checkpoint in Apple's
layout.

The notebook beside them is run by test_notebook.py.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))


def run(script: str, *args: object) -> str:
    if script == "client.py":
        for needed in ("openai", "uvicorn"):
            pytest.importorskip(needed, reason=f"{needed} is not installed")
    if script == "coreml.py":
        pytest.importorskip("coremltools", reason="the extra 'coreml' is not installed")
    done = subprocess.run([sys.executable, EXAMPLES / script, *map(str, args)], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b""), done.stderr.decode()
    return done.stdout.decode()


def test_all_are_here() -> None:
    assert SCRIPTS == [
        "caption_folder.py", "chinese.py", "choices.py", "client.py", "compare.py", "coreml.py", "describe.py",
        "fields.py", "inspect_parts.py", "page.py", "questions.py", "together.py",
    ]  # fmt: skip
    assert sum(path.stat().st_size for path in EXAMPLES.iterdir() if path.is_file()) < 400_000


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_with_a_model_and_a_picture_of_ones_own(apple: Path, script: str) -> None:
    assert run(script, "--model", apple, "--image", EXAMPLES / "sign.png").strip()
    assert "--model" in (EXAMPLES / script).read_text(encoding="utf-8").split('"""')[1]  # its usage says so


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_with_the_built_in_model(script: str) -> None:
    lines = run(script).splitlines()
    least = {"describe.py": 1, "questions.py": 3, "compare.py": 10, "page.py": 5, "chinese.py": 3, "fields.py": 3}
    least |= {
        "caption_folder.py": 6,
        "inspect_parts.py": 2,
        "choices.py": 3,
        "client.py": 2,
        "coreml.py": 10,
        "together.py": 5,
    }
    assert len(lines) >= least[script]
    if script == "caption_folder.py":
        assert 'sign.png: my_style, The text says "HELP".' in lines
    if script == "inspect_parts.py":
        assert lines[0] == "part,views,verdict,holes,remark,error" and lines[1].startswith("part,3,")
    if script == "together.py":
        assert lines[1] == "How many shapes are there? Three." and lines[-1].startswith("4 answers, ")
    if script == "choices.py":
        assert lines[0].startswith("No ") and sum(float(line.split()[-1][:-1]) for line in lines) == pytest.approx(
            100, abs=0.01
        )
    if script == "fields.py":
        assert [line.partition(":")[0] for line in lines] == ["shape", "colour", "how many"]
    if script == "compare.py":  # the same questions of every view, then of all three together
        assert [line for line in lines if not line.startswith("  ")][:3] == [
            "part-front.png",
            "part-left.png",
            "part-right.png",
        ]
        assert lines[-1].startswith("All 3 together (27 image tokens):")
    if script == "questions.py":  # later questions find the system prompt and the picture computed
        first, *others = (int(found) for found in re.findall(r"\((\d+) of \d+ positions", "\n".join(lines)))
        assert first == 0 and min(others) > 9


@pytest.mark.slow
def test_chinese_with_a_tokenizer_that_lies_apart(apple: Path, tokenizer_files: Path) -> None:
    """The checkpoint has no tokenizer of its own; the one named knows some Chinese, so that fewer tokens than bytes are
    needed."""
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json"):
        (apple / name).unlink()
    lines = run("chinese.py", "--model", apple, "--tokenizer-path", tokenizer_files).splitlines()
    question = re.match(r"图里有什么？ \(6 characters, (\d+) tokens\) ", lines[0])
    assert question and int(question[1]) < len("图里有什么？".encode())
    tiny = re.match(r"图里有什么？ \(6 characters, (\d+) tokens\) ", run("chinese.py"))
    assert tiny and int(tiny[1]) == len("图里有什么？".encode())  # a token per byte, and the same text
