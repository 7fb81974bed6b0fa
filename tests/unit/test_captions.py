"""Rules for captions: what is cut, what is put around, what is forbidden, what counts as repeating itself; shares."""

from pathlib import Path

import pytest

from fastvlm_mlx.errors import OptionError
from fastvlm_mlx.folder import sidecar
from fastvlm_mlx.folder.captions import Rules, repeated
from fastvlm_mlx.folder.lines import JSONLines, Table
from fastvlm_mlx.folder.share import Share, parse


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        (" The image shows a cat. ", "Photo: A cat. [x]"),
        ("the IMAGE shows, a cat", "Photo: a cat [x]"),
        ("This is The image shows", "Photo: The image shows [x]"),
        ("A dog", "Photo: A dog [x]"),
        ("", "Photo:  [x]"),
    ],
)
def test_what_is_cut_and_put_around(text: str, caption: str) -> None:
    rules = Rules("Photo: ", " [x]", ("The image shows", "This is", "The image"))
    assert rules.caption(text) == caption


def test_forbidden_phrases_are_whole_words() -> None:
    rules = Rules(forbidden=("watermark", "stock photo", "c++"))
    assert rules.breach("A Stock\nPHOTO.") == "Stock\nPHOTO" and rules.breach("in c++, he said") == "c++"
    assert rules.breach("watermarked stock photographs") is None and Rules().breach("watermark") is None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a very very very very very very big dog", "very"),
        ("a very, very, very big dog", None),
        ("a red circle, " * 6, "a red circle,"),
        ("a red circle, " * 4 + "and a dog", None),
        ("there is a man who stands beside the house, " * 3, "there is a man who stands beside the house,"),
        ("there is a man who stands beside the house, " * 2, None),
        ("", None),
    ],
)
def test_what_repeats_itself(text: str, found: str | None) -> None:
    phrase = repeated(text)
    assert (phrase is None) == (found is None)
    assert phrase is None or found is None or sorted(phrase.split()) == sorted(found.split())


def test_shares_are_whole_and_apart() -> None:
    names = [f"{number}.jpg" for number in range(3000)]
    shares = [Share(index, 3) for index in (1, 2, 3)]
    assert all(sum(share.holds(name) for share in shares) == 1 for name in names)
    assert all(900 < sum(map(share.holds, names)) < 1100 for share in shares)
    assert parse(None).holds("anything") and str(parse("2/3").file(Path("a/out.csv"))) == "a/out.2-of-3.csv"
    for text in ("", "3", "0/2", "3/2", "1/0", "-1/2", "a/b"):
        with pytest.raises(OptionError):
            parse(text)


def test_texts_of_any_kind_come_back_from_both_forms() -> None:
    for text in ('"quoted", and\nlines\r\n', "", "[1]", "ä 图 \U0001f600 \x00", '=1+1, "'):
        line = {
            "image": '["odd.jpg', "digest": ["a", "b"], "prompt": "?", "text": text, "finish_reason": "stop",
            "model": "m", "adapter": None, "seconds": 0.5, "name": "x", "recipe": "r", "modified": 3,
            "doubt": ["repeats"],
        }  # fmt: skip
        for form in (JSONLines(), Table(["b", "a"])):
            data = form.header + form.encode(line) * 2
            whole = list(form.whole(iter([part + b"\n" for part in data.split(b"\n")[:-1]])))
            assert form.decode(whole[-1]) == line
            cut = (data + form.encode(line)[:-1]).split(b"\n")
            parts = [part + b"\n" for part in cut[:-1]] + [cut[-1]]
            assert list(form.whole(iter(parts))) == whole


def test_texts_are_joined_with_a_blank_where_one_is_needed(tmp_path: Path) -> None:
    assert sidecar.joined("a dog\n", "in a park") == "a dog in a park"
    assert sidecar.joined("a dog", ", outdoors") == "a dog, outdoors" and sidecar.joined("", "x") == "x"
    sidecar.write(tmp_path / "new" / "a.txt", "x")
    assert sidecar.read(tmp_path / "new" / "a.txt") == "x\n" and sidecar.read(tmp_path / "b.txt") is None
