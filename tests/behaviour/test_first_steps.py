"""What a new user tries, and the hint that leads on; and arguments that are refused before anything is downloaded."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import fastvlm_mlx
from fastvlm_mlx import CheckpointError, FastVLMWarning, OptionError
from fastvlm_mlx.chat.conversation import Chat
from fastvlm_mlx.cli.conversation.plain import Plain
from fastvlm_mlx.cli.conversation.session import Session
from fastvlm_mlx.decoding.engine import Engine
from fastvlm_mlx.decoding.request import Options

from .forkserver import Run

TINY = Path(fastvlm_mlx.__file__).parent / "tiny"


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("photo.png",), ("What is it?", "photo.png"), ("--model", "tiny", "photo.png")])
def test_a_picture_without_its_option(run: Run, arguments: tuple[str, ...]) -> None:
    done = run("generate", *arguments)
    assert done.code == 2 and done.out == b""
    assert "; pictures are given after --image; see 'fastvlm-mlx generate --help'." in done.err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["7b", "0.5B", "apple/FastVLM-7B"])
def test_info_of_a_model_that_is_not_here(run: Run, name: str) -> None:
    done = run("info", name)
    assert done.code == 1 and f"'fastvlm-mlx info {name} --estimate'." in done.err
    assert "--estimate" not in run("info", "someone/else").err


@pytest.mark.parametrize(
    ("line", "command"), [("quit", "/quit"), ("Exit", "/quit"), ("bye", "/quit"), (" help ", "/help")]
)
def test_a_command_without_its_slash(capsys: pytest.CaptureFixture[str], line: str, command: str) -> None:
    engine = Engine.open("tiny")
    session = Session(engine, Chat(engine), Plain(typing=True), Options(), 1 << 26)
    assert session.take(line) and not session.chat.exchanges
    assert f"begin with a slash: {command}." in capsys.readouterr().err
    assert not session.take("/quit")


@pytest.mark.parametrize("wrong", [{"dtype": "int8"}, {"bits": 7}, {"bits": 4, "group_size": 48}, {"resolution": 100}])
def test_arguments_before_a_download(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError) as raised:
        fastvlm_mlx.load("nobody/nothing", **wrong)
    assert raised.value.option == list(wrong)[-1]


@pytest.mark.parametrize("command", ["quantize", "bench"])
def test_a_dtype_before_a_download(run: Run, tmp_path: Path, command: str) -> None:
    model = ("nobody/nothing", "--out", tmp_path / "out") if command == "quantize" else ("--model", "nobody/nothing")
    done = run(command, *model, "--dtype", "int8")
    assert done.code == 1 and "--dtype is 'int8'" in done.err


def test_an_adapter_in_a_subfolder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("calibration"))
    (folder / "lora").mkdir()
    (folder / "lora" / "adapter_config.json").write_text("{}")
    with pytest.warns(FastVLMWarning, match="the adapter in 'lora' is not applied"):
        Engine.open(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights in it but an adapter in 'lora'"):
        Engine.open(folder)


@pytest.mark.parametrize("command", ["generate", "chat", "bench"])
def test_a_missing_picture_before_a_model_is_looked_for(run: Run, command: str) -> None:
    done = run(command, "--model", "nobody/nothing", "--image", "missing.jpg")
    assert (done.code, done.err) == (1, "fastvlm-mlx: 'missing.jpg': no such image; check the path.\n")


def test_settings_of_tiles_that_are_ignored(apple: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(apple, tmp_path / "theirs"))
    settings = json.loads((folder / "config.json").read_text()) | {"image_grid_pinpoints": [[336, 672]]}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.warns(FastVLMWarning, match="'image_grid_pinpoints' describes pictures cut into tiles, and is ignored"):
        Engine.open(folder)
