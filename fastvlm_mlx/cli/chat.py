"""`fastvlm-mlx chat`: a conversation about pictures, in the terminal or line by line through a pipe."""

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

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
)

if TYPE_CHECKING:
    from .conversation.plain import Plain


def chat(
    model: Model = DEFAULT_MODEL,
    image: Pictures = None,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    stop: Stop = None,
    system: System = None,
    bits: Annotated[
        int | None,
        typer.Option(
            help="Quantise the decoder while loading: 2, 3, 4, 5, 6 or 8; 0 leaves it as stored. By default 8 below a "
            "billion parameters, 4 above; as stored on a CPU, and where it is small or quantised already."
        ),
    ] = None,
    load_4bit: Load4Bit = False,
    load_8bit: Load8Bit = False,
    dtype: ComputeType = None,
    adapter: Adapter = None,
    resolution: Resolution = None,
    max_pixels: MaxPixels = MAX_PIXELS,
    tokenizer_path: TokenizerPath = None,
    load: Annotated[str | None, typer.Option(help="Continue a conversation that /save has written.")] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Print answers as they are, without rendering Markdown.")
    ] = False,
    yes: Yes = False,
) -> None:
    """Talk about pictures.

    Type questions; drag pictures into the line, or use /image PATH. /help lists the commands, Ctrl-C stops an answer,
    Ctrl-D leaves. Without a terminal, every line of stdin is a question and its answer goes to stdout.

    Example: fastvlm-mlx chat --model tiny --image examples/shapes.png
    """
    from ..backend.ops import current
    from ..chat.conversation import Chat
    from ..chat.transcript import Picture, Transcript
    from ..config import check_dtype
    from ..decoding.adapters import find_adapter
    from ..decoding.engine import Engine
    from ..decoding.request import Options
    from ..inputs.imagefile import check_max_pixels
    from ..inputs.prompt import Turn
    from ..quantize.recipes import check_bits, usual_bits
    from .conversation.session import Session

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
    )
    check_max_pixels(max_pixels)
    check_dtype(dtype)
    check_bits(bits or None)
    named = pictures_named(image, stdin_is_free=False)
    agree = agree_to_download(yes, named, max_pixels)
    engine = Engine.open(model, tokenizer=tokenizer_path, resolution=resolution, agree=agree)
    engine.render([Turn("", len(named))], system)
    pictures = [Picture.open(source, engine, max_pixels=max_pixels) for source in named]
    transcript = Transcript.open(load, engine, max_pixels=max_pixels) if load is not None else None
    if bits is None:
        bits = usual_bits(engine.config, current())
    changes = find_adapter(adapter, engine.config)
    engine.load_weights(bits=bits or None, dtype=dtype)  # type: ignore[arg-type]  # checked by load_weights
    engine.use(changes)
    front = _front(plain)
    session = Session(engine, Chat(engine, system=system), front, options, max_pixels)
    if transcript is not None:
        session.chat.take_up(transcript)
        session.chat.system = system if system is not None else transcript.system
    session.show(*pictures)
    if front.typing:
        front.note(f"{engine.name}{f' at {bits} bits' if bits else ''}. /help lists the commands, Ctrl-D leaves.")
    session.run()
    if front.failed and not front.typing:
        raise typer.Exit(1)


def _front(plain: bool) -> "Plain":
    """The kind of terminal or pipe that this process talks through."""
    from .conversation.plain import Plain

    typing = sys.stdin is not None and sys.stdin.isatty()
    if not typing or not sys.stdout.isatty() or os.environ.get("TERM", "dumb") in ("dumb", "unknown", ""):
        return Plain(typing=typing)
    from .conversation.terminal import Terminal

    return Terminal(markdown=not plain)
