"""`fastvlm-mlx doctor` as people run it: its verdict, table and JSON, its exit codes, and what the JSON keeps to
itself."""

import getpass
import json
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastvlm_mlx.cli.app import build
from fastvlm_mlx.diagnostics import doctor
from fastvlm_mlx.diagnostics.checks.finding import Finding
from fastvlm_mlx.diagnostics.checks.setting import Setting

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
KEYS = {"format", "right", "verdict", "quick", "seconds", "counts", "machine", "findings"}
FINDING = {"check", "what", "status", "found", "expected", "value", "limit", "unit", "details"}
STATUSES = {"right", "wrong", "note", "measured"}


@pytest.fixture(scope="module")
def done() -> subprocess.CompletedProcess[str]:
    """A quick run as JSON."""
    command = [sys.executable, "-m", "fastvlm_mlx", "doctor", "--quick", "--json"]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_nothing_is_wrong_here(done: subprocess.CompletedProcess[str]) -> None:
    told = json.loads(done.stdout)
    assert [(f["what"], f["found"]) for f in told["findings"] if f["status"] == "wrong"] == []
    assert (done.returncode, told["right"]) == (0, True)
    assert told["verdict"].startswith("Nothing is wrong: ")


def test_json_is_one_object_with_every_check(done: subprocess.CompletedProcess[str]) -> None:
    told = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert told.keys() == KEYS and told["quick"] is True and told["format"] == doctor.FORMAT_VERSION
    assert list(dict.fromkeys(f["check"] for f in told["findings"])) == list(doctor.CHECKS)
    for finding in told["findings"]:
        assert finding.keys() == FINDING and finding["status"] in STATUSES
        assert finding["status"] != "right" or finding["expected"], (
            finding
        )  # a limit, or what else was expected, is stated
    assert told["counts"] == {status: sum(f["status"] == status for f in told["findings"]) for status in told["counts"]}
    assert set(told["counts"]) == STATUSES
    assert {"cpu", "cores", "memory_bytes", "backend", "libraries"} <= told["machine"].keys()


def test_json_has_neither_paths_nor_names(done: subprocess.CompletedProcess[str]) -> None:
    for path in (Path.home(), ROOT, Path(tempfile.gettempdir()), Path(sys.prefix), Path(sys.executable)):
        assert str(path) not in done.stdout
    for name in (getpass.getuser(), platform.node()):
        assert not re.search(rf"\b{re.escape(name)}\b", done.stdout), name


def test_progress_is_told_on_stderr(done: subprocess.CompletedProcess[str]) -> None:
    lines = done.stderr.splitlines()
    assert [line for line in lines if not line.startswith("Checking ")] == []
    assert [line.removeprefix("Checking ") for line in lines if ":" not in line] == list(doctor.CHECKS)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
    """What the only check finds, which a test fills in."""
    findings: list[Finding] = []

    def check(_: Setting) -> Iterator[Finding]:
        yield from findings

    for name in list(doctor.CHECKS):
        monkeypatch.delitem(doctor.CHECKS, name)
    monkeypatch.setitem(doctor.CHECKS, "stand-in", check)
    return findings


def run(*arguments: str) -> Any:
    """The command's exit code."""
    return build(["doctor"])(["doctor", *arguments], standalone_mode=False) or 0


def test_exit_codes_and_the_verdict_come_first(stand_in: list[Finding], capsys: pytest.CaptureFixture[str]) -> None:
    stand_in.append(Finding("one", "right", "1e-07", "at most 1e-04"))
    stand_in.append(Finding("two", "note", "yes", "no"))
    assert run() == 0
    verdict, blank, heading, *rows = capsys.readouterr().out.splitlines()
    assert verdict.startswith("Nothing is wrong: 1 check right, 1 note to read (") and blank == ""
    assert heading.split() == ["check", "what", "found", "expected"]
    assert [row.split()[:3] for row in rows] == [["right", "stand-in", "one"], ["note", "stand-in", "two"]]
    stand_in.append(Finding("three", "wrong", "3e-01", "at most 1e-04", value=float("nan")))
    assert run() == 1
    assert capsys.readouterr().out.startswith(
        "Something is wrong: 1 of 2 checks failed; first stand-in, three: 3e-01, expected at"
    )
    assert run("--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert told["right"] is False and told["findings"][2]["value"] is None


def test_what_comes_from_outside_cannot_reach_the_terminal(
    stand_in: list[Finding], capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.append(Finding("one", "wrong", "\x1b[2J\x07gone\nnext"))
    assert run() == 1
    assert all(line.isprintable() for line in capsys.readouterr().out.splitlines())


def test_json_of_an_error_names_no_path(stand_in: list[Finding], capsys: pytest.CaptureFixture[str]) -> None:
    home = Path.home()
    stand_in.append(
        Finding("one", "wrong", f"OSError: '{home}/My Pictures/x.jpg' and {home}/.cache/y of {getpass.getuser()}")
    )
    assert run("--json") == 1
    found = json.loads(capsys.readouterr().out)["findings"][0]["found"]
    assert "My Pictures" not in found and ".cache" not in found and getpass.getuser() not in found.split()


def test_help_says_how_it_is_used() -> None:
    command = [sys.executable, "-m", "fastvlm_mlx", "doctor", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "Example: fastvlm-mlx doctor --json > doctor.json" in text and "--quick" in text


def test_the_page_and_the_issue_template_say_what_is_so() -> None:
    page = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    for name in doctor.CHECKS:
        assert f"| `{name}` |" in page, name
    for status in STATUSES:
        assert f"`{status}`" in page
    for key in KEYS | FINDING:
        assert f"`{key}`" in page, key
    template = (ROOT / ".github" / "ISSUE_TEMPLATE" / "doctor.yml").read_text(encoding="utf-8")
    assert "fastvlm-mlx doctor --json > doctor.json" in template and "fastvlm-mlx doctor --json > doctor.json" in page
