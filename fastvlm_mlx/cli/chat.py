"""`fastvlm-mlx chat`: a conversation about pictures, in the terminal or line by line through a pipe."""

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from .options import (
    DEFAULT_MODEL,
    ComputeType,
    Load4Bit,
    Load8Bit,
    MaxPixels,
    MaxTokens,
    Model,
    Pictures,
    Resolution,
    Seed,
    System,
    Temperature,
    TokenizerPath,
    TopP,
    Yes,
    agree_to_download,
    one_of_bits,
)

if TYPE_CHECKING:
    from ..config import ModelConfig
    from .conversation.plain import Plain

BILLION = 1_000_000_000
SMALL = 100_000_000  # weights of a decoder that there is nothing to gain from quantising


def chat(
    model: Model = DEFAULT_MODEL,
    image: Pictures = None,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    system: System = None,
    bits: Annotated[
        int | None,
        typer.Option(
            help="Quantise the decoder while loading: 2, 3, 4, 5, 6 or 8; 0 leaves it as stored. By default 8 below a billion "
            "weights, 4 above; as stored on a CPU, and where it is small or quantised already."
        ),
    ] = None,
    load_4bit: Load4Bit = False,
    load_8bit: Load8Bit = False,
    dtype: ComputeType = None,
    resolution: Resolution = None,
    max_pixels: MaxPixels = 1 << 26,
    tokenizer_path: TokenizerPath = None,
    load: Annotated[str | None, typer.Option(help="Take up a conversation that /save has written.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Show answers as they are, Markdown not rendered.")] = False,
    yes: Yes = False,
) -> None:
    """Talk about pictures.

    Type questions; drag pictures into the line, or use /image PATH. /help lists the commands, Ctrl-C stops an answer, Ctrl-D
    leaves. Without a terminal, every line of stdin is a question and its answer goes to stdout.

    Example: fastvlm-mlx chat --model tiny --image examples/shapes.png
    """
    from ..backend.ops import current
    from ..chat.transcript import Picture, Transcript
    from ..config import check_dtype
    from ..decoding.generate import Options
    from ..inputs.image import load_image
    from ..inputs.imagefile import check_max_pixels
    from ..inputs.prompt import Turn
    from ..quantize import check_bits
    from ..vlm import VLM
    from .conversation.session import Session

    bits = one_of_bits(bits, load_4bit, load_8bit)
    options = Options(max_tokens, temperature, top_p, seed)
    check_max_pixels(max_pixels)
    check_dtype(dtype)
    check_bits(bits or None)

    def agree(notice: str) -> bool:
        for source in image or []:  # before gigabytes are fetched
            load_image(source, max_pixels=max_pixels)
        return agree_to_download(yes)(notice)

    vlm = VLM.open(model, tokenizer=tokenizer_path, resolution=resolution, agree=agree)
    vlm.render([Turn("", len(image or []))], system)
    pictures = [Picture.open(source, vlm, max_pixels=max_pixels) for source in image or []]
    transcript = Transcript.open(load, vlm, max_pixels=max_pixels) if load is not None else None
    if bits is None:
        bits = usual_bits(vlm.config, current())
    vlm.load_weights(bits=bits or None, dtype=dtype)  # type: ignore[arg-type]  # checked by load_weights
    front = _front(plain)
    session = Session(vlm, vlm.chat(system=system), front, options, max_pixels)
    if transcript is not None:
        session.chat.take_up(transcript)
        session.chat.system = system if system is not None else transcript.system
    session.show(*pictures)
    if front.typing:
        front.note(f"{vlm.name}{f' at {bits} bits' if bits else ''}. /help lists the commands, Ctrl-D leaves.")
    session.run()
    if session.failed and not front.typing:
        raise typer.Exit(1)


def usual_bits(config: "ModelConfig", backend: str) -> int:
    """Bits to load a decoder with where none are asked for; 0 for as stored."""
    if backend == "cpu" or config.quantization or config.text.parameters < SMALL:
        return 0
    return 8 if config.text.parameters < BILLION else 4


def _front(plain: bool) -> "Plain":
    """What this process can talk through."""
    from .conversation.plain import Plain

    typing = sys.stdin is not None and sys.stdin.isatty()
    if not typing or not sys.stdout.isatty() or os.environ.get("TERM", "dumb") in ("dumb", "unknown", ""):
        return Plain(typing=typing)
    from .conversation.terminal import Terminal

    return Terminal(markdown=not plain)
