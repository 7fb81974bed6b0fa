"""A folder's run killed twenty times at any moment, with damaged pictures; shares whose processes die; a full disk; an
interrupt."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastvlm_mlx
from fastvlm_mlx import FastVLMError
from fastvlm_mlx.inputs.image import load_image

from .albums import album, damages

MAX_LOOKS = 60_000  # at a file, before a run without progress is given up
ARGUMENTS = ("-m", "tiny", "--max-tokens", "12")


def start(folder: Path, *arguments: object, **how: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "fastvlm_mlx", "batch", str(folder), *ARGUMENTS, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **how)


def finish(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    _, err = process.communicate()
    return process.returncode, err.decode()


def wait_until(met: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Until something is so, or the process has ended."""
    for _ in range(MAX_LOOKS):
        if met() or process.poll() is not None:
            return
        time.sleep(0.002)
    process.kill()
    pytest.fail("no progress")


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def album_with_damage(folder: Path, pictures: int, damaged: int) -> tuple[list[Path], list[Path]]:
    """The paths of pictures in order, and of those that were damaged."""
    paths = album(folder, pictures)
    every = damages()
    bad = random.Random(2).sample(paths, damaged)
    for number, path in enumerate(bad):
        path.write_bytes(every[number % len(every)])
        with pytest.raises(FastVLMError):
            load_image(path)
    return [path for path in paths if path not in bad], bad


@pytest.mark.parametrize(
    ("write", "count", "damaged"),
    [
        pytest.param("jsonl", 100, 20, marks=pytest.mark.slow),
        pytest.param("txt", 100, 20, marks=pytest.mark.slow),
        pytest.param("jsonl", 1000, 40, marks=pytest.mark.large),  # minutes
        pytest.param("txt", 1000, 40, marks=pytest.mark.large),
    ],
)
@pytest.mark.filterwarnings("ignore::fastvlm_mlx.FastVLMWarning")
def test_killed_again_and_again(tmp_path: Path, write: str, count: int, damaged: int) -> None:
    """Twenty times with a thousand pictures, four times with a hundred: while it starts, and at any line."""
    folder = tmp_path / "album"
    good, bad = album_with_damage(folder, count, damaged)
    ledger, draw = folder / "fastvlm-batch.jsonl", random.Random(1)
    per_line = 420  # bytes, about
    kills, wanted = 0, 20 if count == 1000 else 4
    for number in range(wanted):
        process = start(folder, "--write", write)
        goal = size(ledger) + draw.randrange(per_line * count // (wanted + 1))
        if number % 4 == 0:
            time.sleep(draw.random())  # while it is starting
        else:
            wait_until(lambda goal=goal: size(ledger) >= goal, process)  # type: ignore[misc]
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        code, err = finish(process)
        assert code in (-signal.SIGKILL, 3), err
    assert kills == wanted
    code, err = finish(start(folder, "--write", write))
    assert code == 3, err
    lines = [json.loads(line) for line in ledger.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == count and len({line["image"] for line in lines}) == count
    found = {line["image"]: line for line in lines}
    assert all("error" in found[str(path)] for path in bad)
    vlm = fastvlm_mlx.load("tiny")
    for path in good:
        alone = str(vlm.generate(path, max_tokens=12))
        assert found[str(path)]["text"] == alone and "again" not in found[str(path)], path
        if write == "txt":
            assert path.with_suffix(".txt").read_text(encoding="utf-8") == found[str(path)]["text"] + "\n"
    assert sorted(path.suffix for path in folder.glob(".*")) == []


@pytest.mark.slow
def test_a_dead_share_is_found_by_the_next_start(tmp_path: Path) -> None:
    """Three processes side by side, one of which is killed."""
    folder = tmp_path / "album"
    album(folder, 90)
    one, two, three = (start(folder, "--shard", f"{index}/3") for index in (1, 2, 3))
    own = folder / "fastvlm-batch.2-of-3.jsonl"
    wait_until(lambda: size(own) > 1500, two)
    two.send_signal(signal.SIGKILL)
    assert finish(two)[0] == -signal.SIGKILL
    said = [finish(process) for process in (one, three)]
    assert [code for code, _ in said] == [0, 0]
    assert sum("2/3 have items without an answer" in err for _, err in said) >= 1
    assert not (folder / "fastvlm-batch.jsonl").exists()
    kept = own.read_text(encoding="utf-8").splitlines()[:3]
    code, err = finish(start(folder))  # all, or --shard 2/3
    assert code == 0 and "90 answers in all" in err
    lines = (folder / "fastvlm-batch.jsonl").read_text(encoding="utf-8").splitlines()
    assert len({json.loads(line)["name"] for line in lines}) == len(lines) == 90 and set(kept) <= set(lines)
    assert not list(folder.glob("*-of-*"))


@pytest.mark.slow
def test_three_processes_of_mlx_launch(tmp_path: Path) -> None:
    folder = tmp_path / "album"
    album(folder, 30)
    (folder / "bad.jpg").write_bytes(b"no picture")
    program = Path(sys.executable).with_name("mlx.launch")
    if not program.exists():
        pytest.skip("mlx.launch is not installed beside Python")
    launch = [str(program), "-n", "3", "--backend", "ring", "--"]
    command = [*launch, sys.executable, "-m", "fastvlm_mlx", "batch", str(folder), *ARGUMENTS]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    lines = [json.loads(line) for line in (folder / "fastvlm-batch.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 31 and sum("error" in line for line in lines) == 1, done.stderr
    assert done.stderr.count("the last one puts all together") + done.stderr.count("without an answer") == 2
    assert not list(folder.glob("*-of-*"))


@pytest.mark.slow
def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """A limit of a file's size, which ends a write as a full disk does."""
    folder, out = tmp_path / "album", tmp_path / "out.jsonl"
    album(folder, 30)
    limit = 5000
    process = start(folder, "--out", out, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    code, err = finish(process)
    assert code == 1 and "make room and give the same command again" in err and "Traceback" not in err, err
    data = out.read_bytes()
    assert limit // 2 < len(data) <= limit and data.endswith(b"\n")
    before = [json.loads(line) for line in data.splitlines()]
    assert finish(start(folder, "--out", out))[0] == 0
    after = [json.loads(line) for line in out.read_bytes().splitlines()]
    assert len(after) == 30 and all(line in after for line in before)


@pytest.mark.slow
def test_an_interrupt(tmp_path: Path) -> None:
    folder = tmp_path / "album"
    album(folder, 200)
    ledger = folder / "fastvlm-batch.jsonl"
    process = start(folder)
    wait_until(lambda: size(ledger) > 2000, process)
    os.kill(process.pid, signal.SIGINT)
    code, err = finish(process)
    assert code == 130 and "the same command goes on from there" in err and "Traceback" not in err, err
    lines = ledger.read_text(encoding="utf-8").splitlines()
    assert 4 <= len(lines) < 200 and all(json.loads(line)["text"] for line in lines)
    assert not list(folder.glob(".*"))
