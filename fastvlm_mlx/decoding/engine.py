"""What answers: a model's settings, its tokenizer, its network, and the pictures it has seen, in one object.

Whatever asks a model takes an `Engine`: `VLM`, a conversation, a batch, a measurement. Questions are prepared
(`prepare`) before the weights are needed, so that what is wrong with them is said before gigabytes are read.
"""

import copy
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import numpy as np

from ..backend.failures import explaining
from ..backend.forks import check_process
from ..config import Dtype, ModelConfig, check_resolution
from ..errors import CheckpointError, FastVLMError, PromptError, TokenizerError, counted, listed, shown
from ..hub.consent import Agree
from ..hub.find import find, find_tokenizer
from ..inputs.image import Images, Pixels, Source, as_list, load_image, preprocess
from ..inputs.imagefile import MAX_PIXELS, check_path
from ..inputs.pieces import Piece, outside
from ..inputs.prompt import PROMPT, Message, Turn, render, render_messages
from ..inputs.tokenizer import Tokenizer
from ..network.model import FastVLM
from ..quantize.recipes import DEFAULT_GROUP, Plan
from ..storage.open import OpenModel
from .image_cache import ImageCache
from .loading import open_model, read_weights
from .request import Options, Request

if TYPE_CHECKING:
    from ..storage.adapter import Adapter


class Engine:
    """A model that can be asked, once its weights are loaded (`load_weights`).

    `config` and `tokenizer` are what it was opened with, `images` the embeddings of pictures seen before,
    `load_seconds` what opening and loading took, `adapter` the one in use.
    """

    def __init__(self, opened: OpenModel):
        self.config: ModelConfig = opened.config
        self.tokenizer = opened.tokenizer
        self.images = ImageCache()
        self.load_seconds = 0.0
        self._opened = opened
        self._model: FastVLM | None = None
        self._bare: tuple[FastVLM, ModelConfig, Tokenizer] | None = None  # without the adapter in use
        self.adapter: Adapter | None = None

    @classmethod
    def open(
        cls,
        model: str | os.PathLike[str],
        *,
        tokenizer: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        resolution: int | None = None,
        agree: Agree | None = None,
        cached_only: bool = False,
    ) -> "Engine":
        """Find a model and read its settings and tokenizer, but no weights yet; arguments as for `fastvlm_mlx.load`.

        `agree` is asked before a first download; with `cached_only`, nothing is fetched at all.
        """
        started = time.perf_counter()
        check_resolution(resolution)
        folder = find_tokenizer(tokenizer)
        engine = cls(open_model(find(model, revision=revision, agree=agree, cached_only=cached_only), folder))
        if resolution is not None:
            engine = engine.at(resolution)
        engine.load_seconds = time.perf_counter() - started
        return engine

    def load_weights(
        self,
        *,
        bits: int | None = None,
        group_size: int = DEFAULT_GROUP,
        plan: Plan | None = None,
        dtype: Dtype | None = None,
    ) -> None:
        """Read the weights into a network for the default device; see `loading.read_weights`."""
        started = time.perf_counter()
        check_process()
        with explaining():
            model, config = read_weights(self._opened, bits=bits, group_size=group_size, plan=plan, dtype=dtype)
        self.config = replace(config, image=self.config.image)
        self._model = model
        self._bare = self.adapter = None
        self.images.clear()
        self.load_seconds += time.perf_counter() - started

    def use(self, adapter: "Adapter | None") -> None:
        """Answer with an adapter from now on, or without one; raises CheckpointError where it was made for another
        model.

        What conversations and the picture cache hold of the network before is not used any more; nothing is read anew.
        """
        model, config, tokenizer = self._bare or (self.model, self.config, self.tokenizer)
        if adapter is None:
            self._model, self.config, self.tokenizer, self._bare = model, config, tokenizer, None
        else:
            from ..storage.adapter import check_base
            from .adapting import adapted  # not on the way to an answer without one

            check_base(adapter, self._opened)
            self._model, self.config = adapted(model, config, adapter)
            self.tokenizer = adapter.tokenizer or tokenizer
            self._bare = (model, config, tokenizer)
        self.adapter = adapter
        self.images.clear()

    def become(self, model: FastVLM, config: ModelConfig, tokenizer: Tokenizer) -> None:
        """Answer by another network from now on, of this config, with this tokenizer."""
        self._model, self.config, self.tokenizer = model, config, tokenizer
        self.images = ImageCache(self.images.capacity)

    def at(self, resolution: int) -> "Engine":
        """Another engine with this network, for pictures of another side in pixels, a multiple of 64; its `images` are
        its own.
        """
        check_resolution(resolution)
        other = copy.copy(self)
        other.config = replace(self.config, image=replace(self.config.image, size=int(resolution)))
        other.images = ImageCache(self.images.capacity)
        return other

    @property
    def name(self) -> str:
        """What the model was asked for by."""
        return self._opened.name

    @property
    def opened(self) -> OpenModel:
        """What it was opened from: the config as stored, the tokenizer, and the weights to be read."""
        return self._opened

    @property
    def model(self) -> FastVLM:
        """The network; raises CheckpointError before `load_weights`, DeviceError in a child forked after it."""
        if self._model is None:
            raise CheckpointError("The weights have not been read yet; call load_weights() first.")
        check_process()
        return self._model

    @property
    def image_tokens(self) -> int:
        """Positions one picture takes."""
        return self.config.image.tokens

    @property
    def context(self) -> int:
        """Positions there is room for."""
        return self.config.text.max_position_embeddings

    def stop_tokens(self, options: Options) -> tuple[int, ...]:
        """The token ids that end an answer: those of the options, or else the model's own."""
        return self.config.eos_token_ids if options.stop_tokens is None else options.stop_tokens

    def prepare(
        self, image: Images, prompt: str = PROMPT, *, system: str | None = None, max_pixels: int = MAX_PIXELS
    ) -> Request:
        """Check and prepare a question without needing the weights; raises ImageError and PromptError.

        A picture file of more than `max_pixels` is refused before it is decoded.
        """
        return self._request(image, prompt, system, partial(self.pixels, max_pixels=max_pixels))

    def prepare_all(self, questions: Iterable[tuple[Images, str]], *, system: str | None = None) -> list[Request]:
        """Prepare several questions, each a pair (image, prompt); raises the first error."""
        found = []
        for each in self.prepare_each(questions, system=system):
            if isinstance(each, FastVLMError):
                raise each
            found.append(each)
        return found

    def prepare_each(
        self, questions: Iterable[tuple[Images, str]], *, system: str | None = None
    ) -> Iterator[Request | FastVLMError]:
        """Prepare questions, each a pair (image, prompt), as they are asked for; the error of one stands in its place.

        A picture that comes again is not decoded again while an earlier request that shows it is in use. Raises
        PromptError for what holds no questions.
        """
        if not isinstance(questions, Iterable) or isinstance(questions, (str, bytes, dict)):
            raise PromptError(f"The questions are {shown(questions)}, expected a list of pairs (image, prompt).")
        return self._prepare_each(questions, system)

    def check_all(self, questions: Iterable[tuple[Images, str]], *, system: str | None = None) -> None:
        """Raise the first error among questions that shows without decoding a picture: PromptError or ImageError."""
        no_pixels = np.zeros((0, 0, 3), np.uint8)

        def check(source: Source) -> Pixels:
            if isinstance(source, (str, os.PathLike)):
                check_path(os.fsdecode(source))
            return no_pixels

        for number, question in enumerate(questions, start=1):
            self._request(*_pair(number, question), system, check)

    def _prepare_each(
        self, questions: Iterable[tuple[Images, str]], system: str | None
    ) -> Iterator[Request | FastVLMError]:
        # Else a picture may be gone, or another, when the next one comes.
        prepare = self.preparer(system=system, held=isinstance(questions, (list, tuple)))
        for number, question in enumerate(questions, start=1):
            try:
                prepared: Request | FastVLMError = prepare(number, question)
            except FastVLMError as error:
                prepared = error
            yield prepared

    def preparer(
        self, *, system: str | None = None, held: bool = False, max_pixels: int = MAX_PIXELS
    ) -> Callable[[int, object], Request]:
        """A function that prepares question `number`, a pair (image, prompt), in any thread.

        A picture that comes again under the same path is not decoded again while an earlier request that shows it is in
        use; where pictures are `held` by the caller as long as the function is used, neither are other pictures. The
        function raises ImageError and PromptError.
        """
        seen: WeakValueDictionary[object, Pixels] = WeakValueDictionary()

        def pixels(source: Source) -> Pixels:
            named = isinstance(source, (str, os.PathLike))
            if not named and not held:
                return self.pixels(source, max_pixels=max_pixels)
            key = source if named else id(source)
            found = seen.get(key)
            if found is None:
                found = seen[key] = self.pixels(source, max_pixels=max_pixels)
            return found

        return lambda number, question: self._request(*_pair(number, question), system, pixels)

    def _request(self, image: Images, prompt: str, system: str | None, pixels: Callable[[Source], Pixels]) -> Request:
        started = time.perf_counter()
        sources = as_list(image)
        if not sources and prompt == PROMPT:
            raise PromptError("No picture was given to describe; name one (`image`), or ask a question (`prompt`).")
        pieces = self.render([Turn(prompt, len(sources))], system)
        return Request([pixels(source) for source in sources], pieces, time.perf_counter() - started)

    def render(self, turns: Sequence[Turn], system: str | None = None) -> list[Piece]:
        """A conversation as the decoder's input; raises what `pieces` raises, and PromptError where it fills the
        context.
        """
        return self._within_context(self.pieces(turns, system), sum(turn.images for turn in turns))

    def render_messages(self, messages: Sequence[Message]) -> list[Piece]:
        """Messages in any order of roles, up to where the next answer begins; raises what `render` raises."""
        pieces = self._within_vocabulary(render_messages(self.tokenizer, messages, self.image_tokens))
        return self._within_context(pieces, sum(message.images for message in messages))

    def _within_context(self, pieces: list[Piece], images: int) -> list[Piece]:
        tokens = sum(map(len, pieces))
        if tokens >= self.context:
            raise PromptError(
                f"The prompt takes {tokens} tokens, {self.image_tokens * images} of them for "
                f"{counted(images, 'image')}, and the model has room for {self.context}; "
                "shorten the text or show fewer images."
            )
        return pieces

    def check(self, request: Request) -> None:
        """Raise PromptError for a request that cannot be answered: without positions, or with no room for a token."""
        if not request.prompt_tokens:
            raise PromptError(
                "The request holds no positions, expected at least one token or picture; `prepare` makes one."
            )
        self._within_context(request.pieces, len(request.pixels))

    def pieces(self, turns: Sequence[Turn], system: str | None = None) -> list[Piece]:
        """A conversation of any length as the decoder's input.

        Every token id is checked here: PromptError for one of an earlier answer that the model does not have,
        TokenizerError for one that the tokenizer makes of a text.
        """
        vocabulary = self.config.text.vocab_size
        if foreign := outside([token for turn in turns for token in turn.answer or ()], vocabulary):
            raise PromptError(
                f"An earlier answer holds the token {listed(foreign)}, and this model has those from 0 to "
                f"{vocabulary - 1}: it was given by another model; ask again."
            )
        return self._within_vocabulary(render(self.tokenizer, turns, self.image_tokens, system))

    def _within_vocabulary(self, pieces: list[Piece]) -> list[Piece]:
        vocabulary = self.config.text.vocab_size
        if foreign := outside([token for piece in pieces if isinstance(piece, list) for token in piece], vocabulary):
            raise TokenizerError(
                f"{self.tokenizer.origin}: it makes the token {listed(foreign)} of this text, and the model has those "
                f"from 0 to {vocabulary - 1}, so it belongs to another model; name the right one as `tokenizer`."
            )
        return pieces

    def pixels(self, source: Source, *, max_pixels: int = MAX_PIXELS) -> Pixels:
        """The prepared pixels (S, S, 3), uint8, of a picture; raises ImageError."""
        return preprocess(load_image(source, max_pixels=max_pixels), self.config.image)

    def __repr__(self) -> str:
        text = self.config.text
        layers = f"{text.num_hidden_layers} layers of {text.hidden_size}"
        return f"Engine({self.name!r}, {layers}, images at {self.config.image.size})"


def _pair(number: int, question: object) -> tuple[Images, str]:
    """Question `number` as its picture and its prompt; raises PromptError."""
    if not isinstance(question, (list, tuple)) or len(question) != 2:
        raise PromptError(f"Question {number} is {shown(question)}, expected a pair (image, prompt).")
    image, prompt = question
    return image, prompt
