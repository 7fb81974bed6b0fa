"""`fastvlm-mlx generate`: an answer about one or more pictures."""

import sys
from typing import Annotated

import typer

from ..errors import counted
from .messages import for_stdout, printable, say
from .options import (
    DEFAULT_MODEL,
    MAX_PIXELS,
    Adapter,
    ComputeType,
    Load4Bit,
    Load8Bit,
    MaxPixels,
    MaxTokens,
    MinP,
    Model,
    Pictures,
    RepetitionPenalty,
    Resolution,
    Revision,
    Schema,
    Seed,
    Stop,
    System,
    Temperature,
    TokenizerPath,
    TopK,
    TopP,
    Yes,
    agree_to_download,
    one_of_bits,
    pictures_named,
    schema_named,
)
from .startup import without_collector

MAX_STDIN_BYTES = 4_000_000  # bytes, of up to as many characters as a prompt may have


def generate(
    model: Model = DEFAULT_MODEL,
    image: Pictures = None,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="The question; '-' reads it from stdin.")
    ] = "Describe the image.",
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    stop: Stop = None,
    schema: Schema = None,
    logprobs: Annotated[
        int | None,
        typer.Option(
            help="How likely each token was, and so many of the likeliest, 0 to 20: in --json, or a table on stderr."
        ),
    ] = None,
    system: System = None,
    bits: Annotated[
        int | None, typer.Option(help="Quantise the decoder while loading: 2, 3, 4, 5, 6 or 8; 0 leaves it as stored.")
    ] = None,
    load_4bit: Load4Bit = False,
    load_8bit: Load8Bit = False,
    dtype: ComputeType = None,
    adapter: Adapter = None,
    resolution: Resolution = None,
    max_pixels: MaxPixels = MAX_PIXELS,
    tokenizer_path: TokenizerPath = None,
    revision: Revision = None,
    yes: Yes = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object (text, token counts, times) instead of the answer.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print what each stage took to stderr.")] = False,
) -> None:
    """Answer a question about a picture.

    The answer is streamed to stdout; everything else goes to stderr.

    Example: fastvlm-mlx generate --model tiny --image examples/shapes.png

    With Apple's model: fastvlm-mlx generate --image photo.jpg --prompt "What is on the table?"

    Several pictures: fastvlm-mlx generate -i before.jpg after.jpg -p "What has changed?"
    """
    with without_collector():
        from ..config import check_dtype
        from ..decoding.adapters import find_adapter
        from ..decoding.engine import Engine
        from ..decoding.generate import stream
        from ..decoding.request import Options
        from ..errors import PromptError
        from ..inputs.imagefile import check_max_pixels
        from ..quantize.recipes import check_bits

    bits = one_of_bits(bits, load_4bit, load_8bit)
    options = Options(
        max_tokens,
        temperature,
        top_p,
        seed,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=stop or (),
        logprobs=logprobs,
        schema=schema_named(schema),
    )
    check_max_pixels(max_pixels)
    if not prompt.strip():
        raise PromptError("The prompt is empty; give a question, or leave --prompt out to have the picture described.")
    check_dtype(dtype)
    check_bits(bits or None)
    pictures = pictures_named(image, stdin_is_free=prompt != "-")
    agree = agree_to_download(yes, pictures, max_pixels)
    engine = Engine.open(model, tokenizer=tokenizer_path, revision=revision, resolution=resolution, agree=agree)
    question = _read_stdin() if prompt == "-" else prompt
    request = engine.prepare(pictures, question, system=system, max_pixels=max_pixels)
    changes = find_adapter(adapter, engine.config)
    engine.load_weights(bits=bits or None, dtype=dtype)  # type: ignore[arg-type]  # checked
    engine.use(changes)
    if changes is not None and changes.tokenizer is not None:  # by which the question is to be read
        request = engine.prepare(pictures, question, system=system, max_pixels=max_pixels)
    for chunk in stream(engine, request, options):
        if not json:
            print(for_stdout(chunk.text), end="", flush=True)
        if chunk.answer is not None:
            answer = chunk.answer
    if json:
        print(for_stdout(answer.to_json(model=engine.name, load_seconds=engine.load_seconds)))
    else:
        print(flush=True)
        if answer.logprobs is not None:
            print(printable(str(answer.logprobs)), file=sys.stderr)
    if answer.finish_reason == "length":
        say(note_of_a_cut(answer.stats.completion_tokens, max_tokens))
    if verbose:
        print(answer.stats.describe(load_seconds=engine.load_seconds), file=sys.stderr)


def note_of_a_cut(tokens: int, limit: int) -> str:
    """The note about an answer that was cut after `tokens` tokens; `limit` is the option's value."""
    if tokens < limit:
        return f"Note: the answer was cut after {counted(tokens, 'token')}, where the model's context is full."
    return f"Note: the answer was cut at its limit of {counted(tokens, 'token')}; a larger `max_tokens` lets it go on."


def _read_stdin() -> str:
    from ..errors import PromptError

    data = sys.stdin.buffer.read(MAX_STDIN_BYTES + 1) if sys.stdin is not None else b""
    if len(data) > MAX_STDIN_BYTES:
        raise PromptError(f"The prompt on stdin is longer than {MAX_STDIN_BYTES} bytes; shorten it.")
    try:
        text = data.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise PromptError(f"The prompt on stdin is not UTF-8 (byte {error.start}); convert it first.") from error
    if not text.strip():
        raise PromptError("The prompt on stdin is empty; write a question to it, or use --prompt TEXT.")
    return text
