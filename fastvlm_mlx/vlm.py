"""The public API: `load` a model; a `VLM` answers questions about pictures, one or many, whole or as a stream."""

import os
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import TYPE_CHECKING, Literal, NoReturn, overload

import mlx.core as mx

from .config import Dtype, ModelConfig, check_dtype
from .decoding import generate as generation
from .decoding.adapters import find_adapter
from .decoding.answer import Answer, Answers, finish
from .decoding.engine import Engine
from .decoding.image_cache import ImageCache
from .decoding.pictures import encode_all
from .decoding.request import Options, Schema
from .decoding.stream import Stream
from .errors import FastVLMError, ImageError, OptionError, shown
from .inputs.image import Images, Source, as_list
from .inputs.prompt import PROMPT
from .inputs.tokenizer import Tokenizer
from .network.model import FastVLM
from .quantize.recipes import DEFAULT_GROUP, choose

if TYPE_CHECKING:
    from .chat.conversation import Chat
    from .decoding.attention_map import AttentionMap
    from .storage.adapter import Adapter


def load(
    model: str | os.PathLike[str],
    *,
    bits: int | None = None,
    group_size: int = DEFAULT_GROUP,
    dtype: Dtype | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    resolution: int | None = None,
    adapter: "str | os.PathLike[str] | Adapter | None" = None,
) -> "VLM":
    """Load a model, ready to answer.

    `model` is a folder of any accepted layout, a Hub name such as "apple/FastVLM-0.5B" (downloaded once, with a
    FastVLMWarning of its size and terms), or "tiny", the built-in model. `bits` quantises the decoder while loading: 2,
    3, 4, 5, 6 or 8 bits in groups of `group_size` weights (32, 64 or 128). `dtype` is the dtype to compute in: by
    default the stored one on a GPU, and float32 on a CPU (an M5 multiplies float32 as TF32 unless MLX_ENABLE_TF32=0 is
    set). `tokenizer` is a folder to take the tokenizer from, `revision` a branch, tag or commit of a Hub repository,
    `resolution` the side in pixels that pictures are brought to, a multiple of 64 from 64 to 4096, and `adapter` what
    fine-tuning made of the model (see `VLM.use`).

    Raises OptionError for an argument outside its range, HubError, CheckpointError and OutOfMemoryError.
    """
    check_dtype(dtype)
    if bits is not None:
        choose(bits=bits, group_size=group_size)
    engine = Engine.open(model, tokenizer=tokenizer, revision=revision, resolution=resolution)
    found = find_adapter(adapter, engine.config)
    engine.load_weights(bits=bits, group_size=group_size, dtype=dtype)
    engine.use(found)
    return VLM(engine)


class VLM:
    """A FastVLM that answers questions about pictures; `load` makes one. Its parts are in its `engine`."""

    def __init__(self, engine: Engine):
        self.engine = engine

    @property
    def name(self) -> str:
        """The name that the model was loaded by."""
        return self.engine.name

    @property
    def config(self) -> ModelConfig:
        """Every size and setting of the model."""
        return self.engine.config

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer: text to token ids and back."""
        return self.engine.tokenizer

    @property
    def images(self) -> ImageCache:
        """The cache of image embeddings; `images.clear()` empties it."""
        return self.engine.images

    @property
    def model(self) -> FastVLM:
        """The network; raises CheckpointError where its weights are not loaded."""
        return self.engine.model

    def use(self, adapter: "str | os.PathLike[str] | Adapter | None") -> None:
        """Answer with an adapter from now on, or with the model alone (None); nothing is read anew, and others can
        follow.

        `adapter` is a folder that `tune` or PEFT or mlx-lm has written, or what `tune` returned. Raises CheckpointError
        where it was made for another model.
        """
        self.engine.use(find_adapter(adapter, self.engine.config))

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
        top_k: int = ...,
        min_p: float = ...,
        repetition_penalty: float = ...,
        stop: Sequence[str] = ...,
        logprobs: int | None = ...,
        schema: Schema | None = ...,
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
        top_k: int = ...,
        min_p: float = ...,
        repetition_penalty: float = ...,
        stop: Sequence[str] = ...,
        logprobs: int | None = ...,
        schema: Schema | None = ...,
        system: str | None = ...,
    ) -> Answers[Answer]: ...

    def generate(
        self,
        image: Images,
        prompt: str | list[str] | tuple[str, ...] = PROMPT,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
        schema: Schema | None = None,
        system: str | None = None,
    ) -> Answer | Answers[Answer]:
        """Answer a question about a picture, several (a list) or none (None).

        `image` is a path, a file's bytes, an open file, a PIL image, an array (H, W) or (H, W, channels) of NumPy or
        MLX, of uint8, uint16 or floating point from 0 to 1, a dict of "bytes" and "path", or a list of these. For a
        list of prompts, the result is a list of answers; the picture is prepared once.

        `max_tokens` is the longest answer in tokens. With `temperature` 0 every token is the likeliest one; above (up
        to 100), tokens are drawn, the same way for the same `seed`: from the `top_k` likeliest (0: all), of these from
        those that add up to the probability `top_p`, and of these from those at least `min_p` times as likely as the
        likeliest. `repetition_penalty` above 1 makes tokens less likely that are in the text of the prompt or came
        before.

        The answer ends before the first of the `stop` strings, up to 4. `logprobs`, 0 to 20, asks for the
        log-probability of each token and of so many of the likeliest (`Answer.logprobs`). With a `schema` the answer is
        JSON that keeps to it: a JSON Schema as a dict, a JSON text, the path of a file or a class of pydantic, or
        "json" for any object; it is cut short only where the `finish_reason` is "length". `system` replaces the system
        prompt. Raises ImageError, PromptError and OptionError.
        """
        options = Options(
            max_tokens,
            temperature,
            top_p,
            seed,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            stop=stop,
            logprobs=logprobs,
            schema=schema,
        )
        if isinstance(prompt, (list, tuple)):
            return self._answer_all([(image, each) for each in prompt], options, system)
        return finish(generation.stream(self.engine, self.engine.prepare(image, prompt, system=system), options))

    @overload
    def batch(
        self,
        questions: Iterable[tuple[Images, str]],
        *,
        max_tokens: int = ...,
        temperature: float = ...,
        top_p: float = ...,
        seed: int | None = ...,
        top_k: int = ...,
        min_p: float = ...,
        repetition_penalty: float = ...,
        stop: Sequence[str] = ...,
        logprobs: int | None = ...,
        schema: Schema | None = ...,
        system: str | None = ...,
        on_error: Literal["raise"] = ...,
    ) -> Answers[Answer]: ...

    @overload
    def batch(
        self,
        questions: Iterable[tuple[Images, str]],
        *,
        max_tokens: int = ...,
        temperature: float = ...,
        top_p: float = ...,
        seed: int | None = ...,
        top_k: int = ...,
        min_p: float = ...,
        repetition_penalty: float = ...,
        stop: Sequence[str] = ...,
        logprobs: int | None = ...,
        schema: Schema | None = ...,
        system: str | None = ...,
        on_error: Literal["return"],
    ) -> Answers[Answer | FastVLMError]: ...

    def batch(
        self,
        questions: Iterable[tuple[Images, str]],
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
        schema: Schema | None = None,
        system: str | None = None,
        on_error: Literal["raise", "return"] = "raise",
    ) -> Answers[Answer] | Answers[Answer | FastVLMError]:
        """Answer many questions, each a pair (image, prompt), in less time than one by one.

        Arguments are those of `generate`. Every answer is the one that `generate` gives with the same options, seed
        included, up to rounding. Sixteen are under way at a time, and where one ends the next begins. Pictures are
        decoded a few questions ahead, so memory does not grow with the number of questions, which may come from a
        generator; of a list, everything else is checked before the first is answered. With `on_error` "return", a
        question that cannot be used has its exception in the place of its answer, and the others are answered; with
        "raise", the exception is raised.
        """
        options = Options(
            max_tokens,
            temperature,
            top_p,
            seed,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            stop=stop,
            logprobs=logprobs,
            schema=schema,
        )
        if on_error not in ("raise", "return"):
            raise OptionError(f"`on_error` is {shown(on_error)}, expected 'raise' or 'return'.")
        if on_error == "raise":
            return self._answer_all(questions, options, system)
        from .decoding.batch import answer_or_return

        return answer_or_return(
            self.engine, self.engine.prepare_each(questions, system=system), options, _count(questions)
        )

    def _answer_all(
        self, questions: Iterable[tuple[Images, str]], options: Options, system: str | None
    ) -> Answers[Answer]:
        from .decoding.batch import MAX_PREPARED, answer_in_order  # not on the way to a first answer

        if isinstance(questions, (list, tuple)) and len(questions) > MAX_PREPARED:
            self.engine.check_all(questions, system=system)
        return answer_in_order(
            self.engine, self.engine.prepare_each(questions, system=system), options, _count(questions)
        )

    def map(
        self,
        rows: Iterable[object],
        prompt: str = PROMPT,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
        schema: Schema | None = None,
        system: str | None = None,
        on_error: Literal["raise", "return"] = "return",
        window: int | None = None,
    ) -> Iterator[Answer | FastVLMError]:
        """Answer any number of rows: an iterator of their answers, in order, each as soon as it and all before it are
        there.

        A row is a pair (image, prompt), a dict with "image" or "images" and perhaps "prompt" or "question", as rows of
        the library datasets are, or a picture alone, as in a column of pandas, which is asked `prompt`. Rows are read
        as they are needed, in the thread that takes the answers, and up to `window` of them (by default 32) are decoded
        ahead in other threads; sixteen are answered at a time. So memory does not grow with the number of rows, which
        may have no end. Nothing is computed between two answers that are taken.

        Other arguments are those of `generate`. With `on_error` "return", a row that cannot be used has its
        FastVLMError in the place of its answer; with "raise", it is raised when its turn comes. Raises OptionError at
        once, and DeviceError where the device fails.
        """
        options = Options(
            max_tokens,
            temperature,
            top_p,
            seed,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            stop=stop,
            logprobs=logprobs,
            schema=schema,
        )
        from .decoding.mapping import map_rows  # not on the way to a first answer

        return map_rows(self.engine, rows, prompt, options, system=system, on_error=on_error, window=window)

    def stream(
        self,
        image: Images,
        prompt: str = PROMPT,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
        schema: Schema | None = None,
        system: str | None = None,
    ) -> Stream:
        """Answer as `generate` does, chunk by chunk; the last chunk has the whole `answer`.

        As the last line of a notebook's cell the stream displays itself, growing in place.
        """
        options = Options(
            max_tokens,
            temperature,
            top_p,
            seed,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            stop=stop,
            logprobs=logprobs,
            schema=schema,
        )
        request = self.engine.prepare(image, prompt, system=system)
        return Stream(generation.stream(self.engine, request, options), request.pixels)

    def chat(self, *, system: str | None = None) -> "Chat":
        """Start a conversation, which keeps its pictures and everything said: a follow-up costs its own tokens only.

        `system` replaces the system prompt.
        """
        from .chat.conversation import Chat  # not on the way to a first answer

        return Chat(self.engine, system=system)

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
        """The parts of the pictures that an answer attended to, averaged over its tokens, `layers` and `heads`.

        `image`, `prompt` and `system` are those that gave the `answer`. `layers` are by default the second half of the
        decoder's layers, `heads` all heads. In a notebook the map displays itself; `.picture()` is a PIL image. Raises
        ImageError, PromptError and OptionError.
        """
        from .decoding.attention_map import attention_map

        return attention_map(self.engine, self.engine.prepare(image, prompt, system=system), answer, layers, heads)

    def encode_image(self, image: Source | Sequence[Source]) -> mx.array | list[mx.array]:
        """The image embeddings (N, D) that the decoder reads; a list of them for a list of pictures.

        N is ceil(S / 64)**2 for pictures of S pixels. They are float32 whatever the model computes in, so that NumPy,
        which has no bfloat16, takes them (`np.array`). Raises ImageError.
        """
        if image is None:
            raise ImageError("There is no image; give a path, bytes, a PIL image, an array, or a list of these.")
        embeddings = encode_all(self.engine, as_list(image))
        return embeddings if isinstance(image, (list, tuple)) else embeddings[0]

    def __reduce__(self) -> NoReturn:
        raise FastVLMError(
            "A loaded model cannot be copied or sent to another process; load it there again, by its name."
        )

    def __repr__(self) -> str:
        return repr(self.engine).replace("Engine(", "VLM(", 1)


def _count(questions: Iterable[object]) -> int | None:
    """How many questions there are, where that can be known beforehand."""
    return len(questions) if isinstance(questions, Sized) else None
