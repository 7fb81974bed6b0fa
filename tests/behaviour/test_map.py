"""`vlm.map`: rows lazily in, answers lazily out, in order, whatever is wrong with one of them."""

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastvlm_mlx import VLM, Answer, FastVLMError, ImageError, OptionError, PromptError
from fastvlm_mlx.decoding.window import Window

from .pictures import encoded


def picture(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)


def test_every_row_has_the_answer_it_gets_alone(small: VLM) -> None:
    rows = [(picture(i), f"What is it{'?' * (1 + i % 3)}") for i in range(23)]
    answers = list(small.map(rows, max_tokens=6, temperature=0.8, seed=3))
    alone = [small.generate(*row, max_tokens=6, temperature=0.8, seed=3) for row in rows]
    assert [answer.token_ids for answer in answers if isinstance(answer, Answer)] == [a.token_ids for a in alone]


def test_errors_stand_in_their_places(small: VLM, tmp_path: Path) -> None:
    rows: list[Any] = [
        tmp_path / "missing.jpg",
        picture(1),
        (picture(2), 5),
        b"no picture",
        (1, 2, 3),
        picture(3),
        None,
    ]
    kinds = [type(answer) for answer in small.map(rows, max_tokens=2)]
    assert kinds == [ImageError, Answer, PromptError, ImageError, PromptError, Answer, ImageError]
    found = small.map(rows[1:], max_tokens=2, on_error="raise")
    assert isinstance(next(found), Answer)
    with pytest.raises(PromptError):
        next(found)


def test_rows_are_read_as_answers_are_taken_and_may_have_no_end(small: VLM) -> None:
    read: list[int] = []

    def rows() -> Iterator[np.ndarray]:
        for i in itertools.count():
            read.append(i)
            yield picture(i % 5)

    found = small.map(rows(), "What?", max_tokens=2, window=4)
    assert not read, "nothing is read before the first answer is asked for"
    most = 0
    for answer in itertools.islice(found, 40):
        assert isinstance(answer, Answer)
        most = max(most, len(read))
    assert most <= 40 + 2 * 16 + 4  # finished together, under way, and the window
    found.close()  # type: ignore[attr-defined]  # a generator
    assert not [
        thread for thread in threading.enumerate() if thread.name.startswith("fastvlm-window") and _waits(thread)
    ]


def _waits(thread: threading.Thread) -> bool:
    thread.join(10)
    return thread.is_alive()


def test_rows_as_datasets_and_columns_have_them(small: VLM) -> None:
    image = Image.fromarray(picture(1))
    rows: list[Any] = [
        {"image": image, "question": "What?", "label": 3},
        {"image": image, "prompt": "What?"},
        {"images": [image], "prompt": None},
        image,
        {"bytes": None, "path": None},
    ]
    first, second, third, fourth, last = small.map(rows, "What?", max_tokens=3)
    assert str(first) == str(second) == str(third) == str(fourth) and isinstance(last, ImageError)


def test_a_dataset_of_the_library_datasets(small: VLM) -> None:
    datasets = pytest.importorskip("datasets", reason="the library datasets is not installed")
    images = [{"bytes": encoded(Image.fromarray(picture(i)), "PNG"), "path": ""} for i in range(3)]
    table = datasets.table.InMemoryTable.from_pydict({"image": images, "question": ["What?"] * 3})
    features = datasets.Features({"image": datasets.Image(), "question": datasets.Value("string")})
    rows = datasets.Dataset(table, info=datasets.DatasetInfo(features=features), fingerprint="drawings")
    found = [str(answer) for answer in small.map(rows, max_tokens=2)]
    assert found == [str(small.generate(picture(i), "What?", max_tokens=2)) for i in range(3)]


def test_a_column_of_pandas(small: VLM, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    for i in range(3):
        Image.fromarray(picture(i)).save(tmp_path / f"{i}.png")
    table = pandas.DataFrame({"file": [str(tmp_path / f"{i}.png") for i in range(3)] + [None]})
    table["caption"] = [str(answer) for answer in small.map(table["file"], "What?", max_tokens=2)]
    assert table["caption"][0] == str(small.generate(picture(0), "What?", max_tokens=2))
    assert table["caption"][3].startswith(("The row has no image", "The image is a float"))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [({"on_error": "ignore"}, OptionError), ({"window": 0}, OptionError), ({"max_tokens": 0}, OptionError)],
)
def test_options_are_checked_at_once(small: VLM, arguments: dict[str, Any], error: type[FastVLMError]) -> None:
    with pytest.raises(error):
        small.map([], **arguments)
    with pytest.raises(PromptError):
        small.map("photos")


def test_what_a_window_takes_comes_in_order_and_no_more_than_its_size() -> None:
    read: list[int] = []
    block = threading.Event()

    def items() -> Iterator[int]:
        for i in range(10):
            read.append(i)
            yield i

    def prepare(item: int) -> int:
        if item == 0:
            block.wait(10)
        if item == 3:
            raise ValueError("three")
        return item * item

    with Window(items(), prepare, 4) as window:
        assert window.take(wait=False) is None and read == [0, 1, 2, 3]
        block.set()
        found = [window.take(wait=True) for _ in range(11)]
        assert window.exhausted
    assert [each[1] for each in found if each is not None and each[0] != 3] == [0, 1, 4, 16, 25, 36, 49, 64, 81]
    assert found[3] is not None and isinstance(found[3][1], ValueError) and found[10] is None
