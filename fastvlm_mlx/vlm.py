"""The four lines of the front page: load a model, ask about pictures, stream, or take the image embeddings."""

import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, overload

import mlx.core as mx

from . import progress, quantize
from .backend import blas, cpu
from .backend import ops as backends
from .backend.linear import keep_transposed
from .config import STRIDE, Dtype, ModelConfig, check_dtype
from .decoding import generate as generation
from .decoding.generate import Answer, Chunk, Engine, Options, Request
from .decoding.image_cache import ImageCache, digest
from .decoding.prefix import Prefix
from .decoding.stream import Stream
from .errors import CheckpointError, FastVLMWarning, ImageError, OptionError, PromptError, shown
from .hub import find as hub
from .hub import licence
from .inputs.image import Images, Pixels, Source, as_list, load_image, preprocess
from .inputs.imagefile import MAX_PIXELS
from .inputs.prompt import Piece, Turn, render
from .network.model import FastVLM
from .storage.open import OpenModel, fill, is_ours, open_ours

if TYPE_CHECKING:
    from .chat.conversation import Chat
    from .decoding.attention_map import AttentionMap

PROMPT = "Describe the image."
LARGE = 100_000_000  # parameters
RESOLUTIONS = range(STRIDE, 4096 + 1, STRIDE)


def load(
    model: str | os.PathLike[str],
    *,
    bits: int | None = None,
    group_size: int = quantize.DEFAULT_GROUP,
    dtype: Dtype | None = None,
    tokenizer: str | None = None,
    revision: str | None = None,
    resolution: int | None = None,
) -> "VLM":
    """Load a model, ready to answer.

    `model` is a folder of any accepted layout, a Hub name such as "apple/FastVLM-0.5B" (fetched once), or "tiny".
    `bits` quantises the decoder on the fly (2, 3, 4, 5, 6 or 8, in groups of `group_size`). `dtype` is what to compute in:
    by default the stored type on a GPU, float32 on a CPU. `tokenizer` is a folder to take the tokenizer from, `resolution` the
    side in pixels that pictures are brought to (a multiple of 64), `revision` a branch, tag or commit of the Hub repository.
    Raises FastVLMError.
    """
    vlm = VLM.open(model, tokenizer=tokenizer, revision=revision, resolution=resolution)
    vlm.load_weights(bits=bits, group_size=group_size, dtype=dtype)
    return vlm


class VLM:
    """A FastVLM with its tokenizer and settings."""

    def __init__(self, opened: OpenModel):
        self.name = opened.name
        self.config: ModelConfig = opened.config
        self.tokenizer = opened.tokenizer
        self.images = ImageCache()
        self.load_seconds = 0.0
        self._opened = opened
        self._model: FastVLM | None = None

    @classmethod
    def open(
        cls,
        model: str | os.PathLike[str],
        *,
        tokenizer: str | None = None,
        revision: str | None = None,
        resolution: int | None = None,
        agree: hub.Agree | None = None,
        cached_only: bool = False,
    ) -> "VLM":
        """Find a model and read its settings and tokenizer, but no weights yet; see `load`.

        `agree` is asked before a first download (see `hub.find`); with `cached_only`, nothing is fetched at all.
        """
        started = time.perf_counter()
        if resolution is not None and resolution not in RESOLUTIONS:
            raise OptionError(
                f"resolution is {shown(resolution)}, expected a multiple of {STRIDE} from {RESOLUTIONS[0]} to {RESOLUTIONS[-1]} "
                "pixels."
            )
        words = hub.find_tokenizer(tokenizer)
        model = os.fspath(model)
        folder = hub.find(model, revision=revision, agree=agree, cached_only=cached_only)
        vlm = cls(open_folder(folder, model, words))
        if resolution is not None:
            vlm.config = replace(vlm.config, image=replace(vlm.config.image, size=resolution))
        vlm.load_seconds = time.perf_counter() - started
        return vlm

    def load_weights(
        self,
        *,
        bits: int | None = None,
        group_size: int = quantize.DEFAULT_GROUP,
        plan: quantize.Plan | None = None,
        dtype: Dtype | None = None,
    ) -> None:
        """Read the weights into a model for the default device; see `load` for the options; a `plan` says each layer's bits."""
        started = time.perf_counter()
        backend = backends.current()
        check_dtype(dtype)
        licence.announce(self.config.source.license)
        kind: mx.Dtype = getattr(mx, dtype or ("float32" if backend == "cpu" else self.config.dtype))
        self.config = replace(self._opened.settle(), image=self.config.image)
        model = FastVLM(self.config, backend)
        if bits is not None:
            plan, _ = quantize.plan(model, quantize.choose(bits=bits, group_size=group_size))
        if plan:
            if self.config.quantization:
                raise OptionError(f"{self.name} is quantised already; load it without bits.")
            self.config = replace(self.config, quantization=plan)
        quantize.apply(model, self.config.quantization)
        with progress.bar("Loading", len(model.places())) as track:
            fill(model, replace(self._opened, weights=lambda: track(self._opened.weights())), kind, plan or {})
        keep_transposed(model)
        if backend == "cpu":
            _warn_of_slow_blas(model)
            cpu.keep_wide(quantize.packed_layers(model).values(), cpu.memory_bytes())
            cpu.keep_memory()  # of activations only: what loading frees goes back
        self._model = model
        self.images.clear()
        self.load_seconds += time.perf_counter() - started

    @property
    def opened(self) -> OpenModel:
        """What it was opened from: the config as stored, the tokenizer, and the weights to be read."""
        return self._opened

    @property
    def model(self) -> FastVLM:
        """The network; raises CheckpointError before `load_weights`."""
        if self._model is None:
            raise CheckpointError("The weights have not been read yet; call load_weights() first.")
        return self._model

    def prepare(self, image: Images, prompt: str = PROMPT, *, system: str | None = None, max_pixels: int = MAX_PIXELS) -> Request:
        """Check and prepare a question without needing the weights; raises ImageError and PromptError.

        A picture file of more than `max_pixels` is refused before it is decoded.
        """
        return self._request(image, prompt, system, partial(self.pixels, max_pixels=max_pixels))

    def prepare_all(self, questions: Iterable[tuple[Images, str]], *, system: str | None = None) -> list[Request]:
        """The same for several questions (image, prompt); a picture that comes again is not decoded again."""
        seen: dict[object, Pixels] = {}
        held = isinstance(questions, (list, tuple))  # else a picture may be gone, or another, when the next one comes

        def pixels(source: Source) -> Pixels:
            named = isinstance(source, (str, os.PathLike))
            if not named and not held:
                return self.pixels(source)
            key = source if named else id(source)
            if key not in seen:
                seen[key] = self.pixels(source)
            return seen[key]

        requests = []
        for number, question in enumerate(questions, start=1):
            if not isinstance(question, (list, tuple)) or len(question) != 2:
                raise PromptError(f"Question {number} is {shown(question)}, expected a pair (image, prompt).")
            requests.append(self._request(*question, system, pixels))
        return requests

    def _request(self, image: Images, prompt: str, system: str | None, pixels: Callable[[Source], Pixels]) -> Request:
        started = time.perf_counter()
        sources = as_list(image)
        if not sources and prompt == PROMPT:
            raise PromptError("No picture was given to describe; name one (--image PICTURE), or ask a question (--prompt).")
        pieces = self.render([Turn(prompt, len(sources))], system)
        return Request([pixels(source) for source in sources], pieces, time.perf_counter() - started)

    def render(self, turns: Sequence[Turn], system: str | None = None) -> list[Piece]:
        """A conversation as the decoder's input; raises PromptError where it is longer than the context."""
        pieces = render(self.tokenizer, turns, self.image_tokens, system)
        tokens, limit = sum(map(len, pieces)), self.config.text.max_position_embeddings
        if tokens >= limit:
            images = sum(turn.images for turn in turns)
            raise PromptError(
                f"The prompt takes {tokens} tokens, {self.image_tokens * images} of them for {images} images, and the model "
                f"has room for {limit}; shorten the text or show fewer images."
            )
        return pieces

    def pixels(self, source: Source, *, max_pixels: int = MAX_PIXELS) -> Pixels:
        """The prepared pixels (S, S, 3) of a picture; raises ImageError."""
        return preprocess(load_image(source, max_pixels=max_pixels), self.config.image)

    @property
    def image_tokens(self) -> int:
        """Positions one picture takes."""
        return self.config.image.tokens

    def chat(self, *, system: str | None = None) -> "Chat":
        """A conversation that keeps pictures and everything said, so that a follow-up costs its own tokens only."""
        from .chat.conversation import Chat  # not on the way to a first answer

        return Chat(self, system=system)

    @overload
    def generate(
        self,
        image: Images,
        prompt: str = ...,
        *,
        max_tokens: int = ...,
        temperature: float = ...,
        top_p: float = ...,
        seed: int | None = ...,
        system: str | None = ...,
    ) -> Answer: ...

    @overload
    def generate(
        self,
        image: Images,
        prompt: list[str] | tuple[str, ...],
        *,
        max_tokens: int = ...,
        temperature: float = ...,
        top_p: float = ...,
        seed: int | None = ...,
        system: str | None = ...,
    ) -> list[Answer]: ...

    def generate(
        self,
        image: Images,
        prompt: str | list[str] | tuple[str, ...] = PROMPT,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        system: str | None = None,
    ) -> Answer | list[Answer]:
        """Answer a question about a picture, several (a list) or none (None); for a list of questions, a list of answers.

        A picture is a path, bytes, a PIL image or an (H, W, 3) uint8 array. `temperature` 0 always takes the likeliest token;
        above, tokens are drawn, from the likeliest ones that add up to `top_p`, the same way for the same `seed`. `system`
        replaces the system prompt. Raises ImageError, PromptError and OptionError.
        """
        options = Options(max_tokens, temperature, top_p, seed)
        if isinstance(prompt, (list, tuple)):
            return self._answer_all([(image, each) for each in prompt], options, system)
        return generation.finish(self.answer(self.prepare(image, prompt, system=system), options))

    def batch(
        self,
        questions: Iterable[tuple[Images, str]],
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        system: str | None = None,
    ) -> list[Answer]:
        """Answer many questions, each a pair (image, prompt) as for `generate`, in less time than one by one.

        Every answer is the one `generate` gives with the same options, seed included, up to rounding. Everything is checked
        before the first is answered: the prepared pictures (3 MB each at 1024 pixels) are in memory together.
        """
        return self._answer_all(questions, Options(max_tokens, temperature, top_p, seed), system)

    def _answer_all(self, questions: Iterable[tuple[Images, str]], options: Options, system: str | None) -> list[Answer]:
        from .decoding.batch import answer_all

        requests = self.prepare_all(questions, system=system)
        with progress.bar("Answering", len(requests)) as track:
            answers = dict(track(answer_all(self._engine(), requests, options)))
        return [answers[index] for index in range(len(requests))]

    def stream(
        self,
        image: Images,
        prompt: str = PROMPT,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        system: str | None = None,
    ) -> Stream:
        """The same as `generate`, chunk by chunk as the answer is made; the last chunk has the whole `answer`.

        As the last line of a notebook's cell it shows itself, growing in place.
        """
        options = Options(max_tokens, temperature, top_p, seed)
        request = self.prepare(image, prompt, system=system)
        return Stream(self.answer(request, options), request.pixels)

    def answer(self, request: Request, options: Options, prefix: Prefix | None = None) -> Iterator[Chunk]:
        """Stream the answer to a prepared question; with a `prefix`, what it holds of the question is not computed again."""
        return generation.stream(self._engine(), request, options, prefix)

    def _engine(self) -> Engine:
        stop, context = self.config.eos_token_ids, self.config.text.max_position_embeddings
        return Engine(self.model, self.tokenizer, self.images, stop, context)

    def attention_map(
        self,
        image: Images,
        prompt: str,
        answer: Answer,
        *,
        system: str | None = None,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
    ) -> "AttentionMap":
        """Where the answer to a question about these pictures looked, averaged over its tokens, `layers` and `heads`.

        `layers` are by default the second half of all, `heads` all of each. In a notebook it shows itself; `.picture()` is a
        PIL image. Raises ImageError, PromptError and OptionError.
        """
        from .decoding.attention_map import attention_map

        if not isinstance(answer, Answer):
            raise PromptError(f"The answer is a {type(answer).__name__}, expected the Answer that this question was given.")
        request = self.prepare(image, prompt, system=system)
        if not request.pixels:
            raise ImageError("There is no picture whose attention could be shown; give the one that was asked about.")
        shown = generation.encode(self.model, request, [digest(pixels) for pixels in request.pixels], self.images, 0)
        generation.wait([mx.isfinite(embeddings).all() for embeddings in shown.values()], self.images)
        return attention_map(self.model, request.pieces, shown, request.pixels, answer.token_ids, layers, heads)

    def encode_image(self, image: Source | Sequence[Source]) -> mx.array | list[mx.array]:
        """Image embeddings (N, D) as the decoder sees them, N = ceil(S/64)**2; a list of them for a list of pictures."""
        if image is None:
            raise ImageError("There is no image; give a path, bytes, a PIL image, a uint8 array, or a list of these.")
        embeddings = []
        for source in as_list(image):
            pixels = self.pixels(source)
            embeddings.append(self.model.encode(mx.array(pixels[None]))[0])
        if not all(mx.isfinite(each).all().item() for each in embeddings):
            raise CheckpointError("The image encoder's numbers overflow; load the model with dtype='bfloat16' or 'float32'.")
        return embeddings if isinstance(image, (list, tuple)) else embeddings[0]

    def __repr__(self) -> str:
        text = self.config.text
        return f"VLM({self.name!r}, {text.num_hidden_layers} layers of {text.hidden_size}, images at {self.config.image.size})"


def _warn_of_slow_blas(model: FastVLM) -> None:
    """A large model on a CPU without a fast BLAS takes minutes where it could take seconds; say so, and what to do."""
    if blas.is_slow() and sum(place.size for place in model.places().values()) > LARGE:
        warnings.warn(f"This will be slow: {blas.status()}.", FastVLMWarning, stacklevel=4)


def open_folder(folder: Path, name: str, tokenizer: Path | None = None) -> OpenModel:
    """Open a folder of any accepted layout; see `VLM.open`."""
    if is_ours(folder):
        return open_ours(folder, name, tokenizer and tokenizer / "tokenizer.json")
    from .convert import open_foreign

    return open_foreign(folder, name, tokenizer)
