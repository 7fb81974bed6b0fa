"""From a seed to a training batch: pictures, packed question sequences and the auxiliary heads' targets.

All of a picture's questions share one sequence. The prefix (text, image tokens) comes first; each question block
attends to the prefix and to itself, and its positions continue from the prefix's end, so it sees exactly what a prompt
with that single question would see.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from training.model import FINE_STRIDE, IMAGE_STRIDE, MIDDLE_STRIDE, AuxiliarySizes, ModelConfig
from training.questions import Question, ask
from training.world import CHARACTERS, COLOURS, HELD_OUT_PAIRS, SHAPES, Options, Scene, draw, to_model_pixels

SYSTEM = "You are a helpful assistant."
BEFORE_IMAGE = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
NO_CHARACTER = len(CHARACTERS)
IGNORE = -100
NO_PLACE = -1.0


def after_image(question: str) -> str:
    """The text between the image and the answer."""
    return f"\n{question}<|im_end|>\n<|im_start|>assistant\n"


@dataclass
class Batch:
    """One batch. B pictures, T text tokens after the image, L = prefix + N + T.

    pixels (B, 3, S, S) uint8; before (B, P) and after (B, T) token ids; labels (B, T), the token to predict at each
    place or -100; unlearned (B, T), a token that the place must not be taught to avoid or -100; block (B, T), the
    question's number from 1, 0 for padding; offset (B, T), the place in its block; kinds: per picture the kind of each
    question; targets of the auxiliary heads.
    """

    pixels: Tensor
    before: Tensor
    after: Tensor
    labels: Tensor
    unlearned: Tensor
    block: Tensor
    offset: Tensor
    kinds: list[list[str]]
    targets: dict[str, Tensor]


def additive_mask(block: Tensor, prefix: int) -> Tensor:
    """The mask (B, 1, L, L): causal, and each block sees the prefix and itself only. Padding sees the prefix."""
    zeros = torch.zeros(block.shape[0], prefix, dtype=block.dtype)
    blocks = torch.cat([zeros, block], 1)
    length = blocks.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same = blocks[:, :, None] == blocks[:, None, :]
    shared = torch.arange(length) < prefix
    allowed = causal & (same | shared)
    mask = torch.zeros(allowed.shape).masked_fill_(~allowed, torch.finfo(torch.float32).min)
    return mask[:, None]


def positions(offset: Tensor, prefix: int) -> Tensor:
    """Rotary positions (B, L): the prefix's own, then every block from the prefix's end."""
    start = torch.arange(prefix).expand(offset.shape[0], prefix)
    return torch.cat([start, offset + prefix], 1)


def scene_targets(scene: Scene, scale: float, left: float, top: float, config: ModelConfig) -> dict[str, np.ndarray]:
    """The auxiliary heads' targets of one scene, in the coordinates of the model's picture."""
    sizes = AuxiliarySizes()
    side = config.image_size
    cells = (side // IMAGE_STRIDE) ** 2
    objects = np.zeros((cells, sizes.shapes + sizes.colours + sizes.shapes * sizes.colours), np.float32)
    targets: dict[str, np.ndarray] = {
        "objects": objects,
        "places": np.full((cells, sizes.shapes, 2), NO_PLACE, np.float32),
        "string": np.full(sizes.positions, NO_CHARACTER, np.int64),
        "count": np.zeros(1 + sizes.shapes, np.int64),
        "columns": np.full((cells, sizes.columns), NO_CHARACTER, np.int64),
    }
    levels = (("fine", FINE_STRIDE, sizes.fine_columns), ("middle", MIDDLE_STRIDE, sizes.middle_columns))
    for level, stride, slots in levels:
        count = (side // stride) ** 2
        targets[f"{level}_shape"] = np.full(count, sizes.shapes, np.int64)
        targets[f"{level}_colour"] = np.full(count, sizes.colours, np.int64)
        targets[f"{level}_columns"] = np.full((count, slots), NO_CHARACTER, np.int64)

    def place(x: float, y: float, stride: int) -> tuple[int, float]:
        """The cell of a point, and how far from the cell's left edge to its right one."""
        across = side // stride
        column, row = (min(max(value / stride, 0.0), across - 1e-6) for value in (x, y))
        return int(row) * across + int(column), column - int(column)

    for shape in scene.shapes:
        kind, colour = SHAPES.index(shape.kind), COLOURS.index(shape.colour) if shape.colour else IGNORE
        x, y = shape.x * scale + left, shape.y * scale + top
        pairs = sizes.shapes + sizes.colours
        cell = place(x, y, IMAGE_STRIDE)[0]
        objects[cell, kind] = 1
        if colour == IGNORE:
            objects[cell, sizes.shapes :] = IGNORE
        else:
            objects[cell, [sizes.shapes + colour, pairs + kind * sizes.colours + colour]] = 1
        targets["places"][cell, kind] = x / IMAGE_STRIDE % 1, y / IMAGE_STRIDE % 1
        for level, stride, _ in levels:
            cell, _ = place(x, y, stride)
            targets[f"{level}_shape"][cell], targets[f"{level}_colour"][cell] = kind, colour
        targets["count"][[0, 1 + kind]] += 1
    for kind_name, colour_name in HELD_OUT_PAIRS:  # that they never come is nothing to be learned
        pair = SHAPES.index(kind_name) * sizes.colours + COLOURS.index(colour_name)
        objects[:, sizes.shapes + sizes.colours + pair] = IGNORE
    if scene.text is not None:
        for index, (character, (x, y)) in enumerate(zip(scene.text.string, scene.text.centres, strict=True)):
            code = CHARACTERS.index(character)
            for key, stride, slots in (
                ("columns", IMAGE_STRIDE, sizes.columns),
                *((f"{level}_columns", stride, slots) for level, stride, slots in levels),
            ):
                cell, share = place(x * scale + left, y * scale + top, stride)
                targets[key][cell, int(share * slots)] = code
            if index < sizes.positions:
                targets["string"][index] = code
    return targets


def partners(tokenizer: Tokenizer) -> dict[int, int]:
    """The tokens of the shape and the colour of each held-out pair, each the other's."""

    def token(word: str) -> int:
        found = tokenizer.token_to_id(f"\u0120{word}")
        assert found is not None, f"{word} is in the tokenizer's vocabulary"
        return found

    pairs = {token(shape): token(colour) for shape, colour in HELD_OUT_PAIRS}
    return pairs | {colour: shape for shape, colour in pairs.items()}


def unlearned(answer: list[int], partner: dict[int, int]) -> list[int]:
    """Per token of an answer, the one that would complete a held-out pair there instead, or -100.

    A pair that is never drawn would otherwise be learned to be impossible: each time a star's colour is named, blue
    would be made less likely. Left out of the softmax, it is neither shown nor ruled out.
    """
    found = [IGNORE] * len(answer)
    for place in range(1, len(answer)):
        for named in (answer[place - 1], answer[max(place - 2, 0)]):  # "blue STAR", "star is BLUE"
            if answer[place] in partner and named in partner and partner[named] != answer[place]:
                found[place] = partner[named]
    return found


def make_batch(
    items: list[tuple[Scene, list[Question]]], tokenizer: Tokenizer, config: ModelConfig, length_multiple: int = 8
) -> Batch:
    """Assemble scenes with their questions into one batch."""
    before = tokenizer.encode(BEFORE_IMAGE, add_special_tokens=False).ids
    partner = partners(tokenizer)
    pixels: list[np.ndarray] = []
    rows: list[tuple[list[int], ...]] = []
    targets: list[dict[str, np.ndarray]] = []
    for scene, questions in items:
        image, scale, left, top = to_model_pixels(scene, config.image_size)
        pixels.append(image)
        targets.append(scene_targets(scene, scale, left, top, config))
        ids: list[int] = []
        labels: list[int] = []
        avoided: list[int] = []
        block: list[int] = []
        offset: list[int] = []
        for number, question in enumerate(questions, start=1):
            asked = tokenizer.encode(after_image(question.question), add_special_tokens=False).ids
            answer = tokenizer.encode(question.answer + "<|im_end|>", add_special_tokens=False).ids
            ids += asked + answer[:-1]
            labels += [IGNORE] * (len(asked) - 1) + answer
            avoided += [IGNORE] * (len(asked) - 1) + unlearned(answer, partner)
            block += [number] * (len(asked) + len(answer) - 1)
            offset += range(len(asked) + len(answer) - 1)
        rows.append((ids, labels, avoided, block, offset))
    length = max(len(row[0]) for row in rows)
    length = -(-length // length_multiple) * length_multiple
    filled = [
        torch.tensor([row[part] + [fill] * (length - len(row[part])) for row in rows])
        for part, fill in enumerate((0, IGNORE, IGNORE, 0, 0))
    ]
    return Batch(
        pixels=torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2),
        before=torch.tensor(before).expand(len(items), -1),
        after=filled[0],
        labels=filled[1],
        unlearned=filled[2],
        block=filled[3],
        offset=filled[4],
        kinds=[[question.kind for question in questions] for _, questions in items],
        targets={key: torch.from_numpy(np.stack([t[key] for t in targets])) for key in targets[0]},
    )


class World(IterableDataset[Batch]):
    """An endless stream of batches; ``seed`` and the worker's number decide everything."""

    def __init__(
        self, tokenizer: Tokenizer, config: ModelConfig, options: Options, batch_size: int, questions: int, seed: int
    ) -> None:
        super().__init__()
        self.tokenizer, self.config, self.options = tokenizer, config, options
        self.batch_size, self.questions, self.seed = batch_size, questions, seed

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        rng = np.random.default_rng([self.seed, worker.id if worker else 0])
        while True:
            scenes = [draw(rng, self.options) for _ in range(self.batch_size)]
            items = [(scene, ask(scene, rng, self.questions)) for scene in scenes]
            yield make_batch(items, self.tokenizer, self.config)


def fixed_items(options: Options, count: int, seed: int, held_out: bool) -> list[tuple[Scene, list[Question]]]:
    """A fixed set of scenes with all their questions."""
    rng = np.random.default_rng([seed, 7])
    scenes = [draw(rng, replace(options, held_out=held_out)) for _ in range(count)]
    return [(scene, ask(scene, rng, held_out=held_out)) for scene in scenes]
