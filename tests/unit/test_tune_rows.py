"""Data as people have it becomes rows, and what is wrong with it is said by row."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastvlm_mlx import PromptError
from fastvlm_mlx.finetune.formats import read_rows
from fastvlm_mlx.finetune.rows import Exchange, Row

SAID = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}]
LLAVA = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
PARTS = [{"type": "image"}, {"type": "text", "text": "What?"}]


def only(table: dict[str, Any]) -> Row:
    (row,) = read_rows([table])
    return row


@pytest.mark.parametrize(
    "table",
    [
        {"images": ["a.png"], "messages": SAID},
        {"image": "a.png", "messages": SAID},
        {"image": "a.png", "messages": [{"role": "user", "content": PARTS}, SAID[1]]},
        {"image": "a.png", "conversations": LLAVA},
        {"id": "1", "image": ["a.png"], "conversations": [{"from": "human", "value": "What?\n<image>"}, LLAVA[1]]},
        {"images": ["a.png"], "conversations": LLAVA},
        {"image": "a.png", "question": "What?", "answer": "A cat."},
        {"file_name": "a.png", "prompt": "What?", "answer": "A cat."},
    ],
)
def test_every_form_is_the_same_row(table: dict[str, Any]) -> None:
    assert only(table) == Row((Path("a.png"),), (Exchange("What?", "A cat.", 1),))


def test_a_picture_with_a_text_is_asked_for_it() -> None:
    table = {"file_name": "a.png", "text": "A cat."}
    assert only(table).exchanges == (Exchange("Describe the image.", "A cat.", 1),)
    (row,) = read_rows([table], prompt="Caption, please.")
    assert row.exchanges[0].question == "Caption, please."


def test_pictures_stand_where_their_marks_stand() -> None:
    said = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image>\n<image>\nWhich is larger?"},
        {"role": "assistant", "content": "The first."},
        {"role": "user", "content": "And <image> this?"}, {"role": "assistant", "content": "Larger still."},
    ]  # fmt: skip
    row = only({"images": ["a.png", "b.png", "c.png"], "messages": said})
    assert row.system == "Be brief."
    assert row.exchanges == (
        Exchange("Which is larger?", "The first.", 2),
        Exchange("And  this?", "Larger still.", 1),
    )


def test_a_question_of_its_own_is_never_searched_for_marks() -> None:
    row = only({"image": "a.png", "question": "What does <image> mean in HTML?", "answer": "Nothing."})
    assert row.exchanges == (Exchange("What does <image> mean in HTML?", "Nothing.", 1),)
    text_only = only({"messages": [{"role": "user", "content": "Say <image>."}, SAID[1]]})
    assert text_only.exchanges == (Exchange("Say <image>.", "A cat.", 0),) and not text_only.images


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"image": "a.png"}, "'image'"),
        ({"images": ["a.png"], "messages": SAID[:1]}, "each question with its answer"),
        ({"images": ["a.png"], "messages": [SAID[1], SAID[0]]}, "assistant, user"),
        ({"images": ["a.png"], "messages": "hello"}, "list of tables"),
        ({"images": ["a.png"], "messages": [{"role": "tool", "content": "x"}]}, "'tool'"),
        ({"images": ["a.png"], "messages": [{"role": "user", "content": [{"type": "audio"}]}, SAID[1]]}, "audio"),
        ({"images": ["a.png", "b.png"], "conversations": LLAVA}, "1 time, and it has 2 pictures"),
        ({"image": "a.png", "question": "What?", "answer": " "}, "an answer is empty"),
        ({"image": "a.png", "question": "What?", "answer": 3}, "expected"),
        ({"image": "", "question": "What?", "answer": "x"}, "name of a picture is empty"),
        ({"image": "a.png", "question": "\ud800", "answer": "x"}, "surrogate"),
        ("text", "expected a table"),
    ],
)
def test_what_is_wrong_with_a_row_is_said(table: Any, words: str) -> None:
    with pytest.raises(PromptError, match="row 2") as error:
        read_rows([{"image": "a.png", "question": "What?", "answer": "x"}, table])
    assert words in str(error.value)


def test_several_broken_rows_are_named_together() -> None:
    with pytest.raises(PromptError, match=r"7 rows cannot be used\. row 1: .* row 5: .* And 2 other rows\."):
        read_rows([{"image": "a.png"}] * 7)


def test_lines_a_list_and_folders(tmp_path: Path) -> None:
    rows = [
        {"image": "a.png", "question": "One\u2028?", "answer": "1"},
        {"image": "b.png", "question": "Two?", "answer": "2"},
    ]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "metadata.jsonl").write_text(lines, encoding="utf-8")
    one, two, three = (read_rows(tmp_path / name) for name in ("rows.jsonl", "rows.json", "folder"))
    assert one == two and one[0].images == (tmp_path / "a.png",) and one[0].origin == "rows.jsonl, line 1"
    assert three[1].images == (tmp_path / "folder" / "b.png",)
    assert read_rows(tmp_path / "rows.jsonl", images=tmp_path / "x")[0].images == (tmp_path / "x" / "a.png",)


def test_pictures_with_texts_beside_them(tmp_path: Path) -> None:
    for name in ("a.png", "b.JPG", "._a.png", "notes.md"):
        (tmp_path / name).touch()
    (tmp_path / "a.txt").write_text("A cat.\n", encoding="utf-8")
    with pytest.raises(PromptError, match=r"b\.JPG \(which has no b\.txt beside it"):
        read_rows(tmp_path)
    (tmp_path / "b.txt").write_text("\ufeffEin Hund.", encoding="utf-8")
    assert [row.exchanges[0].answer for row in read_rows(tmp_path)] == ["A cat.", "Ein Hund."]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "line 1: not valid JSON"),
        ("", "There are no rows"),
        ("[{]", "rows.jsonl: not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_files_that_hold_no_rows(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(PromptError, match=r"JSON|rows") as error:
        read_rows(tmp_path / "rows.jsonl")
    assert words in str(error.value) and len(str(error.value)) < 500


def test_data_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="no such file or folder"):
        read_rows(tmp_path / "nowhere")
    with pytest.raises(PromptError, match="no texts in it"):
        read_rows(tmp_path)
    with pytest.raises(PromptError, match="expected the path"):
        read_rows({"image": "a.png"})  # type: ignore[dict-item]
