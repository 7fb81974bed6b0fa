"""The README and the pages of docs/ say what is so: their tables are the help's and the measurements', their
conversations take place, their commands and links exist, and CI runs what the README tells people to run.

Usage: python -m tests.behaviour.test_pages (rewrites the tables)
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

from benchmarks import compare, serve
from fastvlm_mlx.calibrate import report
from fastvlm_mlx.calibrate.quality import Quality
from fastvlm_mlx.cli.app import build
from fastvlm_mlx.serve.fields import CHAT_FIELDS, RESPONSE_FIELDS, table
from training import evaluate

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\((?!https?:)([^)#]+)(?:#([^)]*))?\)")
BLOCKS = re.compile(r"<!-- (\w+): (\S+) -->")
BLOCK = re.compile(r"(?s)(<!-- (\w+): (\S+) -->\n).*?(<!-- end -->)")


def commands() -> dict[str, Any]:
    """The commands by name, as click describes them."""
    return dict(typer.main.get_command(build()).commands)  # type: ignore[attr-defined]


def option_table(command: str) -> str:
    """Markdown rows of a command's options, from the help texts."""
    rows = ["| option | meaning |", "|---|---|"]
    for option in commands()[command].params:
        names = ", ".join(f"`{name}`" for name in option.opts)
        default = (
            "" if option.default in (None, False, "") or callable(option.default) else f" [default: {option.default}]"
        )
        rows.append(f"| {names} | {getattr(option, 'help', '')}{default} |")
    return "\n".join(rows) + "\n"


def comparison_table(resolution: str) -> str:
    """The newest measurement at a resolution: its table, and under it what was measured and where."""
    newest = max((ROOT / "benchmarks" / "results").glob(f"*-float32-{resolution}.json"))
    table, described, machine, *_ = compare.markdown(json.loads(newest.read_text(encoding="utf-8"))).split("\n\n")
    return f"{table}\n\n{described[0].upper()}{described[1:]} {machine}\n"


def accuracy_table(file: str) -> str:
    """What `training.evaluate` measured and wrote to a file."""
    result = json.loads((ROOT / file).read_text(encoding="utf-8"))
    rows = [evaluate.Row(kind, found["right"], found["asked"]) for kind, found in result["kinds"].items()]
    return evaluate.markdown(rows) + "\n"


def chat_session(picture: str) -> str:
    """A conversation with `tiny` as it goes: what is typed, and the answers, which are of one line each."""
    typed = ["How many shapes are there?", "/image examples/sign.png", "What does the text say?"]
    command = [sys.executable, "-m", "fastvlm_mlx", "chat", "--model", "tiny", "--image", picture]
    done = subprocess.run(command, input="\n".join(typed), capture_output=True, text=True, cwd=ROOT, check=True)
    answers = iter(done.stdout.splitlines())
    lines = [
        line
        for text in typed
        for line in (f"    > {text}", *(() if text.startswith("/") else (f"    {next(answers)}",)))
    ]
    return "\n" + "\n".join(lines) + "\n\n"


def quality_table(model: str) -> str:
    """What quantising a model costs, as `benchmarks.quality` measured it last: a line per recipe, and the picture."""
    newest = max((ROOT / "benchmarks" / "results").glob(f"*-quality-{model}.json"))
    result = json.loads(newest.read_text(encoding="utf-8"))
    rows = [Quality(**each) for each in result["qualities"]]
    bars = "".join(f"- {bar['bar']}: {'met' if bar['met'] else 'MISSED'}\n" for bar in result["bars"])
    picture = f"![KL divergence against size](../benchmarks/results/{newest.stem}.svg)"
    return f"{picture}\n\n{report.markdown(rows)}\n{bars}"


def served_table(resolution: str) -> str:
    """The newest measurement of both servers at a resolution, as `benchmarks.serve` wrote it, and the picture."""
    found = sorted((ROOT / "benchmarks" / "results").glob(f"*-serve-*-{resolution}.json"))
    if not found:
        return (
            f"Not measured yet; `python -m benchmarks.serve --python-mlx-vlm PYTHON --resolution {resolution}` does.\n"
        )
    picture = f"![seconds to the first text](../benchmarks/results/{found[-1].stem}.svg)"
    return f"{serve.markdown(json.loads(found[-1].read_text(encoding='utf-8')))}\n{picture}\n"


def fields_table(form: str) -> str:
    """The fields of a request to the server, as it checks them."""
    return table({"chat": CHAT_FIELDS, "responses": RESPONSE_FIELDS}[form])


TABLES = {
    "options": option_table, "comparison": comparison_table, "accuracy": accuracy_table, "chat": chat_session,
    "quality": quality_table, "fields": fields_table, "served": served_table,
}  # fmt: skip


def with_tables(text: str) -> str:
    return BLOCK.sub(lambda found: found[1] + TABLES[found[2]](found[3]) + found[4], text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_the_helps_and_the_measurements(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert with_tables(text) == text, "run: python -m tests.behaviour.test_pages"


def test_every_command_has_its_table() -> None:
    described = {
        name
        for kind, name in BLOCKS.findall((ROOT / "docs" / "cli.md").read_text(encoding="utf-8"))
        if kind == "options"
    }
    assert described == set(commands())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    named = set(re.findall(r"(?m)(?:^    |`|bin/)fastvlm-mlx ([a-z]+)", page.read_text(encoding="utf-8")))
    assert named <= set(commands())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, heading in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
        assert not heading, "headings change; link to the page"


def test_the_front_page_leads_to_every_other() -> None:
    linked = {target for target, _ in LINK.findall(README.read_text(encoding="utf-8"))}
    assert {str(page.relative_to(ROOT)) for page in PAGES if page != README} <= linked
    assert len(README.read_text(encoding="utf-8").splitlines()) < 150


def test_ci_runs_both_commands() -> None:
    """.ci/run takes the README's lines by these words: each must be there exactly once, as an indented line."""
    lines = README.read_text(encoding="utf-8").splitlines()
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for words in ("generate --model tiny", "pytest"):
        assert f"eval \"$(command_of '{words}')\"" in script
        assert [line for line in lines if line.startswith("    ") and words in line]


if __name__ == "__main__":
    for each in PAGES:
        each.write_text(with_tables(each.read_text(encoding="utf-8")), encoding="utf-8")
