"""Machines that lack, refuse or interrupt: no compiler, no room, no home, a closed stdout, a signal at any moment."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastvlm_mlx import load
from fastvlm_mlx.convert import convert
from fastvlm_mlx.errors import OutputError
from fastvlm_mlx.storage.place import new_folder

from .. import checkpoint
from .forkserver import Run

pytestmark = pytest.mark.slow

OURS = {"LICENSE", "README.md", "config.json", "model.safetensors", "tokenizer.json"}
COMMAND = [sys.executable, "-m", "fastvlm_mlx"]


def environment(**changes: str | None) -> dict[str, str]:
    """The environment with changes; None removes."""
    env: dict[str, str | None] = {**os.environ, "HF_HUB_OFFLINE": "1", **changes}
    return {name: value for name, value in env.items() if value is not None}


def start(*args: object, **env: str | None) -> subprocess.Popen[bytes]:
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*COMMAND, *map(str, args)], env=environment(**env), **pipes)  # type: ignore[call-overload, no-any-return]


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A small file system in memory, where the tests may mount one."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("mounting a file system is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


mounts = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="needs root on Linux to mount a file system"
)


# ---------------------------------------------------------------------------------------------------- the output


def test_an_output_that_exists(run: Run, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    run("convert", model, "--out", out).refused("exists already", "--force")
    assert run("convert", model, "--out", out, "--force").code == 0
    run("convert", model, "--out", out).refused("exists already")
    (out / "config.json").write_text("{}")
    run("convert", model, "--out", out, "--force").refused("not a model folder of ours")
    (tmp_path / "file").touch()
    run("convert", model, "--out", tmp_path / "file", "--force").refused("not a model folder of ours")


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("", "empty"),
        ("/", "the checkpoint itself"),
        (".", "empty"),
        ("/etc", "exists already"),
        ("/dev/null", "exists already"),
        ("/dev/null/model", "cannot be written"),
        ("/proc/model", "/proc"),
        ("x" * 300, "cannot be written"),
        ("a\0b", "cannot be written"),
        ("x/" * 5000 + "y", "cannot be written"),
        ("/etc/passwd/model", "/etc/passwd"),
    ],
)
def test_impossible_outputs(run: Run, model: Path, tmp_path: Path, out: str, says: str) -> None:
    run("convert", model, "--out", out, cwd=tmp_path).refused(says)
    assert not list(tmp_path.iterdir())


def test_the_checkpoint_itself_is_no_output(run: Run, apple: Path, tmp_path: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in apple.iterdir()}
    for out in (apple, tmp_path, apple / "."):
        run("convert", apple, "--out", out, "--force").refused("the checkpoint itself")
    (tmp_path / "link").symlink_to(apple)
    run("convert", apple, "--out", tmp_path / "link", "--force").refused("the checkpoint itself")
    assert before == {path.name: path.stat().st_mtime_ns for path in apple.iterdir()}


def test_an_output_through_a_link(model: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    convert(model, tmp_path / "link", force=True)
    assert (tmp_path / "link").is_symlink() and {path.name for path in (tmp_path / "there").iterdir()} == OURS
    assert {path.name for path in tmp_path.iterdir()} == {"there", "link"}


@mounts
def test_a_read_only_output(run: Run, model: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "ro,size=1m") as disk:
        run("convert", model, "--out", disk / "out").refused(str(disk), "Read-only")
        run("convert", model, "--out", disk / "a/b/out").refused(str(disk), "Read-only")


@mounts
def test_a_disk_too_small_is_noticed_before_writing(run: Run, model: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=100k") as disk:
        run("convert", model, "--out", disk / "out").refused("free", "make room")
        assert not list(disk.iterdir())


@mounts
@pytest.mark.parametrize("inodes", [2, 3, 4, 5, 6])
def test_a_disk_that_takes_few_files(run: Run, model: Path, tmp_path: Path, inodes: int) -> None:
    with mounted(tmp_path / "disk", f"size=50m,nr_inodes={inodes}") as disk:
        result = run("convert", model, "--out", disk / "out")
        result.refused(str(disk), after=("Layout: llava",) * (result.err.count("\n") - 1))
        assert not list(disk.iterdir())


@mounts
@pytest.mark.parametrize("spare", [0, 5_000, 20_000, 60_000, 200_000, 500_000])
def test_a_disk_that_fills_up_meanwhile(model: Path, tmp_path: Path, spare: int) -> None:
    with mounted(tmp_path / "disk", "size=4m") as disk:

        def fill(done: int, total: int) -> None:
            if done == total // 2:
                with (disk / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(4096))
                os.truncate(disk / "ballast", max(0, (disk / "ballast").stat().st_size - spare))

        with pytest.raises(OutputError, match=r"disk full|No space left"):
            convert(model, disk / "out", progress=fill)
        assert [path.name for path in disk.iterdir()] == ["ballast"]
        (disk / "ballast").unlink()
        convert(model, disk / "out")


def test_a_run_at_the_same_time(model: Path, tmp_path: Path) -> None:
    def another(done: int, total: int) -> None:
        if done == 3:
            with pytest.raises(OutputError, match="another process"):
                convert(model, tmp_path / "out")
            convert(model, tmp_path / "other")

    convert(model, tmp_path / "out", progress=another)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "other"}


@pytest.mark.parametrize("force", [False, True])
def test_an_output_that_appears_meanwhile_is_not_replaced(model: Path, tmp_path: Path, force: bool) -> None:
    def another(done: int, total: int) -> None:
        if done == 3:
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs").touch()

    with pytest.raises(OutputError, match="not a model folder of ours" if force else "exists already"):
        convert(model, tmp_path / "out", force=force, progress=another)
    assert {path.name for path in tmp_path.rglob("*")} == {"out", "theirs"}


def test_a_link_in_the_unfinished_folders_place_is_not_followed(model: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").touch()
    (tmp_path / ".out.fastvlm-partial").symlink_to(tmp_path / "theirs")
    with pytest.raises(OutputError, match="cannot be written"):
        convert(model, tmp_path / "out")
    assert {path.name for path in (tmp_path / "theirs").iterdir()} == {"file"}


def test_a_run_killed_between_the_two_renames_is_undone(model: Path, tmp_path: Path) -> None:
    convert(model, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out.fastvlm-replaced")
    (tmp_path / ".gone.fastvlm-partial").mkdir()
    (tmp_path / ".gone.fastvlm-partial/shard-0.safetensors").touch()
    with pytest.raises(OutputError, match="exists already"):
        convert(model, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == OURS


# ---------------------------------------------------------------------------------------------------- signals


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory, tokenizer_files: Path) -> Path:
    """A checkpoint that takes a while to convert."""
    return checkpoint.write(tmp_path_factory.mktemp("slow") / "checkpoint", tokenizer_files)


def duration(*args: object) -> float:
    began = time.monotonic()
    process = start(*args)
    process.communicate()
    return time.monotonic() - began


def whole_or_nothing(out: Path) -> None:
    """Assert that the output is complete or is not there."""
    assert not out.exists() or {path.name for path in out.iterdir()} == OURS


def test_killed_at_any_moment(slow: Path, tmp_path: Path) -> None:
    """Nothing half-written stands there, and the next run leaves nothing but its result."""
    took = duration("convert", slow, "--out", tmp_path / "first")
    rng = random.Random(0)
    for _ in range(10):
        process = start("convert", slow, "--out", tmp_path / "out", "--force")
        time.sleep(took * rng.uniform(0.3, 1.0))
        process.kill()
        process.communicate()
        whole_or_nothing(tmp_path / "out")
    convert(slow, tmp_path / "out", force=True)
    assert {path.name for path in tmp_path.iterdir()} == {"first", "out"}
    load(str(tmp_path / "out"))


def test_killed_while_writing(slow: Path, tmp_path: Path) -> None:
    """At every stage of the writing itself."""
    script = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom fastvlm_mlx.convert import convert\n"
        "source, out, moment = sys.argv[1], sys.argv[2], int(sys.argv[3])\n"
        "FILES = 'storage/place.py', 'storage/save.py', 'storage/open.py', 'pathlib.py', 'shutil.py', 'card.py'\n"
        "calls = [0]\n"
        "def count(frame, event, arg):\n"
        "    if event == 'call' and frame.f_code.co_filename.endswith(FILES):\n"
        "        calls[0] += 1\n"
        "        if calls[0] == moment: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from fastvlm_mlx.storage import save as storage\n"
        "whole = storage.save\n"
        "def save(*a, **k):\n    sys.setprofile(count)\n    whole(*a, **k)\n    sys.setprofile(None)\n"
        "import fastvlm_mlx.convert.pipeline as pipeline\npipeline.save = save\n"
        "convert(Path(source), Path(out), force=True)\nprint(calls[0])\n"
    )
    whole = subprocess.run([sys.executable, "-c", script, slow, tmp_path / "out", "0"], capture_output=True, check=True)
    total = int(whole.stdout)
    for moment in sorted({1 + total * i // 12 for i in range(12)} | {total - i for i in range(4)}):
        killed = subprocess.run(
            [sys.executable, "-c", script, slow, tmp_path / "out", str(moment)], capture_output=True, check=False
        )
        assert killed.returncode == -signal.SIGKILL
        whole_or_nothing(tmp_path / "out")
    convert(slow, tmp_path / "out", force=True)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


LISTENING = """
import os, signal, sys
from fastvlm_mlx import cli
pipe, install = int(sys.argv.pop(1)), signal.signal
def listen(*arguments):
    signal.signal = install
    install(*arguments)
    os.close(pipe)
signal.signal = listen
cli.main()
"""


def listening(*args: object) -> subprocess.Popen[bytes]:
    """A command that answers for interrupts itself by now; before, Python does."""
    theirs, ours = os.pipe()
    command = [sys.executable, "-c", LISTENING, str(ours), *map(str, args)]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process: subprocess.Popen[bytes] = subprocess.Popen(command, env=environment(), pass_fds=[ours], **pipes)  # type: ignore[call-overload]
    os.close(ours)
    os.read(theirs, 1)
    os.close(theirs)
    return process


@pytest.mark.parametrize("command", ["convert", "generate"])
def test_interrupted_at_any_moment(slow: Path, photo: Path, tmp_path: Path, command: str) -> None:
    args = (
        ["convert", slow, "--out", tmp_path / "out"]
        if command == "convert"
        else ["generate", "-m", slow, "-i", photo, "--max-tokens", 200]
    )
    took = duration(*args)
    if command == "convert":
        (tmp_path / "out").rename(tmp_path / "first")
    rng = random.Random(1)
    for _ in range(14):
        process = listening(*args)
        time.sleep(took * rng.uniform(0, 0.9))
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
        if process.returncode == 0:
            (tmp_path / "out").exists() and (tmp_path / "out").rename(tmp_path / f"done{rng.random()}")
            continue
        assert process.returncode == 130, err.decode()
        assert b"Traceback" not in err and b"KeyboardInterrupt" not in err, err.decode()
        assert err.count(b"\n") <= 1, err.decode()
        assert command == "generate" or not out
        assert not list(tmp_path.glob(".*"))
        if (tmp_path / "out").exists():  # it had just been put in its place
            whole_or_nothing(tmp_path / "out")
            (tmp_path / "out").rename(tmp_path / f"done{rng.random()}")


def test_an_interrupt_that_became_another_error() -> None:
    """A compiled module that is interrupted while it is imported raises ImportError."""
    script = (
        "import os, signal, sys, time, types\nfrom fastvlm_mlx.cli import entry\n"
        "def build(arguments):\n"
        "    try:\n        os.kill(os.getpid(), signal.SIGINT)\n        time.sleep(5)\n"
        "    except KeyboardInterrupt:\n        raise ImportError('while initializing the extension') from None\n"
        "sys.modules['fastvlm_mlx.cli.app'] = types.SimpleNamespace(COMMANDS=(), build=build, flags=dict)\n"
        "entry.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_an_interrupt_while_mlx_is_imported_waits_until_it_is() -> None:
    """Where MLX's compiled module is interrupted while it defines itself, it ends the process with a report of its
    own."""
    script = (
        "import os, signal, sys, time, types\nfrom fastvlm_mlx.cli import process\n"
        "module = sys.modules['mlx.core'] = types.ModuleType('mlx.core')\n"
        "module.__spec__ = types.SimpleNamespace(_initializing=True)\n"
        "process.watch()\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(0.1)\nprint('imported', flush=True)\n"
        "module.__spec__._initializing = False\n"
        "try:\n    time.sleep(5)\nexcept KeyboardInterrupt:\n    print('interrupted', process.take())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False, timeout=20)
    assert (done.stdout.split(), done.stderr) == ([b"imported", b"interrupted", b"True"], b"")


def test_an_interrupt_within_an_import_of_a_compiled_module_waits() -> None:
    """Where a compiled module imports another and is interrupted in Python's code of that, it prints a traceback of its
    own."""
    script = (
        "import os, signal, time\nfrom fastvlm_mlx.cli import process\nprocess.watch()\n"
        "code = 'os.kill(os.getpid(), signal.SIGINT)\\nfor _ in range(1000): pass\\nprint(\"imported\", flush=True)'\n"
        "exec(compile(code, '<frozen importlib._bootstrap>', 'exec'))\n"
        "try:\n    time.sleep(5)\nexcept KeyboardInterrupt:\n    print('interrupted', process.take())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False, timeout=20)
    assert (done.stdout.split(), done.stderr) == ([b"imported", b"interrupted", b"True"], b"")


def test_interrupted_before_the_unfinished_folder_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def interrupt(path: Any, flags: int, *rest: Any) -> int:
        monkeypatch.setattr(os, "open", opened)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "open", interrupt)
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out", 0, force=False):
        pass
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------- the machine


@pytest.fixture(scope="module")
def answer(model: Path, photo: Path) -> bytes:
    return load(str(model)).generate(str(photo), max_tokens=4).text.encode() + b"\n"


ASK = ["--max-tokens", 4]
CUT = b"fastvlm-mlx: Note: the answer was cut at its limit of 4 tokens; a larger --max-tokens lets it go on.\n"


def looks(model: Path, photo: Path, answer: bytes, **env: str | None) -> None:
    """Assert that a question is answered in this environment as in any other, with no other word on stderr than that it
    was cut."""
    process = start("generate", "-m", model, "-i", photo, *ASK, **env)
    out, err = process.communicate()
    assert (process.returncode, out, err) == (0, answer, CUT)


def test_without_a_compiler(model: Path, photo: Path, answer: bytes, tmp_path: Path) -> None:
    looks(model, photo, answer, PATH=str(tmp_path))
    for dtype in ("bfloat16", "float16"):
        process = start("generate", "-m", model, "-i", photo, *ASK, "--dtype", dtype, PATH=str(tmp_path))
        out, err = process.communicate()
        assert (process.returncode, err) == (0, CUT) and out


def test_a_large_picture_without_a_compiler(model: Path, photo: Path, tmp_path: Path) -> None:
    """Large enough for every way that the work is cut."""
    process = start("generate", "-m", model, "-i", photo, *ASK, "--resolution", 1024, PATH=str(tmp_path))
    _, err = process.communicate()
    assert (process.returncode, err) == (0, CUT)


NO_OPENBLAS = """
import ctypes
class CDLL(ctypes.CDLL):
    def __init__(self, name, *rest, **options):
        if "openblas" in str(name):
            raise OSError("not here")
        super().__init__(name, *rest, **options)
ctypes.CDLL = CDLL
"""


def test_without_openblas(model: Path, photo: Path, answer: bytes, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(NO_OPENBLAS)
    process = start("info", PYTHONPATH=str(tmp_path))
    out, err = process.communicate()
    assert (process.returncode, err) == (0, b"")
    if sys.platform == "linux":
        assert b"install OpenBLAS" in out
    looks(model, photo, answer, PYTHONPATH=str(tmp_path))


def test_no_home(model: Path, photo: Path, answer: bytes) -> None:
    looks(model, photo, answer, HOME=None, XDG_CACHE_HOME=None, HF_HOME=None, USER=None, LOGNAME=None)
    looks(model, photo, answer, HOME="/nowhere/at/all", TMPDIR="/nowhere")


@mounts
def test_a_read_only_home(model: Path, photo: Path, answer: bytes, tmp_path: Path) -> None:
    with mounted(tmp_path / "home", "ro,size=1m") as home:
        looks(
            model, photo, answer, HOME=str(home), XDG_CACHE_HOME=str(home), HF_HOME=str(home / "hf"), TMPDIR=str(home)
        )


def test_terminals_and_locales(model: Path, photo: Path, answer: bytes) -> None:
    looks(model, photo, answer, TERM="dumb", COLUMNS="1", NO_COLOR="1")
    looks(model, photo, answer, TERM=None, LANG="C", LC_ALL="C")
    process = start("generate", "-m", model, "-i", photo, *ASK, PYTHONIOENCODING="ascii")
    out, err = process.communicate()
    assert (process.returncode, err) == (0, CUT) and out.isascii()


def shell(command: str, *args: object) -> subprocess.CompletedProcess[bytes]:
    """Run a line of shell in which "$@" is `fastvlm-mlx ARGS`."""
    words = ["sh", "-c", command, "sh", *COMMAND, *map(str, args)]
    return subprocess.run(words, env=environment(), capture_output=True, check=False)


def test_closed_streams(model: Path, photo: Path, tmp_path: Path) -> None:
    ask = ["generate", "-m", model, "-i", photo, *ASK]
    closed = shell('"$@" >&-', *ask)
    assert (closed.returncode in (0, 1)) and b"Traceback" not in closed.stderr
    assert shell('"$@" 2>&-', *ask).returncode == 0
    assert shell('"$@" <&-', *ask).returncode == 0
    assert shell('"$@" <&- >&- 2>&-', *ask).returncode in (0, 1)
    wrong = shell('"$@" 2>&-', "generate", "-i", tmp_path / "none.jpg", "-m", model)
    assert (wrong.returncode, wrong.stdout) == (1, b"")
    empty = shell('"$@" -p - <&-', "generate", "-m", model)
    assert empty.returncode == 1 and b"stdin is empty" in empty.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_behind_stdout(model: Path, photo: Path) -> None:
    for args in (
        ["generate", "-m", model, "-i", photo, *ASK],
        ["generate", "-m", model, "-i", photo, *ASK, "--json"],
        ["info"],
    ):
        full = shell('"$@" >/dev/full', *args)
        assert full.returncode == 1 and full.stderr.count(b"\n") == 1, full.stderr
        assert b"No space left" in full.stderr and b"Traceback" not in full.stderr


def test_a_reader_that_leaves(model: Path, photo: Path) -> None:
    for args in (["generate", "-m", model, "-i", photo, "--max-tokens", 60], ["info"], ["--help"]):
        left = shell('"$@" | true', *args)
        assert left.stderr == b"", left.stderr


def test_an_error_of_our_own_is_one_sentence_too(tmp_path: Path) -> None:
    code = (
        "import sys, fastvlm_mlx.decoding.engine as engine\nfrom fastvlm_mlx.cli import main\n"
        "def fail(*a, **k): raise ZeroDivisionError('by\\nzero')\nengine.Engine.open = fail\n"
        "sys.argv = ['fastvlm-mlx', 'generate']\nmain()\n"
    )
    for shown in ("", "1"):
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment(FASTVLM_TRACEBACK=shown), capture_output=True, check=False
        )
        assert (done.returncode, done.stdout) == (1, b"")
        assert (b"Traceback" in done.stderr) == bool(shown)
        assert b"ZeroDivisionError" in done.stderr and b"report it" in done.stderr
        assert shown or done.stderr.count(b"\n") == 1
