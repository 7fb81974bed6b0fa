"""The real commands, as processes: what comes on stdout, on stderr, and the exit code."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvlm_mlx import load
from fastvlm_mlx.decoding.engine import Engine

from .. import checkpoint

KEYS = {
    "text", "model", "images", "image_tokens", "prompt_tokens", "completion_tokens", "finish_reason", "load_seconds",
    "preprocess_seconds", "vision_seconds", "prefill_seconds", "ttft_seconds", "decode_tokens_per_second",
    "peak_memory_bytes",
}  # fmt: skip


def run(*args: object, stdin: bytes = b"", **env: str) -> subprocess.CompletedProcess[bytes]:
    import os

    command = [sys.executable, "-m", "fastvlm_mlx", *map(str, args)]
    return subprocess.run(
        command, input=stdin, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1", **env}, check=False
    )


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "photo of a café.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (80, 60, 3), dtype=np.uint8)).save(path)
    return path


def test_generate_prints_the_answer_and_nothing_else(apple: Path, picture: Path) -> None:
    expected = load(str(apple)).generate(str(picture), "What is it?", max_tokens=12).text
    done = run("generate", "--model", apple, "--image", picture, "--prompt", "What is it?", "--max-tokens", 12)
    assert (done.returncode, done.stderr.count(b"\n")) == (0, 1) and b"cut at its limit of 12 tokens" in done.stderr
    assert done.stdout.decode() == expected + "\n"


@pytest.mark.slow
def test_apples_option_names(apple: Path, picture: Path) -> None:
    plain = run(
        "generate",
        "-m",
        apple,
        "-i",
        picture,
        "-p",
        "Hi",
        "--max-tokens",
        6,
        "--temperature",
        0.8,
        "--top-p",
        0.9,
        "--seed",
        4,
    )
    apples = run(
        "generate", "--model-path", apple, "--image-file", picture, "--prompt", "Hi", "--max-new-tokens", 6,
        "--temp", 0.8, "--top_p", 0.9, "--seed", 4,
    )  # fmt: skip
    assert plain.returncode == apples.returncode == 0, plain.stderr + apples.stderr
    assert plain.stdout == apples.stdout


def test_json_has_every_key(apple: Path, picture: Path) -> None:
    done = run("generate", "-m", apple, "-i", picture, "-i", picture, "--max-tokens", 5, "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer.keys() == KEYS
    assert (answer["images"], answer["image_tokens"], answer["completion_tokens"]) == (2, 8, 5)
    assert answer["model"] == str(apple)


@pytest.mark.slow
def test_a_prompt_from_stdin(apple: Path, picture: Path) -> None:
    question = "图里有什么？\nAnd what else? 😀"
    typed = run("generate", "-m", apple, "-i", picture, "-p", question, "--max-tokens", 6)
    piped = run("generate", "-m", apple, "-i", picture, "-p", "-", "--max-tokens", 6, stdin=question.encode() + b"\n")
    assert typed.returncode == piped.returncode == 0
    assert typed.stdout == piped.stdout


@pytest.mark.slow
def test_the_model_from_the_environment(apple: Path, picture: Path) -> None:
    assert run("generate", "-i", picture, "--max-tokens", 2, FASTVLM_MODEL=str(apple)).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--bits", "8"], ["--load-8bit"]])
def test_bits(apple: Path, picture: Path, flags: list[str]) -> None:
    assert run("generate", "-m", apple, "-i", picture, "--max-tokens", 2, *flags).returncode == 0


@pytest.mark.slow
def test_tokenizer_from_another_folder(apple: Path, picture: Path, tokenizer_files: Path) -> None:
    whole = run("generate", "-m", apple, "-i", picture, "--max-tokens", 6)
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json"):
        (apple / name).unlink()
    lacking = run("generate", "-m", apple, "-i", picture, "--max-tokens", 6)
    assert lacking.returncode == 1 and b"--tokenizer-path" in lacking.stderr
    given = run("generate", "-m", apple, "-i", picture, "--max-tokens", 6, "--tokenizer-path", tokenizer_files)
    assert (given.returncode, given.stdout) == (0, whole.stdout)


@pytest.mark.slow
def test_convert_then_generate(apple: Path, picture: Path, tmp_path: Path) -> None:
    done = run("convert", apple, "--out", tmp_path / "ours", "--dtype", "float32")
    assert (done.returncode, done.stdout) == (0, b""), done.stderr
    ask = ("-i", picture, "--max-tokens", 8, "--dtype", "float32")
    answers = [run("generate", "-m", folder, *ask).stdout for folder in (apple, tmp_path / "ours")]
    assert answers[0] == answers[1] != b""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda apple: (apple / "model.safetensors").unlink(), "no *.safetensors"),
        (lambda apple: (apple / "config.json").unlink(), "no config.json"),
        (lambda apple: (apple / "config.json").write_text('{"model_type": "llama"}'), "'llama'"),
        (lambda apple: (apple / "vocab.json").unlink(), "no vocab.json"),
    ],
)
def test_mistakes_get_one_sentence_before_any_weights_are_read(
    apple: Path, picture: Path, change: object, says: str
) -> None:
    change(apple)  # type: ignore[operator]
    done = run("generate", "-m", apple, "-i", picture)
    message = done.stderr.decode()
    assert (done.returncode, done.stdout) == (1, b"")
    assert says in message and message.count("\n") == 1 and "Traceback" not in message


@pytest.mark.slow
def test_a_picture_is_checked_before_the_weights(apple: Path, tmp_path: Path) -> None:
    """The weights hold a value that is no number, which reading them reveals; the picture is complained of first."""
    weights = checkpoint.read(apple)
    weights["model.norm.weight"] = weights["model.norm.weight"] * float("nan")
    checkpoint.save(apple / "model.safetensors", weights)
    assert b"not finite" in run("generate", "-m", apple, "-p", "Hi").stderr
    (tmp_path / "empty.jpg").touch()
    done = run("generate", "-m", apple, "-i", tmp_path / "empty.jpg")
    assert done.returncode == 1 and b"is empty" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("option", "value"), [("--bits", 7), ("--dtype", "int8"), ("--max-tokens", 0), ("--top-p", 2)])
def test_an_option_out_of_range_is_found_before_the_model_is_looked_for(option: str, value: object) -> None:
    done = run("generate", "-m", "no-such/model", option, value)
    assert done.returncode == 1 and str(value).encode() in done.stderr and b"Hub" not in done.stderr


def test_opening_a_checkpoint_reads_no_weights(apple: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvlm_mlx.convert.read.Checkpoint.load", lambda _: pytest.fail("weights were read"))
    Engine.open(str(apple)).prepare(None, "Hi")


@pytest.mark.slow
def test_a_model_that_is_nowhere(picture: Path) -> None:
    done = run("generate", "-m", "no/such/folder", "-i", picture)
    assert done.returncode == 1 and b"no such folder, and not a Hub name" in done.stderr
    done = run("generate", "-m", "some-one/some-model", "-i", picture)
    assert done.returncode == 1 and b"no such folder" in done.stderr and b"Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["generate", "convert", "download", "info", "--version"])
def test_help(command: str) -> None:
    done = run(command, *([] if command == "--version" else ["--help"]))
    assert done.returncode == 0 and done.stdout


def test_wrong_usage_is_exit_code_2() -> None:
    assert run("generate", "--no-such-option").returncode == 2
    assert run("no-such-command").returncode == 2


@pytest.mark.slow
def test_info(apple: Path) -> None:
    assert b"BLAS" in run("info").stdout
    done = run("info", apple)
    assert done.returncode == 0 and b"apple-amlr" in done.stdout


def test_the_built_in_model_is_ours(tmp_path: Path) -> None:
    done = run("info", "tiny")
    assert done.returncode == 0 and b" mit, see " in done.stdout and b"apple-amlr" not in done.stdout


@pytest.mark.slow
def test_an_answer_cut_by_its_limit_says_so(apple: Path, picture: Path) -> None:
    cut = run("generate", "-m", apple, "-p", "Hi", "--max-tokens", 1)
    assert cut.stderr.decode() == (
        "fastvlm-mlx: Note: the answer was cut at its limit of 1 token; a larger --max-tokens lets it go on.\n"
    )
    done = run("generate", "-m", "tiny", "-p", "How many shapes are there?", "-i", "examples/shapes.png")
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.slow
def test_bits_of_none(apple: Path) -> None:
    plain, none = (run("generate", "-m", apple, "-p", "Hi", "--max-tokens", 4, *bits) for bits in ([], ["--bits", 0]))
    assert none.returncode == 0 and none.stdout == plain.stdout


def test_a_revision_belongs_to_the_hub(apple: Path) -> None:
    done = run("generate", "-m", apple, "-p", "Hi", "--revision", "main")
    assert done.returncode == 1 and b"has no revisions; leave --revision out" in done.stderr
