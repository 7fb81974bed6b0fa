"""`fastvlm-mlx generate`: an answer about one or more pictures."""

import sys
from typing import Annotated

import typer

from .options import DEFAULT_MODEL, Model, TokenizerPath, Yes, agree_to_download

MAX_STDIN = 4_000_000  # bytes, of up to as many characters as a prompt may have


def generate(
    model: Model = DEFAULT_MODEL,
    image: Annotated[
        list[str] | None,
        typer.Option(
            "--image",
            "-i",
            "--image-file",
            help="A picture (JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF; HEIC with an extra). Repeat for several.",
        ),
    ] = None,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The question; '-' reads it from stdin.")] = "Describe the image.",
    max_tokens: Annotated[int, typer.Option("--max-tokens", "--max-new-tokens", help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[
        float,
        typer.Option(
            "--temperature", "--temp", help="0 always takes the likeliest token; above, tokens are drawn, and higher varies more."
        ),
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option("--top-p", "--top_p", help="When drawing: only from the likeliest tokens that add up to this probability."),
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="When drawing: the same seed draws the same answer.")] = None,
    system: Annotated[str | None, typer.Option(help="A system prompt in place of 'You are a helpful assistant.'")] = None,
    bits: Annotated[int | None, typer.Option(help="Quantise the decoder while loading: 2, 3, 4, 5, 6 or 8.")] = None,
    load_4bit: Annotated[bool, typer.Option("--load-4bit", help="The same as --bits 4.")] = False,
    load_8bit: Annotated[bool, typer.Option("--load-8bit", help="The same as --bits 8.")] = False,
    dtype: Annotated[
        str | None, typer.Option(help="Compute in float32, float16 or bfloat16; by default float32 on a CPU, as stored on a GPU.")
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(help="Side in pixels that pictures are brought to: a multiple of 64 from 64 to 4096.")
    ] = None,
    max_pixels: Annotated[int, typer.Option(help="Refuse larger pictures before decoding them.")] = 1 << 26,
    tokenizer_path: TokenizerPath = None,
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

    Several pictures: fastvlm-mlx generate -i before.jpg -i after.jpg -p "What has changed?"
    """
    from ..config import check_dtype
    from ..errors import OptionError, PromptError
    from ..generate import Options
    from ..image import load_image
    from ..imagefile import check_max_pixels
    from ..quantize import check_bits
    from ..vlm import VLM

    if sum((bits is not None, load_4bit, load_8bit)) > 1:
        raise OptionError("--bits, --load-4bit and --load-8bit were given together; choose one.")
    bits = 4 if load_4bit else 8 if load_8bit else bits
    options = Options(max_tokens, temperature, top_p, seed)
    check_max_pixels(max_pixels)
    if not prompt.strip():
        raise PromptError("The prompt is empty; give a question, or leave --prompt out to have the picture described.")
    check_dtype(dtype)
    check_bits(bits)

    def agree(notice: str) -> bool:
        for source in image or []:  # before gigabytes are fetched
            load_image(source, max_pixels=max_pixels)
        return agree_to_download(yes)(notice)

    vlm = VLM.open(model, tokenizer=tokenizer_path, resolution=resolution, agree=agree)
    request = vlm.prepare(image, _read_stdin() if prompt == "-" else prompt, system=system, max_pixels=max_pixels)
    vlm.load_weights(bits=bits, dtype=dtype)  # type: ignore[arg-type]  # checked by load_weights
    for chunk in vlm.answer(request, options):
        if not json:
            print(chunk.text, end="", flush=True)
        if chunk.answer is not None:
            answer = chunk.answer
    if json:
        print(answer.to_json(model=vlm.name, load_seconds=vlm.load_seconds))
    else:
        print()
    if verbose:
        print(answer.stats.describe(load_seconds=vlm.load_seconds), file=sys.stderr)


def _read_stdin() -> str:
    from ..errors import PromptError

    data = sys.stdin.buffer.read(MAX_STDIN + 1) if sys.stdin is not None else b""
    if len(data) > MAX_STDIN:
        raise PromptError(f"The prompt on stdin is longer than {MAX_STDIN} bytes; shorten it.")
    try:
        text = data.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise PromptError(f"The prompt on stdin is not UTF-8 (byte {error.start}); convert it first.") from error
    if not text.strip():
        raise PromptError("The prompt on stdin is empty; write a question to it, or use --prompt TEXT.")
    return text
