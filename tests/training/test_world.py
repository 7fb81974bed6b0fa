"""The synthetic world: deterministic, free of overlaps, and its held-out part is never drawn in training."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from training.questions import (
    COLOUR,
    COLOUR_HELD_OUT,
    DESCRIBE,
    DESCRIBE_HELD_OUT,
    POSITION,
    POSITION_HELD_OUT,
    TEXT,
    TEXT_HELD_OUT,
    ask,
    corpus,
    describe,
    neighbour,
)
from training.world import HELD_OUT_PAIRS, WORDS, Options, Scene, Shape, Text, draw, is_held_out_string, to_model_pixels

BLANK = Image.new("RGB", (200, 200))


def scenes(count: int, options: Options, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [draw(rng, options) for _ in range(count)]


def test_same_seed_same_pictures() -> None:
    for a, b in zip(scenes(8, Options(), 3), scenes(8, Options(), 3), strict=True):
        assert a.shapes == b.shapes and a.text == b.text
        assert np.array_equal(np.asarray(a.image), np.asarray(b.image))


@pytest.mark.slow
@pytest.mark.parametrize("held_out", [False, True])
def test_shapes_do_not_overlap_and_stay_inside(held_out: bool) -> None:
    for scene in scenes(60, Options(held_out=held_out)):
        width, height = scene.image.size
        for index, shape in enumerate(scene.shapes):
            assert shape.size / 2 <= shape.x <= width - shape.size / 2
            assert shape.size / 2 <= shape.y <= height - shape.size / 2
            for other in scene.shapes[:index]:
                assert math.hypot(shape.x - other.x, shape.y - other.y) > (shape.size + other.size) / 2


@pytest.mark.slow
def test_training_never_draws_the_held_out_part() -> None:
    for scene in scenes(150, Options()):
        assert not {(shape.kind, shape.colour) for shape in scene.shapes} & HELD_OUT_PAIRS
        if scene.text is not None and scene.text.string.upper() not in WORDS:
            assert not is_held_out_string(scene.text.string)


@pytest.mark.slow
def test_held_out_world_draws_unseen_pairs_and_strings() -> None:
    drawn = scenes(80, Options(held_out=True))
    assert any((shape.kind, shape.colour) in HELD_OUT_PAIRS for scene in drawn for shape in scene.shapes)
    strings = [scene.text.string for scene in drawn if scene.text is not None]
    assert all(is_held_out_string(s) for s in strings if s.upper() not in WORDS)
    assert any(s.upper() not in WORDS for s in strings)


@pytest.mark.slow
def test_random_strings_avoid_ambiguous_characters() -> None:
    for scene in scenes(150, Options(only="text")):
        assert scene.text is not None
        string = scene.text.string
        if string.upper() not in WORDS and not string.isdigit():
            assert not set(string) & set("OI01")


def test_model_pixels_carry_coordinates() -> None:
    scene = Scene(Image.new("RGB", (300, 200), (255, 255, 255)), (), None)
    pixels, scale, left, top = to_model_pixels(scene, 192)
    assert pixels.shape == (192, 192, 3)
    assert (scale, left, top) == (192 / 300, 0.0, 50 * 192 / 300)
    assert pixels[0].max() == 0 and pixels[96].min() == 255


def test_answers_follow_from_the_scene() -> None:
    star, ring = Shape("star", "red", 40, 100, 30), Shape("ring", "blue", 150, 105, 40)
    scene = Scene(BLANK, (ring, star), Text("AB2", ((20, 20), (30, 20), (40, 20)), 20, (10, 10, 50, 30)))
    assert describe(scene) == 'A red star and a blue ring. The text says "AB2".'
    assert neighbour(scene, star, "right") is ring
    assert neighbour(scene, star, "left") is None and neighbour(scene, star, "above") is None
    rng = np.random.default_rng(0)
    answers: dict[str, set[str]] = {}
    for _ in range(60):
        for question in ask(scene, rng):
            answers.setdefault(question.kind, set()).add(question.answer)
    assert answers["colour"] == {"The star is red.", "The ring is blue."}
    assert answers["count"] == {"Two."}
    assert answers["count_kind"] == {"One.", "Zero."}
    assert answers["yes_no"] == {"Yes.", "No."}
    assert answers["position"] == {"A red star.", "A blue ring."}
    assert answers["text"] == {'The text says "AB2".'}
    assert answers["absent"] == {f"I see no {kind}." for kind in ("circle", "square", "triangle", "cross")}


def test_ambiguous_questions_are_not_asked() -> None:
    two = Scene(BLANK, (Shape("star", "red", 60, 60, 30), Shape("star", "blue", 140, 140, 30)), None)
    rng = np.random.default_rng(0)
    for _ in range(30):
        kinds = {question.kind for question in ask(two, rng)}
        assert not kinds & {"colour", "shape", "position"}


def test_held_out_phrasings_are_new_but_made_of_known_words() -> None:
    for seen, unseen in (
        (DESCRIBE, DESCRIBE_HELD_OUT),
        (COLOUR, COLOUR_HELD_OUT),
        (POSITION, POSITION_HELD_OUT),
        (TEXT, TEXT_HELD_OUT),
    ):
        assert not set(seen) & set(unseen)
    known = {word for line in corpus() for word in line.strip(".?").split()}
    for line in (*DESCRIBE_HELD_OUT, *TEXT_HELD_OUT):
        assert set(line.strip(".?").split()) <= known
    assert "Describe the image." in DESCRIBE
