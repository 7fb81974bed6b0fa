"""Results in a notebook: what an answer shows, a stream that grows in place, bars, and examples/notebook.ipynb as it
runs.

Usage: python -m tests.behaviour.test_notebook (runs the notebook and writes its output into it)
"""

import base64
import io
import json
import math
import os
import pty
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

from fastvlm_mlx import VLM, progress
from fastvlm_mlx.decoding import notebook, stream
from fastvlm_mlx.decoding.answer import Answer, Answers, Chunk
from fastvlm_mlx.decoding.stream import Stream

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOK = EXAMPLES / "notebook.ipynb"
PICTURE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
HOSTILE = (
    "<script>alert('x')</script> & <img src=x onerror=y>\n"
    "# no heading, **not bold**, $5$ ![x](http://x/y.png) `a` </div>"
)


class Page(HTMLParser):
    """The tags of a piece of HTML, the sources of its images and the text outside of <details>."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[str] = []
        self.images: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attrs)["src"] or "")
        else:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "details" not in self.open:
            self.text += data


def answer_of(small: VLM, text: str) -> Answer:
    answer = small.generate(PICTURE, "What is it?", max_tokens=3)
    return Answer(text, answer.token_ids, answer.finish_reason, answer.stats, answer.thumbnails)


@pytest.fixture
def in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "in_notebook", lambda: True)


def test_no_thumbnail_is_made_where_nobody_looks(small: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notebook, "thumbnail", lambda pixels: pytest.fail("made a thumbnail"))
    assert small.generate(PICTURE, "What is it?", max_tokens=2).thumbnails == ()
    assert [answer.thumbnails for answer in small.generate(PICTURE, ["What?", "Why?"], max_tokens=2)] == [(), ()]
    assert small.chat().ask("What is it?", PICTURE, max_tokens=2).thumbnails == ()


@pytest.mark.usefixtures("in_a_notebook")
def test_answers_of_a_batch_have_the_pictures_of_their_own_questions(
    small: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = [(PICTURE, "What?"), (None, "Hi"), ([PICTURE, PICTURE[:, ::-1]], "And?"), (PICTURE, "Where?")]
    alone = [small.generate(image, prompt, max_tokens=2).thumbnails for image, prompt in questions]
    monkeypatch.setattr(progress, "DELAY_SECONDS", math.inf)  # no display to draw a bar on
    assert [answer.thumbnails for answer in small.batch(questions, max_tokens=2)] == alone
    assert list(map(len, alone)) == [1, 0, 2, 1] and alone[2][1] != alone[0][0] == alone[2][0]


@pytest.mark.usefixtures("in_a_notebook")
def test_an_answer_shows_itself_beside_its_pictures(small: VLM) -> None:
    answer = small.generate([PICTURE, PICTURE[:, ::-1]], "What is it?", max_tokens=5)
    page = Page(answer._repr_html_())
    assert page.tags.count("details") == 1 and page.text == answer.text == str(answer)
    assert len(page.images) == 2
    for source, picture in zip(page.images, (PICTURE, PICTURE[:, ::-1]), strict=True):
        kind, _, data = source.partition(",")
        assert kind == "data:image/jpeg;base64"
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).astype(int)
        assert shown.shape == small.engine.pixels(picture).shape
        assert np.abs(shown - small.engine.pixels(picture)).mean() < 25  # JPEG of noise
    assert "tokens/s" in answer._repr_html_() and "tokens/s" in answer._repr_markdown_()
    assert "thumbnails" not in repr(answer)
    assert Page(small.generate(None, "Hi", max_tokens=2)._repr_html_()).images == []


@pytest.mark.usefixtures("in_a_notebook")
def test_what_a_model_wrote_is_text(small: VLM) -> None:
    answer = answer_of(small, HOSTILE)
    page = Page(answer._repr_html_())
    assert page.text == HOSTILE and "script" not in page.tags and len(page.images) == 1
    first, second = HOSTILE.split("\n")
    shown = answer._repr_markdown_().split("\n\n<details>")[0]
    assert re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", shown) == f"{first}  \n{second}"
    assert not re.search(r"(?<!\\)[<>*`#\[\]$&]", shown)
    for line, escaped in (
        ("- a", r"\- a"),
        ("12. a", r"12\. a"),
        ("---", r"\---"),
        ("a - 1.5", "a - 1.5"),
        ("    a", "a"),
    ):
        assert notebook.markdown(line, "").startswith(f"{escaped}\n")


@pytest.mark.parametrize("shape", [(3000, 3000), (192, 192), (64, 64)])
def test_a_thumbnail_is_small(shape: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    jpeg = notebook.thumbnail(noise)
    assert len(jpeg) < 60_000 and max(Image.open(io.BytesIO(jpeg)).size) == min(shape[0], notebook.THUMBNAIL)


class Screen:
    """Stands in for IPython.display.display: everything shown in one place, one after the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.shown: list[str] = []
        monkeypatch.setattr("IPython.display.display", self.display)

    def display(self, bundle: dict[str, str], *, raw: bool, display_id: bool) -> "Screen":
        assert raw and display_id and not self.shown
        self.shown.append(bundle["text/html"])
        return self

    def update(self, bundle: dict[str, str], *, raw: bool) -> None:
        assert raw
        self.shown.append(bundle["text/html"])


@pytest.mark.usefixtures("in_a_notebook")
def test_a_stream_grows_in_place(small: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "INTERVAL", 0)
    screen = Screen(monkeypatch)
    small.stream(PICTURE, "What is it?", max_tokens=12)._ipython_display_()
    whole = small.generate(PICTURE, "What is it?", max_tokens=12)
    texts = [Page(html).text for html in screen.shown]
    assert texts[0] == "" and texts[-1] == whole.text and len(set(texts)) > 4
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert all(len(Page(html).images) == 1 for html in screen.shown)

    screen.shown.clear()
    chat = small.chat()
    chat.stream("What is it?", PICTURE, max_tokens=12)._ipython_display_()
    assert Page(screen.shown[-1]).text == whole.text == chat.messages[-1]["content"]


def test_updates_of_a_stream_are_not_too_many(small: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "INTERVAL", float("inf"))
    screen = Screen(monkeypatch)
    chunks = [*(Chunk(letter) for letter in "many"), Chunk("", answer_of(small, "many"))]
    Stream(iter(chunks), [])._ipython_display_()
    assert len(screen.shown) == 2  # the empty beginning, and the answer


def test_a_stream_can_be_read_and_broken_off(small: VLM) -> None:
    answer = small.stream(PICTURE, "What is it?", max_tokens=12)
    assert iter(answer) is answer and isinstance(next(answer), Chunk)
    answer.close()
    assert list(answer) == []


BAR = "from fastvlm_mlx import progress\nprogress.DELAY_SECONDS = progress.REDRAW_SECONDS = {}\n"
BAR += "with progress.bar('Loading', 3) as track:\n    list(track(range(3)))\n"


def test_a_bar_in_a_terminal(tmp_path: Path) -> None:
    """In a real one; and none where work is short, or stderr is no terminal."""
    assert "Loading [##########--------------------] 1/3" in in_a_terminal(BAR.format(0))
    assert re.fullmatch(r"(\r *\r[^\r]+){3}\r *\r", in_a_terminal(BAR.format(0)))
    assert in_a_terminal(BAR.format(60)) == ""
    assert "\rLoading 2" in in_a_terminal(BAR.format(0).replace("3)", "None)", 1))  # of a number that is not known
    piped = subprocess.run([sys.executable, "-c", BAR.format(0)], capture_output=True, check=True)
    assert (piped.stdout, piped.stderr) == (b"", b"")


def in_a_terminal(code: str) -> str:
    """What a process writes to stderr where that is a terminal."""
    outside, inside = pty.openpty()
    done = subprocess.Popen([sys.executable, "-c", code], stderr=inside)
    os.close(inside)
    data = b""
    while True:
        try:
            part = os.read(outside, 4096)
        except OSError:  # the other end is closed
            part = b""
        if not part:
            break
        data += part
    os.close(outside)
    assert done.wait() == 0
    return data.decode()


def test_loading_and_batches_say_how_far_they_are(apple: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import contextmanager

    from fastvlm_mlx import load, progress

    steps: dict[str, list[int]] = {}

    @contextmanager
    def bar(label: str, total: int) -> Any:
        def track(items: Any) -> Any:
            for done, item in enumerate(items, start=1):
                steps[label] = [total, done]
                yield item

        yield track

    monkeypatch.setattr(progress, "bar", bar)
    vlm = load(apple)
    vlm.generate(PICTURE, ["What is it?", "Why?"], max_tokens=2)
    assert steps.keys() == {"Loading", "Answering"}
    assert all(total == done > 0 for total, done in steps.values())


def run(book: Any, folder: Path) -> Any:
    """A notebook run from the top in a fresh kernel, every cell without an error."""
    return NotebookClient(
        book, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()


def outputs(cell: Any) -> list[Any]:
    """A cell's outputs, without what is left of a bar."""
    return [output for output in cell.get("outputs", []) if output.get("data", {}).get("text/html") != ""]


def shape(book: Any) -> list[list[list[str]]]:
    """For every cell, the kinds of data of each of its outputs."""
    return [[sorted(output.get("data", {output.output_type: ""})) for output in outputs(cell)] for cell in book.cells]


def pictures(book: Any) -> list[int]:
    """For every cell, how many pictures its HTML shows."""
    return [
        sum(output.get("data", {}).get("text/html", "").count("<img") for output in outputs(cell))
        for cell in book.cells
    ]


@pytest.mark.slow
def test_the_notebook_runs_and_its_output_is_in_it() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    committed = nbformat.reads(text, as_version=4)
    assert len(text) < 150_000 and not re.search(r"/(home|Users|root|work|tmp)/|site-packages", text)
    assert all(cell.outputs for cell in committed.cells if cell.cell_type == "code" and "load(" not in cell.source)
    book = nbformat.reads(text, as_version=4)
    extra = nbformat.v4.new_code_cell(BAR.format(0))
    book.cells.append(extra)
    run(book, EXAMPLES)
    assert extra.outputs and outputs(extra) == []  # a bar, gone when done
    book.cells.pop()
    assert shape(book) == shape(committed), "run: python -m tests.behaviour.test_notebook"
    assert pictures(book) == pictures(committed) and any(pictures(book))


if __name__ == "__main__":
    fresh = run(nbformat.read(NOTEBOOK, as_version=4), EXAMPLES)
    for cell in fresh.cells:
        cell.metadata = {}  # when it ran is nobody's business
        if cell.cell_type == "code":
            cell.outputs = outputs(cell)
    fresh.metadata.language_info = {"name": "python"}
    NOTEBOOK.write_text(json.dumps(fresh, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def test_a_list_of_answers_shows_itself(small: VLM) -> None:
    """As each answer does, one below the other; it is a list all the same."""
    answers = small.generate(PICTURE, ["What is it?", "Where?", "Why?"], max_tokens=6)
    assert isinstance(answers, list) and answers[1:] == [answers[1], answers[2]]
    assert str(Answers([answer_of(small, "Two."), answer_of(small, "Red.")])) == "Two.\nRed."
    assert str(Answers([answer_of(small, "- one\n- two"), answer_of(small, "Red.")])) == "- one\n- two\n\nRed."
    assert str(Answers()) == ""
    assert answers._repr_html_() == "".join(answer._repr_html_() for answer in answers)
    assert answers._repr_markdown_().count("<details>") == 3
    assert isinstance(small.batch([(PICTURE, "What?")], max_tokens=2), Answers)
