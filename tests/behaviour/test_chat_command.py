"""`fastvlm-mlx chat` through a pipe: questions line by line, answers on stdout and nothing else, and on it goes after
mistakes."""

import json
import random
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image, ImageGrab

from fastvlm_mlx import VLM
from fastvlm_mlx.cli.conversation import clipboard
from fastvlm_mlx.cli.conversation.typed import COMMANDS
from fastvlm_mlx.config import ModelConfig, QuantConfig
from fastvlm_mlx.diagnostics.random_model import SIZES
from fastvlm_mlx.errors import FastVLMError, ImageError
from fastvlm_mlx.quantize.recipes import usual_bits

from .forkserver import Result, Run

EXACT = ("--dtype", "float32", "--max-tokens", 8)


def talk(run: Run, model: Path, *lines: str | bytes, options: tuple[object, ...] = EXACT) -> Result:
    """What came of typing these lines into a chat."""
    typed = b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines)
    return run("chat", "-m", model, *options, stdin=typed)


def answers(small: VLM, *questions: tuple[str, list[Path]], max_tokens: int = 8, system: str | None = None) -> bytes:
    chat = small.chat(system=system)
    return b"".join(
        chat.ask(prompt, pictures, max_tokens=max_tokens).text.encode() + b"\n" for prompt, pictures in questions
    )


def test_questions_in_answers_out(run: Run, small: VLM, model: Path, photo: Path) -> None:
    done = talk(run, model, "What is it?", "", "图里有什么？", f"{photo} And this?", options=(*EXACT, "-i", photo))
    expected = answers(small, ("What is it?", [photo]), ("图里有什么？", []), ("And this?", [photo]))
    assert (done.code, done.err, done.out) == (0, "", expected)


def test_the_last_line_may_lack_its_end_and_stdin_may_be_empty(run: Run, small: VLM, model: Path) -> None:
    done = run("chat", "-m", model, *EXACT, stdin=b"Why?")
    assert (done.code, done.out) == (0, answers(small, ("Why?", [])))
    done = run("chat", "-m", model, *EXACT, stdin=b"")
    assert (done.code, done.out, done.err) == (0, b"", "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/undoo", "did you mean /undo"),
        ("/undo", "nothing to undo"),
        ("/retry", "nothing to retry"),
        ("/retry hot", "takes a temperature"),
        ("/retry 1000", "temperature is 1000.0"),
        ("/image", "/image PATH"),
        ("/image nowhere.png", "no such image"),
        ("/nowhere/photo.jpg what is it?", "no such image"),
        ("/image /dev/zero", "/dev/zero"),
        ("/load", "/load PATH"),
        ("/load nowhere.json", "no such transcript"),
        ("/load /dev/zero", "pipe, a socket or a device"),
        ("/save", "/save PATH"),
        ("/save /no/such/folder/talk.json", "cannot be written"),
        ("word " * 40_000, "has room for 1024"),
        ("x" * 4_000_001, "longer than"),
        ("x" * 1_000_001, "more than 1,000,000"),
        (b"what\xff", "not UTF-8"),
        ("what\0", "NUL"),
        ("/system a\0b", "NUL"),
    ],
)
def test_a_mistake_is_one_sentence_and_the_conversation_goes_on(
    run: Run, small: VLM, model: Path, photo: Path, line: str | bytes, says: str
) -> None:
    done = talk(run, model, line, "What is it?", options=(*EXACT, "-i", photo))
    if line == "/undo":  # takes back the picture first
        done = talk(run, model, "/undo", line, f"{photo} What is it?", options=(*EXACT, "-i", photo))
        assert done.err.startswith("1 picture taken back.\n")
    assert (done.code, done.out) == (1, answers(small, ("What is it?", [photo])))
    *_, complaint = done.err.splitlines()
    assert (
        complaint.startswith("fastvlm-mlx: ")
        and says in complaint
        and len(complaint) < 1100
        and complaint.isprintable()
    )


@pytest.mark.slow
def test_no_line_ends_the_conversation(run: Run, small: VLM, model: Path, photo: Path, tmp_path: Path) -> None:
    """Commands and scraps of paths, quotes and signs, thrown together."""
    rng = random.Random(5)
    scraps = [f"/{name}" for name in COMMANDS if name not in ("quit", "help", "stats")]
    scraps += [
        "~",
        "~nobody/x",
        "/",
        "..",
        ".",
        "a.png",
        "\0",
        "'",
        '"',
        "\\",
        "file://",
        "file:///%00.png",
        "~/.png",
        " ",
        "0",
    ]
    scraps += [
        "-1",
        "nan",
        "\u2028",
        "图",
        "\x1b[2J",
        "x" * 300,
        "[pasted text 1, 5 characters]",
        str(tmp_path),
        str(photo),
        "🎉",
    ]
    lines = ["".join(rng.choice(scraps) + rng.choice(["", " "]) for _ in range(rng.randint(1, 4))) for _ in range(150)]
    typed = [*lines, "/clear", "/system default", "What is it?"]
    done = run(
        "chat", "-m", model, "--dtype", "float32", "--max-tokens", 1, stdin="\n".join(typed).encode(), cwd=tmp_path
    )
    assert done.code == 1 and done.out.endswith(answers(small, ("What is it?", []), max_tokens=1)), done.err[-2000:]
    assert "of its own" not in done.err and "Traceback" not in done.err and "could not be computed" not in done.err
    assert "\x1b" not in done.err and done.err.count("fastvlm-mlx: ") > 30


def test_commands(run: Run, small: VLM, model: Path, photo: Path, tmp_path: Path) -> None:
    saved = tmp_path / "a talk.json"
    done = talk(
        run, model, "What is it?", "/undo", "/system Be brief.", "And now?", f"/save {saved}", "/clear",
        f"/load '{saved}'",
        "/stats", "/help", "/retry", "Why?", "/quit", "Never asked.", options=(*EXACT, "-i", photo),
    )  # fmt: skip
    first = answers(small, ("What is it?", [photo]))
    brief = answers(small, ("And now?", [photo]), ("Why?", []), system="Be brief.").splitlines(keepends=True)
    again = answers(small, ("And now?", [photo]), system="Be brief.")
    assert (done.code, done.out) == (0, first + again + again + b"".join(brief).removeprefix(again))
    for text in (
        "its picture waits",
        "System prompt: Be brief.",
        "1 question saved",
        "1 question about 1 picture",
        "pictures kept: 1",
    ):
        assert text in done.err
    again_loaded = talk(run, model, "/undo", "/undo", options=(*EXACT, "--load", saved))
    assert again_loaded.code == 0 and "“And now?” taken back" in again_loaded.err
    for typed, options in (((f"/load '{saved}'",), ()), ((), ("--load", saved))):
        refused = talk(run, model, *typed, options=(*EXACT, "--max-pixels", 1, *options))
        assert refused.code == 1 and "more than the 1 allowed" in refused.err


@pytest.mark.slow
def test_the_same_seed_gives_the_same_conversation_retries_included(run: Run, model: Path, photo: Path) -> None:
    def outcome(seed: int) -> bytes:
        drawn = ("--temperature", 1, "--seed", seed, *EXACT, "-i", photo)
        return talk(run, model, "What is it?", "/retry", "/retry", "And now?", options=drawn).out

    assert outcome(1) == outcome(1) != outcome(2)


@pytest.mark.slow
def test_near_its_limit_it_says_what_goes_and_keeps_the_rest(run: Run, small: VLM, model: Path, photo: Path) -> None:
    question = "What is on the table? A red circle and a blue square? " * 5
    count = 14
    done = talk(run, model, *[f"{number}. {question}" for number in range(count)], options=(*EXACT, "-i", photo))
    assert done.code == 0
    nearly, full = done.err.splitlines()[:2]
    assert "nearly full" in nearly and "“0. What is on" in nearly and "will no longer see" in nearly
    assert "is full" in full and full.endswith("; the system prompt, 1 picture and the question stay.")
    chat, expected = small.chat(), b""
    for number in range(count):
        prompt = f"{number}. {question}".strip()
        chat.leave_out(chat.crowded_out(prompt, 1 if number == 0 else 0, max_tokens=8))
        expected += chat.ask(prompt, photo if number == 0 else None, max_tokens=8).text.encode() + b"\n"
    assert done.out == expected
    assert chat.left_out.exchanges > 0 and chat.left_out.pictures == 0


@pytest.mark.slow
def test_an_interrupt_ends_a_chat_without_a_terminal(model: Path, photo: Path) -> None:
    command = [sys.executable, "-m", "fastvlm_mlx", "chat", "-m", str(model), "-i", str(photo), "--max-tokens", "900"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdin.write(b"What is it?\n")
        process.stdin.flush()
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, complaint = process.communicate()
    assert (process.returncode, complaint) == (130, b"")


def test_saving_never_overwrites_what_is_no_transcript(run: Run, model: Path, photo: Path, tmp_path: Path) -> None:
    before = photo.read_bytes()
    done = talk(run, model, "Why?", f"/save {photo}", f"/save {tmp_path / 'talk'}", "How?", "/save")
    assert done.code == 1 and "not a saved conversation" in done.err and photo.read_bytes() == before
    assert len(json.loads((tmp_path / "talk").read_text())["exchanges"]) == 2


def test_corrupt_transcripts_one_after_the_other(
    run: Run, small: VLM, model: Path, photo: Path, tmp_path: Path
) -> None:
    """All of them in one conversation, which goes on as if nothing had been."""
    rng = random.Random(1)
    chat = small.chat()
    chat.ask("Hello?", photo, max_tokens=3)
    chat.save(tmp_path / "good.json")
    good = (tmp_path / "good.json").read_bytes()
    lines: list[str] = []
    while len(lines) < 60:
        data = bytearray(good)
        start = rng.randrange(len(data))
        data[start : start + rng.randint(1, 200)] = rng.randbytes(rng.randint(0, 40))
        path = tmp_path / f"{len(lines)}.json"
        path.write_bytes(data)
        with suppress(FastVLMError):
            chat.load(path)
            continue  # no harm done, such as to the model's name
        lines.append(f"/load {path}")
    done = talk(run, model, "What is it?", *lines, "And now?", options=(*EXACT, "-i", photo))
    assert (done.code, done.out) == (1, answers(small, ("What is it?", [photo]), ("And now?", [])))
    assert done.err.count("fastvlm-mlx: ") == done.err.count("\n") == 60


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--bits", 7), "bits is 7"),
        (("--bits", 4, "--load-8bit"), "choose one"),
        (("-i", "nowhere.png"), "no such image"),
        (("--load", "nowhere.json"), "no such transcript"),
        (("--temperature", -1), "temperature is -1"),
        (("--max-tokens", 0), "--max-tokens is 0"),
        (("--system", "a\0b"), "NUL"),
        (("--resolution", 100), "resolution is 100"),
        (("-i", "/dev/zero") * 500, "500 images"),
    ],
)
def test_wrong_options_are_refused_before_anything(
    run: Run, model: Path, options: tuple[object, ...], says: str
) -> None:
    run("chat", "-m", model, *options, stdin=b"What?\n").refused(says)


def test_bits_unless_told() -> None:
    assert {size: usual_bits(config, "metal") for size, config in SIZES.items()} == {
        "0.5b": 8,
        "1.5b": 4,
        "7b": 4,
        "small": 0,
    }
    assert [usual_bits(config, "cpu") for config in SIZES.values()] == [0, 0, 0, 0]
    quantised = ModelConfig(SIZES["7b"].text, quantization={"text.lm_head": QuantConfig(4, 64)})
    assert usual_bits(quantised, "metal") == 0


FINDER = """#!/bin/sh
test "$2" = 'POSIX path of (the clipboard as «class furl»)' && printf '%s\\n' '{}'
"""


def test_a_file_copied_in_finder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its path is asked for before Pillow, which would take the icon; where there is none, the picture itself is."""
    tool = tmp_path / "osascript"
    monkeypatch.setattr(clipboard, "OSASCRIPT", (str(tool), *clipboard.OSASCRIPT[1:]))
    monkeypatch.setattr(sys, "platform", "darwin")
    icon = Image.new("RGB", (8, 8))
    monkeypatch.setattr(ImageGrab, "grabclipboard", lambda: icon)
    assert clipboard.pictures() == [icon]  # without osascript
    tool.write_text(FINDER.format("/Users/me/Bild ä\u202f1.heic"), encoding="utf-8")
    tool.chmod(0o755)
    assert clipboard.pictures() == ["/Users/me/Bild ä\u202f1.heic"]
    tool.write_text(
        '#!/bin/sh\necho "execution error: Can’t make some data into the expected type. (-1700)" >&2; exit 1\n'
    )
    assert clipboard.pictures() == [icon]


def test_the_clipboard(monkeypatch: pytest.MonkeyPatch, photo: Path) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    with Image.open(photo) as picture:
        for found, pictures in ((picture, [picture]), ([str(photo)], [str(photo)])):
            monkeypatch.setattr(ImageGrab, "grabclipboard", lambda found=found: found)
            assert clipboard.pictures() == pictures
    for nothing in (None, list[Image.Image]()):
        monkeypatch.setattr(ImageGrab, "grabclipboard", lambda nothing=nothing: nothing)
        with pytest.raises(ImageError, match="no picture on the clipboard"):
            clipboard.pictures()

    def fails() -> None:
        raise NotImplementedError("wl-paste or xclip is required")

    monkeypatch.setattr(ImageGrab, "grabclipboard", fails)
    with pytest.raises(ImageError, match="wl-paste or xclip"):
        clipboard.pictures()


SCREENSHOT = "Screenshot 2026-01-05 at 3.45.12\u202fPM.png"


@pytest.mark.slow
def test_a_screenshot_as_macos_names_it(run: Run, small: VLM, model: Path, photo: Path, tmp_path: Path) -> None:
    """Dragged in, spaces are escaped and U+202F is not; typed, there is a plain space."""
    path = tmp_path / SCREENSHOT
    path.write_bytes(photo.read_bytes())
    expected = answers(small, ("What is it?", [photo]))
    escaped, plain = str(path).replace(" ", "\\ "), str(path).replace("\u202f", " ")
    for typed in (escaped, f"'{path}'", str(path), plain, f"'{plain}'", plain.replace(" ", "\\ ")):
        done = talk(run, model, f"{typed} What is it?")
        assert (done.code, done.err, done.out) == (0, "", expected), typed


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    [
        "https://example.org/a.png What is it?",
        "What is on https://example.org/gallery/7?",
        "https://example.org/gallery/7",
        "/image https://example.org/gallery/7",
        "/image https://example.org/a.png",
        "What is (http://example.org/a.png)?",
        "data:image/png;base64,iVBORw0KGgo= What is it?",
        "www.example.org/a.png What is it?",
        "S3://bucket/a.png What is it?",
        '"https://example.org/a.png" What is it?',
        "i.example.org/a.jpg",
        "https:example.org/a.jpg",
        "smb://server/share/x.png What is it?",
        "What is https\uff1a//example.org/b?",
        "\u770bhttps://example.org/b",
    ],
)
def test_a_web_address_is_refused_and_never_answered(run: Run, model: Path, line: str) -> None:
    done = talk(run, model, line)
    assert (done.code, done.out) == (1, b"")
    assert "is an address, and nothing is fetched" in done.err


@pytest.mark.slow
@pytest.mark.parametrize(
    "line", ['Does it say "https://example.org"?', "What does https:// mean?", "Is it 'www.example.org/a'?"]
)
def test_an_address_that_is_text(run: Run, small: VLM, model: Path, line: str) -> None:
    assert talk(run, model, line).out == answers(small, (line, []))


@pytest.mark.slow
def test_a_folder_and_a_pattern_in_the_chat(run: Run, small: VLM, model: Path, photo: Path, tmp_path: Path) -> None:
    for name in ("b.png", "a.png", "._a.png", "notes.txt"):
        (tmp_path / name).write_bytes(photo.read_bytes())
    expected = answers(small, ("Why?", [photo, photo]))
    for named in (tmp_path, f"{tmp_path}/*.png", f"'{tmp_path}/a.png' {tmp_path}/b*.png"):
        done = talk(run, model, f"/image {named}", "Why?")
        assert done.out == expected, done


def test_the_chat_reads_no_picture_from_stdin(run: Run, model: Path) -> None:
    run("chat", "-m", model, "-i", "-").refused("stdin")
