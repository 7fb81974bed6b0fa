"""`fastvlm-mlx batch`: every sound picture of a folder has one whole answer, whatever is started, stopped, changed."""

import csv
import errno
import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import fastvlm_mlx
from fastvlm_mlx import VLM

from .forkserver import Result, Run

EXAMPLES = Path(__file__).parents[2] / "examples"
SOUND = ("page.png", "part-left.png", "shapes.png", "sign.png")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Four pictures in order and one that is none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in SOUND:
        shutil.copy(EXAMPLES / name, folder)
    (folder / "bad.jpg").write_bytes(b"no picture")
    return folder


@pytest.fixture
def batch(run: Run) -> Run:
    """The command with the built-in model."""
    return lambda source, *arguments, **how: run(
        "batch", str(source), "-m", "tiny", "--max-tokens", "24", *map(str, arguments), **how
    )


@pytest.fixture(scope="module")
def tiny() -> VLM:
    return fastvlm_mlx.load("tiny")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def texts(path: Path) -> dict[str, str]:
    """Name -> answer, of which each has exactly one."""
    found = [(line["name"], line["text"]) for line in lines(path) if "error" not in line]
    assert len(dict(found)) == len(found)
    return dict(found)


def ended(result: Result, code: int) -> Result:
    assert result.code == code, f"{result.code}\n{result.out!r}\n{result.err}"
    assert "Traceback" not in result.err
    return result


def test_json_lines_have_the_answers_that_pictures_get_alone(batch: Run, photos: Path, tiny: VLM) -> None:
    result = ended(batch(photos), 3)
    found = lines(photos / "fastvlm-batch.jsonl")
    assert result.out == b"" and "fastvlm-batch.jsonl" in result.err.splitlines()[-1]
    assert texts(photos / "fastvlm-batch.jsonl") == {
        name: str(tiny.generate(photos / name, max_tokens=24)) for name in SOUND
    }
    for line in found:
        if "error" in line:
            assert line["image"] == str(photos / "bad.jpg") and "is no image" in line["error"]
            continue
        keys = {"image", "digest", "prompt", "text", "finish_reason", "model", "adapter", "seconds"}
        assert keys <= line.keys() and line["model"] == "tiny" and line["adapter"] is None
        assert len(line["digest"]) == 64 and line["prompt"] == "Describe the image." and line["seconds"] >= 0
    html = (photos / "fastvlm-batch.report.html").read_text(encoding="utf-8")
    assert html.count("<img") == 4 and html.count("<figure") == 5


def test_what_is_done_is_not_asked_again(batch: Run, photos: Path) -> None:
    batch(photos)
    before = (photos / "fastvlm-batch.jsonl").read_bytes()
    assert "4 were done before" in ended(batch(photos), 3).err
    assert (photos / "fastvlm-batch.jsonl").read_bytes() == before
    (photos / "bad.jpg").unlink()
    assert ended(batch(photos, "--fail-on", "any"), 0).code == 0
    shutil.copy(EXAMPLES / "part-front.png", photos / "new.png")
    assert "this run: 1 item" in ended(batch(photos), 0).err
    assert set(texts(photos / "fastvlm-batch.jsonl")) == {*SOUND, "new.png"}


def test_none_fails_where_it_is_told_so(batch: Run, photos: Path) -> None:
    ended(batch(photos, "--fail-on", "none"), 0)


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_what_a_killed_run_left_unfinished_is_cut(batch: Run, photos: Path, form: str) -> None:
    out = photos.parent / f"out.{form}"
    batch(photos, "--out", out)
    whole = out.read_bytes()
    for cut in (1, 40, 200, len(whole) - 3, len(whole)):
        out.write_bytes(whole[: len(whole) - cut])
        ended(batch(photos, "--out", out), 3)
        text = out.read_text(encoding="utf-8")
        rows = list(csv.DictReader(text.splitlines())) if form == "csv" else lines(out)
        assert sorted(row["name"] for row in rows) == sorted((*SOUND, "bad.jpg"))


def test_a_changed_question_makes_answers_stale(batch: Run, photos: Path) -> None:
    (photos / "bad.jpg").unlink()
    out = photos / "fastvlm-batch.jsonl"
    batch(photos)
    described = texts(out)
    question = ("--prompt", "How many shapes are there?")
    assert "4 items left as found" in ended(batch(photos, *question, "--existing", "skip"), 0).err
    assert texts(out) == described
    ended(batch(photos, *question), 0)
    counted = texts(out)
    assert all(counted[name] != described[name] for name in SOUND) and len(lines(out)) == 4
    ended(batch(photos, "--existing", "append"), 0)
    assert texts(out) == {name: f"{counted[name]} {described[name]}" for name in SOUND}
    ended(batch(photos, "--existing", "append"), 0)  # which is done
    assert texts(out) == {name: f"{counted[name]} {described[name]}" for name in SOUND}
    ended(batch(photos, "--existing", "overwrite", "--max-tokens", "2"), 0)  # another option
    assert all(line["finish_reason"] == "length" for line in lines(out) if line["name"] == "part-left.png")


def test_a_changed_picture_is_asked_again(batch: Run, photos: Path) -> None:
    (photos / "bad.jpg").unlink()
    batch(photos)
    shutil.copy(EXAMPLES / "sign.png", photos / "shapes.png")
    os.utime(photos / "page.png")  # touched, and the same
    assert "this run: 1 item" in ended(batch(photos), 0).err
    found = texts(photos / "fastvlm-batch.jsonl")
    assert found["shapes.png"] == found["sign.png"]


def test_texts_beside_pictures(batch: Run, photos: Path, tiny: VLM) -> None:
    (photos / "sign.txt").write_text("by hand\n")
    (photos / "page.txt").write_text("")  # as a killed program of another kind leaves it
    ended(batch(photos, "--write", "txt"), 3)
    alone = {name: str(tiny.generate(photos / name, max_tokens=24)) for name in SOUND}
    assert (photos / "page.txt").read_text(encoding="utf-8") == alone["page.png"] + "\n"
    assert (photos / "sign.txt").read_text() == "by hand\n" and not (photos / "bad.txt").exists()
    (photos / "page.txt").unlink()  # to have it made again
    assert "this run: 2 items" in ended(batch(photos, "--write", "txt"), 3).err
    ended(batch(photos, "--write", "txt", "--existing", "prepend"), 3)
    assert (photos / "sign.txt").read_text(encoding="utf-8") == f"{alone['sign.png']} by hand\n"
    ended(batch(photos, "--write", "txt", "--existing", "prepend"), 3)
    assert (photos / "sign.txt").read_text(encoding="utf-8") == f"{alone['sign.png']} by hand\n"
    ended(batch(photos, "--write", "txt", "--existing", "overwrite", "--prefix", "trigger, "), 3)
    for name in SOUND:
        assert (photos / name).with_suffix(".txt").read_text(encoding="utf-8") == f"trigger, {alone[name]}\n"
    (photos / "page.txt").write_text("edited\n")
    ended(batch(photos, "--write", "txt", "--prefix", "other, "), 3)
    assert (photos / "page.txt").read_text() == "edited\n"  # not ours any more
    assert (photos / "sign.txt").read_text(encoding="utf-8") == f"other, {alone['sign.png']}\n"
    assert not list(photos.glob(".*"))


def test_texts_elsewhere_and_pictures_below(batch: Run, photos: Path) -> None:
    (photos / "below").mkdir()
    shutil.copy(EXAMPLES / "sign.png", photos / "below" / "deep.png")
    shutil.copy(EXAMPLES / "sign.png", photos / "sign.webp")  # whose text would be the same file
    out = photos.parent / "texts"
    result = ended(batch(photos, "--write", "txt", "--out", out, "--recursive"), 3)
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*.txt")) == [
        "below/deep.txt", "page.txt", "part-left.txt", "shapes.txt", "sign.txt",
    ]  # fmt: skip
    assert "rename one of the pictures" in result.err and not list(photos.rglob("*.txt"))


def test_several_questions_and_a_question_per_row(batch: Run, photos: Path) -> None:
    (photos / "questions").write_text("How many shapes are there?\n\nWhat does the text say?\n")
    ended(batch(photos, "--prompts", photos / "questions"), 3)
    found = [line for line in lines(photos / "fastvlm-batch.jsonl") if "error" not in line]
    assert len(found) == 8 and {line["question"] for line in found} == {0, 1}
    assert "this run: 1 item" in batch(photos, "--prompts", photos / "questions").err
    rows = [
        {"image": "shapes.png", "prompt": "How many shapes are there?"},
        {"image": ["part-left.png", "sign.png"], "prompt": "What is in the images?"},
        {"image": "shapes.png", "prompt": "Is there a cross?"},
        {"image": "missing.png"},
    ]
    (photos / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended(batch(photos / "rows.jsonl", "--out", photos / "out.jsonl"), 3)
    answered = {line["name"]: line for line in lines(photos / "out.jsonl")}
    assert answered["shapes.png"]["prompt"] != answered["shapes.png #2"]["prompt"]
    pair = answered["part-left.png; sign.png"]
    assert pair["image"] == [str(photos / "part-left.png"), str(photos / "sign.png")] and len(pair["digest"]) == 2
    assert "error" in answered["missing.png"]
    (photos / "rows.csv").write_text("image,prompt,label\nshapes.png,What is it?,3\nsign.png,,4\n")
    ended(batch(photos / "rows.csv", "--out", photos / "table.csv"), 0)
    with (photos / "table.csv").open(encoding="utf-8", newline="") as file:
        assert [(row["name"], row["prompt"]) for row in csv.DictReader(file)] == [
            ("shapes.png", "What is it?"),
            ("sign.png", "Describe the image."),
        ]


def test_a_list_on_stdin_a_pattern_and_lines_on_stdout(batch: Run, photos: Path) -> None:
    result = ended(batch("-", "--out", "-", stdin=b"shapes.png\nsign.png\n", cwd=photos), 0)
    assert {json.loads(line)["name"] for line in result.out.splitlines()} == {"shapes.png", "sign.png"}
    ended(batch(photos / "s*.png", "--out", photos / "s.jsonl"), 0)
    assert set(texts(photos / "s.jsonl")) == {"shapes.png", "sign.png"}


def test_a_schema_makes_columns(batch: Run, photos: Path) -> None:
    schema = {
        "type": "object",
        "properties": {
            "shape": {"enum": ["circle", "square"]},
            "count": {"type": "integer", "minimum": 0, "maximum": 9},
        },
        "required": ["shape", "count"],
        "additionalProperties": False,
    }
    (photos / "schema.json").write_text(json.dumps(schema))
    arguments = ("--schema", photos / "schema.json", "--max-tokens", "60")
    ended(batch(photos, *arguments, "--out", photos / "table.csv"), 3)
    with (photos / "table.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if not row["error"]]
    assert len(rows) == 4 and all(
        json.loads(row["text"]) == {"shape": row["shape"], "count": int(row["count"])} for row in rows
    )
    ended(batch(photos, *arguments, "--max-tokens", "3", "--out", photos / "cut.jsonl"), 3)
    assert all("max_tokens" in line["error"] or "no image" in line["error"] for line in lines(photos / "cut.jsonl"))


def test_forbidden_phrases_are_asked_again_and_dropped(batch: Run, photos: Path) -> None:
    (photos / "forbidden").write_text("the text says\nCROSS\n")
    ended(batch(photos, "--forbid", photos / "forbidden", "--strip-start", "a yellow"), 3)
    found = {line["name"]: line for line in lines(photos / "fastvlm-batch.jsonl")}
    assert set(found) == {*SOUND, "bad.jpg"}
    for line in found.values():
        assert "forbidden" in line["error"] if "error" in line else "the text says" not in line["text"].casefold()
    assert "forbidden" in found["sign.png"].get("error", "forbidden")


def test_a_second_run_of_the_same_share_is_refused(batch: Run, photos: Path) -> None:
    out = photos / "fastvlm-batch.jsonl"
    lock = photos / ".fastvlm-batch.jsonl.lock"
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        batch(photos).refused("is being written by another run", str(out))
        batch(photos, "--shard", "1/2").refused("is being written by another run")
    shared = photos / ".fastvlm-batch.1-of-2.jsonl.lock"
    with shared.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        batch(photos).refused("is being written by another run")
        batch(photos, "--shard", "1/3").refused("is being written by another run")
        batch(photos, "--shard", "1/2").refused("is being written by another run")
        ended(batch(photos, "--shard", "2/2", "--fail-on", "none"), 0)
    ended(batch(photos), 3)
    assert set(texts(out)) == set(SOUND) and sorted(path.name for path in photos.glob("*of*")) == []


def test_shares_are_put_together_by_the_last(batch: Run, photos: Path) -> None:
    for index in (1, 2, 3):
        assert (photos / "fastvlm-batch.jsonl").exists() is False
        batch(photos, "--shard", f"{index}/3", "--fail-on", "none")
    assert set(texts(photos / "fastvlm-batch.jsonl")) == set(SOUND)
    assert not list(photos.glob("*-of-*")) and not list(photos.glob(".*"))
    names = [line["name"] for line in lines(photos / "fastvlm-batch.jsonl")]
    assert names == sorted(names)  # in the order of the folder


def test_a_full_disk_ends_in_a_sentence_and_a_sound_file(batch: Run, photos: Path, monkeypatch: Any) -> None:
    from fastvlm_mlx.folder import ledger
    from fastvlm_mlx.folder.lines import fields_of

    out = photos.parent / "full.jsonl"
    written = ledger.Ledger(out, [], "jsonl", fields_of(None))
    written.open()
    written.append([{"image": "a.jpg", "text": "a", "name": "a.jpg"}])
    whole, write = out.read_bytes(), os.write

    def full(descriptor: int, data: Any) -> int:
        if len(data) < 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, bytes(data[:20]))

    monkeypatch.setattr("os.write", full)
    with pytest.raises(fastvlm_mlx.OutputError, match="make room and give the same command again"):
        written.append([{"image": "b.jpg", "text": "b", "name": "b.jpg"}])
    monkeypatch.undo()
    assert out.read_bytes() == whole
    written.append([{"image": "b.jpg", "text": "b", "name": "b.jpg"}])
    assert len(lines(out)) == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--shard", "0/3"), "--shard is '0/3'"),
        (("--shard", "4/3"), "--shard is '4/3'"),
        (("--existing", "keep"), "--existing is 'keep'"),
        (("--write", "xml"), "--write is 'xml'"),
        (("--fail-on", "some"), "--fail-on is 'some'"),
        (("--window", "0"), "--window is 0"),
        (("--prompt", "a", "--prompts", "b"), "--prompt and --prompts"),
        (("--prompts", "missing"), "--prompts is 'missing'"),
        (("--forbid", "missing"), "--forbid is 'missing'"),
        (("--max-tokens", "0"), "--max-tokens is 0"),
        (("--prompt", " "), "--prompt is empty"),
        (("--write", "txt", "--out", "-"), "--out -"),
        (("--out", "page.png"), "is not"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(
    batch: Run, photos: Path, arguments: tuple[str, ...], says: str
) -> None:
    before = sorted(photos.iterdir())
    batch(photos, *arguments, cwd=photos)
    result = batch(photos, *arguments, cwd=photos)
    assert result.code == 1 and (says in result.err or "has not written" in result.err), result.err
    assert sorted(photos.iterdir()) == before


def test_where_there_are_no_pictures(batch: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    batch(tmp_path / "empty").refused("has no pictures")
    batch(tmp_path / "missing").refused("There is no")
    batch(tmp_path / "*.jpg").refused("matches no pictures")
    (tmp_path / "list.txt").write_text("\n")
    batch(tmp_path / "list.txt").refused("is empty")
