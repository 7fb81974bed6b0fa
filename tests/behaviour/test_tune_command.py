"""`tune` and what it writes as commands: a run, its preview, faults in a sentence, adapters used, fused and written for
PEFT.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from .forkserver import Run

QUICK = ("--steps", 2, "--batch", 2, "--rank", 2, "--eval-every", 1, "--cache", "none")


@pytest.fixture
def rows(photo: Path, tmp_path: Path) -> Path:
    """Six rows about copies of one picture."""
    lines = []
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes(photo.read_bytes())
        lines.append(json.dumps({"image": f"{number}.png", "question": f"What is {number}?", "answer": "A café."}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "rows.jsonl"


@pytest.fixture
def adapter(run: Run, model: Path, rows: Path, tmp_path: Path) -> Path:
    done = run("tune", rows, "-m", model, "--out", tmp_path / "adapter", *QUICK)
    assert done.code == 0, done.err
    return tmp_path / "adapter"


def test_a_run_and_what_it_leaves(run: Run, model: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    done = run("tune", rows, "-m", model, "--out", out, *QUICK)
    assert done.code == 0, done.err
    assert (
        done.out.decode().startswith("| held-out rows | rows | loss before | after |")
        and "| new | 1 |" in done.out.decode()
    )
    assert [line.split(":")[0] for line in done.err.splitlines() if line.startswith("Step")] == [
        "Step 0",
        "Step 1",
        "Step 2",
    ]
    assert f"--adapter {out}" in done.err
    names = {"README.md", "adapter.safetensors", "adapter_config.json", "curve.svg", "log.jsonl", "state"}
    assert {path.name for path in out.iterdir()} == names
    settings = json.loads((out / "adapter_config.json").read_text())
    assert settings["model_type"] == "fastvlm_mlx_adapter" and settings["rank"] == 2 and settings["resolution"] == 128
    again = run("tune", rows, "-m", model, "--out", out, *QUICK)
    assert again.code == 1 and "exists already; give --resume to go on" in again.err and not again.out
    on = run("tune", rows, "-m", model, "--out", out, *QUICK, "--resume", "--json")
    assert on.code == 0 and json.loads(on.out)["best_step"] in (0, 1, 2)


def test_a_preview_trains_nothing(run: Run, model: Path, rows: Path, tmp_path: Path) -> None:
    done = run("tune", rows, "-m", model, "--out", tmp_path / "adapter", "--dry-run")
    assert done.code == 0, done.err
    shown = done.out.decode()
    assert "5 to learn from, 1 held out" in shown and "⟦A café.<|im_end|>⟧" in shown
    assert not (tmp_path / "adapter").exists()
    table = json.loads(run("tune", rows, "-m", model, "--dry-run", "--json").out)
    assert table["pictures"] == 6 and table["memory_bytes"] > 0 and table["parameters"] > 0


def test_options_from_a_file(run: Run, model: Path, rows: Path, tmp_path: Path) -> None:
    config = tmp_path / "options.toml"
    config.write_text('rank = 3\nstage = "adapt"\ntrain = ["lora"]\nsteps = 1\ncache = "none"\n')
    done = run("tune", rows, "-m", model, "--out", tmp_path / "a", "--config", config, "--rank", 5)
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert done.code == 0 and settings["rank"] == 5 and not settings["trained"]
    config.write_text("ranks = 3\n")
    assert "'ranks' are no options of tune" in run("tune", rows, "-m", model, "--dry-run", "--config", config).err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--rank", 0), "--rank is 0"),
        (("--train", "lora,full"), "--train names 'lora' and 'full'"),
        (("--stage", "sft"), "--stage is 'sft'"),
        (("--epochs", 1, "--minutes", 1), "--epochs, --steps and --minutes were given together"),
        (("--replay", "nowhere"), "'nowhere': no such file or folder of training data"),
        (("--layers", 9), "--layers is 9, and the decoder has 2"),
        (("--bits", 7), "--bits is 7"),
        (("--resume",), "no adapter's folder"),
    ],
)
def test_faults_in_a_sentence(
    run: Run, model: Path, rows: Path, tmp_path: Path, change: tuple[object, ...], words: str
) -> None:
    done = run("tune", rows, "-m", model, "--out", tmp_path / "adapter", *change)
    assert done.code == 1 and not done.out and len(done.err.strip().splitlines()) == 1
    assert words in done.err
    assert not (tmp_path / "adapter").exists()


def test_nowhere_to_write(run: Run, model: Path, rows: Path) -> None:
    done = run("tune", rows, "-m", model)
    assert done.code == 1 and "name a new folder as --out" in done.err


def test_an_adapter_is_used_fused_and_written_for_peft(
    run: Run, model: Path, photo: Path, adapter: Path, tmp_path: Path
) -> None:
    question = ("-i", photo, "-p", "What is 1?", "--max-tokens", 8, "--dtype", "float32")
    asked = run("generate", "-m", model, "--adapter", adapter, *question)
    assert asked.code == 0, asked.err
    assert run("convert", model, "--adapter", adapter, "--out", tmp_path / "fused", "--dtype", "float32").code == 0
    assert run("generate", "-m", tmp_path / "fused", *question).out == asked.out
    assert (
        "(adapter)" in (tmp_path / "fused" / "README.md").read_text()
        and "Nothing was trained" not in (tmp_path / "fused" / "README.md").read_text()
    )
    assert run("convert", adapter, "--to", "peft", "--out", tmp_path / "peft").code == 0
    assert run("generate", "-m", model, "--adapter", tmp_path / "peft", *question).out == asked.out
    assert run("convert", tmp_path / "peft", "--out", tmp_path / "back").code == 0
    assert run("generate", "-m", model, "--adapter", tmp_path / "back", *question).out == asked.out
    chatted = run("chat", "-m", model, "--adapter", adapter, "-i", photo, "--max-tokens", 8, stdin=b"What is 1?\n")
    assert chatted.code == 0 and chatted.out.strip() == asked.out.strip()
    small = run("convert", model, "--adapter", adapter, "--out", tmp_path / "small", "--bits", 4, "--group-size", 32)
    assert small.code == 0 and "4 bits in groups of 32" in small.err
    assert run("quantize", model, "--out", tmp_path / "packed", "--bits", 8, "--group-size", 32).code == 0
    packed = run("generate", "-m", tmp_path / "packed", "--adapter", adapter, *question)
    assert packed.code == 0 and "before that was quantised" in packed.err


def test_what_is_no_adapter(run: Run, model: Path, photo: Path, adapter: Path, tmp_path: Path) -> None:
    for folder, words in (
        (tmp_path / "nowhere", "no such folder with an adapter in it"),
        (model, "no adapter_config.json in it"),
    ):
        done = run("generate", "-m", model, "--adapter", folder, "-i", photo)
        assert done.code == 1 and words in done.err
    settings = json.loads((adapter / "adapter_config.json").read_text())
    for change, words in (
        ({"targets": settings["targets"][1:]}, "stand in one of adapter_config.json and the file only"),
        ({"scale": "much"}, "scale is 'much'"),
        ({"extra": 1}, "unknown entries 'extra'"),
        ({"format_version": 2}, "this release reads 1"),
        ({"base_digest": "0" * 32}, "load the model that it was trained on"),
    ):
        (adapter / "adapter_config.json").write_text(json.dumps(settings | change))
        done = run("generate", "-m", model, "--adapter", adapter, "-i", photo)
        assert done.code == 1 and words in done.err, done.err


@pytest.mark.slow
def test_an_interrupt_saves_and_resume_goes_on(model: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    command = [sys.executable, "-m", "fastvlm_mlx", "tune", str(rows), "-m", str(model), "--out", str(out)]
    command += [*map(str, QUICK), "--steps", "100000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("Step 3"):
                break
        process.send_signal(signal.SIGINT)
        err = process.stderr.read()
    assert process.returncode == 130 and f"the state is kept in {out}, and the same command with --resume" in err
    assert json.loads((out / "state" / "state.json").read_text())["step"] >= 3


# Several processes


def free_ports() -> int:
    """The first of two ports, below those the system hands out, that nobody listens at or has just left."""
    while True:
        first = random.randrange(10000, 32000)
        with suppress(OSError), socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", first))
            two.bind(("127.0.0.1", first + 1))
            return first


def launched(*arguments: object) -> subprocess.Popen[str]:
    """Two processes on this machine that learn together."""
    launch = str(Path(sys.executable).with_name("mlx.launch"))
    command = [launch, "-n", "2", "--backend", "ring", "--starting-port", str(free_ports()), "--"]
    command += [sys.executable, "-m", "fastvlm_mlx", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def losses(out: Path) -> list[float]:
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [event["loss"] for event in events if "loss" in event]


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(run: Run, model: Path, rows: Path, tmp_path: Path) -> None:
    options = ("-m", model, "--steps", 4, "--batch", 3, "--lr", 1e-3, "--cache", "none")
    with launched("tune", rows, *options, "--out", tmp_path / "two") as both:
        told, _ = both.communicate(timeout=240)
    assert run("tune", rows, *options, "--out", tmp_path / "one").code == 0
    assert len(losses(tmp_path / "two")) == 4, told
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.timing  # a minute is what all have to end in
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
def test_one_that_is_gone_ends_all(model: Path, rows: Path, tmp_path: Path, sent: signal.Signals) -> None:
    out = tmp_path / "adapter"
    with launched("tune", rows, "-m", model, "--out", out, *QUICK, "--steps", 100000) as both:
        try:
            log = out / "log.jsonl"
            while not (log.exists() and '"step": 4' in log.read_text()):
                assert both.poll() is None
                time.sleep(0.2)
            os.kill(_second(str(out)), sent)
            told, _ = both.communicate(timeout=60)
        finally:
            both.kill()
    failed = json.loads((out / "state" / "failed.json").read_text())["failed"]
    if sent == signal.SIGSTOP:
        assert failed.startswith("Process 1 hangs")
        assert "Process 1 hangs" in told and "is whole: start all again with" in told, told
    else:  # mlx.launch may stop listening, and end the other one, before that can say more
        assert failed.startswith(("Process 1 has ended", "This process was told to end")), failed
    assert json.loads((out / "state" / "state.json").read_text())["step"] >= 4


def _second(out: str) -> int:
    """The process of rank 1 that writes to a folder."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if out.encode() in words and b"MLX_RANK=1" in (folder / "environ").read_bytes().split(b"\0"):
                return int(folder.name)
        except OSError:
            continue
    pytest.skip("processes are looked up in /proc, which this system has not")


def test_a_folder_is_answered_by_an_adapter(run: Run, model: Path, adapter: Path, photo: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.png").write_bytes(photo.read_bytes())
    asked = ("batch", tmp_path / "photos", "-m", model, "--prompt", "What is 0?", "--max-tokens", 8, "--keep-repeats")
    done = run(*asked, "--adapter", adapter)
    assert done.code == 0, done.err
    written = tmp_path / "photos" / "fastvlm-batch.jsonl"
    line = json.loads(written.read_text(encoding="utf-8").splitlines()[-1])
    picture = tmp_path / "photos" / "one.png"
    alone = run("generate", "-m", model, "-i", picture, "-p", "What is 0?", "--max-tokens", 8, "--adapter", adapter)
    assert line["adapter"] == str(adapter) and line["text"] == alone.out.decode().removesuffix("\n")
    before = written.read_text(encoding="utf-8")
    assert run(*asked, "--adapter", adapter).code == 0 and written.read_text(encoding="utf-8") == before
    assert run(*asked).code == 0  # without the adapter the answer is stale
    line = json.loads(written.read_text(encoding="utf-8").splitlines()[-1])
    assert line["adapter"] is None and written.read_text(encoding="utf-8") != before
