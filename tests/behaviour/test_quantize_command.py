"""`quantize`, `convert --bits`, `bench --quality` and `info --estimate` as commands: what they write, print and
refuse."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .forkserver import Run


def patiently(*arguments: object) -> subprocess.CompletedProcess[str]:
    """A command that may take longer than `run` waits."""
    command = [sys.executable, "-m", "fastvlm_mlx", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def pictures(photo: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.png").write_bytes(photo.read_bytes())
    (folder / "questions.jsonl").write_text('{"image": "a.png", "question": "What?", "answer": "A café."}\n')
    return folder


def test_quantize_says_what_was_left_alone(run: Run, model: Path, photo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("quantize", model, "--out", out)
    assert done.code == 0 and not done.out
    for line in (
        "8 layers: 4 bits in groups of 64 (affine)",
        "3 layers: 8 bits in groups of 64 (affine)",
        "left alone, the image encoder",
    ):
        assert line in done.err, done.err
    answered = run("generate", "-m", out, "-i", photo, "--max-tokens", 3)
    assert answered.code == 0 and answered.out


@pytest.mark.slow
def test_convert_quantises_as_quantize_does(run: Run, model: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert run("convert", model, "--out", one, "--bits", 3, "--group-size", 32).code == 0
    assert run("quantize", model, "--out", two, "--bits", 3, "--group-size", 32).code == 0
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    assert {q["bits"] for q in json.loads((one / "config.json").read_text())["quantization"].values()} == {3, 8}


@pytest.mark.slow
def test_a_calibrated_folder_and_its_report(model: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = patiently("quantize", model, "--out", out, "--recipe", "mixed", "--pictures", pictures, "--report")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["weights", "unquantised", "mixed"]
    assert "| mixed |" in (out / "README.md").read_text()
    chart = tmp_path / "chart.svg"
    compared = patiently("bench", "--quality", model, out, "--pictures", pictures, "--chart", chart, "--json")
    assert compared.returncode == 0, compared.stderr
    exact, mixed = json.loads(compared.stdout)["qualities"]
    stored = json.loads((out / "quality.json").read_text())["qualities"][1]
    assert mixed["kl"] == pytest.approx(stored["kl"]) and mixed["bytes"] == stored["bytes"] < exact["bytes"]
    assert chart.read_text().startswith("<svg")


@pytest.mark.slow
def test_every_recipe_in_memory(model: Path, pictures: Path) -> None:
    done = patiently("bench", "--quality", model, "recipes", "--pictures", pictures)
    assert done.returncode == 0, done.stderr
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert names == ["weights", str(model), "4bit", "8bit", "small", "mixed", "plain"]


def test_estimates(run: Run, model: Path) -> None:
    rows = {row["recipe"]: row for row in json.loads(run("info", "7b", "--estimate", "--json").out)}
    assert rows["4bit"]["total"] < 6e9 and rows["8bit"]["stored"] < 0.6 * rows["bfloat16"]["stored"]
    assert "small" in run("info", model, "--estimate").out.decode()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", "MODEL", "--out", "OUT", "--recipe", "5bit"], "--recipe is '5bit', expected one of"),
        (["quantize", "MODEL", "--out", "OUT", "--bits", "7"], "bits is 7"),
        (["quantize", "MODEL", "--out", "OUT", "--bits", "4", "--group-size", "48"], "--group-size is 48"),
        (["quantize", "MODEL", "--out", "OUT", "--recipe", "mixed"], "needs pictures"),
        (["quantize", "MODEL", "--out", "OUT", "--recipe", "mixed", "--pictures", "/no/such"], "no such folder"),
        (["quantize", "MODEL", "--out", "MODEL", "--force"], "is the source itself"),
        (["quantize", "MODEL", "--out", ""], "is empty"),
        (["quantize", "MODEL", "--out", "OUT", "--dtype", "int8"], "dtype is 'int8'"),
        (["convert", "MODEL", "--out", "OUT", "--group-size", "64"], "belong to quantising"),
        (["bench", "--chart", "chart.svg"], "belong to --quality"),
        (["bench", "--quality", "recipes", "MODEL"], "name a model"),
        (["bench", "--quality", "MODEL", "MODEL"], "needs pictures"),
        (["info", "--estimate"], "takes a model or a size"),
    ],
)
def test_what_is_refused_is_refused_in_a_sentence(
    run: Run, model: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    places = {"MODEL": str(model), "OUT": str(tmp_path / "out")}
    done = run(*(places.get(argument, argument) for argument in arguments))
    assert done.code == 1 and not done.out
    assert message in done.err and done.err.count("\n") == 1, done.err
    assert not list(tmp_path.iterdir())
