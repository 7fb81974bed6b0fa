"""Questions about a scene and their answers, in plain English.

``ask(scene, rng, ...)`` gives (kind, question, answer) triples. A question is asked only where its answer is
unambiguous: "the star" needs exactly one star, and positions need clear margins. Answers are canonical and short.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from training.world import COLOURS, HELD_OUT_PAIRS, SHAPES, Scene, Shape

NUMBERS = ("zero", "one", "two", "three", "four")
KINDS = ("describe", "shape", "colour", "count", "count_kind", "yes_no", "position", "absent", "text", "no_text")
MAX_ANSWER_SHAPES = 4
POSITION_MARGIN = 0.12  # of the picture's longer side: how far beyond the other's centre, and beyond the perpendicular
ROW_MARGIN = 0.05  # of the longer side: shapes nearer than this in x have no left-to-right order

# Every phrasing exists in a training and a held-out list; the held-out ones recombine words of the training ones.
DESCRIBE = (
    "Describe the image.",
    "Describe this image.",
    "Describe the picture.",
    "What is in the image?",
    "What is in this picture?",
    "What do you see?",
    "What can you see in the picture?",
    "What does the image show?",
    "Please describe the picture.",
    "Tell me what is in the image.",
)
DESCRIBE_HELD_OUT = (
    "Describe this picture.",
    "What is in the picture?",
    "What can you see in the image?",
    "Please describe the image.",
)
SHAPE = (
    "What shape is in the image?",
    "What shape is this?",
    "Which shape is in the picture?",
    "What shape do you see?",
    "Which shape can you see?",
    "What is the shape in the image?",
    "Tell me which shape this is.",
)
SHAPE_HELD_OUT = (
    "What shape is in the picture?",
    "Which shape is in the image?",
    "What shape can you see?",
    "Which shape do you see?",
)
COLOUR = (
    "What {colour} is the {shape}?",
    "Which {colour} is the {shape}?",
    "What is the {colour} of the {shape}?",
    "Tell me the {colour} of the {shape}.",
    "What {colour} is the {shape} in the image?",
    "Which {colour} does the {shape} have?",
    "What is the {shape}'s {colour}?",
)
COLOUR_HELD_OUT = (
    "What {colour} does the {shape} have?",
    "Which {colour} is the {shape} in the image?",
    "Tell me what {colour} the {shape} is.",
    "What {colour} is the {shape} in this picture?",
)
COUNT = (
    "How many shapes are there?",
    "How many shapes are in the image?",
    "How many shapes do you see?",
    "How many shapes can you see in the picture?",
    "What is the number of shapes?",
    "Count the shapes.",
    "Tell me how many shapes there are.",
)
COUNT_HELD_OUT = (
    "How many shapes are in the picture?",
    "How many shapes can you see?",
    "How many shapes are there in the image?",
    "Count the shapes in the picture.",
)
COUNT_KIND = (
    "How many {shapes} are there?",
    "How many {shapes} are in the image?",
    "How many {shapes} do you see?",
    "How many {shapes} can you see in the picture?",
    "What is the number of {shapes}?",
    "Count the {shapes}.",
    "Tell me how many {shapes} there are.",
)
COUNT_KIND_HELD_OUT = tuple(p.replace("shapes", "{shapes}") for p in COUNT_HELD_OUT)
YES_NO = (
    "Is there {thing}?",
    "Is there {thing} in the image?",
    "Do you see {thing}?",
    "Can you see {thing} in the picture?",
    "Does the image show {thing}?",
    "Is {thing} in this picture?",
    "Tell me if there is {thing}.",
)
YES_NO_HELD_OUT = (
    "Is there {thing} in the picture?",
    "Can you see {thing}?",
    "Does this picture show {thing}?",
    "Do you see {thing} in the image?",
)
POSITION = (
    "What is {where} the {shape}?",
    "Which shape is {where} the {shape}?",
    "What shape is {where} the {shape}?",
    "What do you see {where} the {shape}?",
    "Tell me what is {where} the {shape}.",
    "Which shape can you see {where} the {shape}?",
)
POSITION_HELD_OUT = (
    "What can you see {where} the {shape}?",
    "Tell me which shape is {where} the {shape}.",
    "What shape do you see {where} the {shape}?",
)
WHERE = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above",),
    "below": ("below",),
}
TEXT = (
    "What does the text say?",
    "What does it say?",
    "Read the text.",
    "What is the text?",
    "What is written in the image?",
    "What text is in the picture?",
    "Which text do you see?",
    "Please read the text in the image.",
    "Tell me what is written here.",
    "What does the image say?",
)
TEXT_HELD_OUT = (
    "What text is in the image?",
    "What is written in the picture?",
    "Read the text in the picture.",
    "Tell me what the text says.",
)
NO_TEXT_ANSWER = "I see no text."
NO_SHAPE_ANSWER = "I see no shape."


@dataclass(frozen=True)
class Question:
    """A question of one kind and its one right answer."""

    kind: str
    question: str
    answer: str


def article(word: str) -> str:
    """The word with "a" or "an" before it."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def plural(kind: str) -> str:
    """The name of several shapes of a kind."""
    return "crosses" if kind == "cross" else f"{kind}s"


def _name(shape: Shape) -> str:
    return article(f"{shape.colour} {shape.kind}")


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _joined(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def left_to_right(scene: Scene) -> list[Shape] | None:
    """The shapes in the order of their centres' x; None where two are too near to order."""
    ordered = sorted(scene.shapes, key=lambda s: s.x)
    margin = ROW_MARGIN * max(scene.image.size)
    near = any(b.x - a.x < margin and (a.kind, a.colour) != (b.kind, b.colour) for a, b in pairwise(ordered))
    return None if near else ordered


def describe(scene: Scene) -> str | None:
    """The description: shapes from left to right, then the text; None where the order or a colour is unclear."""
    ordered = left_to_right(scene)
    if ordered is None or any(not shape.colour for shape in ordered):
        return None
    parts = [_sentence(_joined([_name(s) for s in ordered]))] if ordered else []
    if scene.text is not None:
        parts.append(f'The text says "{scene.text.string}".')
    return " ".join(parts)


def neighbour(scene: Scene, anchor: Shape, where: str) -> Shape | None:
    """The one shape on a side of ``anchor``; None where there is none, more than one, or an unclear one."""
    margin = POSITION_MARGIN * max(scene.image.size)
    found: list[Shape] = []
    for other in scene.shapes:
        if other is anchor:
            continue
        dx, dy = other.x - anchor.x, other.y - anchor.y
        along, across = {"left": (-dx, dy), "right": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}[where]
        if along > margin and along > 1.3 * abs(across):
            found.append(other)
        elif along > 0.25 * margin and along > 0.55 * abs(across):
            return None  # neither clearly there nor clearly elsewhere
    return found[0] if len(found) == 1 else None


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def ask(scene: Scene, rng: np.random.Generator, limit: int | None = None, held_out: bool = False) -> list[Question]:
    """Questions about a scene.

    :param limit: how many at most; each kind comes once before any comes twice. None: all candidates.
    :param held_out: use the phrasings never seen in training.
    """

    def phrase(kind: str, training: tuple[str, ...], other: tuple[str, ...]) -> str:
        if held_out and kind == "describe" and rng.random() < 0.3:
            return "Describe the image."  # the runtime's default prompt
        return _pick(rng, other if held_out else training)

    first: list[Question] = []
    more: list[Question] = []

    def add(kind: str, question: str, answer: str) -> None:
        (more if any(q.kind == kind for q in first) else first).append(Question(kind, question, answer))

    shapes = scene.shapes
    named = all(shape.colour for shape in shapes)  # else nothing is asked about colours
    by_kind = {kind: [s for s in shapes if s.kind == kind] for kind in SHAPES}
    absent = [kind for kind in SHAPES if not by_kind[kind]]

    def spelling() -> str:
        return "colour" if rng.random() < 0.5 else "color"

    def colour_question(kind: str) -> str:
        return phrase("colour", COLOUR, COLOUR_HELD_OUT).format(colour=spelling(), shape=kind)

    def position_question(where: str, kind: str) -> str:
        return phrase("position", POSITION, POSITION_HELD_OUT).format(where=_pick(rng, WHERE[where]), shape=kind)

    description = describe(scene)
    if description is not None:
        add("describe", phrase("describe", DESCRIBE, DESCRIBE_HELD_OUT), description)
    if scene.text is not None:
        add("text", phrase("text", TEXT, TEXT_HELD_OUT), f'The text says "{scene.text.string}".')
    elif rng.random() < 0.5:
        add("no_text", phrase("text", TEXT, TEXT_HELD_OUT), NO_TEXT_ANSWER)

    if shapes:
        if len(shapes) == 1:
            add("shape", phrase("shape", SHAPE, SHAPE_HELD_OUT), _sentence(article(shapes[0].kind)))
        single = [kind for kind in SHAPES if len(by_kind[kind]) == 1]
        for kind in rng.permutation(single if named else []):
            add("colour", colour_question(str(kind)), f"The {kind} is {by_kind[str(kind)][0].colour}.")
        add("count", phrase("count", COUNT, COUNT_HELD_OUT), _sentence(NUMBERS[len(shapes)]))
        present = [kind for kind in SHAPES if by_kind[kind]]
        several = [kind for kind in present if len(by_kind[kind]) > 1]
        pool = several if several and rng.random() < 0.5 else present if rng.random() < 0.7 else list(SHAPES)
        for kind in dict.fromkeys([_pick(rng, tuple(pool)), _pick(rng, SHAPES)]):
            question = phrase("count_kind", COUNT_KIND, COUNT_KIND_HELD_OUT).format(shapes=plural(kind))
            add("count_kind", question, _sentence(NUMBERS[len(by_kind[kind])]))
        pairs = {(s.kind, s.colour) for s in shapes}
        kind, colour = sorted(pairs)[int(rng.integers(len(pairs)))]
        yes = (kind, colour)
        near_miss = (kind, _pick(rng, COLOURS)) if rng.random() < 0.4 else (_pick(rng, SHAPES), colour)
        if rng.random() < 0.2:
            near_miss = (_pick(rng, SHAPES), _pick(rng, COLOURS))
        asked = [yes, near_miss] if rng.random() < 0.5 else [near_miss, yes]
        for shape_kind, shape_colour in asked:
            if not held_out and (shape_kind, shape_colour) in HELD_OUT_PAIRS:
                continue  # whose answer would always be no
            plain = not named or rng.random() < 0.2
            thing = article(shape_kind if plain else f"{shape_colour} {shape_kind}")
            truth = bool(by_kind[shape_kind]) if plain else (shape_kind, shape_colour) in pairs
            add("yes_no", phrase("yes_no", YES_NO, YES_NO_HELD_OUT).format(thing=thing), "Yes." if truth else "No.")
        positions: list[tuple[str, str, Shape]] = []
        for kind in single:
            for where in WHERE:
                other = neighbour(scene, by_kind[kind][0], where)
                if other is not None and named:
                    positions.append((kind, where, other))
        for index in rng.permutation(len(positions))[:3]:
            kind, where, other = positions[int(index)]
            add("position", position_question(where, kind), _sentence(_name(other)))
        if absent and rng.random() < 0.5:
            kind = _pick(rng, tuple(absent))
            question = (
                colour_question(kind) if rng.random() < 0.5 else position_question(_pick(rng, tuple(WHERE)), kind)
            )
            add("absent", question, f"I see no {kind}.")
    else:
        share = rng.random()
        if share < 0.25:
            kind = _pick(rng, SHAPES)
            add("absent", colour_question(kind), f"I see no {kind}.")
        elif share < 0.45:
            add("count", phrase("count", COUNT, COUNT_HELD_OUT), _sentence(NUMBERS[0]))
        elif share < 0.65:
            thing = article(f"{_pick(rng, COLOURS)} {_pick(rng, SHAPES)}")
            if held_out or tuple(reversed(thing.split()[1:])) not in HELD_OUT_PAIRS:
                add("yes_no", phrase("yes_no", YES_NO, YES_NO_HELD_OUT).format(thing=thing), "No.")
        elif share < 0.75:
            add("shape", phrase("shape", SHAPE, SHAPE_HELD_OUT), NO_SHAPE_ANSWER)
    if limit is None:
        return first + more
    order = [first[int(i)] for i in rng.permutation(len(first))] + [more[int(i)] for i in rng.permutation(len(more))]
    return order[:limit]


def corpus() -> list[str]:
    """Every phrasing and every form of answer, for the tokenizer: each word as questions and answers have it."""
    lines = [*DESCRIBE, *SHAPE, *COUNT, *TEXT, NO_TEXT_ANSWER, NO_SHAPE_ANSWER, 'The text says "']
    for kind in SHAPES:
        for template in COLOUR:
            lines += [template.format(colour=c, shape=kind) for c in ("colour", "color")]
        lines += [template.format(shapes=plural(kind)) for template in COUNT_KIND]
        lines += [t.format(where=w, shape=kind) for t in POSITION for names in WHERE.values() for w in names]
        lines += [_sentence(article(kind)), f"I see no {kind}."]
        for colour in COLOURS:
            lines += [t.format(thing=article(f"{colour} {kind}")) for t in YES_NO]
            lines += [
                _sentence(article(f"{colour} {kind}")),
                f"The {kind} is {colour}.",
                f"a {colour} {kind} and a {kind}",
            ]
        lines += [t.format(thing=article(kind)) for t in YES_NO]
    lines += [_sentence(number) for number in NUMBERS] + ["Yes.", "No.", "You are a helpful assistant."]
    return lines
