"""`fastvlm-mlx chat` in a real pseudo-terminal: keys go in, and what the screen is sent comes out."""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pexpect
import pytest

from fastvlm_mlx import VLM, load
from fastvlm_mlx.cli.conversation.typed import COMMANDS
from fastvlm_mlx.cli.messages import printable

pytestmark = pytest.mark.slow

SHAPES, SIGN = (Path(__file__).parents[2] / "examples" / name for name in ("shapes.png", "sign.png"))
CTRL_C, CTRL_D, UP, PASTE, PASTE_END = "\x03", "\x04", "\x1b[A", "\x1b[200~", "\x1b[201~"
READY = r"([\d,]+) of ([\d,]+) tokens \(\d+%\)"  # stands beside the line, or in a dumb terminal above it
ESCAPES = re.compile(r"\x1b(?:\[[0-9;?]*[A-Za-z]|[=>]|\][^\x07]*\x07)")


class Screen:
    """A chat in a terminal of its own."""

    def __init__(self, folder: Path, *arguments: object, term: str = "xterm-256color"):
        env = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "TERM": term,
            "XDG_STATE_HOME": str(folder),
            "PROMPT_TOOLKIT_NO_CPR": "1",
        }
        words = ["-m", "fastvlm_mlx", "chat", *map(str, arguments)]
        self.process = pexpect.spawn(
            sys.executable, words, env=env, cwd=str(folder), dimensions=(50, 150), encoding="utf-8", timeout=20
        )
        self.process.delaybeforesend = None
        self.until(READY)

    def until(self, pattern: str) -> str:
        """Wait for a pattern; returns what came before it, without escapes, and the match itself."""
        self.process.expect(pattern)
        return ESCAPES.sub("", self.process.before + self.process.after)

    def keys(self, text: str) -> None:
        self.process.send(text)

    def says(self, line: str, pattern: str) -> str:
        """Type a line, wait for a pattern and then for the next prompt."""
        self.keys(line + "\r")
        return self.until(pattern) + self.until(READY)

    def leave(self, key: str = CTRL_D) -> int:
        self.keys(key)
        self.process.expect(pexpect.EOF)
        self.process.close()
        return int(self.process.exitstatus)


Open = Callable[..., Screen]


@pytest.fixture
def chat(tmp_path: Path) -> Iterator[Open]:
    """`chat(*arguments)` begins one, in an empty folder."""
    opened: list[Screen] = []

    def begin(*arguments: object, term: str = "xterm-256color") -> Screen:
        opened.append(Screen(tmp_path, *arguments, term=term))
        return opened[-1]

    yield begin
    for screen in opened:
        screen.process.close(force=True)


@pytest.fixture(scope="module")
def tiny() -> VLM:
    return load("tiny")


def test_questions_and_answers(chat: Open, tiny: VLM) -> None:
    asked = tiny.chat()
    first, second = asked.ask("Describe the image.", SHAPES), asked.ask("How many shapes are there?")
    screen = chat("-m", "tiny", "-i", SHAPES)
    screen.says("Describe the image.", re.escape(first.text))
    assert f"{asked.tokens:,} of 2,048" in screen.says("How many shapes are there?", re.escape(second.text))
    screen.says(
        "/stats", f"{second.stats.reused_tokens} of the {second.stats.prompt_tokens} tokens were there from before"
    )
    assert screen.leave() == 0


def test_completion_history_and_dragging(chat: Open, tiny: VLM, tmp_path: Path) -> None:
    text = tiny.generate(SIGN, "What does the text say?").text
    picture = tmp_path / "my sign (1).png"
    shutil.copy(SIGN, picture)
    screen = chat("-m", "tiny")
    screen.says("/st\t", "pictures kept: 0")
    screen.says("/image my\t", "1 picture, 9 tokens")
    screen.says("What does the text say?", re.escape(text))
    screen.says("/clear", "starts over")
    escaped = re.sub(r"([ ()])", r"\\\1", str(picture))
    screen.says(f"{PASTE}{escaped} {PASTE_END}What does the text say?", re.escape(text))
    screen.says("/clear", "starts over")
    screen.says(f"What does the text say? '{picture}'", re.escape(text))
    assert screen.leave("/quit\r") == 0
    again = chat("-m", "tiny", "-i", SIGN)
    again.keys(f"{UP}{UP}{UP}{UP}")  # past /quit, the question with the path, /clear, to the question alone
    again.says("", re.escape(text))
    assert again.leave() == 0


@pytest.fixture(scope="module")
def fresh(small: VLM, photo: Path) -> list[str]:
    """The answers to two questions, each the first of a conversation of its own."""
    return [small.chat().ask(question, photo, max_tokens=250).text for question in ("What is it?", "And now?")]


@pytest.mark.parametrize(("term", "plain"), [("xterm-256color", True), ("xterm-256color", False), ("dumb", True)])
def test_an_answer_stopped_is_as_if_never_begun(
    chat: Open, fresh: list[str], model: Path, photo: Path, tmp_path: Path, term: str, plain: bool
) -> None:
    options = ("--max-tokens", 250, "--dtype", "float32", *(["--plain"] if plain else []))
    screen = chat("-m", model, "-i", photo, *options, term=term)
    screen.keys("What is it?\r")
    screen.until(re.escape(printable(fresh[0])[:3]))  # it streams
    screen.keys(CTRL_C)
    screen.until("Stopped, and not kept; its picture waits")
    screen.until(READY)
    shown = re.escape(printable(fresh[1]).replace("\n", "\r\n")) if plain else READY
    screen.says("And now?", shown)
    screen.says("/save talk", "1 question saved")
    screen.keys(CTRL_C)
    screen.until("Ctrl-D leaves")
    screen.until(READY)
    assert screen.leave() == 0
    (exchange,) = json.loads((tmp_path / "talk").read_text())["exchanges"]
    assert (exchange["prompt"], exchange["answer"], len(exchange["images"])) == ("And now?", fresh[1], 1)


def test_a_dumb_terminal_is_sent_plain_lines(chat: Open, tiny: VLM) -> None:
    text = tiny.generate(SHAPES, "Describe the image.").text
    screen = chat("-m", "tiny", "-i", SHAPES, term="dumb")
    screen.keys("Describe the image.\r")
    screen.process.expect(re.escape(text))
    assert "\x1b" not in screen.process.before
    screen.until(READY)
    screen.says("/undoo", "did you mean /undo")
    assert screen.leave() == 0


def test_every_command(chat: Open, tiny: VLM, tmp_path: Path) -> None:
    def text(question: str, *pictures: Path, system: str | None = None) -> str:
        return re.escape(tiny.generate(list(pictures), question, system=system).text)

    screen = chat("-m", "tiny")
    for name in COMMANDS:
        screen.keys("/help\r")
        screen.until(f"/{name} ")
        screen.until(READY)
    screen.says(f"/image {SHAPES} '{SIGN}'", "2 pictures")
    screen.says("/undo", "2 pictures taken back")
    screen.says(f"/image {SHAPES}", "1 picture")
    screen.says("How many shapes are there?", text("How many shapes are there?", SHAPES))
    screen.says("/retry", "always the same")
    screen.says("/retry 0.5", READY)
    screen.says("/retry warm", "takes a temperature")
    screen.says("/save talk", "1 question saved in talk")
    screen.says("/clear", "starts over")
    screen.says("/undo", "nothing to undo")
    screen.says("/load talk", "1 question about 1 picture")
    screen.says("/undo", "its picture waits")
    screen.says("/system Be brief.", "System prompt: Be brief.")
    screen.says("How many shapes are there?", text("How many shapes are there?", SHAPES, system="Be brief."))
    screen.says("/system default", "You are a helpful assistant.")
    screen.says(f"/save {SHAPES}", "is not a saved conversation")
    screen.says("/load nowhere", "no such transcript")
    screen.says("/image nowhere.png", "no such image")
    screen.says("/paste", "clipboard")
    screen.says("/stats", "pictures kept: ")
    screen.says("/frobnicate", "/help lists them")
    assert screen.leave("/exit\r") == 0


@pytest.mark.parametrize(("before", "after"), [("", ""), (PASTE, PASTE_END)])
def test_a_very_long_paste(chat: Open, tiny: VLM, before: str, after: str) -> None:
    text = tiny.generate(SHAPES, "How many shapes are there?").text
    screen = chat("-m", "tiny", "-i", SHAPES)
    screen.says(before + "it's a word " * 10_000 + after, "has room for 2048")
    screen.says("How many shapes are there?", re.escape(text))
    assert screen.leave() == 0
