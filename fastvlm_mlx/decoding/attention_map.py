"""Where an answer looked: how much of its attention went to each place of a picture.

Computed afterwards, by going over the finished sequence once more: answering itself is not slowed. Attention says what
the decoder read from, not why it answered as it did (arXiv:1902.10186).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from PIL import Image

from ..backend.failures import explaining
from ..config import is_whole
from ..errors import ImageError, OptionError, PromptError, listed, shown
from ..inputs.image import Pixels
from ..inputs.pieces import ImageSlot, Piece, outside
from ..network.model import FastVLM
from .answer import Answer
from .engine import Engine
from .image_cache import digest
from .notebook import html, thumbnail
from .pictures import Encoding, forgetting
from .request import Request

Grid = npt.NDArray[np.floating]

RAMP = np.array(
    [(0, 0, 60), (110, 0, 130), (230, 60, 50), (255, 160, 0), (255, 245, 120)], np.float32
)  # from no attention to most
VEIL = 0.5  # how much of the picture the colours cover


@dataclass(frozen=True)
class AttentionMap:
    """Shares of an answer's attention, one grid (H, W) per picture, that add up to 1 over all pictures.

    `on_pictures` is the part of all attention that went to pictures; the rest went to the text.
    """

    grids: list[Grid]
    on_pictures: float
    pictures: list[Pixels] = field(repr=False)

    def picture(self, index: int = 0) -> Image.Image:
        """The prepared picture under its attention, from dark blue (none) to yellow (the most of any place)."""
        pixels = self.pictures[index]
        heat = self.grids[index] / max(float(grid.max()) for grid in self.grids)
        smooth = Image.fromarray(heat).resize(pixels.shape[1::-1], Image.Resampling.BICUBIC)
        level = np.clip(np.asarray(smooth), 0, 1) * (len(RAMP) - 1)
        colours = np.stack([np.interp(level, range(len(RAMP)), RAMP[:, channel]) for channel in range(3)], axis=-1)
        return Image.fromarray((pixels * (1 - VEIL) + colours * VEIL).round().astype(np.uint8))

    def _repr_html_(self) -> str:
        drawn = [thumbnail(np.asarray(self.picture(index))) for index in range(len(self.grids))]
        return html(
            f"{100 * self.on_pictures:.0f} % of the attention went to the picture{'s' * (len(drawn) > 1)}", drawn
        )


def attention_map(
    engine: Engine,
    request: Request,
    answer: Answer,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> AttentionMap:
    """Attention that the answer to a request paid to its pictures, averaged over tokens, layers and heads.

    It is taken where each token was chosen, one position before its own. `layers` are by default those of the second
    half, where what a question asks for is looked up (layers before it attend to pictures whatever is asked), `heads`
    all. Raises OptionError for one that the model does not have, ImageError without a picture, PromptError for what is
    no answer.
    """
    if not isinstance(answer, Answer):
        raise PromptError(f"The answer is a {type(answer).__name__}, expected the Answer that this question was given.")
    if not request.pixels:
        raise ImageError("There is no picture whose attention could be shown; give the one that was asked about.")
    ids = _ids(engine, request, answer)
    digests = [digest(pixels) for pixels in request.pixels]
    with explaining(), forgetting(engine.images, digests):
        pictures = Encoding(engine, request, digests)
        pictures.begin_all()
        pictures.wait()
        return _attention_map(engine.model, request.pieces, pictures.images, request.pixels, ids, layers, heads)


def _ids(engine: Engine, request: Request, answer: Answer) -> list[int]:
    """The answer's token ids; raises PromptError unless this model has them, and room for them after the request."""
    vocabulary, given = engine.config.text.vocab_size, answer.token_ids
    ids = given.tolist() if isinstance(given, (np.ndarray, mx.array)) else given
    if not isinstance(ids, (list, tuple)):
        raise PromptError(
            f"The answer's token ids are {shown(given)}, expected a list; give the Answer that this question was given."
        )
    if not ids:
        raise PromptError("The answer holds no tokens; give the Answer that this question was given.")
    if foreign := outside(ids, vocabulary):
        raise PromptError(
            f"The answer holds the token {listed(foreign)}, and this model has those from 0 to {vocabulary - 1}: "
            "it was given by another model; give the Answer that this model gave to the question."
        )
    tokens = request.prompt_tokens + len(ids)
    if tokens > engine.context:
        raise PromptError(
            f"The question and its answer take {tokens} tokens, and the model has room for {engine.context}, so it was "
            "given by another model; give the Answer that this model gave to the question."
        )
    return [int(token) for token in ids]


def _attention_map(
    model: FastVLM,
    pieces: Sequence[Piece],
    embeddings: dict[int, mx.array],
    pictures: list[Pixels],
    answer: Sequence[int],
    layers: Sequence[int] | None,
    heads: Sequence[int] | None,
) -> AttentionMap:
    blocks = model.text.layers
    count = blocks[0].self_attn.heads
    chosen = _checked("layer", layers, range(len(blocks) // 2, len(blocks)), len(blocks))
    among = mx.array(_checked("head", heads, range(count), count))
    prompt = sum(map(len, pieces))
    cache = model.text.make_cache()
    whole = model.embed([*pieces, list(answer)], embeddings)
    model.prefill(whole[:, : prompt - 1], cache)
    x = whole[:, prompt - 1 : -1]
    total = mx.zeros(whole.shape[1] - 1)
    for number, (block, layer_cache) in enumerate(zip(blocks, cache, strict=True)):
        queries, _, _ = block.self_attn.project(block.input_layernorm(x), layer_cache.offset)
        x = block(x, layer_cache)
        if number in chosen:
            total = total + attention_weights(queries, layer_cache.held[0])[among].mean((0, 1))
            mx.eval(x, total)
    shares = np.array(total / len(chosen))
    grids, start = [], 0
    for piece in pieces:
        if isinstance(piece, ImageSlot):
            side = math.isqrt(len(piece))
            grids.append(shares[start : start + len(piece)].reshape(side, side))
        start += len(piece)
    on_pictures = float(sum(grid.sum() for grid in grids))
    return AttentionMap([grid / on_pictures for grid in grids], on_pictures, pictures)


def attention_weights(queries: mx.array, keys: mx.array) -> mx.array:
    """Attention (heads, T, L) of the last T positions: queries (1, heads, T, head_dim), keys (1, kv_heads, L,
    head_dim).
    """
    _, heads, T, head_dim = queries.shape
    _, kv_heads, L, _ = keys.shape
    grouped = queries.astype(mx.float32).reshape(kv_heads, heads // kv_heads, T, head_dim)
    scores = grouped @ keys[0].astype(mx.float32)[:, None].swapaxes(2, 3) * head_dim**-0.5
    seen = mx.arange(L) <= mx.arange(L - T, L)[:, None]
    return mx.softmax(mx.where(seen, scores, -mx.inf), axis=-1).reshape(heads, T, L)


def _checked(name: str, given: Sequence[int] | None, default: Sequence[int], count: int) -> list[int]:
    if given is not None and not isinstance(given, Iterable):
        raise OptionError(f"`{name}s` is {shown(given)}, expected a list of numbers from 0 to {count - 1}.")
    chosen = list(default if given is None else given)
    if not chosen or not all(is_whole(each) and 0 <= each < count for each in chosen):
        raise OptionError(f"`{name}s` is {shown(given)}, expected numbers from 0 to {count - 1}, at least one.")
    return sorted({int(each) for each in chosen})
