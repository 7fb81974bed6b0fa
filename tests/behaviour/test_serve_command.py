"""`fastvlm-mlx serve` as a process: how it starts, what it prints, and how it ends."""

import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("uvicorn", reason="the extra serve is not installed")

from tests.serving import SHAPES, Process, asked, events_of, text_of

pytestmark = pytest.mark.slow

SERVE = [sys.executable, "-m", "fastvlm_mlx", "serve"]


def failed(*arguments: str, **options: Any) -> tuple[int, str]:
    """The exit code and the one line of a server that does not begin."""
    done = subprocess.run([*SERVE, *arguments], capture_output=True, text=True, timeout=60, **options)
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return done.returncode, line


def test_it_prints_its_address_answers_and_ends() -> None:
    with Process("--model", "tiny", "--metrics", "--exact") as found:
        assert re.fullmatch(r"tiny answers at http://127\.0\.0\.1:\d+ \(Ctrl-C stops it\)\n", found.line)
        answer = httpx.post(
            f"{found.url}/v1/chat/completions", json=asked("How many shapes are there?", SHAPES), timeout=60
        )
        assert answer.json()["choices"][0]["message"]["content"] == "Three."
        assert "fastvlm_requests_total" in httpx.get(f"{found.url}/metrics").text
        found.process.send_signal(signal.SIGINT)
        out, err = found.process.communicate(timeout=30)
        assert (found.process.returncode, out) == (130, "")
        assert [line.split(" ", 1)[1].split(" ")[:3] for line in err.splitlines()] == [
            ["POST", "/v1/chat/completions", "200"]
        ]


def test_an_interrupt_ends_open_answers_with_an_error() -> None:
    pytest.importorskip("llguidance", reason="the extra schema is not installed")
    with Process("--model", "tiny") as found:
        body = asked("Hello", stream=True, response_format={"type": "json_object"}, max_tokens=4096)
        with httpx.stream("POST", f"{found.url}/v1/chat/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            first = [next(lines) for _ in range(6)]
            found.process.send_signal(signal.SIGINT)
            events = events_of("\n".join([*first, *lines]))
        assert text_of(events).startswith("{")
        assert events[-1]["error"]["code"] == "stopping"
        assert found.process.wait(30) == 130


def test_a_connection_that_is_kept_open_does_not_keep_the_server() -> None:
    with Process("--model", "tiny") as found, httpx.Client(base_url=found.url) as client:
        client.get("/health")
        found.process.send_signal(signal.SIGTERM)
        assert found.process.wait(30) == -signal.SIGTERM


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_under_the_log() -> None:
    with Path("/dev/full").open("w") as full, Process("--model", "tiny", "--metrics", stderr=full) as found:
        for _ in range(3):
            answer = httpx.post(f"{found.url}/v1/chat/completions", json=asked("Hello"), timeout=60)
            assert answer.status_code == 200
        assert re.search(r"fastvlm_log_lines_lost [23]\n", httpx.get(f"{found.url}/metrics").text)


def test_another_host_needs_a_key_which_is_made() -> None:
    with Process("--model", "tiny", "--host", "0.0.0.0") as found:
        assert found.process.stderr is not None
        made = re.search(r"sk-\S+", found.process.stderr.readline())
        assert made and len(made[0]) > 30
        assert httpx.get(f"{found.url}/v1/models").status_code == 401
        assert httpx.get(f"{found.url}/v1/models", headers={"Authorization": f"Bearer {made[0]}"}).status_code == 200


def test_a_key_from_the_environment() -> None:
    with Process("--model", "tiny", env={"FASTVLM_API_KEY": "sk-of-the-environment"}) as found:
        assert httpx.get(f"{found.url}/v1/models").status_code == 401
        headers = {"Authorization": "Bearer sk-of-the-environment"}
        assert httpx.get(f"{found.url}/v1/models", headers=headers).status_code == 200


def test_what_keeps_it_from_beginning() -> None:
    with Process("--model", "tiny") as found:
        port = found.url.rpartition(":")[2]
        code, line = failed("--model", "tiny", "--port", port)
        assert (code, "cannot be had" in line, "--port" in line) == (1, True, True)
    for arguments, words in (
        (["--model", "no-such-model"], "no such folder"),
        (["--model", "tiny", "--port", "70000"], "--port is 70000"),
        (["--model", "tiny", "--max-rows", "0"], "--max-rows is 0"),
        (["--model", "tiny", "--host", "no.such.host.invalid", "--api-key", "sk-12345678"], "--host"),
        (["--model", "tiny", "--api-key", "short"], "--api-key"),
        (["--model", "tiny", "--bits", "7"], "--bits"),
        (["--model", "tiny", "--dtype", "int8"], "--dtype"),
    ):
        code, line = failed("--port", "0", *arguments) if "--port" not in arguments else failed(*arguments)
        assert code == 1 and words in line, line


def test_without_the_extra_one_sentence_names_it() -> None:
    for missing in ("uvicorn", "starlette"):
        code = (
            f"import sys; sys.modules[{missing!r}] = None; sys.argv = ['fastvlm-mlx', 'serve', '--model', 'tiny'];"
            "from fastvlm_mlx.cli import main; main()"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        (line,) = done.stderr.splitlines()
        assert done.returncode == 1 and "pip install 'fastvlm-mlx[serve]'" in line


def test_help_does_not_import_the_server() -> None:
    code = (
        "import sys, atexit; atexit.register(lambda: print(sorted({'uvicorn', 'starlette', 'mlx', 'numpy'} & "
        "set(sys.modules))));"
        "sys.argv = ['fastvlm-mlx', 'serve', '--help']; from fastvlm_mlx.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]" and "--allow-url-images" in done.stdout
