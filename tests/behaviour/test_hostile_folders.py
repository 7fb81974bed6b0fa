"""Model folders that lie, lack, overflow or attack: refused in one sentence by every command, and nothing in them is
run."""

import json
import pickle
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from .changes import Attack, poison, settings, weights
from .forkserver import Run
from .hostile_folders import APPLES, BOTH, NORM, OURS, SAYS_OTHERWISE

pytestmark = pytest.mark.slow


def ask(run: Run, folder: Path) -> Any:
    return run("generate", "-m", folder, "-p", "Hi", "--max-tokens", 1)


@pytest.mark.parametrize("case", BOTH)
def test_any_folder(run: Run, apple: Path, case: str) -> None:
    change, says = BOTH[case]
    change(apple)
    ask(run, apple).refused(says)


@pytest.mark.parametrize("case", APPLES)
def test_apples_folder(run: Run, apple: Path, case: str) -> None:
    change, says = APPLES[case]
    change(apple)
    ask(run, apple).refused(SAYS_OTHERWISE.get(says, says))


@pytest.mark.parametrize("case", [case for case in BOTH if "config" not in case and case not in ("an empty header",)])
def test_our_folder_as_any(run: Run, ours: Path, case: str) -> None:
    change, says = BOTH[case]
    change(ours)
    ask(run, ours).refused(says)


@pytest.mark.parametrize("case", OURS)
def test_our_folder(run: Run, ours: Path, case: str) -> None:
    change, says = OURS[case]
    change(ours)
    ask(run, ours).refused(says)


@pytest.mark.parametrize("case", ["no config", "cut at 50 %", "a tensor renamed", "an index that mixes up"])
def test_convert_says_the_same_and_writes_nothing(run: Run, apple: Path, tmp_path: Path, case: str) -> None:
    change, says = BOTH[case]
    change(apple)
    before = sorted(tmp_path.iterdir())
    run("convert", apple, "--out", tmp_path / "out").refused(says)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("case", ["NaN", "infinity", "NaN in the tower", "a negative variance"])
def test_convert_finds_values_that_are_not_numbers(run: Run, apple: Path, tmp_path: Path, case: str) -> None:
    change, says = APPLES[case]
    change(apple)
    before = sorted(tmp_path.iterdir())
    run("convert", apple, "--out", tmp_path / "out").refused(says, "not finite", after=("Layout: llava",))
    assert sorted(tmp_path.iterdir()) == before


def test_weights_too_large_for_float16(run: Run, apple: Path, tmp_path: Path) -> None:
    poison(NORM, 1e6)(apple)
    run("generate", "-m", apple, "-p", "Hi", "--dtype", "float16").refused("norm.weight", "float16", "bfloat16")
    run("convert", apple, "--out", tmp_path / "out", "--dtype", "float16").refused(
        "norm.weight", "float16", "bfloat16", after=("Layout: llava",)
    )
    ask(run, apple).answered()


def test_large_sums_of_ordinary_weights_are_no_error(run: Run, apple: Path) -> None:
    weights(lambda t: t.update({NORM: mx.full((64,), 3e38, mx.float32)}))(apple)
    ask(run, apple).answered()


def test_nothing_in_a_folder_is_run(run: Run, apple: Path, tmp_path: Path) -> None:
    """Code and pickles beside good weights are ignored, by every command."""
    evidence = tmp_path / "executed"
    code = f"import os\nos.mkdir({str(evidence)!r})\n"
    for name in (
        "modeling_llava_qwen.py",
        "configuration.py",
        "__init__.py",
        "setup.py",
        "model.py",
        "sitecustomize.py",
        "mlx.py",
    ):
        (apple / name).write_text(code)
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pkl"):
        (apple / name).write_bytes(pickle.dumps(Attack(evidence)))
    settings(
        auto_map={"AutoModel": "modeling_llava_qwen.Model", "AutoConfig": "configuration.Config"},
        model_file="model.py",
        trust_remote_code=True,
        custom_pipelines={"x": {"impl": "model.Model"}},
        chat_template="{{ cycler.__init__ }}",
    )(apple)
    run("generate", "-m", ".", "-p", "Hi", "--max-tokens", 1, cwd=apple).answered()
    assert run("info", apple).code == run("convert", apple, "--out", tmp_path / "out").code == 0
    assert not evidence.exists()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "LICENSE",
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickles_of_code_are_refused_by_name(run: Run, apple: Path, tmp_path: Path, name: str) -> None:
    evidence = tmp_path / "executed"
    (apple / "model.safetensors").unlink()
    (apple / name).write_bytes(pickle.dumps(Attack(evidence)))
    ask(run, apple).refused(name, "safetensors instead")
    assert not evidence.exists()


def test_a_pickle_called_safetensors(run: Run, apple: Path, tmp_path: Path) -> None:
    (apple / "model.safetensors").write_bytes(pickle.dumps(Attack(tmp_path / "executed")))
    ask(run, apple).refused("truncated or not a safetensors file")
    assert not (tmp_path / "executed").exists()


def test_a_tokenizer_of_another_model(run: Run, apple: Path, ours: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    table = json.loads((ours / "tokenizer.json").read_text())
    size = len(table["model"]["vocab"])
    table["model"]["vocab"] |= {f"more{i}": size + 3 + i for i in range(200)}
    (other / "tokenizer.json").write_text(json.dumps(table))
    for folder in (apple, ours):
        run("generate", "-m", folder, "--tokenizer-path", other, "-p", "Hi").refused(
            "another model", "--tokenizer-path"
        )
    (other / "tokenizer.json").unlink()
    for folder in (apple, ours):
        run("generate", "-m", folder, "--tokenizer-path", other, "-p", "Hi").refused("tokenizer")
